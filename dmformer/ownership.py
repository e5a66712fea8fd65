"""Whose files and folders these are: what other users of the machine may have put there or changed.

POSIX alone tells; elsewhere everything counts as the user's own. Root may change everything, and counts as the user.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from dmformer.errors import UsageError

_MOST_LINKS = 40  # as Linux follows


def is_own(path: Path) -> bool:
    """Return whether a file, a folder, or a link itself, belongs to this user or to root; no where there is none."""
    try:
        return _is_ours(path.lstat())
    except OSError:
        return False


def exposure(path: Path) -> str | None:
    """Say how other users could have changed what lies at a path; ``None`` where they could not.

    Its owner, its mode and the modes of the folders above it tell; on a file system that is mounted read-only nobody
    changes anything.

    Raises:
        OSError: there is nothing at the path, or it cannot be looked at.
    """
    if os.name != "posix":
        return None
    resolved = path.resolve()
    status = resolved.stat()
    if os.statvfs(resolved).f_flag & os.ST_RDONLY:
        return None
    if not _is_ours(status):
        return f"it belongs to another user ({status.st_uid})"
    if _is_shared(status):
        return f"other users can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    for folder in resolved.parents:
        above = folder.stat()
        if _is_shared(above) and not above.st_mode & stat.S_ISVTX:
            return f"other users can exchange it: they can write to {str(folder)!r} above it"
    return None


def is_shared(folder: Path) -> bool:
    """Return whether users beside its owner can put files into a folder."""
    try:
        return os.name == "posix" and _is_shared(folder.stat())
    except OSError:
        return False


def resolve(path: Path) -> Path:
    """Resolve a path that is about to be written, as :meth:`pathlib.Path.resolve` does.

    Links of other users are not followed in folders that others can write to, as Linux itself refuses it in those that
    are sticky (``fs.protected_symlinks``) where it is told to.

    Raises:
        UsageError: there is such a link on the way, or links without end.
    """
    if os.name != "posix":
        return path.resolve()
    at, followed = Path(path.absolute().anchor), 0
    waiting = list(reversed(path.absolute().parts[1:]))
    while waiting:
        part = waiting.pop()
        here = at / part
        if part == "..":
            at = at.parent
            continue
        target = None
        with suppress(OSError):  # not there yet, or not to be looked at: writing tells
            status = here.lstat()
            if stat.S_ISLNK(status.st_mode):
                target = here.readlink()
                if not _is_ours(status) and _is_shared(at.stat()):
                    raise UsageError(
                        f"{str(here)!r} is a link that another user ({status.st_uid}) put into a shared folder; "
                        "expected a path without it: remove the link, or write elsewhere"
                    )
        if target is None:
            at = here
            continue
        followed += 1
        if followed > _MOST_LINKS:
            raise UsageError(f"{str(path)!r}: links without end; expected a path that leads somewhere")
        at = Path(target.anchor) if target.is_absolute() else at
        waiting += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return at


def _is_ours(status: os.stat_result) -> bool:
    return os.name != "posix" or status.st_uid in (os.geteuid(), 0)


def _is_shared(status: os.stat_result) -> bool:
    """Whether a mode lets others write: everybody, or a group that is not the user's own."""
    return bool(status.st_mode & stat.S_IWOTH) or bool(
        status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid)
    )


def _is_private_group(number: int) -> bool:
    """Whether a group is the one that many systems make for each user, of the user's name and without others."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return user.pw_gid == number and group.gr_name == user.pw_name and not set(group.gr_mem) - {user.pw_name}
