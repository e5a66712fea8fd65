"""Take a trained DMFormer from PyTorch to the machine at the edge, and prove that what arrives is the same model.

Everything here is loaded when it is first used, so that importing the package costs nothing and needs no runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmformer.models.checkpoint import load_checkpoint
    from dmformer.models.dmformer import create_model, list_models

__version__ = "0.1.0"

_HOMES = {
    "create_model": "dmformer.models.dmformer",
    "list_models": "dmformer.models.dmformer",
    "load_checkpoint": "dmformer.models.checkpoint",
}
__all__ = ["__version__", "create_model", "list_models", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
