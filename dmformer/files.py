"""Files: written whole or not at all, opened once and known by what is in them, and JSON that says each thing once."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import secrets
import stat
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from dmformer.errors import StageFailed
from dmformer.process import announce
from dmformer.procfs import is_mount_point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]  # a pattern's $ lets a last line break pass
T = TypeVar("T")


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


def decode_json(data: bytes, kind: type[T]) -> T:
    """Decode JSON in which no object has a key twice: readers differ in which of the two they take.

    Raises:
        msgspec.DecodeError: it is no JSON, not of this type, nested too deeply, or has a key twice.
    """

    def check_keys(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise msgspec.DecodeError(f"key {key!r} is there twice")
            seen.add(key)

    try:
        decoded = msgspec.json.decode(data, type=kind)
        json.loads(data.decode(), object_pairs_hook=check_keys, parse_int=float)
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise msgspec.DecodeError(str(error) or type(error).__name__) from error
    return decoded


def open_regular(path: Path, *, links: bool = False) -> IO[bytes]:
    """Open a regular file for reading: no pipe, which would wait for a writer, and no device.

    Args:
        path: of the file.
        links: whether it may be a link.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    # Windows has neither of the two flags; elsewhere O_NONBLOCK keeps the opening of a pipe from waiting.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    if not links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
        if path.is_symlink():
            raise OSError(errno.ELOOP, "a link, no file", str(path))
    file = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return file


def read_bounded(path: Path, most: int, *, links: bool = False) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with open_regular(path, links=links) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
    return data


class OpenFile:
    """A file that is opened once: what is hashed, looked at and loaded is the same file, wherever its name leads later.

    Somebody who writes into the file itself changes it all the same; :meth:`is_unchanged` tells.

    Attributes:
        path: under which it was opened.
        sha256: of its content, in hexadecimal digits.
        bytes: its size.
        data: its content, mapped; engines that want memory which may be written do not change the file.
    """

    def __init__(self, path: Path, *, links: bool = False) -> None:
        """Open and hash a regular file.

        Raises:
            OSError: it cannot be opened, or is no regular file.
        """
        self.path = path.resolve() if links else path
        with open_regular(self.path) as file:
            self._identity = _identity(os.fstat(file.fileno()))
            self.sha256, self.bytes = hash_pieces(read_pieces(file))  # read, not mapped: what is mapped counts as used
            self.data: mmap.mmap | bytes = b""
            if self.bytes:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def is_unchanged(self) -> bool:
        """Return whether the path still leads to this file, and nobody wrote, renamed or linked it since."""
        try:
            return _identity(self.path.stat()) == self._identity
        except OSError:
            return False


def _identity(status: os.stat_result) -> tuple[int, ...]:
    # Renaming a file, and renaming it back, changes the time of its last change too (POSIX allows it, Linux does it).
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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
