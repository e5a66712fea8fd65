"""What a run will time, in which order, and how long it may take: checked before any process is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from msgspec import Struct

from dmformer.bench import DEFAULT_DURATION_S, DEFAULT_LIMIT_S, DEFAULT_ROUNDS
from dmformer.bundle.reader import Bundle, open_bundle, own_bundle
from dmformer.bundle.select import select
from dmformer.data.images import list_images, load_pixels
from dmformer.errors import StageFailed, UnavailableError, UsageError
from dmformer.machine import check_threads, is_emulated, usable_cores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dmformer.bundle.select import Choice


Mode = Literal["compute", "end-to-end", "throughput"]
MODES: tuple[Mode, ...] = ("compute", "end-to-end", "throughput")

# Samples below which a percentile is not known with 99 % confidence (MLPerf LoadGen, early stopping).
SAMPLES_FOR = {"p50": 7, "p90": 64, "p99": 662}

MOST_IMAGES = 64
NO_SPEED = "emulation has a processor's answers, not its speed"
_START_S = {"torch": 3.0}  # imports and load, where it takes long
_USUAL_START_S = 1.0
_LIMITS_S = 2.0
_USUAL_RATE = 4e10  # operations a second of a core: for the estimate alone


class WarmUp(Struct, frozen=True, kw_only=True):
    """When the calls before the timed ones may end: after time and calls, once the latencies are stable.

    Attributes:
        least_s: least time, in seconds.
        least_calls: least number of calls.
        window_calls: least number of calls in a window, of which the last three must agree.
        limit: gives up on stability after so many times the least time.
    """

    least_s: float
    least_calls: int
    window_calls: int
    limit: int


WARM_UP = WarmUp(least_s=1.0, least_calls=20, window_calls=5, limit=6)
BRIEF_WARM_UP = WarmUp(least_s=0.5, least_calls=9, window_calls=3, limit=2)  # where medians alone are wanted


class Configuration(Struct, frozen=True, kw_only=True):
    """One row of a report.

    Attributes:
        runtime: canonical name.
        precision: of the artifact.
        batch: rows in each call.
        threads: for one inference.
        mode: ``compute`` runs the network alone; ``end-to-end`` begins with an image file and ends with classes:
            decode, resize, normalise, run, softmax; ``throughput`` keeps several streams busy.
        streams: calls that are under way at once, each in a copy of the model of its own.
        artifact_sha256: what is timed; another artifact under the same name is refused.
    """

    runtime: str
    precision: str
    batch: int
    threads: int
    artifact_sha256: str
    mode: Mode = "compute"
    streams: int = 1

    @property
    def cores(self) -> int:
        """Threads that all streams together use."""
        return self.threads * self.streams

    @property
    def title(self) -> str:
        """For people: what tells it from the other rows."""
        mode = "" if self.mode == "compute" else f", {self.mode}"
        streams = f", {self.streams} streams" if self.mode == "throughput" else ""
        return f"{self.runtime} {self.precision} batch {self.batch}{mode}{streams}"


class TimingOrder(Struct, frozen=True, kw_only=True):
    """One round of one configuration to measure, or to profile.

    Attributes:
        bundle: its folder.
        manifest_sha256: of the bundle that is meant.
        configuration: what to time.
        images: files that are the input; without them the golden inputs are.
        duration_s: least time of the steady state, in seconds.
        least_calls: least number of timed calls.
        limit_s: bounds all calls together, loading included, from when the order arrives.
        prove_precision: whether to read back in which precision the layers run.
        warm_up: what comes before the timed calls.
    """

    bundle: str
    manifest_sha256: str
    configuration: Configuration
    images: tuple[str, ...]
    duration_s: float
    least_calls: int
    limit_s: float
    prove_precision: bool
    warm_up: WarmUp

    def choice(self) -> Choice:
        """Return the artifact and its runtime, after making sure that the bundle is the one that was meant.

        Raises:
            StageFailed: the bundle is another one.
        """
        bundle = own_bundle(Path(self.bundle))  # the process that sent the order opened it under the policy
        if bundle.manifest_sha256 != self.manifest_sha256:
            raise StageFailed(
                f"manifest {bundle.manifest_sha256[:12]}…; expected {self.manifest_sha256[:12]}…: the bundle changed"
            )
        (choice,), _ = select(bundle, [self.configuration.runtime], [self.configuration.precision])
        return choice

    def inputs(self, bundle: Bundle) -> NDArray[np.float32]:
        """Return what the network sees of the images, (N, C, H, W)."""
        if not self.images:
            return bundle.golden().inputs
        preprocessing = bundle.manifest.preprocessing
        return preprocessing.normalize(load_pixels([Path(image) for image in self.images], preprocessing))


@dataclass(frozen=True)
class BenchPlan:
    """A run of the benchmark.

    Attributes:
        bundle: what is timed.
        configurations: the rows.
        rounds: how often each is timed, each time in a process of its own.
        duration_s: least time of steady state of a row, over all rounds.
        limit_s: after so many seconds a process is ended; half of it is for its calls.
        images: files that are the input; empty for the golden images.
        profile: whether each row of mode ``compute`` is profiled after the rounds.
        brief: whether medians are enough: a short warm-up, few calls, and no limits of the machine.
        skipped: a sentence for each artifact that no runtime here can run.
        notes: a sentence for each artifact that runs here, and may answer wrongly.
    """

    bundle: Bundle
    configurations: tuple[Configuration, ...]
    rounds: int
    duration_s: float
    limit_s: float
    images: tuple[Path, ...]
    profile: bool
    brief: bool
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def twin(self) -> int:
        """Place of the configuration that is timed twice, for the noise: not PyTorch, where there is another."""
        return next((place for place, row in enumerate(self.configurations) if row.runtime != "torch"), 0)

    def order(self, number: int) -> list[int]:
        """Places of configurations in a round, one of them twice, as far apart as can be; each round begins elsewhere.

        What is timed first in a round meets a processor that has rested.
        """
        others = [place for place in range(len(self.configurations)) if place != self.twin]
        half = (len(others) + 1) // 2
        runs = [self.twin, *others[:half], self.twin, *others[half:]]
        start = number * len(runs) // self.rounds
        return runs[start:] + runs[:start]

    @property
    def warm_up(self) -> WarmUp:
        """What comes before the timed calls of each process."""
        return BRIEF_WARM_UP if self.brief else WARM_UP

    @property
    def least_calls(self) -> int:
        """Least number of timed calls of each process: the 90th percentile is known, or the median if brief."""
        return -(-SAMPLES_FOR["p50" if self.brief else "p90"] // self.rounds)

    @property
    def profiled(self) -> tuple[int, ...]:
        """Places of the configurations that are profiled."""
        rows = enumerate(self.configurations) if self.profile else ()
        return tuple(place for place, row in rows if row.mode == "compute")

    @property
    def processes(self) -> int:
        """How many are started: a round times one row twice, and measures the machine's limits unless brief."""
        return self.rounds * (len(self.configurations) + (1 if self.brief else 2)) + len(self.profiled)

    @property
    def expected_s(self) -> float:
        """About how long the run takes; networks that are slow for their size take longer."""
        rows = self.rounds * sum(self._process_s(self.configurations[place]) for place in self.order(0))
        limits = 0.0 if self.brief else self.rounds * _LIMITS_S
        return rows + limits + sum(self._process_s(self.configurations[row]) for row in self.profiled)

    @property
    def longest_s(self) -> float:
        """What the run cannot exceed."""
        return self.processes * self.limit_s

    def _process_s(self, row: Configuration) -> float:
        call_s = 2 * self.bundle.manifest.model.macs * row.batch / (_USUAL_RATE * row.threads)
        warm_up = max(self.warm_up.least_s, self.warm_up.least_calls * call_s)
        steady = max(self.duration_s / self.rounds, self.least_calls * call_s)
        return _START_S.get(row.runtime, _USUAL_START_S) + min(warm_up + steady, self.limit_s / 2)


@dataclass(frozen=True)
class BenchRequest:
    """What a user may choose; :func:`dmformer.bench` describes each field."""

    runtimes: Sequence[str] = ()
    precisions: Sequence[str] = ()
    batches: Sequence[int] = (1,)
    modes: Sequence[str] = ()
    streams: Sequence[int] = ()
    threads: int | None = None
    rounds: int = DEFAULT_ROUNDS
    duration_s: float = DEFAULT_DURATION_S
    limit_s: float = DEFAULT_LIMIT_S
    images: str | Path | None = None
    profile: bool = False
    brief: bool = False


def plan_bench(bundle: str | Path | Bundle, request: BenchRequest) -> BenchPlan:
    """Check everything that can be checked before the work.

    Raises:
        CheckFailed: a file is not what the manifest says.
        UnavailableError: a runtime that was named, or every one, cannot run on this machine, or it is emulated.
        UsageError: an argument cannot be used.
    """
    _check(request)
    if is_emulated() and not request.brief:
        raise UnavailableError(f"{NO_SPEED}; expected the device, or: dmformer verify")
    images = tuple(list_images(Path(request.images))[:MOST_IMAGES]) if request.images is not None else ()
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    if images:
        load_pixels(images, opened.manifest.preprocessing)  # one that cannot be read is found before anything is timed
    chosen, skipped = select(opened, request.runtimes, request.precisions)
    for choice in chosen:
        opened.load_path(choice.artifact)
    cores = request.threads if request.threads is not None else usable_cores()
    return BenchPlan(
        bundle=opened,
        configurations=tuple(
            Configuration(
                runtime=choice.entry.name,
                precision=choice.artifact.precision,
                batch=batch,
                threads=max(1, cores // count),
                mode=mode,
                streams=count,
                artifact_sha256=choice.artifact.sha256,
            )
            for mode in _modes(request)
            for count in (_streams(request.streams, cores) if mode == "throughput" else [1])
            for choice in chosen
            for batch in dict.fromkeys(request.batches)
        ),
        rounds=request.rounds,
        duration_s=request.duration_s,
        limit_s=request.limit_s,
        images=images,
        profile=request.profile,
        brief=request.brief,
        skipped=tuple(skipped),
        notes=tuple(f"{choice.title}: {choice.saturation_risk}" for choice in chosen if choice.saturation_risk),
    )


def _check(request: BenchRequest) -> None:
    if not request.batches or min(request.batches) < 1:
        raise UsageError(f"batch sizes {list(request.batches)}; expected at least 1")
    if request.rounds < 1:
        raise UsageError(f"{request.rounds} rounds; expected at least 1")
    for name, seconds in (("duration", request.duration_s), ("time limit", request.limit_s)):
        if not 0 < seconds < math.inf:
            raise UsageError(f"{name} {seconds:g} s; expected more than 0")
    check_threads(request.threads)
    if request.profile and request.modes and "compute" not in request.modes:
        raise UsageError(f"a profile of mode {', '.join(request.modes)}; expected `modes` compute with `profile`")


def _modes(request: BenchRequest) -> list[Mode]:
    named, streams = request.modes, request.streams
    for mode in named:
        if mode not in MODES:
            raise UsageError(f"mode {mode!r}; expected one of {', '.join(MODES)}")
    modes = cast("list[Mode]", list(dict.fromkeys(named)))
    if streams and named and "throughput" not in modes:
        raise UsageError(f"{max(streams)} streams for mode {', '.join(modes)}; expected `modes` throughput with them")
    return modes or (["throughput"] if streams else ["compute"])


def _streams(named: Sequence[int], cores: int) -> list[int]:
    """Without a number: one stream for each core."""
    counts = list(dict.fromkeys(named)) or [cores]
    for count in counts:
        if not 1 <= count <= cores:
            raise UsageError(f"{count} streams; expected 1 to {cores}, a thread for each at least")
    return counts
