"""Packages that only some installations have."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
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
        missing = ((isinstance(error, ModuleNotFoundError) and error.name) or module).partition(".")[0]
        if find_spec(missing) is None:
            raise UnavailableError(
                f"{purpose} needs the package {missing!r}, which is not installed; run: pip install 'dmformer[{extra}]'"
            ) from error
        raise UnavailableError(f"{purpose} needs the package {module!r}, which does not load here: {error}") from error
