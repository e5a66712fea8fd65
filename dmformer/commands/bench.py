"""``dmformer bench``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.bench import DEFAULT_DURATION_S, DEFAULT_LIMIT_S
from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from dmformer.bench.report import Baseline, BenchReport, Result
    from dmformer.bench.server import LoadReport

_REPORTED = "Reports"
_MOST_ERRORS = 5  # of a row that are shown; the JSON has all


def bench(
    bundle: options.BundleArgument = None,
    runtimes: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="torch, onnxruntime (ort), openvino (ov), tensorrt (trt), ncnn, litert or all. Repeatable.",
        ),
    ] = None,
    precisions: options.PrecisionOption = None,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size; otherwise 1. Repeatable.")
    ] = None,
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="compute (the network alone), end-to-end (image file to classes) or throughput. Repeatable.",
        ),
    ] = None,
    streams: Annotated[
        list[int] | None,
        typer.Option("--streams", min=1, help="Calls under way at once, for throughput; otherwise as many as cores."),
    ] = None,
    threads: options.ThreadsOption = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Images to ask about; otherwise the golden ones.")
    ] = None,
    duration_s: Annotated[
        float, typer.Option("--duration", metavar="S", help="Seconds of steady state for each row, at least.")
    ] = DEFAULT_DURATION_S,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Processes for each row, in turns; otherwise 3.")
    ] = None,
    limit_s: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            metavar="S",
            help="Seconds after which a process is ended, otherwise 120; with --server those that one answer may take, "
            "otherwise 60.",
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where the time goes, too: by operator and by stage of the network.")
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option("--compare", metavar="FILE", help="The JSON of an earlier run.", rich_help_panel=_REPORTED),
    ] = None,
    max_regression: Annotated[
        float | None,
        typer.Option(
            "--max-regression",
            metavar="PERCENT",
            help="With --compare: exit code 1 where a row is slower by more, beyond the noise; otherwise 5.",
            rich_help_panel=_REPORTED,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="Put load on this server: http://HOST:PORT, or grpc://HOST:PORT.",
            rich_help_panel=options.SERVED,
        ),
    ] = None,
    model: options.ServedModelOption = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            "--concurrency",
            metavar="N,N",
            help="Clients that ask at once, a row for each number; otherwise 1,4,16.",
            rich_help_panel=options.SERVED,
        ),
    ] = None,
    json_file: options.JsonOption = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            callback=options.check_report_target,
            help="Write the report as one page that needs no network.",
            rich_help_panel=_REPORTED,
        ),
    ] = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
    cpus: Annotated[list[str] | None, typer.Option("--cpu", hidden=True)] = None,
) -> None:
    """Time a bundle's runtimes: each row in processes of its own, beside what the machine can do at best."""
    from dmformer.bench import api, page
    from dmformer.bench.plan import NO_SPEED, BenchRequest, plan_bench
    from dmformer.bench.sentences import format_duration
    from dmformer.page.svg import check_installed

    if cpus:
        raise UsageError(f"--cpu {cpus[0]}: {NO_SPEED}; expected it with dmformer verify, and bench on the device")
    if server is not None:
        local = (batches, modes, streams, threads, images, rounds, profile, baseline, html, max_regression is not None)
        if any(local):
            raise UsageError(
                "--server with options of runtimes on this machine; expected --model, --concurrency, --runtime, "
                "--precision, --duration, --time-limit or --json with it"
            )
        _bench_server(bundle, server, model, concurrency, runtimes, precisions, duration_s, limit_s, json_file)
        return
    if model is not None or concurrency is not None:
        raise UsageError("--model or --concurrency without --server; expected the address of the server")
    if html is not None:
        check_installed()
    earlier = _baseline(baseline, max_regression)
    request = BenchRequest(
        runtimes=runtimes or [],
        precisions=precisions or [],
        batches=batches or [1],
        modes=modes or [],
        streams=streams or [],
        threads=threads,
        rounds=rounds or api.ROUNDS,
        duration_s=duration_s,
        limit_s=DEFAULT_LIMIT_S if limit_s is None else limit_s,
        images=images,
        profile=profile,
    )
    plan = plan_bench(options.find_bundle(bundle), request)
    if earlier is not None:
        earlier.check_model(plan.bundle.manifest.model.arch)
    about, most = format_duration(plan.expected_s), format_duration(plan.longest_s)
    present.say(f"{plan.processes} processes, about {about}, at most {most}")
    with present.stages() as shown:
        report = api.run_plan(plan, shown.stage, baseline=earlier, command=shlex.join(["dmformer", *sys.argv[1:]]))
    present.write_json(report, json_file)
    if html is not None:
        present.write_report(html, page.render(report, plan.bundle.manifest).encode())
    _show(report, json_file)
    if report.partial:
        raise KeyboardInterrupt
    if earlier is not None:
        earlier.judge(report)
    report.check_rows()


def _bench_server(
    bundle: Path | None,
    url: str,
    model: str | None,
    concurrency: str | None,
    runtimes: list[str] | None,
    precisions: list[str] | None,
    duration_s: float,
    limit_s: float | None,
    json_file: str | None,
) -> None:
    """Put load on a server, and show what it came to."""
    from dmformer.bench.server import CONCURRENCY, bench_server
    from dmformer.serve.client import LIMIT_S

    if precisions is not None and len(precisions) > 1:
        raise UsageError(f"--precision {' '.join(precisions)} with --server; expected one")
    counts = options.parse_numbers(concurrency, "--concurrency")
    if any(count % 1 != 0 for count in counts or ()):  # infinity and NaN have a rest that is NaN
        raise UsageError(f"--concurrency {concurrency}; expected whole numbers, for instance 1,4,16")
    opened = options.find_bundle(bundle)
    with present.stages() as shown:
        report = bench_server(
            opened,
            url,
            model=model,
            concurrency=CONCURRENCY if counts is None else [int(count) for count in counts],
            duration_s=duration_s,
            runtimes=runtimes or [],
            precision=precisions[0] if precisions else None,
            limit_s=LIMIT_S if limit_s is None else limit_s,
            command=shlex.join(["dmformer", *sys.argv[1:]]),
            stage=shown.stage,
        )
    present.write_json(report, json_file)
    present.show(_load_table(report), json_file)
    for row in report.rows:
        for reason, count in list(row.errors.items())[:_MOST_ERRORS]:
            present.say(f"{row.title}: {count} requests failed: {reason}")
        if len(row.errors) > _MOST_ERRORS:
            present.say(f"{row.title}: … and {len(row.errors) - _MOST_ERRORS} more")
    for note in report.notes:
        present.say(note)
    if report.partial:
        raise KeyboardInterrupt
    report.check_rows()


def _load_table(report: LoadReport) -> Table:
    from dmformer.bench.sentences import digits

    figures = ["clients", "answered", "failed", "p50 ms", "p90 ms", "p99 ms", "img/s", "client ms", "client cores"]
    title = f"Load on {report.server}, one image a request, {report.duration_s:g} s a row"
    listing = present.table(title, ["model", *figures, "status"], numeric=figures)
    for row in report.rows:
        timed = row.latency_ms
        wrong = f"{row.mixed_up} mixed up" if row.mixed_up else "failed"
        cells: list[str | Text] = [
            row.model,
            str(row.concurrency),
            str(row.answered),
            str(row.failed),
            *(digits(getattr(timed, name) if timed else None) for name in ("p50", "p90", "p99")),
            digits(row.throughput_ips),
            digits(row.client_cpu_ms),
            f"{row.client_cores:.2f}",
            present.mark(not row.failed and not row.mixed_up, wrong),
        ]
        present.add_row(listing, cells)
    return listing


def _baseline(path: str | None, max_regression: float | None) -> Baseline | None:
    """An earlier run, read and checked before this one begins."""
    from dmformer.bench.report import DEFAULT_REGRESSION, Baseline

    if path is not None:
        return Baseline.read(path, DEFAULT_REGRESSION if max_regression is None else max_regression / 100)
    if max_regression is not None:
        raise UsageError("--max-regression without a baseline; expected --compare FILE with it")
    return None


def _show(report: BenchReport, json_file: str | None) -> None:
    from dmformer.bench import sentences

    present.show(_table(report), json_file)
    for line in sentences.summary(report):
        present.show(line, json_file)
    for line in sentences.remarks(report):
        present.say(line)


def _place(row: Result) -> tuple[object, ...]:
    """The quickest first, what has no figures last."""
    return row.mode, row.streams, row.batch, row.call_ms if row.call_ms is not None else float("inf")


def _table(report: BenchReport) -> Table:
    from dmformer.bench.sentences import digits
    from dmformer.runtimes.inspector import describe_layers

    several = any(row.mode != "compute" for row in report.results)
    columns = ["runtime", *(["mode"] if several else []), "batch"]
    columns += ["p50 ms", "p90 ms", "img/s", "of limit", "load ms", "first ms", "MiB"]
    first = report.results[0]
    cores = f"{first.cores} threads" if first.cores > 1 else "1 thread"
    left_out = "" if several else ", preprocessing left out"
    processes = "1 process" if report.rounds == 1 else f"{report.rounds} processes"
    stopped = ", stopped before the end" if report.partial else ""
    title = f"Latency of {report.arch}{left_out}, {cores}, {processes} a row{stopped}"
    listing = present.table(title, [*columns, "computes", "status"], numeric=columns[2 if several else 1 :])
    for row in sorted(report.results, key=_place):
        timed = row.latency_ms
        mode = f"throughput, {row.streams}" if row.mode == "throughput" else row.mode
        figures = (row.load_ms, row.first_inference_ms, row.peak_rss_mb)
        cells: list[str | Text] = [
            f"{row.runtime} {row.precision}",
            *([mode] if several else []),
            str(row.batch),
            digits(timed.p50 if timed else None),
            digits(timed.p90 if timed else None),
            digits(row.throughput_ips),
            "-" if row.share_of_limit is None else f"{row.share_of_limit:.0%}",
            *(digits(figure) for figure in figures),
            describe_layers(row.layers),
            present.mark(row.status == "ok", row.status),
        ]
        present.add_row(listing, cells)
    return listing
