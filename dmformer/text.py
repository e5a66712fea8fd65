"""Text from a manifest, a checkpoint or a file's name, made fit for where it is written: one function for each place.

Control characters move a terminal's cursor, set its title or its clipboard; a line break begins a line that nobody
wrote; marks of the writing direction make a name read as another one. They are escaped as Python writes them.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_SHOWN = 300  # characters of what somebody else says
_MOST_LISTED = 10  # of the names that somebody else gave

# Control characters (C0, DEL, C1), separators of lines and paragraphs, what is invisible or turns the direction of
# writing, tags, and halves of surrogate pairs. Joiners (U+200C, U+200D), which words of some languages need, stay.
_HIDDEN = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
    "\\ud800-\\udfff\\U000e0000-\\U000e0fff]"
)


def plain(text: str) -> str:
    """Return a text on one line and without control characters, for terminals, logs and comments."""
    return _HIDDEN.sub(_escape, text)


def plain_lines(text: str) -> str:
    """Return a text of several lines, each as :func:`plain` has it."""
    return "\n".join(map(plain, text.split("\n")))


def shorten(text: object) -> str:
    """Return the beginning of what somebody else says, on one line and without control characters."""
    line = plain(" ".join(str(text).split()))
    return line if len(line) <= _MOST_SHOWN else f"{line[:_MOST_SHOWN]}…"


def shorten_list(names: Iterable[object], separator: str = ", ", most: int = _MOST_LISTED) -> str:
    """Return the first of what somebody else named, each as :func:`shorten` has it, and how many more there are."""
    shown = [shorten(name) for name in names]
    more = [f"… and {len(shown) - most} more"] if len(shown) > most else []
    return separator.join([*shown[:most], *more])


def plain_json(data: bytes) -> bytes:
    """Return JSON of the same content in which strings have no control characters, for terminals."""
    lines = (_HIDDEN.sub(lambda hidden: json.dumps(hidden[0])[1:-1], line) for line in data.decode().split("\n"))
    return "\n".join(lines).encode()


def pbtxt_string(text: str) -> str:
    """Return a string, with its quotes, of protobuf's text form, in which every byte but plain ASCII is octal."""
    shown = (
        chr(byte) if 0x20 <= byte < 0x7F and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in text.encode("utf-8", "surrogatepass")
    )
    return f'"{"".join(shown)}"'


def markdown(text: str) -> str:
    """Return a text for Markdown that stays text: neither HTML, nor a link, an image, code or emphasis."""
    return re.sub(r"([\\`*\[\]<>&|])", r"\\\1", plain(text))


def markdown_code(text: str) -> str:
    """Return a text as code in Markdown, within more backticks than it has itself."""
    shown = plain(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _escape(hidden: re.Match[str]) -> str:
    code = ord(hidden[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file's name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return hidden[0].encode("unicode_escape").decode()
