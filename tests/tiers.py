"""Which cases of a test run each time, and which with the slow ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable


def first(count: int, cases: Iterable[Any]) -> list[Any]:
    """Mark all but the first so many cases as slow; a tuple has the arguments of one."""
    return [
        case if place < count else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for place, case in enumerate(cases)
    ]
