"""The page for browsers, served and opened: for the tests of its answers and of its pixels."""

from __future__ import annotations

import base64
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.data.preprocessing import Preprocessing


class _Quiet(SimpleHTTPRequestHandler):
    headers_to_add: tuple[tuple[str, str], ...] = ()

    def log_message(self, *_: Any) -> None:
        return

    def end_headers(self) -> None:
        for header in self.headers_to_add:
            self.send_header(*header)
        super().end_headers()


@contextmanager
def served(folder: Path, *headers: tuple[str, str]) -> Iterator[str]:
    """Serve a folder as any static server does, with more headers; gives the address."""
    kind = type("Handler", (_Quiet,), {"headers_to_add": headers})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


class Opened:
    """The page, opened in a browser."""

    def __init__(self, browser: Any, address: str, width: int = 1000, script: str = "") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.requested: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        if script:
            self.page.add_init_script(script)
        self.page.goto(address)

    def ready(self) -> Opened:
        self.page.wait_for_selector("#main:not([hidden])", timeout=60_000)
        return self

    def verify(self) -> list[list[str]]:
        """Press the button; gives the rows, the words of a column without figures as they are."""
        self.page.evaluate("document.getElementById('verdict').className = ''")
        self.page.focus("#verify")
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#verdict.good, #verdict.bad", timeout=120_000)
        return self.table("#checks")

    @property
    def verdict(self) -> str:
        return str(self.page.text_content("#verdict"))

    def look(self, path: Path) -> list[list[str]]:
        """Choose an image; gives the rows of the classes."""
        self.page.set_input_files("#file", path)
        return self._answered(path.name)

    def drop(self, path: Path) -> list[list[str]]:
        """Drop an image onto the page; gives the rows of the classes."""
        self.page.evaluate(
            """async ([name, data]) => {
              const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
              const given = new DataTransfer();
              given.items.add(new File([bytes], name));
              const drop = new DragEvent('drop', {dataTransfer: given, bubbles: true, cancelable: true});
              document.getElementById('drop').dispatchEvent(drop);
            }""",
            [path.name, encoded(path.read_bytes())],
        )
        return self._answered(path.name)

    def _answered(self, name: str) -> list[list[str]]:
        self.page.wait_for_selector(f"#said:has-text('{name}, ')", timeout=60_000)
        return self.table("#classes")

    def table(self, selector: str) -> list[list[str]]:
        found: list[list[str]] = self.page.evaluate(
            "id => [...document.querySelectorAll(id + ' tr')].map(row => [...row.cells].map(cell => cell.textContent))",
            selector,
        )
        return found[1:]

    def pixels(self, data: bytes, preprocessing: Preprocessing, multiple: int = 0) -> NDArray[np.uint8]:
        """What the page's scripts make of an image file: (H, W, C)."""
        height, width, channels, made = self.page.evaluate(
            """async ([data, preprocessing, multiple]) => {
              const { readImage, fit } = await import(new URL('images.js', location.href).href);
              const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
              const image = fit(await readImage(new Blob([bytes]), preprocessing), preprocessing, multiple);
              let text = '';
              for (const byte of image.data) text += String.fromCharCode(byte);
              return [image.height, image.width, image.channels, btoa(text)];
            }""",
            [encoded(data), msgspec.to_builtins(preprocessing), multiple],
        )
        return np.frombuffer(base64.b64decode(made), np.uint8).reshape(height, width, channels)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
