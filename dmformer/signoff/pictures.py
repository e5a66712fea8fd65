"""The pictures of the page: checks against their limits, layers by precision, accuracy with intervals, sensitivity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dmformer.page.svg import (
    BAD,
    INK,
    MUTED,
    SERIES,
    Picture,
    add_legend,
    draw_picture,
    label_text,
    name_rows,
    tidy,
)
from dmformer.verify.report import Check

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dmformer.bundle.manifest import Artifact

_ROWS = 30  # of a picture: as many as fit on a page of paper
MOST_CHECK_ROWS = 6 * _ROWS  # of all pictures of checks
_MOST_BLOCKS = 24
_LOW, _HIGH = 1e-5, 100.0  # shares of the limit that the axis shows; what is beyond stands at its ends


class CheckRow(Struct, frozen=True, kw_only=True):
    """A row of the picture of checks: what was asked, and each check with the place of its source."""

    label: str
    checks: Sequence[tuple[int, Check]]

    @property
    def failed(self) -> bool:
        """Whether one of the checks failed."""
        return not all(check.passed for _, check in self.checks)


def share_of_limit(check: Check) -> float | None:
    """Return the difference over the largest one allowed; ``None`` where a check has none of the two."""
    if check.max_abs is None or check.limit is None or not math.isfinite(check.max_abs):
        return None
    if check.limit > 0:
        return abs(check.max_abs) / check.limit
    return 0.0 if check.max_abs == 0 else math.inf


def check_pictures(rows: Sequence[CheckRow], sources: Sequence[str]) -> list[Picture]:
    """Return pictures of all checks; where there are far too many rows, those that failed come first.

    Args:
        rows: what was asked.
        sources: titles of the sources, by place.
    """
    shown = rows
    if len(rows) > MOST_CHECK_ROWS:
        shown = sorted(rows, key=lambda row: not row.failed)[:MOST_CHECK_ROWS]
    several = len({place for row in rows for place, _ in row.checks}) > 1
    pictures = []
    for start in range(0, len(shown), _ROWS):
        part = shown[start : start + _ROWS]
        draw = partial(_draw_checks, rows=part, sources=sources if several else ())
        extra = 1.3 + (0.25 * len(sources) if several else 0)
        description = "each check's difference over the largest one allowed"
        pictures.append(draw_picture(description, draw, extra + 0.27 * len(part), extra + 0.42 * len(part)))
    return pictures


def _draw_checks(figure: Any, narrow: bool, rows: Sequence[CheckRow], sources: Sequence[str]) -> None:
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.axvline(1, color=BAD, linewidth=1.2)
    for number, row in enumerate(rows):
        for source, check in row.checks:
            place = number + (0.3 * (source / (len(sources) - 1) - 0.5) if len(sources) > 1 else 0)  # beside each other
            share = share_of_limit(check)
            label = label_text(sources[source], 50) if sources else None
            if not check.passed:
                at = min(max(share or _HIGH, _LOW), _HIGH)
                axes.plot([at], [place], "X", color=BAD, markersize=11, label="FAILED", zorder=4)
            elif share is None:
                axes.plot([_LOW], [place], "|", color=MUTED, markersize=9, label="held, without a figure")
            else:
                at = min(max(share, _LOW), _HIGH)
                filled = {} if share >= _LOW else {"markerfacecolor": "none"}
                axes.plot([at], [place], "o", color=SERIES[source % len(SERIES)], markersize=6, label=label, **filled)
    names = name_rows(axes, [label_text(row.label) for row in rows], narrow)
    for row, name in zip(rows, names, strict=True):
        if row.failed:
            name.set(color=BAD, fontweight="bold")
    axes.set_xlim(_LOW / 2, _HIGH * 2)
    ticks = [10.0**power for power in range(-5, 3)]
    marks = {_LOW: "0", 1.0: "limit", _HIGH: "100x"}
    axes.set_xticks(ticks, [marks.get(tick, f"{tick:.3g}" if tick < 1 else f"{tick:.0f}x") for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("difference over the limit (log)")
    add_legend(axes, 1 if narrow else 2)
    tidy(axes, "x")


def layers_picture(artifacts: Sequence[tuple[str, Artifact]]) -> Picture:
    """Return a picture of the compute layers of each artifact by the precision in which they ran.

    Args:
        artifacts: with their labels.
    """
    draw = partial(_draw_layers, artifacts=artifacts)
    return draw_picture("compute layers by precision", draw, 1.2 + 0.42 * len(artifacts), 1.5 + 0.55 * len(artifacts))


def _draw_layers(figure: Any, narrow: bool, artifacts: Sequence[tuple[str, Artifact]]) -> None:
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for _, artifact in artifacts for kind in artifact.layers))
    for place, (_, artifact) in enumerate(artifacts):
        total, left = sum(artifact.layers.values()) or 1, 0.0
        for kind, count in artifact.layers.items():
            colour = SERIES[kinds.index(kind) % len(SERIES)]
            axes.barh(place, 100 * count / total, left=left, height=0.5, color=colour, label=label_text(kind, 20))
            left += 100 * count / total
        promised = 100 * artifact.promised_share
        axes.plot([promised] * 2, [place - 0.33, place + 0.33], color=INK, linestyle=":", label="promised")
    name_rows(axes, [label_text(label) for label, _ in artifacts], narrow)
    axes.set_xlim(0, 102)
    axes.set_xlabel("% of the compute layers")
    add_legend(axes, 3 if narrow else 6)
    tidy(axes, "x")


class Share(Struct, frozen=True, kw_only=True):
    """A share (0 to 1) of right answers, with its interval where it has one."""

    label: str
    kind: str
    value: float
    interval: tuple[float, float] | None = None


def accuracy_picture(shares: Sequence[Share]) -> Picture:
    """Return a picture of accuracies with their intervals of 95 % confidence."""
    draw = partial(_draw_accuracy, shares=shares)
    return draw_picture("accuracy with its interval", draw, 1.3 + 0.32 * len(shares), 1.5 + 0.5 * len(shares))


def _draw_accuracy(figure: Any, narrow: bool, shares: Sequence[Share]) -> None:
    axes = figure.subplots()
    kinds = list(dict.fromkeys(share.kind for share in shares))
    for place, share in enumerate(shares):
        colour = SERIES[kinds.index(share.kind) % len(SERIES)]
        if share.interval is not None:
            axes.plot([100 * bound for bound in share.interval], [place] * 2, "-", color=colour, linewidth=2)
        axes.plot([100 * share.value], [place], "o", color=colour, markersize=7, label=label_text(share.kind, 40))
    name_rows(axes, [label_text(share.label) for share in shares], narrow)
    axes.margins(x=0.05)
    axes.set_xlabel("%")
    add_legend(axes, 1 if narrow else 3)
    tidy(axes, "x")


def sensitivity_pictures(sensitivity: Mapping[str, Mapping[str, float]]) -> Iterator[Picture]:
    """Give a picture for each precision: the error that it causes in each block alone, the largest first.

    Args:
        sensitivity: of each block, by precision, over the outputs' spread.
    """
    for precision, blocks in sensitivity.items():
        finite = {name: error for name, error in blocks.items() if 0 <= error < math.inf}
        most = sorted(finite.items(), key=lambda item: -item[1])[:_MOST_BLOCKS]
        if most:
            draw = partial(_draw_sensitivity, blocks=most, precision=precision)
            rows = len(most)
            yield draw_picture(f"sensitivity to {precision}", draw, 1.0 + 0.27 * rows, 1.0 + 0.42 * rows)


def _draw_sensitivity(figure: Any, narrow: bool, blocks: Sequence[tuple[str, float]], precision: str) -> None:
    axes = figure.subplots()
    for place, (_, error) in enumerate(blocks):
        axes.barh(place + (0.1 if narrow else 0), 100 * error, height=0.3 if narrow else 0.6, color=SERIES[0])
    name_rows(axes, [label_text(name) for name, _ in blocks], narrow)
    axes.set_xlabel(f"error of the outputs at {label_text(precision, 20)}, % of their spread")
    if all(error == 0 for _, error in blocks):
        axes.set_xlim(0, 1)
    tidy(axes, "x")
