"""Names of files that are one and the same file on every system, and nothing else: relative, inside a folder."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from dmformer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_BYTES = 200  # Windows takes 260 with the folder that the bundle is in
_FORBIDDEN = frozenset('\\:*?"<>|')
# Windows takes these for devices, whatever follows the first dot; a superscript counts as the digit.
_DEVICES = frozenset(
    (
        *("con", "prn", "aux", "nul", "conin$", "conout$", "clock$"),
        *(f"{kind}{number}" for kind in ("com", "lpt") for number in "0123456789¹²³"),
    )
)


def check_name(name: str) -> None:
    """Refuse what is no relative path with forward slashes, inside the bundle, on every system.

    Raises:
        UsageError: the name is absolute, leads upwards, or is one that some system cannot hold or reads otherwise.
    """
    if len(name) > _MOST_BYTES or not all(map(_is_plain, name.split("/"))):
        raise UsageError(
            f"path {name[:_MOST_BYTES]!r}; expected a relative path inside the bundle, legal on every system"
        )


def _is_plain(part: str) -> bool:
    return (
        part.isprintable()  # neither control characters nor halves of a surrogate pair
        and part not in ("", ".", "..")
        and part[-1] not in ". "  # Windows drops them
        and not _FORBIDDEN.intersection(part)
        and part.partition(".")[0].strip().casefold() not in _DEVICES
        and len(part.encode()) <= _MOST_BYTES
    )


def check_distinct(names: Iterable[str]) -> None:
    """Refuse names of which a system that ignores case, or writes accents in its own way, would make one file.

    Raises:
        UsageError: two names collide, or one is a folder in another.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = _key(name)
        if key in seen:
            raise UsageError(f"paths {seen[key]!r} and {name!r} are the same file to some systems; expected each once")
        seen[key] = name
    for key, name in seen.items():
        parts = key.split("/")
        folders = ("/".join(parts[:count]) for count in range(1, len(parts)))
        if above := next((folder for folder in folders if folder in seen), None):
            raise UsageError(f"path {name!r} lies in {seen[above]!r}, which is a file; expected a folder")


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
