"""Options whose values are pairs, or one of a few words."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from dmformer.errors import UsageError

T = TypeVar("T", bound=str)


def parse_choice(value: str | None, words: tuple[T, ...], option: str) -> T | None:
    """One of the words, in any case.

    Raises:
        UsageError: it is none of them.
    """
    if value is None:
        return None
    for word in words:
        if word == value.lower():
            return word
    raise UsageError(f"{option} {value!r}; expected one of {', '.join(words)}")


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
