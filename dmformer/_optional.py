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
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{purpose} needs the package {(error.name or module).split('.')[0]!r}, which is not installed; "
            f"run: pip install 'dmformer[{extra}]'"
        ) from error
    except (ImportError, OSError) as error:
        raise UnavailableError(f"{purpose} needs the package {module!r}, which does not load here: {error}") from error
