"""Helpers for tests that spoil bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmformer.bundle.manifest import MANIFEST
from dmformer.files import hash_file

Change = Callable[[dict[str, Any]], object]


def rewrite(bundle: Path, change: Change) -> None:
    """Change the manifest of a bundle as JSON."""
    path = bundle / MANIFEST
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def adopt(bundle: Path, name: str) -> None:
    """Make the manifest's size and hash of a file those that the file has."""
    sha256, size = hash_file(bundle / name)

    def change(content: dict[str, Any]) -> None:
        entries = content["files"] + [entry for artifact in content["artifacts"] for entry in artifact["files"]]
        (entry,) = (entry for entry in entries if entry["path"] == name)
        entry.update(sha256=sha256, bytes=size)

    rewrite(bundle, change)


def one_line(error: BaseException) -> str:
    assert str(error).strip()
    assert "\n" not in str(error)
    return str(error)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def copied(bundle: Path, artifact: dict[str, Any], **named: str) -> dict[str, Any]:
    """An artifact of a manifest under another format or precision, with copies of its files."""
    made = {**artifact, **named}
    files = []
    for file in artifact["files"]:
        path = f"{made['format']}/{made['precision']}/{Path(file['path']).name}"
        (bundle / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / file["path"], bundle / path)
        files.append({**file, "path": path})
    return {**made, "files": files}
