"""A report as one page that needs no network: pictures first, then the figures, then what they were measured with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dmformer._optional import require
from dmformer.bench import plots, words
from dmformer.bench.words import digits

if TYPE_CHECKING:
    from dmformer.bench.plots import Draw
    from dmformer.bench.report import BenchReport, Result
    from dmformer.bundle.manifest import Manifest


class Picture(Struct, frozen=True, kw_only=True):
    """A drawing for wide pages and one for narrow ones."""

    title: str
    caption: str
    wide: str
    narrow: str


class Table(Struct, frozen=True, kw_only=True):
    """Figures."""

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
    for module in ("matplotlib", "jinja2"):
        require(module, extra="report", purpose="--html")


def render(report: BenchReport, manifest: Manifest) -> str:
    """The page.

    Args:
        report: what was measured.
        manifest: of the bundle that it was measured on.
    """
    jinja2: Any = require("jinja2", extra="report", purpose="--html")
    template = resources.files("dmformer.bench").joinpath("page.html").read_text(encoding="utf-8")
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    text: str = made.render(
        report=report,
        verdicts=[*words.verdicts(report), *words.comparison(report)],
        figures=_pictures(report, manifest),
        tables=_tables(report),
    )
    return text


def _pictures(report: BenchReport, manifest: Manifest) -> list[Picture]:
    timed = [row for row in report.results if row.timed]
    found = []
    if timed:
        caption = (
            "Every call of every process; the box holds half of them, the whiskers nine in ten. Dotted: the least "
            "that this machine's limits admit."
        )
        found.append(_picture("Latency", caption, plots.latencies(report), 1.2 + 0.75 * len(timed)))
    if (tradeoff := plots.tradeoffs(report, manifest)) is not None:
        caption = "Below and to the left is better; the dotted line joins what no other artifact beats in both."
        found.append(_picture("What speed costs", caption, tradeoff, 3.6, narrow_height_in=6.5))
    if report.limits is not None and any(row.attainable_ms is not None for row in timed):
        caption = (
            f"How far each row is below what the machine can do: {words.limits(report)}. Bytes are those of "
            "weights, input and output."
        )
        found.append(_picture("Roofline", caption, plots.roofline(report), 4.6))
    for row in timed:
        if row.profile is not None:
            caption = words.profile(row, row.profile)
            found.append(_picture(f"Where the time goes: {row.title}", caption, plots.stages(row.profile), 3.2))
    return found


def _picture(title: str, caption: str, draw: Draw, height_in: float, narrow_height_in: float | None = None) -> Picture:
    return Picture(
        title=title,
        caption=caption,
        wide=plots.svg(draw, height_in, narrow=False),
        narrow=plots.svg(draw, narrow_height_in or height_in, narrow=True),
    )


def _tables(report: BenchReport) -> list[Table]:
    columns = [
        "row", "p50 ms", "p90 ms", "p99 ms", "mean ms", "max ms", "images/s", "samples", "load ms", "first ms", "MiB",
        "limit ms", "of limit", "status",
    ]  # fmt: skip
    environment = dict(report.environment)
    versions = environment.pop("versions", {})
    told = [(name.replace("_", " "), _plain(value)) for name, value in environment.items() if value is not None]
    told += [(str(name), str(version)) for name, version in dict(versions).items()]
    if report.images is not None:
        told.append(("images", report.images))
    found = [
        Table(
            title="Figures",
            caption="A percentile without enough samples is not given. " + (words.noise(report) or ""),
            columns=columns,
            rows=[_figures(row) for row in report.results],
            text_last=True,
        ),
        Table(title="Measured with", rows=told, text_last=True),
    ]
    if remarks := words.remarks(report):
        found.append(Table(title="To be known", rows=[[remark] for remark in remarks], text_last=True))
    return found


def _figures(row: Result) -> list[str]:
    timed = row.latency_ms
    percentiles = (timed.p50, timed.p90, timed.p99, timed.mean, timed.max) if timed else (None,) * 5
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
