"""A report as one page that needs no network: pictures first, then the figures, then what they were measured with.

matplotlib draws the pictures as SVG, without any browser code: their text stays text. Each colour in them is one that
nothing else uses, and is replaced by a CSS variable of the page, so that one drawing serves a light and a dark page.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from dmformer._optional import require
from dmformer.bench import sentences
from dmformer.bench.sentences import digits

if TYPE_CHECKING:
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


class Picture(Struct, frozen=True, kw_only=True):
    """A drawing for wide pages and one for narrow ones."""

    title: str
    caption: str
    wide: str
    narrow: str


class Table(Struct, frozen=True, kw_only=True):
    """A table of the page; ``text_last`` says that the last column is text."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    caption: str = ""
    text_last: bool = False


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


def render(report: BenchReport, manifest: Manifest) -> str:
    """Return the page, as HTML.

    Args:
        report: what was measured.
        manifest: of the bundle that it was measured on.
    """
    jinja2: Any = require("jinja2", extra="report", purpose="--html")
    template = resources.files("dmformer.bench").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text: str = environment.from_string(template).render(
        report=report,
        verdicts=[*sentences.verdicts(report), *sentences.comparison(report)],
        figures=_pictures(report, manifest),
        tables=_tables(report),
    )
    return text


def _pictures(report: BenchReport, manifest: Manifest) -> list[Picture]:
    timed = [row for row in report.results if row.timed]
    pictures = []
    if timed:
        caption = (
            "Every call of every process; the box holds half of them, the whiskers nine in ten. Dotted: the least "
            "that this machine's limits admit."
        )
        pictures.append(_picture("Latency", caption, partial(_draw_latencies, rows=timed), 1.2 + 0.75 * len(timed)))
    alone = [row for row in timed if row.mode == "compute"]
    artifacts = {artifact.sha256: artifact for artifact in manifest.artifacts}
    least_batch = min((row.batch for row in alone), default=1)
    rows = [(row, artifacts[row.artifact_sha256]) for row in alone if row.batch == least_batch]
    if len(rows) > 1:
        sizes = [(row, artifact.bytes / 1e6) for row, artifact in rows]
        wrong = [(row, percent) for row, artifact in rows if (percent := _wrong_percent(artifact)) is not None]
        caption = "Below and to the left is better; the dotted line joins what no other artifact beats in both."
        draw = partial(_draw_tradeoffs, sizes=sizes, wrong=wrong)
        pictures.append(_picture("What speed costs", caption, draw, 3.6, narrow_height_in=6.5))
    limited = [row for row in timed if row.attainable_ms is not None]
    if report.limits is not None and limited:
        caption = (
            f"How far each row is below what the machine can do: {sentences.limits(report)}. Bytes are those of "
            "weights, input and output."
        )
        draw = partial(_draw_roofline, rows=limited, limits=report.limits)
        pictures.append(_picture("Roofline", caption, draw, 4.6))
    for row in timed:
        if row.profile is not None:
            caption, draw = sentences.where_time_goes(row, row.profile), partial(_draw_stages, profile=row.profile)
            pictures.append(_picture(f"Where the time goes: {row.title}", caption, draw, 3.2))
    return pictures


def _picture(title: str, caption: str, draw: Draw, height_in: float, narrow_height_in: float | None = None) -> Picture:
    wide, narrow = _svg(draw, height_in, narrow=False), _svg(draw, narrow_height_in or height_in, narrow=True)
    return Picture(title=title, caption=caption, wide=wide, narrow=narrow)


def _wrong_percent(artifact: Artifact) -> float | None:
    """Return the wrong answers in percent: by the labels, or without labels by PyTorch's answers."""
    accuracy = artifact.accuracy
    if accuracy is None:
        return None
    for share in (accuracy.top1, accuracy.pixel_accuracy, accuracy.agreement_with_torch):
        if share is not None:
            return 100 * (1 - share)
    return None


def _tables(report: BenchReport) -> list[Table]:
    columns = [
        "row", "p50 ms", "p90 ms", "p99 ms", "mean ms", "max ms", "images/s", "samples", "load ms", "first ms", "MiB",
        "limit ms", "of limit", "status",
    ]  # fmt: skip
    environment = dict(report.environment)
    versions = environment.pop("versions", {})
    measured_with = [
        (name.replace("_", " "), _plain(value)) for name, value in environment.items() if value is not None
    ]
    measured_with += [(str(name), str(version)) for name, version in dict(versions).items()]
    if report.images is not None:
        measured_with.append(("images", report.images))
    tables = [
        Table(
            title="Figures",
            caption="A percentile without enough samples is not given. " + (sentences.noise(report) or ""),
            columns=columns,
            rows=[_figures(row) for row in report.results],
            text_last=True,
        ),
        Table(title="Measured with", rows=measured_with, text_last=True),
    ]
    if remarks := sentences.remarks(report):
        tables.append(Table(title="To be known", rows=[[remark] for remark in remarks], text_last=True))
    return tables


def _figures(row: Result) -> list[str]:
    latency = row.latency_ms
    percentiles = (latency.p50, latency.p90, latency.p99, latency.mean, latency.max) if latency else (None,) * 5
    share = "-" if row.share_of_limit is None else f"{row.share_of_limit:.0%}"
    status = row.status if row.reason is None else f"{row.status}: {row.reason}"
    others = (row.load_ms, row.first_inference_ms, row.peak_rss_mb, row.attainable_ms)
    return [
        row.title,
        *(digits(value) for value in percentiles),
        digits(row.throughput_ips),
        str(row.samples),
        *(digits(value) for value in others),
        share,
        status,
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {digits(number)}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# --- pictures --------------------------------------------------------------------------------------------------------


def _svg(draw: Draw, height_in: float, *, narrow: bool) -> str:
    """Return a picture as an ``<svg>`` element; its names differ from those of every other picture of this process."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "dmformer", "font.family": "sans-serif", "font.size": 10,
        "axes.edgecolor": _GRID, "axes.labelcolor": _MUTED, "text.color": _INK, "xtick.color": _MUTED,
        "ytick.color": _INK, "grid.color": _GRID,
    }  # fmt: skip
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style}):
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


def _draw_latencies(figure: Any, narrow: bool, rows: Sequence[Result]) -> None:
    """Draw every call of every row: the box from the first to the third quartile, whiskers from 5 % to 95 %."""
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


def _draw_roofline(figure: Any, narrow: bool, rows: Sequence[Result], limits: Limits) -> None:
    """Draw operations a second against operations a byte, below what the machine can do."""
    used = {(row.runtime, precision) for row in rows for precision in row.layers}
    peaks = [peak for peak in limits.peaks if (peak.runtime, peak.precision) in used]
    roofs = [("fp32", limits.gflops), *((f"{peak.precision} in {peak.runtime}", peak.gops) for peak in peaks)]
    axes = figure.subplots()
    points = [
        (row, row.operations / row.least_bytes, row.operations / row.call_ms / 1e6)
        for row in rows
        if row.operations and row.least_bytes and row.call_ms
    ]
    reach = [intensity for _, intensity, _ in points] + [limits.gflops / limits.gbytes_per_s]
    across = np.geomspace(min(reach) / 4, max(reach) * 4, 200)
    for (name, gops), colour in zip(roofs, (_INK, *_SERIES[::-1]), strict=False):
        axes.plot(across, np.minimum(across * limits.gbytes_per_s, gops), color=colour, linewidth=1.5)
        axes.annotate(
            f"{name}: {gops:.0f} G/s", (across[0], gops), (2, 3), textcoords="offset points", color=colour,
            va="bottom", ha="left", fontsize=9,
        )  # fmt: skip
    for row, operations, rate in points:
        marker = "o" if row.mode == "compute" else "s" if row.mode == "end-to-end" else "^"
        axes.plot([operations], [rate], marker, color=_colour(row, rows), markersize=8, label=_label(row, narrow))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=3 * max(gops for _, gops in roofs))
    axes.set_xlabel("operations a byte (log)")
    axes.set_ylabel("10⁹ operations a second (log)")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_numbers(axis)
    _legend(axes, 1 if narrow else 2)
    _tidy(axes, "both")


def _draw_tradeoffs(
    figure: Any, narrow: bool, sizes: Sequence[tuple[Result, float]], wrong: Sequence[tuple[Result, float]]
) -> None:
    """Draw latency against size in MB, and against wrong answers in percent where there are any."""
    down, across = (2, 1) if narrow else (1, 2)
    panels = figure.subplots(down, across).ravel() if wrong else [figure.subplots()]
    _scatter(panels[0], sizes, "size of the artifact, MB", narrow)
    if wrong:
        _scatter(panels[1], wrong, "wrong answers on the calibration images, %", narrow)
    _legend(panels[0], 1 if narrow else 2)


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


def _draw_stages(figure: Any, narrow: bool, profile: Profile) -> None:
    """Draw the milliseconds of each stage, by part of the block."""
    axes = figure.subplots()
    names = list(profile.modules)
    parts = dict.fromkeys(kind for module in profile.modules.values() for kind in module.parts)
    kinds = sorted(parts, key=lambda kind: _KINDS.index(kind) if kind in _KINDS else len(_KINDS))
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
