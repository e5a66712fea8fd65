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
    from dmformer.signoff.api import report
    from dmformer.tuning.api import tune
    from dmformer.verify.api import verify

__version__ = "0.1.0"

_FUNCTIONS = {
    "bench": "dmformer.bench.api",
    "create_model": "dmformer.models.dmformer",
    "export": "dmformer.export.run",
    "list_models": "dmformer.models.dmformer",
    "load": "dmformer.serve.predictor",
    "load_checkpoint": "dmformer.models.checkpoint",
    "report": "dmformer.signoff.api",
    "tune": "dmformer.tuning.api",
    "verify": "dmformer.verify.api",
}
__all__ = [
    "__version__", "bench", "create_model", "export", "list_models", "load", "load_checkpoint", "report", "tune",
    "verify",
]  # fmt: skip

# Three functions are called as the packages in which they are. Python binds a package to its name when it is first
# imported; that is done with here, so that it cannot take the function's place later.
for _package in ("bench", "export", "verify"):
    importlib.import_module(f"{__name__}.{_package}")
    globals().pop(_package, None)


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
