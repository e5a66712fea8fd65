"""Pictures in SVG by matplotlib, without any browser code: their text stays text.

Each colour in them is one that nothing else uses, and is replaced by a CSS variable of the page, so that one drawing
serves a light and a dark page, and paper.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from msgspec import Struct

from dmformer._optional import require
from dmformer.text import plain, plain_lines

Draw = Callable[[Any, bool], None]  # into a figure; whether it is narrow

WIDE_IN, NARROW_IN = 9.0, 4.2
INK, MUTED, GRID, BAD = "#010101", "#020202", "#030303", "#050505"
SERIES = tuple(f"#0400{number:02x}" for number in range(1, 7))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BAD: "bad"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, 1)
}
_numbers = itertools.count()


class Picture(Struct, frozen=True, kw_only=True):
    """A drawing for wide pages and one for narrow ones; ``description`` is for those who cannot see it."""

    kind: ClassVar[str] = "picture"

    description: str
    wide: str
    narrow: str


def check_installed() -> None:
    """Make sure that a page can be made, before the work.

    Raises:
        UnavailableError: a package is missing.
    """
    _matplotlib()
    require("jinja2", extra="report", purpose="--html")


def _matplotlib() -> Any:
    """Import matplotlib in another folder: it reads a ``matplotlibrc`` in the working folder, whoever put it there."""
    if (imported := sys.modules.get("matplotlib")) is not None:
        return imported
    here = Path.cwd()
    os.chdir(Path(__file__).parent)
    try:
        return require("matplotlib", extra="report", purpose="the pictures of --html")
    finally:
        os.chdir(here)


def draw_picture(description: str, draw: Draw, height_in: float, narrow_height_in: float | None = None) -> Picture:
    """Return a picture of both widths.

    Args:
        description: what it shows, in a sentence.
        draw: draws it.
        height_in: height of the wide one, in inches at a width of :data:`WIDE_IN`.
        narrow_height_in: height of the narrow one, at a width of :data:`NARROW_IN`; otherwise the same.
    """
    wide, narrow = _svg(draw, height_in, narrow=False), _svg(draw, narrow_height_in or height_in, narrow=True)
    return Picture(description=description, wide=wide, narrow=narrow)


def _svg(draw: Draw, height_in: float, *, narrow: bool) -> str:
    """Return a picture as an ``<svg>`` element; its names differ from those of every other picture of this process."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "dmformer", "font.family": "sans-serif", "font.size": 10,
        "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "text.color": INK, "xtick.color": MUTED,
        "ytick.color": INK, "grid.color": GRID,
    }  # fmt: skip
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style}), warnings.catch_warnings():
        # matplotlib only measures the letters; the browser has a font for those that its own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(NARROW_IN if narrow else WIDE_IN, height_in), layout="constrained")
        draw(figure, narrow)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    text = target.getvalue()
    text = plain_lines(text[text.index("<svg") :])
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    prefix = f"p{next(_numbers)}-"
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)


# --- what drawings share ----------------------------------------------------------------------------------------------


def label_text(text: str, most: int = 60) -> str:
    """Return a text for a drawing: on one line, not too long, and no formula, which two dollars would make of it."""
    text = plain(text)
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def name_rows(axes: Any, labels: list[str], narrow: bool) -> list[Any]:
    """Name the rows of a drawing, from the top: beside them or, where it is narrow and there is no room, above them.

    Returns the texts, in the same order.
    """
    axes.set_yticks([] if narrow else range(len(labels)), [] if narrow else labels)
    axes.set_ylim(len(labels) - 0.3, -0.8 if narrow else -0.6)
    if not narrow:
        return list(axes.get_yticklabels())
    return [
        axes.text(0.01, place - 0.33, label, transform=axes.get_yaxis_transform(), va="bottom", fontsize=9)
        for place, label in enumerate(labels)
    ]


def plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10 in place of powers of ten, as far as they fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def add_legend(axes: Any, columns: int) -> None:
    """Below the picture, where it hides nothing; each label once."""
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        axes.figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False,
            labelcolor=INK, fontsize=9,
        )  # fmt: skip


def tidy(axes: Any, grid: str) -> None:
    """Draw a grid behind the data, and no frame above and on the right."""
    axes.grid(visible=True, axis=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
