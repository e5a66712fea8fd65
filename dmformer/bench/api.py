"""``dmformer.bench``: rounds of fresh processes, interleaved over the configurations."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from dmformer.bench import DEFAULT_DURATION_S
from dmformer.bench.measure import SAMPLES_FOR, Measurement
from dmformer.bench.report import BenchReport, Result, round_ratios, summarise
from dmformer.bench.worker import Answer, Job
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import select
from dmformer.child import Child
from dmformer.errors import StageFailed, UsageError
from dmformer.machine import check_threads, describe_machine, usable_cores
from dmformer.progress import silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.progress import Stage

ROUNDS = 3
PROCESS_LIMIT_S = 900


def bench(
    bundle: str | Path | Bundle,
    *,
    runtimes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    duration_s: float = DEFAULT_DURATION_S,
    stage: Stage = silent,
) -> BenchReport:
    """Time the runtimes of a bundle on its golden inputs.

    Each configuration runs in :data:`ROUNDS` processes of its own, one round of all configurations after the other, so
    that no runtime disturbs another and a slow minute of the machine hits all of them.

    Args:
        bundle: a bundle's folder.
        runtimes: names of runtimes, or ``all``; otherwise every one that can run on this machine.
        precisions: otherwise every one there is.
        batches: batch sizes.
        threads: for one inference; otherwise all cores.
        duration_s: least time of steady state for each configuration, over all rounds, in seconds.
        stage: told about each round of each configuration.

    Returns:
        A row for each configuration; one whose process failed has the status ``failed``.

    Raises:
        CheckFailed: a file is not what the manifest says.
        UnavailableError: a runtime that was named, or every one, cannot run on this machine.
        UsageError: an argument cannot be used.
    """
    if not batches or min(batches) < 1:
        raise UsageError(f"batch sizes {list(batches)}; expected at least 1")
    if not 0 < duration_s < math.inf:
        raise UsageError(f"duration {duration_s:g} s; expected more than 0")
    check_threads(threads)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    chosen, skipped = select(opened, runtimes, precisions)
    for choice in chosen:
        opened.load_path(choice.artifact)  # a damaged file is found before anything is timed
    planned = [
        Result(
            runtime=choice.entry.name,
            precision=choice.artifact.precision,
            batch=batch,
            threads=threads if threads is not None else usable_cores(),
            artifact_sha256=choice.artifact.sha256,
            status="ok",
        )
        for choice in chosen
        for batch in dict.fromkeys(batches)
    ]
    before = describe_machine()
    runs = [*planned, planned[0]]  # the first one twice, for the noise floor
    answers: list[list[Answer]] = [[] for _ in runs]
    for number in range(1, ROUNDS + 1):
        for run, found in zip(runs, answers, strict=True):
            with stage(f"{run.runtime} {run.precision} batch {run.batch}, round {number} of {ROUNDS}"):
                if not found or found[-1].measurement:  # a configuration that failed is not tried again
                    found.append(_run(opened, run, duration_s, first=not found))
    *results, again = (_result(run, found) for run, found in zip(runs, answers, strict=True))
    return BenchReport(
        environment=before,
        results=tuple(results),
        noise_floor=_noise_floor(results[0], again),
        skipped=tuple(skipped),
    )


def _noise_floor(first: Result, again: Result) -> float | None:
    if "failed" in (first.status, again.status):
        return None
    # The median, as for the ratio of two configurations: one disturbed round of three moves neither.
    return float(np.median([abs(ratio - 1) for ratio in round_ratios(again.samples_ns, first.samples_ns)]))


def _run(bundle: Bundle, result: Result, duration_s: float, *, first: bool) -> Answer:
    """One round in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="dmformer-") as folder:
        answer = Path(folder) / "answer.json"
        job = Job(
            bundle=str(bundle.root.absolute()),
            manifest_sha256=bundle.manifest_sha256,
            runtime=result.runtime,
            precision=result.precision,
            batch=result.batch,
            threads=result.threads,
            duration_s=duration_s / ROUNDS,
            least_calls=-(-SAMPLES_FOR["p90"] // ROUNDS),
            prove_precision=first,
            answer=str(answer),
        )
        try:
            with Child("dmformer.bench.worker") as worker:
                worker.work(msgspec.json.encode(job), PROCESS_LIMIT_S + 2 * job.duration_s)
        except StageFailed as error:
            return Answer(error=str(error))
        try:
            return msgspec.json.decode(answer.read_bytes(), type=Answer)
        except (OSError, msgspec.DecodeError):
            return Answer(error="the process ended without an answer")


def _result(planned: Result, answers: Sequence[Answer]) -> Result:
    for answer in answers:
        if answer.measurement is None:
            return msgspec.structs.replace(planned, status="failed", reason=answer.error)
    rounds: list[Measurement] = [answer.measurement for answer in answers if answer.measurement]
    return summarise(planned, rounds)
