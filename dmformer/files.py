"""Files: written whole or not at all, and known by what is in them."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from dmformer.errors import StageFailed
from dmformer.process import announce

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` when the block ends, in the place of an older file; or nothing does.

    Raises:
        StageFailed: it could not be written, or is a pipe or a device, which a file must not replace.
    """
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise StageFailed(f"{str(target)!r} is no file; expected a new one, or one to be replaced")
    staging = announce(target.with_name(f".{target.name}-{secrets.token_hex(8)}"))
    try:
        try:
            yield staging
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise StageFailed(f"{str(target)!r} could not be written: {error.strerror or error}") from error


def indented_json(content: Any) -> bytes:
    """How every JSON file and report is written."""
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size
