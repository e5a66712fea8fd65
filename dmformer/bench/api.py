"""``dmformer.bench``: rounds of fresh processes, interleaved over the configurations."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from dmformer.bench import DEFAULT_DURATION_S, DEFAULT_LIMIT_S, DEFAULT_ROUNDS
from dmformer.bench.limits import Limits, LimitsOrder, environment_for, least_work
from dmformer.bench.measure import Measurement
from dmformer.bench.plan import BenchPlan, BenchRequest, TimingOrder, plan_bench
from dmformer.bench.profile import Profile
from dmformer.bench.report import BenchReport, Result, median_limits, standings, summarise
from dmformer.bench.statistics import noise_floor
from dmformer.errors import DMFormerError
from dmformer.machine import describe_machine
from dmformer.process import call
from dmformer.progress import silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bench.plan import Configuration
    from dmformer.bench.report import Baseline
    from dmformer.bundle.reader import Bundle
    from dmformer.progress import Advance, Progress

ROUNDS = DEFAULT_ROUNDS
_KILL_AFTER = 2  # times the limit of a process's calls: what loads longer than it may call is stuck

T = TypeVar("T")
RoundResult = Measurement | DMFormerError


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
    request = BenchRequest(
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
    return run_plan(plan_bench(bundle, request), stage)


@dataclass
class _Run:
    """A run under way: how its processes are started, and what they gave so far.

    Attributes:
        plan: what to do.
        folder: for files that do not outlive the run.
        timed: rounds of each configuration, and at the end of the twin, timed once more.
        limits: of the machine, in each round.
        profiles: by place of the configuration.
        notes: what else is to be known.
        partial: whether it was stopped.
    """

    plan: BenchPlan
    folder: Path
    timed: list[list[RoundResult]] = field(init=False)
    limits: list[Limits | None] = field(default_factory=list)
    profiles: dict[int, Profile | DMFormerError] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    partial: bool = False

    def __post_init__(self) -> None:
        rows = self.plan.configurations
        self.timed = [[] for _ in range(len(rows) + 1)]
        self.images = tuple(str(path.absolute()) for path in self.plan.images)
        if not self.images and any(row.mode == "end-to-end" for row in rows):
            self.images = self._golden_images()

    def carry_out(self, advance: Advance) -> None:
        """Start one process after the other."""
        plan = self.plan
        for number in range(plan.rounds):
            if all(rounds and isinstance(rounds[-1], DMFormerError) for rounds in self.timed[:-1]):
                break
            if not plan.brief:
                self._measure_limits()
                advance()
            again = False
            for place in plan.order(number):
                rounds = self.timed[-1 if place == plan.twin and again else place]
                again = again or place == plan.twin
                if not any(isinstance(each, DMFormerError) for each in (*rounds, *self.timed[place])):
                    # The first round proves the precision.
                    order = self._order(plan.configurations[place], prove_precision=not rounds)
                    rounds.append(self._call("dmformer.bench.measure:measure_configuration", order, Measurement))
                advance()
        for place in plan.profiled:
            if self.timed[place] and isinstance(self.timed[place][-1], Measurement):
                order = self._order(plan.configurations[place])
                self.profiles[place] = self._call("dmformer.bench.profile:profile_configuration", order, Profile)
            advance()

    def _measure_limits(self) -> None:
        rows = self.plan.configurations
        cores = max(row.cores for row in rows)
        peaks = dict.fromkeys((row.runtime, row.precision) for row in rows if row.precision != "fp32")
        order = LimitsOrder(threads=cores, peaks=tuple(peaks))
        limits = self._call("dmformer.bench.limits:measure_limits", order, Limits, environment_for(cores))
        if isinstance(limits, DMFormerError):
            note = f"the machine's limits were not measured: {limits}"
            self.notes += [] if note in self.notes else [note]
        self.limits.append(limits if isinstance(limits, Limits) else None)

    def _order(self, row: Configuration, *, prove_precision: bool = False) -> TimingOrder:
        plan = self.plan
        return TimingOrder(
            bundle=str(plan.bundle.root.absolute()),
            manifest_sha256=plan.bundle.manifest_sha256,
            configuration=row,
            images=self.images,
            duration_s=plan.duration_s / plan.rounds,
            least_calls=plan.least_calls,
            limit_s=plan.limit_s / _KILL_AFTER,
            prove_precision=prove_precision,
            warm_up=plan.warm_up,
        )

    def _call(
        self, function: str, order: msgspec.Struct, result: type[T], environment: dict[str, str] | None = None
    ) -> T | DMFormerError:
        try:
            return call(function, order, result, self.plan.limit_s, environment)
        except DMFormerError as error:
            return error

    def results(self) -> tuple[Result, ...]:
        """Return a row for each configuration."""
        manifest = self.plan.bundle.manifest
        artifacts = {artifact.sha256: artifact for artifact in manifest.artifacts}
        rows = []
        for place, (row, rounds) in enumerate(zip(self.plan.configurations, self.timed, strict=False)):
            work = least_work(manifest, artifacts[row.artifact_sha256], row.batch)
            result = _result(row, rounds, self.limits, work)
            profile = self.profiles.get(place)
            if isinstance(profile, DMFormerError):
                rows.append(msgspec.structs.replace(result, profile_reason=str(profile)))
            else:
                rows.append(msgspec.structs.replace(result, profile=profile))
        return tuple(rows)

    def _golden_images(self) -> tuple[str, ...]:
        """Write the bundle's golden images to files, from which the mode ``end-to-end`` begins."""
        from PIL import Image

        paths = []
        for number, pixels in enumerate(self.plan.bundle.golden().images):
            path = self.folder / f"{number}.png"
            Image.fromarray(pixels.squeeze()).save(path)
            paths.append(str(path))
        return tuple(paths)


def run_plan(
    plan: BenchPlan, stage: Progress = silent, *, baseline: Baseline | None = None, command: str | None = None
) -> BenchReport:
    """Carry a plan out.

    Args:
        plan: what to do.
        stage: told about the run; it advances with each process.
        baseline: an earlier run, which the report compares with.
        command: the command line that the run is of, for the report.

    Returns:
        See :func:`bench`.
    """
    environment = describe_machine()
    begun = datetime.now(timezone.utc)
    with (
        tempfile.TemporaryDirectory(prefix="dmformer-") as folder,
        stage(f"timing, {plan.processes} processes", plan.processes) as advance,
    ):
        run = _Run(plan, Path(folder))
        try:
            run.carry_out(advance)
        except KeyboardInterrupt:
            run.partial = True
    results = run.results()
    twin, again = results[plan.twin], _result(plan.configurations[plan.twin], run.timed[-1], (), None)
    noise = noise_floor(twin.call_ns, again.call_ns) if twin.timed and again.timed else None
    if twin.timed and again.status == "failed":
        run.notes.append(f"no noise floor: {twin.title}, timed once more, failed: {again.reason}")
    report = BenchReport(
        environment=environment,
        results=results,
        limits=median_limits(run.limits),
        noise_floor=noise,
        twin=plan.twin,
        standings=standings(results, noise),
        rounds=plan.rounds,
        partial=run.partial,
        arch=plan.bundle.manifest.model.arch,
        measured_at=begun.isoformat(timespec="seconds"),
        images=f"{len(plan.images)} files, the first {plan.images[0]}" if plan.images else None,
        skipped=plan.skipped,
        notes=(*plan.notes, *run.notes),
        command=command,
    )
    return msgspec.structs.replace(report, comparison=baseline.compare(report)) if baseline is not None else report


def _result(
    row: Configuration,
    rounds: Sequence[RoundResult],
    limits: Sequence[Limits | None],
    work: tuple[float, float] | None,
) -> Result:
    planned = Result(**msgspec.structs.asdict(row), status="not run")
    measured = []
    for each in rounds:
        if isinstance(each, DMFormerError):
            return msgspec.structs.replace(planned, status="failed", reason=str(each))
        measured.append(each)
    if not measured:
        return msgspec.structs.replace(planned, reason="stopped before its first round ended")
    return summarise(planned, measured, limits, work)
