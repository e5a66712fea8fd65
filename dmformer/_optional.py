"""Packages that only some installations have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dmformer.errors import UnavailableError

if TYPE_CHECKING:
    from types import ModuleType


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: its import name.
        extra: the extra of this distribution that installs it.
        purpose: what needs it, for the message.

    Raises:
        UnavailableError: it is not installed, or does not load; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and "." not in missing:  # else it is a part of something that is there
            raise UnavailableError(
                f"{purpose} needs the package {missing!r}, which is not installed; run: pip install 'dmformer[{extra}]'"
            ) from error
        raise UnavailableError(
            f"{purpose} needs the package {module!r}, which does not load here: {error}; "
            f"to install it anew: pip install --force-reinstall 'dmformer[{extra}]'"
        ) from error
