"""How long work tells what it is doing: a callback that library functions take and the command line draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[], None]


class Progress(Protocol):
    """Called with the name of a step and, where it is known, of how many parts it consists; entered while it runs.

    What it gives on entering is called after each part.
    """

    def __call__(self, name: str, parts: int | None = None) -> AbstractContextManager[Advance]:
        """A step that begins when it is entered and ends when it is left."""
        ...


@contextmanager
def silent(name: str, parts: int | None = None) -> Iterator[Advance]:
    """The default: nothing is shown."""
    del name, parts
    yield lambda: None
