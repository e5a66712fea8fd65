"""``dmformer tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present

if TYPE_CHECKING:
    from rich.table import Table

    from dmformer.tuning.report import Candidate, TuneReport


def tune(
    bundle: options.BundleArgument = None,
    max_latency: Annotated[
        float | None, typer.Option("--max-latency", metavar="MS", min=0, help="Nine calls in ten take at most that.")
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option("--max-memory", metavar="MIB", min=0, help="Resident memory of the whole process, at most."),
    ] = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            "--max-accuracy-drop", metavar="POINTS", min=0, help="Percentage points lost against PyTorch, at most."
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option("--objective", metavar="NAME", help="latency (of one call) or throughput (images a second)."),
    ] = "latency",
    runtimes: options.RuntimeOption = None,
    precisions: options.PrecisionOption = None,
    threads: Annotated[
        list[int] | None,
        typer.Option("--threads", min=1, help="Of one inference; otherwise from 1 to all cores. Repeatable."),
    ] = None,
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Batch size; otherwise 1, for throughput 4 and 8 too. Repeatable."),
    ] = None,
    streams: Annotated[
        list[int] | None,
        typer.Option("--streams", min=1, help="Calls under way at once, for throughput. Repeatable."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Labelled images for accuracy; otherwise the bundle's evidence."),
    ] = None,
    write: Annotated[
        bool,
        typer.Option("--write", help="Keep the choice beside the bundle, for predict and dmformer.load here."),
    ] = False,
    json_file: options.JsonOption = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Find what this machine runs a bundle with best: runtime, precision, threads and batch, within a budget."""
    from dmformer.bundle.settings import settings_path
    from dmformer.tuning.api import tune as run_tune

    opened = options.find_bundle(bundle)
    with present.stages() as shown:
        report = run_tune(
            opened,
            max_latency=max_latency,
            max_memory=max_memory,
            max_accuracy_drop=max_accuracy_drop,
            objective=objective,
            runtimes=runtimes or [],
            precisions=precisions or [],
            threads=threads or [],
            batches=batches or [],
            streams=streams or [],
            data=data,
            write=write,
            stage=shown.stage,
        )
    present.write_json(report, json_file)
    _show(report, json_file)
    if report.partial:
        raise KeyboardInterrupt
    report.check()
    if write:
        present.say(f"kept for this machine: {settings_path(opened)}")


def _show(report: TuneReport, json_file: str | None) -> None:
    present.show(_table(report), json_file)
    if report.chosen is not None:
        best = report.candidates[report.chosen]
        ties = [report.candidates[place].label for place in report.ties]
        as_fast = f" As fast, within the noise: {'; '.join(ties)}." if ties else ""
        present.show(f"Best for {report.objective} on this machine: {best.label}.{as_fast}", json_file)
    if report.noise_floor is not None:
        present.show(f"Noise floor {report.noise_floor:.1%}: smaller differences are ties.", json_file)
    for line in (*report.skipped, *report.notes):
        present.say(line)


def _table(report: TuneReport) -> Table:
    from dmformer.bench.sentences import digits

    energy = any(one.energy_mj is not None for one in report.candidates)
    figures = ["p50 ms", "p90 ms", "img/s", "memory MiB", "files MB", "points lost", *(["mJ a call"] if energy else [])]
    title = f"Configurations of {report.arch} on this machine, {report.objective}; * no other is better in everything"
    listing = present.table(title, ["configuration", *figures, "timed", "verdict"], numeric=figures)
    for place, one in enumerate(report.candidates):
        cells = [
            one.label + (" *" if one.on_front else ""),
            digits(one.p50_ms),
            digits(one.p90_ms),
            digits(one.images_per_s),
            digits(one.memory_mb),
            digits(one.size_bytes / 1e6),
            "-" if one.points_lost is None else f"{one.points_lost:.2f}",
            *([digits(one.energy_mj)] if energy else []),
            "as bench does" if one.final else "briefly",
            _standing(report, place, one),
        ]
        present.add_row(listing, cells)
    return listing


def _standing(report: TuneReport, place: int, one: Candidate) -> str:
    if place == report.chosen:
        return "best" if one.status == "ok" else f"best; {one.status}: {one.reason}"
    if one.p50_ms is None:
        return f"{one.status}: {one.reason}" if one.reason else one.status
    if one.over_budget:
        return "; ".join(one.over_budget)
    return (
        "as fast"
        if place in report.ties
        else "slower"
        if one.final
        else "not compared"
        if report.partial
        else "left early"
    )
