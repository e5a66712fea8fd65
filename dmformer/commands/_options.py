"""Options whose values are pairs."""

from __future__ import annotations

import json
from typing import Any

from dmformer.errors import UsageError


def parse_pairs(pairs: list[str], option: str, example: str) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value is JSON where it reads as JSON, and a plain word otherwise.

    Raises:
        UsageError: a text is no pair.
    """
    values = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key or not text:
            raise UsageError(f"{option} {pair!r}; expected KEY=VALUE, for instance {example}")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values
