"""Rooms that are also functions.

``dmformer.export`` is a package (``dmformer.export.pipeline``) and, to users, a function (``dmformer.export(...)``).
Python binds a subpackage to its parent's attribute on first import, so a function of that name would vanish; instead
the package itself is made callable.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, function: str) -> None:
    """Let calls of ``package`` go to ``module:function``, imported at the first call."""
    module_name, _, attribute = function.partition(":")

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(module_name), attribute)(*args, **kwargs)

    sys.modules[package].__class__ = CallableModule
