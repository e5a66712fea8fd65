"""A page: verdicts first, then sections of pictures, tables and images. Every text in it is a stranger's: escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec import Struct

from dmformer._optional import require
from dmformer.page.svg import Picture
from dmformer.text import plain_lines

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_ROWS = 1000  # of a table
_ROWS_A_PAGE = 20
_MOST_IMAGES = 64  # of a gallery
_MOST_LETTERS = 2000  # of a text


class Table(Struct, frozen=True, kw_only=True):
    """A table; the last ``texts`` columns are text, and the rows whose place is in ``bad`` stand out."""

    kind: ClassVar[str] = "table"
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    caption: str = ""
    texts: int = 0
    bad: Sequence[int] = ()

    @property
    def shown(self) -> list[tuple[Sequence[str], bool]]:
        """The rows that are shown, each with whether it stands out."""
        bad = set(self.bad)
        return [(row, place in bad) for place, row in enumerate(self.rows[:_MOST_ROWS])]

    @property
    def left_out(self) -> int:
        """The number of rows that are not shown."""
        return max(0, len(self.rows) - _MOST_ROWS)


class Image(Struct, frozen=True, kw_only=True):
    """An image of a gallery, a PNG file, with what is said of it; ``bad`` makes it stand out."""

    png: bytes
    caption: str
    bad: bool = False

    @property
    def address(self) -> str:
        """The image itself, as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


class Gallery(Struct, frozen=True, kw_only=True):
    """Images side by side."""

    kind: ClassVar[str] = "gallery"
    images: Sequence[Image]

    @property
    def shown(self) -> Sequence[Image]:
        """The images that are shown."""
        return self.images[:_MOST_IMAGES]


class Command(Struct, frozen=True, kw_only=True):
    """A line for a shell."""

    kind: ClassVar[str] = "command"
    line: str


class Section(Struct, frozen=True, kw_only=True):
    """A part of the page under a title; ``caption`` says how to read it."""

    title: str
    parts: Sequence[Picture | Table | Gallery | Command] = ()
    caption: str = ""

    @property
    def long(self) -> bool:
        """Whether it takes more than a page on paper, so that it may be parted."""
        return len(self.parts) > 1 or any(
            isinstance(part, Table) and len(part.rows) > _ROWS_A_PAGE for part in self.parts
        )


class Verdict(Struct, frozen=True, kw_only=True):
    """A sentence at the top of the page, with the points that belong to it.

    ``held`` colours it; ``None`` where nothing holds or fails.
    """

    text: str
    points: Sequence[str] = ()
    held: bool | None = None


def with_rest(caption: str, count: int, most: int) -> str:
    """Return the caption of a picture that draws at most so many rows, and says where the others are."""
    return f"{caption} Drawn: {most} rows, and {count - most} more are in the table." if count > most else caption


def render_page(
    title: str, subtitle: str, verdicts: Iterable[Verdict], sections: Iterable[Section], warning: str = ""
) -> str:
    """Return a page, as HTML.

    Args:
        title: of the page.
        subtitle: a line below it.
        verdicts: what a reader has to know first.
        sections: in their order.
        warning: ends the line below the title, and stands out.

    Raises:
        UnavailableError: a package is missing.
    """
    jinja2: Any = require("jinja2", extra="report", purpose="--html")
    template = resources.files("dmformer.page").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_fit)
    text: str = environment.from_string(template).render(
        title=title, subtitle=subtitle, verdicts=list(verdicts), sections=list(sections), warning=warning
    )
    return text


def _fit(value: Any) -> Any:
    """Return a text without control characters and not too long; pictures and addresses, which are ours, stay."""
    if hasattr(value, "__html__"):
        return value
    text = plain_lines(str(value))
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"
