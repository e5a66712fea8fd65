"""Write a bundle so that a reader sees the whole old one or the whole new one."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dmformer.bundle.reader import own_bundle
from dmformer.errors import StageFailed, UsageError
from dmformer.process import announce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TOKEN_BYTES = 8
_PATIENCE_S = 2.0  # for a process that was killed a moment ago and is on its way out
_RETIRED = "old"
_LITTLE_BYTES = 1_000_000
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _check_replaceable(folder: Path) -> None:
    """A folder that is replaced goes away with all that is in it, so it must hold a bundle and nothing else."""
    try:
        foreign = own_bundle(folder).unlisted()
    except UsageError as error:
        raise UsageError(
            f"output {str(folder)!r} is a folder with other things in it than a bundle; "
            "expected a new one, an empty one or a bundle"
        ) from error
    if foreign:
        raise UsageError(
            f"output {str(folder)!r} is a bundle with another file in it, {foreign[0]!r}, which would be lost; "
            "move it away or choose another --output"
        )


def check_destination(destination: Path, replaceable: Callable[[Path], None] = _check_replaceable) -> None:
    """Refuse to replace what may not be replaced.

    Args:
        destination: a folder, there or not.
        replaceable: raises where a folder that is not empty may not be replaced; otherwise only bundles may.

    Raises:
        UsageError: something else is there, or the folder cannot be written.
    """
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"output {str(destination)!r} is a file; expected a folder")
    if destination.is_dir() and any(destination.iterdir()):
        replaceable(destination)
    if destination.is_dir() and Path.cwd().is_relative_to(destination.resolve()):
        raise UsageError(f"output {str(destination)!r} is the working folder or above it; expected a folder in it")
    parent = destination.resolve().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"output {str(destination)!r}: {str(existing)!r} cannot be written; choose another --output")


@contextmanager
def staged(destination: Path, replaceable: Callable[[Path], None] = _check_replaceable) -> Iterator[Path]:
    """A new folder that takes the place of ``destination`` when the block ends without an error.

    An error in the block, or the process's end at any moment, leaves the destination as it was. The folder lies in a
    hidden one beside the destination, which is for all that the work writes on its way: what a killed process leaves
    there, the next one removes.

    Args:
        destination: a folder, there or not.
        replaceable: as :func:`check_destination` has it.

    Raises:
        StageFailed: writing failed, for instance because the disk is full.
        UsageError: the destination cannot be used, or another process is writing it.
    """
    check_destination(destination, replaceable)
    destination = destination.resolve()  # through a link, so that the link stays
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination):
            _clear_leftovers(destination)
            staging = announce(_hidden(destination, secrets.token_hex(_TOKEN_BYTES)))
            try:
                folder = staging / "bundle"
                folder.mkdir(parents=True)
                with _full_disks_named(staging):
                    yield folder
                _flush(folder)
                _put_in_place(folder, destination)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise StageFailed(f"{str(destination)!r} could not be written: {error.strerror or error}") from error


@contextmanager
def _full_disks_named(folder: Path) -> Iterator[None]:
    """Engines have words of their own for a disk that is full."""
    try:
        yield
    except StageFailed as error:
        free = shutil.disk_usage(folder).free
        if free >= _LITTLE_BYTES:
            raise
        raise StageFailed(
            f"{error}; the disk is full: {free / 1e6:.1f} MB are left at {str(folder.parent)!r}"
        ) from error


def _hidden(destination: Path, name: str) -> Path:
    return destination.with_name(f".{destination.name}-{name}")


@contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """One writer at a time; the system gives the lock back however the process that holds it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(_hidden(destination, "lock"), timeout=_PATIENCE_S)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"output {str(destination)!r} is being written by another process; wait for it to end, or write to "
            "another folder"
        ) from error
    try:
        yield
    finally:
        if os.name == "posix":  # with the lock held: who opened the file meanwhile sees that it has no name any more
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _clear_leftovers(destination: Path) -> None:
    """Remove what killed processes left, and put a bundle back that one of them had moved out of the way."""
    leftover = re.compile(re.escape(_hidden(destination, "").name) + rf"[0-9a-f]{{{2 * _TOKEN_BYTES}}}")
    for folder in destination.parent.iterdir():
        if leftover.fullmatch(folder.name):
            if not destination.exists() and (folder / _RETIRED).exists():
                (folder / _RETIRED).rename(destination)
            shutil.rmtree(folder)


def _flush(folder: Path) -> None:
    """To the disk, before any name leads there: a device that loses power has the old bundle or the new one too."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() and os.name == "nt":  # folders cannot be opened there
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(folder: Path, destination: Path) -> None:
    """Rename; where a bundle is in the way, exchange the two in one system call: the old one is then ``folder``."""
    if not destination.exists():
        try:
            folder.rename(destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return  # otherwise another export has put its bundle there in the meantime
    if not _exchange(folder, destination):
        # No atomic exchange on this system: for a moment there is no bundle, but never a mixture.
        # Where the process ends in it, the next one puts the old bundle back.
        destination.rename(folder.with_name(_RETIRED))
        folder.rename(destination)


def _exchange(first: Path, second: Path) -> bool:
    """Linux's renameat2(2) with RENAME_EXCHANGE; False where the system or the file system has none."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(second))
