"""Make docs/api.md: the functions for Python, from their signatures and docstrings. Usage: python docs/api.py."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import is_dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("api.md")
GROUPS = {
    "`import dmformer`": (
        "dmformer:create_model",
        "dmformer:list_models",
        "dmformer:load_checkpoint",
        "dmformer:export",
        "dmformer:verify",
        "dmformer:bench",
        "dmformer:tune",
        "dmformer:load",
        "dmformer:report",
    ),
    "Behind the other commands": (
        "dmformer.export.run:plan_export",
        "dmformer.export.build:build",
        "dmformer.verify.evaluate:evaluate",
        "dmformer.train.api:train",
        "dmformer.layouts.api:serve_layout",
        "dmformer.bench.server:bench_server",
    ),
}


def page() -> str:
    """The whole page."""
    parts = [
        "# Python",
        "Made by `python docs/api.py`; `help()` shows the same.",
        "What lies deeper is imported by `from`, as in `from dmformer.export.options import EngineOptions`.",
    ]
    for title, names in GROUPS.items():
        parts += [f"## {title}", *map(_entry, names)]
    return "\n\n".join(parts) + "\n"


def _entry(named: str) -> str:
    module, _, name = named.partition(":")
    function = getattr(importlib.import_module(module), name)
    signature = inspect.signature(function)
    parameters = "".join(f"    {_parameter(one)},\n" for one in signature.parameters.values())
    imported = "" if module == "dmformer" else f"from {module} import {name}\n\n"
    shown = f"{name}(\n{parameters}) -> {_type(signature.return_annotation)}"
    return f"### {name}\n\n```python\n{imported}{shown}\n```\n\n```text\n{inspect.getdoc(function)}\n```"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{stars}{parameter.name}: {_type(parameter.annotation)}"
    default = parameter.default
    if default is parameter.empty:
        return text
    if is_dataclass(default) and default == type(default)():
        return f"{text} = {type(default).__name__}()"
    return f"{text} = {default.__name__ if inspect.isfunction(default) else repr(default)}"


def _type(annotation: object) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)  # as some versions of Python write it


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
