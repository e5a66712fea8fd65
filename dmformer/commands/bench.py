"""``dmformer bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.bench import DEFAULT_DURATION_S
from dmformer.commands import _present as present
from dmformer.errors import StageFailed

if TYPE_CHECKING:
    from rich.text import Text

    from dmformer.bench.report import BenchReport


def bench(
    bundle: present.BundleArgument = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="torch, onnxruntime (ort), openvino (ov), tensorrt (trt) or all. Repeatable.",
        ),
    ] = None,
    precision: present.PrecisionOption = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size; otherwise 1. Repeatable.")
    ] = None,
    threads: present.ThreadsOption = None,
    duration: Annotated[
        float, typer.Option("--duration", metavar="S", help="Seconds of steady state for each row, at least.")
    ] = DEFAULT_DURATION_S,
    json_file: present.JsonOption = None,
) -> None:
    """Time a bundle's runtimes: each row in processes of its own, load and first inference apart."""
    from dmformer.bench.api import ROUNDS
    from dmformer.bench.api import bench as run_bench

    present.check_json_target(json_file)
    opened = present.bundle_named(bundle)
    with present.stages() as shown:
        report = run_bench(
            opened,
            runtimes=runtime or [],
            precisions=precision or [],
            batches=batch or [1],
            threads=threads,
            duration_s=duration,
            stage=shown.stage,
        )
    _show(report, opened.manifest.model.arch, ROUNDS, json_file)
    present.write_json(report, json_file)
    failed = [result for result in report.results if result.status == "failed"]
    if failed:
        raise StageFailed(f"{len(failed)} of {len(report.results)} rows failed; first: {failed[0].reason}")


def _show(report: BenchReport, arch: str, rounds: int, json_file: str | None) -> None:
    from dmformer.runtimes.layers import describe

    columns = [
        "runtime",
        "batch",
        "p50 ms",
        "p90 ms",
        "images/s",
        "load ms",
        "first ms",
        "MiB",
        "samples",
        "computes",
        "status",
    ]
    threads = report.results[0].threads
    title = f"Latency of {arch}, preprocessing left out, {threads} threads, {rounds} processes a row"
    listing = present.table(title, columns, numeric=columns[1:9])
    for row in sorted(report.results, key=lambda row: (row.batch, row.latency_ms.mean if row.latency_ms else 0.0)):
        timed = row.latency_ms
        cells: list[str | Text] = [
            f"{row.runtime} {row.precision}",
            str(row.batch),
            present.three_digits(timed.p50 if timed else None),
            present.three_digits(timed.p90 if timed else None),
            present.three_digits(row.throughput_ips),
            present.three_digits(row.load_ms),
            present.three_digits(row.first_inference_ms),
            present.three_digits(row.peak_rss_mb),
            str(row.samples),
            describe(row.layers),
            present.mark(row.status == "ok", row.status),
        ]
        present.add_row(listing, cells)
    present.show(listing, json_file)
    for row in report.results:
        if row.device_latency_ms is not None:
            alone = row.device_latency_ms
            present.show(
                f"{row.runtime} {row.precision} batch {row.batch}, on the GPU alone (events, no transfers): "
                f"p50 {present.three_digits(alone.p50)} ms, p90 {present.three_digits(alone.p90)} ms",
                json_file,
            )
            for state in row.gpu[-1:]:
                said = ", ".join(f"{name} {value}" for name, value in state.items() if value is not None)
                present.show(f"after it: {said}", json_file)
    if report.noise_floor is not None:
        present.show(
            f"noise floor {report.noise_floor:.1%}: {report.results[0].runtime} {report.results[0].precision} against "
            "itself in this run; smaller differences are ties",
            json_file,
        )
    machine = report.environment
    present.show(f"{machine['cpu']}, {machine['cores']} cores, {machine['os']}", json_file)
    for reason in report.skipped:
        present.say(f"not timed: {reason}")
    for row in report.results:
        if row.reason:
            present.say(f"{row.runtime} {row.precision} batch {row.batch}: {row.reason}")
