"""Packages that only some installations have, imported so that they report to nobody.

Two of them call home where nothing stops them, from the moment of their import on. onnxruntime (its packages from
PyPI, since 1.29) writes an identifier of the device and queued events below the home folder and looks up its maker's
host; ``ORT_DISABLE_TELEMETRY`` is its switch. OpenVINO's Python package counts imports and conversions through the
package ``openvino_telemetry``, and uses a stub of its own where that package is not to be found.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from dmformer.errors import UnavailableError

if TYPE_CHECKING:
    from types import ModuleType

ALLOW_TELEMETRY = "DMFORMER_ALLOW_TELEMETRY"


def switch_telemetry_off() -> None:
    """Keep engines that are imported later, here and in child processes, from reporting to their makers.

    ``DMFORMER_ALLOW_TELEMETRY`` leaves it to them, unless it is empty or 0.
    """
    if os.environ.get(ALLOW_TELEMETRY, "") in ("", "0"):
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, with the telemetry of engines switched off.

    Args:
        module: its import name.
        extra: the extra of this distribution that installs it.
        purpose: what needs it, for the message.

    Raises:
        UnavailableError: it is not installed, or does not load; the message has the command that installs it.
    """
    switch_telemetry_off()
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
