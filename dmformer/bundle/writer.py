"""Write a bundle so that a reader sees the whole old one or the whole new one."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dmformer.bundle.reader import own_bundle
from dmformer.errors import StageFailed, UsageError
from dmformer.supervise import announce

if TYPE_CHECKING:
    from collections.abc import Iterator

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_destination(destination: Path) -> None:
    """Refuse to replace anything but a bundle or an empty folder.

    Raises:
        UsageError: something else is there, or the folder cannot be written.
    """
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"output {str(destination)!r} is a file; expected a folder")
    if destination.is_dir() and any(destination.iterdir()):
        _check_replaceable(destination)
    if destination.is_dir() and Path.cwd().is_relative_to(destination.resolve()):
        raise UsageError(f"output {str(destination)!r} is the working folder or above it; expected a folder in it")
    parent = destination.resolve().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"output {str(destination)!r}: {str(existing)!r} cannot be written; choose another --output")


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


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A new folder beside ``destination`` that takes its place when the block ends without an error.

    An error in the block, or the process's end, leaves the destination as it was.

    Raises:
        StageFailed: writing failed, for instance because the disk is full.
    """
    check_destination(destination)
    destination = destination.resolve()  # through a link, so that the link stays
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Named before it is made: an interrupt that comes between the two leaves nothing either.
        folder = announce(destination.parent / f".{destination.name}-{secrets.token_hex(8)}")
        try:
            folder.mkdir()
            yield folder
            _put_in_place(folder, destination)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StageFailed(
            f"the bundle could not be written to {str(destination)!r}: {error.strerror or error}"
        ) from error


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
        retired = folder.with_name(folder.name + "-old")
        destination.rename(retired)
        folder.rename(destination)
        shutil.rmtree(retired, ignore_errors=True)


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
