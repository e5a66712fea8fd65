"""Which bundle a command means when none is named: the one that the last export in this folder wrote."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.errors import UsageError

DEFAULT_BUNDLE = "dmformer-bundle"


def remember(bundle: Path) -> None:
    """Note the bundle that was just written from this working folder; a home that cannot be written is no failure."""
    try:
        note = _note()
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(bundle.absolute()), encoding="utf-8")
    except (OSError, RuntimeError, UnicodeError):  # RuntimeError: there is no home at all
        return


def find_bundle(named: Path | None) -> Bundle:
    """Open the bundle that was named, or else the last one written from this working folder.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    return open_bundle(bundle_path(named))


def bundle_path(named: Path | None) -> Path:
    """Where the bundle is that was named, or else the last one written from this working folder.

    Raises:
        UsageError: none is named, and there is no such folder.
    """
    if named is not None:
        return named
    try:
        remembered = Path(_note().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, UnicodeError):
        remembered = Path(DEFAULT_BUNDLE)
    for candidate in (remembered, Path(DEFAULT_BUNDLE)):
        if candidate.is_dir():
            return candidate
    raise UsageError(f"no bundle named, and none at ./{DEFAULT_BUNDLE}; name one, or run: dmformer export")


def _note() -> Path:
    """One small file for each working folder, in the user's state folder (XDG Base Directory Specification)."""
    import platformdirs

    key = hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()[:16]
    return platformdirs.user_state_path("dmformer") / f"last-bundle-{key}"
