"""Files: written whole or not at all, and known by what is in them."""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from dmformer.errors import StageFailed
from dmformer.process import announce
from dmformer.procfs import is_mount_point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a path to write to, which replaces ``target`` when the block ends without an error, and else goes away.

    Raises:
        StageFailed: it could not be written, or is a pipe or a device, which a file must not replace.
    """
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise StageFailed(f"{str(target)!r} is no file; expected a new one, or one to be replaced")
    if is_mount_point(target):
        raise StageFailed(f"{str(target)!r} is a mount point, which no file can replace; expected a file in a folder")
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
    r"""Encode as every JSON file and report is written.

    Bytes of file names that are no UTF-8, which Python keeps as lone surrogates, become text like ``\xe9``.
    """
    try:
        encoded = msgspec.json.encode(content)
    except UnicodeEncodeError:
        encoded = msgspec.json.encode(_printable(msgspec.to_builtins(content)))
    return msgspec.json.format(encoded, indent=2) + b"\n"


def _printable(content: Any) -> Any:
    """Return JSON types with every text fit to be written in UTF-8."""
    if isinstance(content, str):
        raw = content.encode("utf-8", "surrogatepass")
        with suppress(UnicodeEncodeError):  # a surrogate that stands for no byte
            raw = content.encode("utf-8", "surrogateescape")
        return raw.decode("utf-8", "backslashreplace")
    if isinstance(content, dict):
        return {_printable(name): _printable(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_printable(value) for value in content]
    return content


def utf8_path(path: Path) -> Path:
    """Return a path of UTF-8 to the same file or folder, for libraries in C++ that take no other.

    Where the path itself is none, it leads through this process's open folders, which Linux shows as files; a folder
    stays open for as long as the process lives. Other systems have no such paths.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return Path(f"/proc/{os.getpid()}/fd/{_descriptor(path.absolute().parent)}", path.name)
    return path


@cache
def _descriptor(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY)


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
