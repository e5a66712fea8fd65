"""The pictures of a report, as SVG that a page can hold: its text is text, its colours are the page's.

Drawn by matplotlib, which needs no browser code. Each colour is one that nothing else uses, and is replaced by a CSS
variable, so that one drawing serves a light and a dark page.
"""

from __future__ import annotations

import io
import itertools
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer._optional import require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dmformer.bench.limits import Limits
    from dmformer.bench.profile import Profile
    from dmformer.bench.report import BenchReport, Result
    from dmformer.bundle.manifest import Artifact, Manifest

    Draw = Callable[[Any, bool], None]  # into a figure; whether it is narrow

WIDE_IN, NARROW_IN = 9.0, 4.2
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_SERIES = tuple(f"#0400{number:02x}" for number in range(1, 7))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid"} | {
    colour: f"series-{number}" for number, colour in enumerate(_SERIES, 1)
}
_MOST_POINTS = 60  # of a round, in the picture
_KINDS = ("dma", "ffn", "downsample", "residual sums", "head", "pooling and sums")  # one colour in every picture
_numbers = itertools.count()


def latencies(report: BenchReport) -> Draw:
    """Every call of every row: the box from the first to the third quartile, whiskers from 5 % to 95 %."""
    rows = [row for row in report.results if row.timed]

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        rng = np.random.default_rng(0)
        for place, row in enumerate(rows):
            pooled = np.concatenate([np.asarray(samples) for samples in row.samples_ns]) / 1e6
            colour = _colour(row, rows)
            axes.boxplot(
                [pooled], positions=[place], orientation="horizontal", widths=0.5, whis=(5, 95), showfliers=False,
                boxprops={"color": colour}, whiskerprops={"color": colour}, capprops={"color": colour},
                medianprops={"color": _INK, "linewidth": 2}, manage_ticks=False,
            )  # fmt: skip
            for number, samples in enumerate(row.samples_ns):
                values = np.asarray(samples) / 1e6
                shown = values if len(values) <= _MOST_POINTS else rng.choice(values, _MOST_POINTS, replace=False)
                height = place + 0.34 + 0.1 * number / max(1, len(row.samples_ns) - 1)
                axes.plot(shown, np.full(len(shown), height), "|", color=colour, alpha=0.35, markersize=5)
            if row.attainable_ms is not None and row.mode != "throughput":
                axes.plot([row.attainable_ms] * 2, [place - 0.35, place + 0.35], color=_MUTED, linestyle=":")
        if narrow:  # beside the boxes there is no room
            axes.set_yticks([])
            for place, row in enumerate(rows):
                inside = axes.get_yaxis_transform()
                axes.text(0.01, place - 0.33, _label(row, narrow), transform=inside, va="bottom", fontsize=9)
        else:
            axes.set_yticks(range(len(rows)), [_label(row, narrow) for row in rows])
        axes.set_ylim(len(rows) - 0.3, -0.8 if narrow else -0.6)
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        axes.set_xlabel("milliseconds a call (log)")
        _tidy(axes, "x")

    return draw


def roofline(report: BenchReport) -> Draw:
    """Operations a second against operations a byte, below what the machine can do."""
    rows = [row for row in report.results if row.attainable_ms is not None and row.operations and row.least_bytes]
    limits = report.limits
    assert limits is not None

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        points = [(float(row.operations or 0) / float(row.least_bytes or 1), _gflops(row)) for row in rows]
        reach = [point[0] for point in points] + [limits.gflops / limits.gbytes_per_s]
        intensity = np.geomspace(min(reach) / 4, max(reach) * 4, 200)
        for (name, gops), colour in zip(_roofs(limits, rows), (_INK, *_SERIES[::-1]), strict=False):
            axes.plot(intensity, np.minimum(intensity * limits.gbytes_per_s, gops), color=colour, linewidth=1.5)
            axes.annotate(
                f"{name}: {gops:.0f} G/s", (intensity[0], gops), (2, 3), textcoords="offset points", color=colour,
                va="bottom", ha="left", fontsize=9,
            )  # fmt: skip
        for row, (operations, rate) in zip(rows, points, strict=True):
            marker = "o" if row.mode == "compute" else "s" if row.mode == "end-to-end" else "^"
            axes.plot([operations], [rate], marker, color=_colour(row, rows), markersize=8, label=_label(row, narrow))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(top=3 * max(gops for _, gops in _roofs(limits, rows)))
        axes.set_xlabel("operations a byte (log)")
        axes.set_ylabel("10⁹ operations a second (log)")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_numbers(axis)
        _legend(axes, 1 if narrow else 2)
        _tidy(axes, "both")

    return draw


def _roofs(limits: Limits, rows: Sequence[Result]) -> list[tuple[str, float]]:
    used = {(row.runtime, precision) for row in rows for precision in row.layers}
    peaks = [peak for peak in limits.peaks if (peak.runtime, peak.precision) in used]
    return [("fp32", limits.gflops), *((f"{peak.precision} in {peak.runtime}", peak.gops) for peak in peaks)]


def _gflops(row: Result) -> float:
    return float(row.operations or 0) / (row.call_ms or float("inf")) / 1e6


def tradeoffs(report: BenchReport, manifest: Manifest) -> Draw | None:
    """Latency against size, and against accuracy where the bundle has it; below and to the left is better."""
    artifacts = {artifact.sha256: artifact for artifact in manifest.artifacts}
    single = [row for row in report.results if row.timed and row.mode == "compute"]
    batch = min((row.batch for row in single), default=1)
    rows = [(row, artifacts[row.artifact_sha256]) for row in single if row.batch == batch]
    if len(rows) < 2:
        return None
    judged = [(row, wrong) for row, artifact in rows if (wrong := _wrong(artifact)) is not None]

    def draw(figure: Any, narrow: bool) -> None:
        down, across = (2, 1) if narrow else (1, 2)
        panels = figure.subplots(down, across).ravel() if judged else [figure.subplots()]
        sizes = [(row, artifact.bytes / 1e6) for row, artifact in rows]
        _scatter(panels[0], sizes, "size of the artifact, MB", narrow)
        if judged:
            _scatter(panels[1], judged, "wrong answers on the calibration images, %", narrow)
        _legend(panels[0], 1 if narrow else 2)

    return draw


def _wrong(artifact: Artifact) -> float | None:
    """In percent: of the labels, or without labels of PyTorch's answers."""
    if artifact.accuracy is None:
        return None
    found = artifact.accuracy
    known = [share for share in (found.top1, found.pixel_accuracy, found.agreement_with_torch) if share is not None]
    return 100 * (1 - known[0]) if known else None


def _scatter(axes: Any, points: Sequence[tuple[Result, float]], label: str, narrow: bool) -> None:
    rows = [row for row, _ in points]
    best: list[tuple[float, float]] = []  # not beaten in both by any other
    for x, y in sorted((float(row.call_ms or 0), value) for row, value in points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    axes.step(*zip(*best, strict=True), where="post", color=_MUTED, linestyle=":")
    for row, value in points:
        axes.plot([row.call_ms], [value], "o", color=_colour(row, rows), markersize=9, label=_label(row, narrow))
    axes.set_xlabel("milliseconds a call, p50")
    axes.set_ylabel(label)
    axes.margins(0.2)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    _tidy(axes, "both")


def stages(profile: Profile) -> Draw:
    """Milliseconds of each stage, by part of the block."""

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.subplots()
        names = list(profile.modules)
        found = dict.fromkeys(kind for part in profile.modules.values() for kind in part.parts)
        kinds = sorted(found, key=lambda kind: _KINDS.index(kind) if kind in _KINDS else len(_KINDS))
        left = np.zeros(len(names))
        for kind in kinds:
            colour = dict(zip(_KINDS, _SERIES, strict=True)).get(kind, _MUTED)
            widths = np.array([profile.modules[name].parts.get(kind, 0.0) for name in names])
            axes.barh(range(len(names)), widths, left=left, color=colour, label=_literal(kind), height=0.6)
            left += widths
        for place, total in enumerate(left):
            share = total / (profile.total_ms or 1)
            axes.annotate(f"{share:.0%}", (total, place), (4, 0), textcoords="offset points", va="center", color=_INK)
        axes.set_yticks(range(len(names)), [_literal(name) for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("milliseconds of one inference")
        _legend(axes, 2 if narrow else 6)
        _tidy(axes, "x")

    return draw


def svg(draw: Draw, height_in: float, *, narrow: bool) -> str:
    """A picture as an ``<svg>`` element; its names differ from those of every other picture of this process."""
    require("matplotlib", extra="report", purpose="the pictures of --html")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "dmformer", "font.family": "sans-serif", "font.size": 10,
        "axes.edgecolor": _GRID, "axes.labelcolor": _MUTED, "text.color": _INK, "xtick.color": _MUTED,
        "ytick.color": _INK, "grid.color": _GRID,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(NARROW_IN if narrow else WIDE_IN, height_in), layout="constrained")
        draw(figure, narrow)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    prefix = f"p{next(_numbers)}-"
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)


def _literal(text: str) -> str:
    """Between two dollars matplotlib would read a formula."""
    return text.replace("$", r"\$")


def _label(row: Result, narrow: bool) -> str:
    runtime = {"onnxruntime": "ort", "openvino": "ov", "tensorrt": "trt"}.get(row.runtime, row.runtime)
    title = row.title.removeprefix(row.runtime)
    return f"{runtime}{title.replace(' batch ', ' b')}" if narrow else f"{row.runtime}{title}"


def _colour(row: Result, rows: Sequence[Result]) -> str:
    """One for each runtime and precision."""
    kinds = list(dict.fromkeys((other.runtime, other.precision) for other in rows))
    return _SERIES[kinds.index((row.runtime, row.precision)) % len(_SERIES)]


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10 in place of powers of ten, as far as they fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Any, columns: int) -> None:
    """Below the picture, where it hides nothing."""
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, labelcolor=_INK,
        fontsize=9,
    )  # fmt: skip


def _tidy(axes: Any, grid: str) -> None:
    axes.grid(visible=True, axis=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
