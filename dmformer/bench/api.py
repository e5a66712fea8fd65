"""``dmformer.bench``: rounds of fresh processes, interleaved over the configurations."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from dmformer.bench import DEFAULT_DURATION_S, DEFAULT_LIMIT_S, DEFAULT_ROUNDS
from dmformer.bench import limits as machine_limits
from dmformer.bench.limits import Limits, environment_for, least_work
from dmformer.bench.plan import Plan, Request, plan_bench
from dmformer.bench.report import BenchReport, Result, median_limits, standings, summarise
from dmformer.bench.statistics import noise_floor
from dmformer.bench.worker import Answer, Job
from dmformer.errors import StageFailed
from dmformer.machine import describe_machine
from dmformer.process import Child
from dmformer.progress import silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bench.plan import Configuration
    from dmformer.bundle.reader import Bundle
    from dmformer.progress import Advance, Progress

ROUNDS = DEFAULT_ROUNDS
_KILL_AFTER = 2  # times the limit of a process's calls: what loads longer than it may call is stuck

Told = TypeVar("Told", Answer, machine_limits.Answer)


def bench(
    bundle: str | Path | Bundle,
    *,
    runtimes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    modes: Sequence[str] = (),
    streams: Sequence[int] = (),
    threads: int | None = None,
    rounds: int | None = None,
    duration_s: float = DEFAULT_DURATION_S,
    limit_s: float = DEFAULT_LIMIT_S,
    images: str | Path | None = None,
    profile: bool = False,
    brief: bool = False,
    stage: Progress = silent,
) -> BenchReport:
    """Time the runtimes of a bundle.

    Each configuration runs in several processes of its own, one round of all configurations after the other, so that
    no runtime disturbs another and a slow minute of the machine hits all of them. What the machine can do at best is
    measured in each round too.

    Args:
        bundle: a bundle's folder.
        runtimes: names of runtimes, or ``all``; otherwise every one that can run on this machine.
        precisions: otherwise every one there is.
        batches: batch sizes.
        modes: out of :data:`dmformer.bench.plan.MODES`; otherwise ``compute``.
        streams: calls under way at once, for the mode ``throughput``; otherwise one for each core.
        threads: for one inference, or for all streams together; otherwise all cores.
        rounds: otherwise :data:`ROUNDS`.
        duration_s: least time of steady state for each configuration, over all rounds, in seconds.
        limit_s: seconds after which a process is ended.
        images: folder of images to ask about; otherwise the bundle's golden images.
        profile: whether to find out where the time goes, too.
        brief: take a short warm-up and few calls, enough for a median, and leave out the machine's limits.
        stage: told about the run; it advances with each process.

    Returns:
        A row for each configuration; one whose process failed has the status ``failed``. After Ctrl-C what the rounds
        that finished gave, marked partial.

    Raises:
        CheckFailed: a file is not what the manifest says.
        UnavailableError: a runtime that was named, or every one, cannot run on this machine.
        UsageError: an argument cannot be used.
    """
    request = Request(
        runtimes=runtimes,
        precisions=precisions,
        batches=batches,
        modes=modes,
        streams=streams,
        threads=threads,
        rounds=ROUNDS if rounds is None else rounds,
        duration_s=duration_s,
        limit_s=limit_s,
        images=images,
        profile=profile,
        brief=brief,
    )
    return run(plan_bench(bundle, request), stage)


@dataclass
class _Found:
    """What the processes of a run gave so far; the last list of answers is of the twin, timed once more."""

    answers: list[list[Answer]]
    limits: list[Limits | None] = field(default_factory=list)
    profiles: dict[int, Answer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    partial: bool = False


def run(plan: Plan, stage: Progress = silent) -> BenchReport:
    """Carry a plan out; see :func:`bench`."""
    environment = describe_machine()
    begun = datetime.now(timezone.utc)
    found = _Found([[] for _ in range(len(plan.configurations) + 1)])
    with tempfile.TemporaryDirectory(prefix="dmformer-") as folder:
        work = _Work(plan, Path(folder))
        name = f"timing, {plan.processes} processes"
        with stage(name, plan.processes) as advance:
            try:
                _fill(found, work, advance)
            except KeyboardInterrupt:
                found.partial = True
    return _report(plan, found, environment, begun)


def _fill(found: _Found, work: _Work, advance: Advance) -> None:
    plan = work.plan
    for number in range(plan.rounds):
        if all(answers and answers[-1].error for answers in found.answers[:-1]):
            break
        if not plan.brief:
            told = work.limits()
            found.limits.append(told.limits)
            note = f"the machine's limits were not measured: {told.error}"
            if told.error and note not in found.notes:
                found.notes.append(note)
            advance()
        again = False
        for place in plan.order(number):
            answers = found.answers[-1 if place == plan.twin and again else place]
            again = again or place == plan.twin
            failed = any(told.error for told in (*answers, *found.answers[place]))
            if not failed:  # a configuration that failed is not tried again
                answers.append(work.measure(plan.configurations[place], first=not answers))
            advance()
    for place in plan.profiled:
        if found.answers[place][-1].measurement:
            found.profiles[place] = work.profile(plan.configurations[place])
        advance()


class _Work:
    """Starts the processes of a run."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.answer = folder / "answer.json"
        self.images = tuple(str(path.absolute()) for path in plan.images)
        if not self.images and any(row.mode == "end-to-end" for row in plan.configurations):
            self.images = self._golden_images()
        self.cores = max(row.cores for row in plan.configurations)
        peaks = ((row.runtime, row.precision) for row in plan.configurations if row.precision != "fp32")
        self.peaks = tuple(dict.fromkeys(peaks))

    def limits(self) -> machine_limits.Answer:
        """The machine's limits, now."""
        order = machine_limits.Order(threads=self.cores, peaks=self.peaks, answer=str(self.answer))
        return self._ask("dmformer.bench.limits", order, machine_limits.Answer, environment_for(self.cores))

    def measure(self, row: Configuration, *, first: bool) -> Answer:
        """One round of one configuration; the first one proves the precision."""
        return self._work(row, prove_precision=first, profile=False)

    def profile(self, row: Configuration) -> Answer:
        """Where its time goes."""
        return self._work(row, prove_precision=False, profile=True)

    def _work(self, row: Configuration, *, prove_precision: bool, profile: bool) -> Answer:
        plan = self.plan
        job = Job(
            bundle=str(plan.bundle.root.absolute()),
            manifest_sha256=plan.bundle.manifest_sha256,
            configuration=row,
            images=self.images,
            duration_s=plan.duration_s / plan.rounds,
            least_calls=plan.least_calls,
            limit_s=plan.limit_s / _KILL_AFTER,
            prove_precision=prove_precision,
            brief=plan.brief,
            profile=profile,
            answer=str(self.answer),
        )
        return self._ask("dmformer.bench.worker", job, Answer)

    def _ask(
        self,
        module: str,
        order: msgspec.Struct,
        kind: type[Told],
        environment: dict[str, str] | None = None,
    ) -> Told:
        self.answer.unlink(missing_ok=True)  # of the process before
        try:
            with Child(module, environment=environment) as child:
                child.work(msgspec.json.encode(order), self.plan.limit_s)
        except StageFailed as error:
            return kind(error=str(error))
        try:
            return msgspec.json.decode(self.answer.read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError):
            return kind(error="the process ended without an answer")

    def _golden_images(self) -> tuple[str, ...]:
        from PIL import Image

        found = []
        for number, pixels in enumerate(self.plan.bundle.golden().images):
            path = self.folder / f"{number}.png"
            Image.fromarray(pixels.squeeze()).save(path)
            found.append(str(path))
        return tuple(found)


def _report(plan: Plan, found: _Found, environment: dict[str, object], begun: datetime) -> BenchReport:
    manifest = plan.bundle.manifest
    artifacts = {artifact.sha256: artifact for artifact in manifest.artifacts}
    results = []
    for place, (row, answers) in enumerate(zip(plan.configurations, found.answers, strict=False)):
        work = least_work(manifest, artifacts[row.artifact_sha256], row.batch)
        result = _result(row, answers, found.limits, work)
        if (told := found.profiles.get(place)) is not None:
            result = msgspec.structs.replace(result, profile=told.profile, profile_reason=told.error)
        results.append(result)
    twin, again = results[plan.twin], _result(plan.configurations[plan.twin], found.answers[-1], (), None)
    noise = noise_floor(twin.call_ns, again.call_ns) if twin.timed and again.timed else None
    if twin.timed and again.status == "failed":
        found.notes.append(f"no noise floor: {twin.title}, timed once more, failed: {again.reason}")
    return BenchReport(
        environment=environment,
        results=tuple(results),
        limits=median_limits(found.limits),
        noise_floor=noise,
        twin=plan.twin,
        standings=standings(results, noise),
        rounds=plan.rounds,
        partial=found.partial,
        arch=manifest.model.arch,
        measured_at=begun.isoformat(timespec="seconds"),
        images=f"{len(plan.images)} files, the first {plan.images[0]}" if plan.images else None,
        skipped=plan.skipped,
        notes=(*plan.notes, *found.notes),
    )


def _result(
    row: Configuration,
    answers: Sequence[Answer],
    limits: Sequence[Limits | None],
    work: tuple[float, float] | None,
) -> Result:
    planned = Result(**msgspec.structs.asdict(row), status="not run")
    for answer in answers:
        if answer.measurement is None:
            return msgspec.structs.replace(planned, status="failed", reason=answer.error)
    rounds = [answer.measurement for answer in answers if answer.measurement]
    if not rounds:
        return msgspec.structs.replace(planned, reason="stopped before its first round ended")
    return summarise(planned, rounds, limits, work)
