"""Take a trained DMFormer from PyTorch to the machine at the edge, and prove that what arrives is the same model.

Everything here is loaded when it is first used, so that importing the package costs nothing and needs no runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmformer.bench.api import bench
    from dmformer.export.run import export
    from dmformer.models.checkpoint import load_checkpoint
    from dmformer.models.dmformer import create_model, list_models
    from dmformer.serve.predictor import load
    from dmformer.verify.api import verify

__version__ = "0.1.0"

_FUNCTIONS = {
    "create_model": "dmformer.models.dmformer",
    "list_models": "dmformer.models.dmformer",
    "load": "dmformer.serve.predictor",
    "load_checkpoint": "dmformer.models.checkpoint",
}
_CALLABLE_PACKAGES = ("bench", "export", "verify")
__all__ = [
    "__version__", "bench", "create_model", "export", "list_models", "load", "load_checkpoint", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _CALLABLE_PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
