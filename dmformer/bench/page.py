"""The page of ``bench``: pictures first, then the figures, then what they were measured with."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.bench import sentences
from dmformer.bench.sentences import digits
from dmformer.page.document import Command, Section, Table, Verdict, render_page
from dmformer.page.svg import (
    INK,
    MUTED,
    SERIES,
    Draw,
    Picture,
    add_legend,
    draw_picture,
    label_text,
    name_rows,
    plain_numbers,
    tidy,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bench.limits import Limits
    from dmformer.bench.profile import Profile
    from dmformer.bench.report import BenchReport, Result
    from dmformer.bundle.manifest import Artifact, Manifest

FIGURES = (
    "row", "p50 ms", "p90 ms", "p99 ms", "mean ms", "max ms", "images/s", "samples", "load ms", "first ms", "MiB",
    "limit ms", "of limit", "status",
)  # fmt: skip
_MOST_POINTS = 60  # of a round, in the picture
LATENCY_CAPTION = (
    "Every call of every process; the box holds half of them, the whiskers nine in ten. Dotted: the least that this "
    "machine's limits admit."
)
_KINDS = ("dma", "ffn", "downsample", "residual sums", "head", "pooling and sums")  # one colour in every picture


def render(report: BenchReport, manifest: Manifest) -> str:
    """Return the page, as HTML.

    Args:
        report: what was measured.
        manifest: of the bundle that it was measured on.
    """
    environment = report.environment
    sections = [*_pictures(report, manifest), *_tables(report)]
    if report.command:
        sections.append(Section(title="Measure it again", parts=[Command(line=report.command)]))
    return render_page(
        f"Latency of {report.arch}",
        f"{environment['cpu']}, {environment['cores']} cores · {report.measured_at} · "
        f"{report.rounds} processes a row, in turns",
        [Verdict(text=line) for line in (*sentences.verdicts(report), *sentences.comparison(report))],
        sections,
        "stopped before the end" if report.partial else "",
    )


def _pictures(report: BenchReport, manifest: Manifest) -> list[Section]:
    timed = [row for row in report.results if row.timed]
    pictures = []
    if timed:
        pictures.append(Section(title="Latency", caption=LATENCY_CAPTION, parts=[latency_picture(timed)]))
    alone = [row for row in timed if row.mode == "compute"]
    artifacts = {artifact.sha256: artifact for artifact in manifest.artifacts}
    least_batch = min((row.batch for row in alone), default=1)
    rows = [(row, artifacts[row.artifact_sha256]) for row in alone if row.batch == least_batch]
    if len(rows) > 1:
        sizes = [(row, artifact.bytes / 1e6) for row, artifact in rows]
        wrong = [(row, percent) for row, artifact in rows if (percent := _wrong_percent(artifact)) is not None]
        caption = "Below and to the left is better; the dotted line joins what no other artifact beats in both."
        draw = partial(_draw_tradeoffs, sizes=sizes, wrong=wrong)
        pictures.append(_section("What speed costs", caption, draw, 3.6, narrow_height_in=6.5))
    limited = [row for row in timed if row.attainable_ms is not None]
    if report.limits is not None and limited:
        caption = (
            f"How far each row is below what the machine can do: {sentences.limits(report)}. Bytes are those of "
            "weights, input and output."
        )
        draw = partial(_draw_roofline, rows=limited, limits=report.limits)
        pictures.append(_section("Roofline", caption, draw, 4.6))
    for row in timed:
        if row.profile is not None:
            caption, draw = sentences.where_time_goes(row, row.profile), partial(_draw_stages, profile=row.profile)
            pictures.append(_section(f"Where the time goes: {row.title}", caption, draw, 3.2))
    return pictures


def _section(title: str, caption: str, draw: Draw, height_in: float, narrow_height_in: float | None = None) -> Section:
    return Section(title=title, caption=caption, parts=[draw_picture(caption, draw, height_in, narrow_height_in)])


def latency_picture(rows: Sequence[Result], places: Sequence[str] = ()) -> Picture:
    """Return a picture of the latencies of rows that were timed.

    Args:
        rows: from the top.
        places: where each was timed, for rows of several machines.
    """
    draw = partial(_draw_latencies, rows=rows, places=places)
    return draw_picture("latencies of each row", draw, 1.2 + 0.75 * len(rows))


def _wrong_percent(artifact: Artifact) -> float | None:
    """Return the wrong answers in percent: by the labels, or without labels by PyTorch's answers."""
    accuracy = artifact.accuracy
    if accuracy is None:
        return None
    for share in (accuracy.top1, accuracy.pixel_accuracy, accuracy.agreement_with_torch):
        if share is not None:
            return 100 * (1 - share)
    return None


def _tables(report: BenchReport) -> list[Section]:
    environment = dict(report.environment)
    versions = environment.pop("versions", {})
    measured_with = [
        (name.replace("_", " "), _plain(value)) for name, value in environment.items() if value is not None
    ]
    measured_with += [(str(name), str(version)) for name, version in dict(versions).items()]
    if report.images is not None:
        measured_with.append(("images", report.images))
    caption = "A percentile without enough samples is not given. " + (sentences.noise(report) or "")
    figures = Table(columns=FIGURES, rows=[row_figures(row) for row in report.results], texts=1)
    tables = [
        Section(title="Figures", caption=caption, parts=[figures]),
        Section(title="Measured with", parts=[Table(rows=measured_with, texts=1)]),
    ]
    if remarks := sentences.remarks(report):
        listing = Table(rows=[[remark] for remark in remarks], texts=1)
        tables.append(Section(title="To be known", parts=[listing]))
    return tables


def row_figures(row: Result) -> list[str]:
    """Return the figures of a row, in the order of :data:`FIGURES`."""
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


def _draw_latencies(figure: Any, narrow: bool, rows: Sequence[Result], places: Sequence[str]) -> None:
    """Draw every call of every row: the box from the first to the third quartile, whiskers from 5 % to 95 %."""
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for place, row in enumerate(rows):
        pooled = np.concatenate([np.asarray(samples) for samples in row.samples_ns]) / 1e6
        colour = _colour(row, rows)
        axes.boxplot(
            [pooled], positions=[place], orientation="horizontal", widths=0.5, whis=(5, 95), showfliers=False,
            boxprops={"color": colour}, whiskerprops={"color": colour}, capprops={"color": colour},
            medianprops={"color": INK, "linewidth": 2}, manage_ticks=False,
        )  # fmt: skip
        for number, samples in enumerate(row.samples_ns):
            values = np.asarray(samples) / 1e6
            shown = values if len(values) <= _MOST_POINTS else rng.choice(values, _MOST_POINTS, replace=False)
            height = place + 0.34 + 0.1 * number / max(1, len(row.samples_ns) - 1)
            axes.plot(shown, np.full(len(shown), height), "|", color=colour, alpha=0.35, markersize=5)
        if row.attainable_ms is not None and row.mode != "throughput":
            axes.plot([row.attainable_ms] * 2, [place - 0.35, place + 0.35], color=MUTED, linestyle=":")
    labels = [_label(row, narrow) for row in rows]
    if places:
        joint = " · " if narrow else "\n"
        labels = [f"{label}{joint}{label_text(place, 28)}" for label, place in zip(labels, places, strict=True)]
    name_rows(axes, labels, narrow)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel("milliseconds a call (log)")
    tidy(axes, "x")


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
    for (name, gops), colour in zip(roofs, (INK, *SERIES[::-1]), strict=False):
        axes.plot(across, np.minimum(across * limits.gbytes_per_s, gops), color=colour, linewidth=1.5)
        axes.annotate(
            label_text(f"{name}: {gops:.0f} G/s"), (across[0], gops), (2, 3), textcoords="offset points", color=colour,
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
        plain_numbers(axis)
    add_legend(axes, 1 if narrow else 2)
    tidy(axes, "both")


def _draw_tradeoffs(
    figure: Any, narrow: bool, sizes: Sequence[tuple[Result, float]], wrong: Sequence[tuple[Result, float]]
) -> None:
    """Draw latency against size in MB, and against wrong answers in percent where there are any."""
    down, across = (2, 1) if narrow else (1, 2)
    panels = figure.subplots(down, across).ravel() if wrong else [figure.subplots()]
    _scatter(panels[0], sizes, "size of the artifact, MB", narrow)
    if wrong:
        _scatter(panels[1], wrong, "wrong answers on the calibration images, %", narrow)
    add_legend(panels[0], 1 if narrow else 2)


def _scatter(axes: Any, points: Sequence[tuple[Result, float]], label: str, narrow: bool) -> None:
    rows = [row for row, _ in points]
    best: list[tuple[float, float]] = []  # not beaten in both by any other
    for x, y in sorted((float(row.call_ms or 0), value) for row, value in points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    axes.step(*zip(*best, strict=True), where="post", color=MUTED, linestyle=":")
    for row, value in points:
        axes.plot([row.call_ms], [value], "o", color=_colour(row, rows), markersize=9, label=_label(row, narrow))
    axes.set_xlabel("milliseconds a call, p50")
    axes.set_title(label, loc="left", fontsize=10, color=MUTED)  # upright it may be longer than the panel is high
    axes.margins(0.2)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    tidy(axes, "both")


def _draw_stages(figure: Any, narrow: bool, profile: Profile) -> None:
    """Draw the milliseconds of each stage, by part of the block."""
    axes = figure.subplots()
    names = list(profile.modules)
    parts = dict.fromkeys(kind for module in profile.modules.values() for kind in module.parts)
    kinds = sorted(parts, key=lambda kind: _KINDS.index(kind) if kind in _KINDS else len(_KINDS))
    left = np.zeros(len(names))
    for kind in kinds:
        colour = dict(zip(_KINDS, SERIES, strict=True)).get(kind, MUTED)
        widths = np.array([profile.modules[name].parts.get(kind, 0.0) for name in names])
        axes.barh(range(len(names)), widths, left=left, color=colour, label=label_text(kind), height=0.6)
        left += widths
    for place, total in enumerate(left):
        share = total / (profile.total_ms or 1)
        axes.annotate(f"{share:.0%}", (total, place), (4, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(names)), [label_text(name) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds of one inference")
    add_legend(axes, 2 if narrow else 6)
    tidy(axes, "x")


def _label(row: Result, narrow: bool) -> str:
    runtime = {"onnxruntime": "ort", "openvino": "ov", "tensorrt": "trt"}.get(row.runtime, row.runtime)
    title = row.title.removeprefix(row.runtime)
    return label_text(f"{runtime}{title.replace(' batch ', ' b')}" if narrow else f"{row.runtime}{title}")


def _colour(row: Result, rows: Sequence[Result]) -> str:
    """One for each runtime and precision."""
    kinds = list(dict.fromkeys((other.runtime, other.precision) for other in rows))
    return SERIES[kinds.index((row.runtime, row.precision)) % len(SERIES)]
