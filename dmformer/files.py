"""Files: written whole or not at all, and known by what is in them."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import contextmanager
from functools import partial
from typing import IO, TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from dmformer.errors import StageFailed
from dmformer.process import announce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a path to write to, which replaces ``target`` when the block ends without an error, and else goes away.

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
    """Encode as every JSON file and report is written; bytes of file names that are no UTF-8 are escaped."""
    try:
        encoded = msgspec.json.encode(content)
    except UnicodeEncodeError:
        encoded = msgspec.json.encode(_escaped(msgspec.to_builtins(content)))
    return msgspec.json.format(encoded, indent=2) + b"\n"


def _escaped(value: Any) -> Any:
    r"""Write halves of surrogate pairs, which stand for such bytes, as text: ``caf\udce9.png``."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_escaped(key): _escaped(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(each) for each in value]
    return value


def hash_file(path: Path) -> tuple[str, int]:
    """Return the SHA-256 and the size in bytes of a file, read in pieces."""
    with path.open("rb") as file:
        return hash_pieces(read_pieces(file))


def read_pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Read an open file to its end, at most 1 MiB at a time."""
    return iter(partial(file.read, 1 << 20), b"")


def hash_pieces(pieces: Iterable[bytes], write: Callable[[bytes], object] | None = None) -> tuple[str, int]:
    """Return the SHA-256 and the size in bytes of content that comes in pieces, each of which is also written on."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
        if write is not None:
            write(piece)
    return digest.hexdigest(), size
