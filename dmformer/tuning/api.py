"""``dmformer.tune``: what is tried, and what accuracy it loses."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dmformer.bench.plan import NO_SPEED, BenchRequest, plan_bench
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.settings import check_writable, machine_key, write_settings
from dmformer.errors import UnavailableError, UsageError
from dmformer.machine import check_threads, describe_machine, is_emulated, usable_cores
from dmformer.progress import silent
from dmformer.tuning.report import OBJECTIVES, Budget, TuneReport
from dmformer.tuning.search import Search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bench.plan import BenchPlan, Configuration, Mode
    from dmformer.bundle.manifest import Accuracy
    from dmformer.progress import Progress
    from dmformer.tuning.report import Objective

_BATCHES = {"latency": (1,), "throughput": (1, 4, 8)}


def tune(
    bundle: str | Path | Bundle,
    *,
    max_latency: float | None = None,
    max_memory: float | None = None,
    max_accuracy_drop: float | None = None,
    objective: str = "latency",
    runtimes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    threads: Sequence[int] = (),
    batches: Sequence[int] = (),
    streams: Sequence[int] = (),
    data: str | Path | None = None,
    write: bool = False,
    stage: Progress = silent,
) -> TuneReport:
    """Find the fastest configuration of a bundle on this machine within a budget.

    Args:
        bundle: a bundle's folder.
        max_latency: of nine calls in ten, in milliseconds.
        max_memory: largest resident memory of the process, Python included, in MiB.
        max_accuracy_drop: of accuracy against PyTorch, in percentage points.
        objective: ``latency``, the time of one call, or ``throughput``, images a second.
        runtimes: names of runtimes, or ``all``; otherwise every one that can run on this machine.
        precisions: otherwise every one there is.
        threads: for one inference; otherwise one, all cores, and the powers of two between.
        batches: batch sizes; otherwise 1, and for throughput 4 and 8 too.
        streams: calls under way at once, for throughput; otherwise 1, and the powers of two up to the cores.
        data: folder of labelled images to measure accuracy on; otherwise the bundle's evidence tells.
        write: keep the choice in the machine's settings beside the bundle, for ``predict`` and :func:`dmformer.load`.
        stage: told about the work.

    Returns:
        A row for each configuration; ``chosen`` is ``None`` where none is within the budget.

    Raises:
        CheckFailed: a file is not what the manifest says.
        StageFailed: accuracy could not be measured, or the settings not be written.
        UnavailableError: a runtime that was named, or every one, cannot run on this machine.
        UsageError: an argument cannot be used.
    """
    budget = Budget(latency_ms=max_latency, memory_mb=max_memory, accuracy_drop=max_accuracy_drop)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    wanted = _checked(objective, budget)
    plan = plan_candidates(
        opened,
        wanted,
        runtimes=runtimes,
        precisions=precisions,
        threads=threads,
        batches=batches,
        streams=streams,
    )
    begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
    environment = describe_machine()
    if write:
        check_writable(opened)
    measured, notes = _measure_points(opened, plan, data, stage) if data is not None else ({}, ())
    search = Search(plan, wanted, budget, measured, stage)
    search.run()
    report = TuneReport(
        arch=opened.manifest.model.arch,
        manifest_sha256=opened.manifest_sha256,
        machine=machine_key(),
        environment=environment,
        objective=wanted,
        budget=budget,
        measured_at=begun,
        skipped=plan.skipped,
        notes=(*plan.notes, *(search.last.notes if search.last is not None else ()), *notes),
        **search.outcome(),
    )
    if write and report.chosen is not None:
        write_settings(opened, report.settings())
    return report


def _checked(objective: str, budget: Budget) -> Objective:
    """Return the objective.

    Raises:
        UsageError: there is no such objective, or a budget cannot be meant.
    """
    for name, value in (
        ("max_latency", budget.latency_ms),
        ("max_memory", budget.memory_mb),
        ("max_accuracy_drop", budget.accuracy_drop),
    ):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"`{name}` {value:g}; expected a number from 0")
    for known in OBJECTIVES:
        if objective == known:
            return known
    raise UsageError(f"objective {objective!r}; expected one of {', '.join(OBJECTIVES)}")


def plan_candidates(
    bundle: Bundle,
    objective: Objective,
    *,
    runtimes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    threads: Sequence[int] = (),
    batches: Sequence[int] = (),
    streams: Sequence[int] = (),
) -> BenchPlan:
    """Return a plan whose rows are all candidates; the arguments are those of :func:`tune`.

    Raises:
        UnavailableError: a runtime that was named, or every one, cannot run on this machine; or it is emulated.
        UsageError: an argument cannot be used.
    """
    if is_emulated():
        raise UnavailableError(f"{NO_SPEED}; expected the device")
    if streams and objective != "throughput":
        raise UsageError("`streams` for one call at a time; expected `objective` throughput with it")
    cores = usable_cores()
    for count in streams:
        if not 1 <= count <= cores:
            raise UsageError(f"`streams` {count}; expected 1 to {cores}, a core for each at least")
    doubling = sorted({*(1 << power for power in range(cores.bit_length()) if 1 << power <= cores), cores})
    request = BenchRequest(runtimes=runtimes, precisions=precisions, batches=batches or _BATCHES[objective], brief=True)
    plan = plan_bench(bundle, request)
    rows: dict[Configuration, None] = {}
    for count in [1] if objective == "latency" else (streams or doubling):
        mode: Mode = "throughput" if count > 1 else "compute"
        for number in threads or (doubling if count == 1 else [max(1, cores // count)]):
            check_threads(number * count)
            rows.update(
                (msgspec.structs.replace(row, threads=number, streams=count, mode=mode), None)
                for row in plan.configurations
            )
    return replace(plan, configurations=tuple(rows))


def _measure_points(
    bundle: Bundle, plan: BenchPlan, data: str | Path, stage: Progress
) -> tuple[dict[tuple[str, str], float], tuple[str, ...]]:
    """Return the points that each runtime and precision loses on labelled images, against PyTorch or else float32.

    And what is to be known of these images.

    Raises:
        UsageError: the images have no labels, and there is nothing to agree with.
    """
    from dmformer.verify.evaluate import evaluate
    from dmformer.verify.tasks import measure_of

    pairs = {(row.runtime, row.precision) for row in plan.configurations}
    precisions = {"fp32", *(precision for _, precision in pairs)} & {one.precision for one in bundle.manifest.artifacts}
    report = evaluate(
        bundle, data, runtimes=sorted({name for name, _ in pairs}), precisions=sorted(precisions), stage=stage
    )
    reference = report.torch or next((row for row in report.results if row.precision == "fp32"), None)
    if reference is None:
        raise UsageError(
            f"{str(data)!r}: nothing tells what accuracy is lost; expected an artifact at fp32 or the torch format "
            "in the bundle, beside what is tuned"
        )
    if report.torch is not None:
        measure = measure_of(bundle.manifest.model.task, bundle.manifest.class_count)
        lost = {(row.runtime, row.precision): measure.points_lost(row, report.torch) for row in report.results}
    else:  # rounded, for shares of so many images are no binary fractions
        lost = {
            (row.runtime, row.precision): round(100 * (_share(reference) - _share(row)), 9) for row in report.results
        }
    return lost, (*report.notes, *report.skipped)


def _share(accuracy: Accuracy) -> float:
    """Return the share of right answers: of images, or over the classes of pixels."""
    share = accuracy.top1 if accuracy.top1 is not None else accuracy.miou
    assert share is not None  # eval refuses images without labels where there is no PyTorch to agree with
    return share
