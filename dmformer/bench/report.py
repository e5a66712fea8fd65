"""What ``bench`` reports: types, the figures made from raw samples, and an earlier run against this one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from dmformer.bench import sentences
from dmformer.bench.limits import Limits, attainable_ms
from dmformer.bench.plan import Configuration
from dmformer.bench.profile import Profile
from dmformer.bench.statistics import Latency, Ratio, latency, middle_ns, paired_ratio, unpaired_ratio
from dmformer.errors import CheckFailed, StageFailed, UsageError
from dmformer.machine import describe_machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bench.measure import Measurement

DEFAULT_REGRESSION = 0.05


class Result(Configuration, frozen=True, kw_only=True):
    """One configuration. Where ``status`` is ``failed`` or ``not run``, the figures are ``null``.

    ``reason`` says why a row failed, or what is to be known of it. ``layers`` has the compute layers by the precision
    in which they ran, ``samples_ns`` the raw latencies, a list for each process. ``device_latency_ms`` is the time on a
    GPU alone, from events: without transfers and without the host. ``gpu`` has clocks, temperature, memory in use and
    what held the clocks back, read right after the calls of each process. ``operations`` and ``least_bytes`` are what
    one call cannot do without, ``attainable_ms`` the least time that this machine's limits admit for them, all threads
    used, and ``share_of_limit`` that time over the measured one, the median over rounds with limits measured in the
    same round. Both are ``null`` on a GPU, and where the rate at the row's precision is not known. ``profile_reason``
    says why there is no profile where one was asked for. ``throttled_ms`` is for how long the kernel held the processes
    back, in all, because their control group had used its CPU quota up. ``energy_mj`` is what the processor's packages
    took for one call, whatever else ran meanwhile included, in millijoules; ``null`` where they do not tell.
    """

    status: Literal["ok", "unstable", "failed", "not run"]
    reason: str | None = None
    device: str | None = None
    engine_version: str | None = None
    latency_ms: Latency | None = None
    device_latency_ms: Latency | None = None
    samples: int = 0
    throughput_ips: float | None = None
    load_ms: float | None = None
    first_inference_ms: float | None = None
    peak_rss_mb: float | None = None
    layers: dict[str, int] = msgspec.field(default_factory=dict)
    operations: float | None = None
    least_bytes: float | None = None
    attainable_ms: float | None = None
    share_of_limit: float | None = None
    samples_ns: tuple[tuple[int, ...], ...] = ()
    wall_ns: tuple[int, ...] = ()
    gpu: tuple[dict[str, Any], ...] = ()
    throttled_ms: float | None = None
    energy_mj: float | None = None
    profile: Profile | None = None
    profile_reason: str | None = None

    @property
    def timed(self) -> bool:
        """Whether there are figures."""
        return self.latency_ms is not None

    @property
    def call_ns(self) -> tuple[tuple[int, ...], ...]:
        """What this mode is judged by, for each round: every call; for several streams the mean time for each."""
        if self.mode != "throughput":
            return self.samples_ns
        return tuple((round(wall / len(samples)),) for wall, samples in zip(self.wall_ns, self.samples_ns, strict=True))

    @property
    def call_ms(self) -> float | None:
        """Milliseconds of one call: the median; for several streams the time that passes between two that end."""
        if self.latency_ms is None:
            return None
        if self.mode == "throughput":
            return sum(self.wall_ns) / self.samples / 1e6
        return self.latency_ms.middle


class Standing(Ratio, frozen=True, kw_only=True):
    """How long a row takes over the quickest of those with its batch, mode and streams; rows by their place."""

    row: int
    quickest: int


class Change(Ratio, frozen=True, kw_only=True):
    """A row that both runs have: how long it takes now over what it took; rows by their place in this run."""

    row: int
    before_ms: float
    now_ms: float
    same_artifact: bool


class BaselineComparison(Struct, frozen=True, kw_only=True):
    """This run against an earlier one.

    ``machine_ratio`` is what the machine's matrix product attains now over what it attained then: a machine that is
    slower today shows here. ``missing`` has the rows of the earlier run that this one lacks or could not time.
    """

    baseline: str
    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    machine_ratio: float | None


class BenchReport(Struct, frozen=True, kw_only=True):
    """All configurations of one run.

    The row ``twin`` is run twice in each round. ``noise_floor`` is the distance of the ratio of its two medians from 1,
    the median over rounds: smaller differences between configurations are ties. ``limits`` are the medians over
    rounds. ``partial`` marks a run that was stopped: its rows have the rounds that finished. ``skipped`` has a sentence
    for each artifact that no runtime here can run, ``notes`` for whatever else is to be known.
    """

    environment: dict[str, Any]
    results: tuple[Result, ...]
    limits: Limits | None = None
    noise_floor: float | None = None
    twin: int = 0
    standings: tuple[Standing, ...] = ()
    rounds: int = 0
    partial: bool = False
    arch: str = ""
    measured_at: str = ""
    command: str | None = None
    images: str | None = None
    comparison: BaselineComparison | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def check_rows(self) -> None:
        """Refuse a run of which a row failed.

        Raises:
            StageFailed: a row failed.
        """
        failed = [row for row in self.results if row.status == "failed"]
        if failed:
            raise StageFailed(f"{len(failed)} of {len(self.results)} rows failed; first: {failed[0].reason}")


def summarise(
    planned: Result,
    rounds: Sequence[Measurement],
    limits: Sequence[Limits | None] = (),
    work: tuple[float, float] | None = None,
) -> Result:
    """Fill a configuration's figures in from its rounds; load and first inference are medians over the rounds.

    Args:
        planned: the row, without figures.
        rounds: what was measured.
        limits: of the machine, in the same rounds.
        work: operations and bytes that one call cannot do without.
    """
    pooled = [sample for measured in rounds for sample in measured.latencies_ns]
    on_device = [sample for measured in rounds for sample in measured.device_ns]
    stable = all(measured.stable for measured in rounds)
    reason = None if stable else "the warm-up did not settle within 3 %: the machine is busy or its clock changes"
    if any(measured.cut for measured in rounds):
        stable, reason = False, "the time limit ended it early: give it a longer time limit"
    throttled = sum(measured.throttled_ms for measured in rounds)
    if throttled:
        held = f"throttled: the kernel held it back for {throttled:.0f} ms, its control group's CPU quota being used up"
        reason = held if reason is None else f"{reason}; {held}"
    energies = [measured.energy_j for measured in rounds if measured.energy_j is not None]
    result = msgspec.structs.replace(
        planned,
        status="ok" if stable else "unstable",
        reason=reason,
        device=rounds[0].device,
        engine_version=rounds[0].version,
        latency_ms=latency(pooled),
        device_latency_ms=latency(on_device) if on_device else None,
        samples=len(pooled),
        throughput_ips=planned.batch * len(pooled) / (sum(measured.wall_ns for measured in rounds) / 1e9),
        load_ms=float(np.median([measured.load_ms for measured in rounds])),
        first_inference_ms=float(np.median([measured.first_inference_ms for measured in rounds])),
        layers=rounds[0].layers,
        peak_rss_mb=max(measured.peak_rss_mb for measured in rounds),
        gpu=tuple(measured.gpu for measured in rounds if measured.gpu is not None),
        samples_ns=tuple(tuple(measured.latencies_ns) for measured in rounds),
        wall_ns=tuple(measured.wall_ns for measured in rounds),
        throttled_ms=throttled,
        energy_mj=1e3 * sum(energies) / len(pooled) if len(energies) == len(rounds) else None,
    )
    on_gpu = any(measured.gpu is not None or measured.device_ns for measured in rounds)
    return result if work is None or on_gpu else _with_limit(result, limits, work)


def _with_limit(result: Result, limits: Sequence[Limits | None], work: tuple[float, float]) -> Result:
    result = msgspec.structs.replace(result, operations=work[0], least_bytes=work[1])
    least, shares = [], []
    for each, calls in zip(limits, result.call_ns, strict=False):
        attainable = attainable_ms(each, result.runtime, result.layers, work) if each is not None else None
        if attainable is not None:
            least.append(attainable)
            shares.append(attainable * 1e6 / float(np.median(calls)))
    if not least:
        return result
    return msgspec.structs.replace(
        result, attainable_ms=float(np.median(least)), share_of_limit=float(np.median(shares))
    )


def standings(results: Sequence[Result], noise: float | None) -> tuple[Standing, ...]:
    """Each row against the quickest of its kind; rows that stand alone are left out."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, row in enumerate(results):
        if row.timed:
            groups.setdefault((row.batch, row.mode, row.streams), []).append(place)
    rows = []
    for places in groups.values():
        quickest = min(places, key=lambda place: middle_ns(results[place].call_ns))
        for place in places:
            if place != quickest:
                ratio = paired_ratio(results[place].call_ns, results[quickest].call_ns, noise)
                rows.append(Standing(row=place, quickest=quickest, **msgspec.structs.asdict(ratio)))
    return tuple(sorted(rows, key=lambda standing: standing.row))


def median_limits(limits: Sequence[Limits | None]) -> Limits | None:
    """Return the medians over the rounds in which the limits could be measured; ``None`` without such a round."""
    measured = [each for each in limits if each is not None]
    if not measured:
        return None
    return Limits(
        threads=measured[0].threads,
        gflops=float(np.median([each.gflops for each in measured])),
        gbytes_per_s=float(np.median([each.gbytes_per_s for each in measured])),
        peaks=tuple(
            msgspec.structs.replace(peak, gops=float(np.median([each.peaks[place].gops for each in measured])))
            for place, peak in enumerate(measured[0].peaks)
        ),
    )


# --- an earlier run against this one ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """An earlier run, and by what share (0.05 is 5 %) a row may be slower than in it."""

    path: str
    report: BenchReport
    allowed: float

    @staticmethod
    def read(path: str, allowed: float) -> Baseline:
        """Read the report of an earlier run.

        Raises:
            UsageError: it cannot be read, is no report of ``bench --json``, or is of another processor: what differs
                then is not the software.
        """
        if not 0 <= allowed < math.inf:
            raise UsageError(f"a regression of {allowed:.1%} is allowed; expected 0 % or more")
        expected = "expected what bench --json wrote"
        try:
            report = msgspec.json.decode(Path(path).read_bytes(), type=BenchReport)
        except OSError as error:
            raise UsageError(f"baseline {path!r}: {error.strerror}; {expected}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"baseline {path!r}: {error}; {expected}") from error
        if not any(row.timed for row in report.results):
            raise UsageError(f"baseline {path!r} has no row with figures; expected at least one")
        if any(row.timed and not all(row.samples_ns or [()]) for row in report.results):
            raise UsageError(f"baseline {path!r} has a row without samples; {expected}")
        there, here = report.environment, describe_machine()
        if there.get("cpu") != here["cpu"]:
            difference = f"is of a {there.get('cpu')}; this is a {here['cpu']}: make a baseline on this machine"
        elif there.get("max_isa") != here["max_isa"]:
            difference = (
                f"was held to {there.get('max_isa') or 'nothing'}; ONEDNN_MAX_CPU_ISA is "
                f"{here['max_isa'] or 'not set'}: compare under the same"
            )
        # Virtual machines give processors of several generations one name.
        elif differing := set(there.get("instructions", here["instructions"])) ^ set(here["instructions"]):
            difference = (
                f"is of another {here['cpu']}: they differ in {', '.join(sorted(differing))}: "
                "make a baseline on this machine"
            )
        else:
            return Baseline(path, report, allowed)
        raise UsageError(f"baseline {path!r} {difference}")

    def check_model(self, arch: str) -> None:
        """Refuse to compare two networks.

        Raises:
            UsageError: the earlier run was of another one.
        """
        if self.report.arch != arch:
            raise UsageError(f"baseline {self.path!r} is of {self.report.arch}; this bundle is of {arch}")

    def compare(self, now: BenchReport) -> BaselineComparison:
        """Compare row by row; a row is the same with the same runtime, precision, batch, threads, mode and streams.

        Differences within the larger noise floor of the two runs, or whose interval of 95 % holds no change, are ties.
        """
        noise = max(now.noise_floor or 0.0, self.report.noise_floor or 0.0)
        places = {_key(row): place for place, row in enumerate(now.results) if row.timed}
        changes, missing = [], []
        for before in self.report.results:
            if not before.timed:
                continue
            place = places.get(_key(before))
            if place is None:
                missing.append(before.title)
                continue
            row = now.results[place]
            ratio = unpaired_ratio(row.call_ns, before.call_ns, noise)
            change = Change(
                row=place,
                before_ms=before.call_ms or 0.0,
                now_ms=row.call_ms or 0.0,
                same_artifact=row.artifact_sha256 == before.artifact_sha256,
                **msgspec.structs.asdict(ratio),
            )
            changes.append(change)
        then, today = self.report.limits, now.limits
        return BaselineComparison(
            baseline=self.path,
            changes=tuple(changes),
            missing=tuple(missing),
            machine_ratio=today.gflops / then.gflops if today and then else None,
        )

    def judge(self, now: BenchReport) -> None:
        """Refuse what became slower.

        Raises:
            CheckFailed: a row is slower by more than is allowed, beyond the noise; or no row is in both runs.
        """
        changes = now.comparison.changes if now.comparison is not None else ()
        if not changes:
            had = ", ".join(f"{row.title}, {row.threads} threads" for row in self.report.results if row.timed)
            raise CheckFailed(f"no row of this run is in {self.path} as well, which has {had}; expected one at least")
        slower = [change for change in changes if change.verdict == "slower" and change.ratio > 1 + self.allowed]
        if slower:
            worst = max(slower, key=lambda change: change.ratio)
            raise CheckFailed(
                f"{len(slower)} of {len(changes)} rows are slower than {self.path} by more than {self.allowed:.1%}; "
                f"worst: {sentences.change(now, worst)}"
            )


def _key(row: Result) -> tuple[object, ...]:
    return row.runtime, row.precision, row.batch, row.threads, row.mode, row.streams
