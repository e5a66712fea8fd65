"""Make docs/api.md: the functions for Python, from their signatures and docstrings. Usage: python docs/api.py."""

from __future__ import annotations

import importlib
import inspect
import re
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
        "dmformer:load",
    ),
    "Behind the other commands": (
        "dmformer.export.run:plan_export",
        "dmformer.export.build:build",
        "dmformer.verify.evaluate:evaluate",
        "dmformer.train.api:train",
    ),
}


def page() -> str:
    """The whole page."""
    parts = [
        "# Python",
        "Made by `python docs/api.py`; `help()` shows the same.",
    ]
    for title, names in GROUPS.items():
        parts += [f"## {title}", *map(_entry, names)]
    return "\n\n".join(parts) + "\n"


def _entry(named: str) -> str:
    module, _, name = named.partition(":")
    function = getattr(importlib.import_module(module), name)
    where = "dmformer" if module == "dmformer" else f"from {module} import {name}"
    signature = inspect.signature(function)
    parameters = "".join(f"    {parameter},\n" for parameter in signature.parameters.values())
    shown = f"{name}(\n{parameters}) -> {signature.return_annotation}".replace("'", "").replace("pathlib.", "")
    shown = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", shown)
    call = f"```python\n{shown}\n```" if where == "dmformer" else f"```python\n{where}\n\n{shown}\n```"
    return f"### {name}\n\n{call}\n\n```text\n{inspect.getdoc(function)}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
