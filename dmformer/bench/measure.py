"""Time one configuration in this process: load, first inference and steady state apart.

The method is that of the established tools, with their weak spots mended: warm-up by time, calls and stability (most
tools: a handful of calls); enough samples for each percentile that is printed (MLPerf's early-stopping table); raw
nanoseconds kept, nothing clipped; inputs that differ from call to call.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from dmformer.bench.plan import WARM_UP, TimingOrder, WarmUp
from dmformer.errors import StageFailed
from dmformer.machine import gpu_state
from dmformer.procfs import EnergyMeter, throttled_ms
from dmformer.runtimes.inspector import shortfall
from dmformer.serve.predictor import Predictor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from dmformer.bundle.select import Choice
    from dmformer.runtimes.base import Runtime

    Ask = Callable[[], object]

STABLE_WINDOWS = 3
STABLE_WITHIN = 0.03


class Measurement(Struct, frozen=True, kw_only=True):
    """One round of one configuration in one process. Times in the units of their names.

    Attributes:
        device: what the runtime says it runs on.
        threads: as the runtime says.
        version: of the engine.
        load_ms: from opening the artifact to being ready, the engine's own import left out.
        first_inference_ms: the first call, which may allocate and compile.
        stable: whether the warm-up settled.
        cut: whether the deadline came before the calls and the duration that were asked for.
        latencies_ns: each timed call, in the order in which they ended.
        wall_ns: how long the timed calls took together; less than their sum where several were under way at once.
        gpu: its state right after the timed calls; ``None`` on a CPU, or where it cannot be asked.
        device_ns: each timed call on the device alone, without transfers; empty on a CPU, and for several streams.
        layers: compute layers by the precision in which they ran; empty where that was not read back.
        peak_rss_mb: largest resident memory of the whole process, Python included, in MiB.
        throttled_ms: for how long the kernel held the process's control groups back for their CPU quotas, from the
            first call to the last.
        energy_j: of the processor's packages during the timed calls, in joules; ``None`` where they do not tell.
    """

    device: str
    threads: int
    version: str
    load_ms: float
    first_inference_ms: float
    stable: bool
    latencies_ns: list[int]
    wall_ns: int
    peak_rss_mb: float
    cut: bool = False
    layers: dict[str, int] = {}
    device_ns: list[int] = []
    gpu: dict[str, Any] | None = None
    throttled_ms: float = 0.0
    energy_j: float | None = None


@dataclass(frozen=True)
class Extent:
    """How long to measure.

    Attributes:
        duration_s: least time of the steady state, in seconds.
        least_calls: least number of timed calls.
        deadline_s: when to stop in any case, on the clock of ``time.perf_counter``.
        warm_up: what comes before the timed calls.
    """

    duration_s: float
    least_calls: int
    deadline_s: float = float("inf")
    warm_up: WarmUp = WARM_UP

    @property
    def over(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() > self.deadline_s


@dataclass
class _Steady:
    """The timed calls; the fields are those of :class:`Measurement`."""

    stable: bool
    latencies_ns: list[int] = field(default_factory=list)
    device_ns: list[int] = field(default_factory=list)
    wall_ns: int = 0
    cut: bool = False
    energy_j: float | None = None


def measure_configuration(order: TimingOrder) -> Measurement:
    """Measure one round of one configuration.

    Raises:
        CheckFailed: a file is not what the manifest says.
        StageFailed: the bundle is not the one that was meant, or the runtime failed.
    """
    deadline_s = time.perf_counter() + order.limit_s
    choice = order.choice()
    promised = choice.artifact.promised_share if order.prove_precision else None
    extent = Extent(order.duration_s, order.least_calls, deadline_s, order.warm_up)
    return measure(_streams(choice, order), extent, promised)


def _streams(choice: Choice, order: TimingOrder) -> list[tuple[Runtime, Ask]]:
    row = order.configuration
    if row.mode == "end-to-end":
        predictor = Predictor(choice, row.threads, batch=row.batch)
        paths = [Path(image) for image in order.images]
        turns = cycle(
            [paths[(start + offset) % len(paths)] for offset in range(row.batch)] for start in range(len(paths))
        )
        return [(predictor.runtime, lambda: predictor.predict(next(turns)))]
    inputs = order.inputs(choice.bundle)
    name = choice.bundle.manifest.inputs[0].name
    runtimes = [choice.runtime(row.threads) for _ in range(row.streams)]
    return [(runtime, network_alone(runtime, name, inputs, row.batch)) for runtime in runtimes]


def measure(streams: Sequence[tuple[Runtime, Ask]], extent: Extent, promised: float | None = None) -> Measurement:
    """Load and time runtimes that are not open yet.

    Args:
        streams: each a runtime and what makes one call of it, legal while it is open. Several are kept busy at once.
        extent: how long to measure.
        promised: least share of the compute layers that must run in the artifact's precision, 0..1; ``None`` leaves
            out the proof, which may take as long as loading.

    Raises:
        StageFailed: the runtime failed, or runs otherwise than it was asked to.
    """
    with ExitStack() as opened:
        (runtime, ask), *others = streams
        start = time.perf_counter_ns()
        opened.enter_context(runtime)
        load_ns = time.perf_counter_ns() - start
        used = runtime.details
        if used.threads != runtime.threads:
            raise StageFailed(f"{runtime.name} runs on {used.threads} threads; expected {runtime.threads}")
        loaded_mb = _peak_rss_mb()
        layers = _proven_layers(runtime, promised) if promised is not None else {}
        _forget_peak_rss()  # the proof may have loaded the model once more
        throttled_before_ms = throttled_ms()
        first_ns = _timed(ask)
        for other, _ in others:
            opened.enter_context(other)
        steady = _side_by_side([ask for _, ask in streams], extent) if others else _alone(runtime, ask, extent)
        return Measurement(
            device=used.device,
            threads=used.threads,
            version=used.version,
            load_ms=load_ns / 1e6,
            first_inference_ms=first_ns / 1e6,
            stable=steady.stable,
            cut=steady.cut,
            latencies_ns=steady.latencies_ns,
            wall_ns=steady.wall_ns,
            peak_rss_mb=max(loaded_mb, _peak_rss_mb()),
            layers=layers,
            device_ns=steady.device_ns,
            gpu=gpu_state() if runtime.device_ns is not None else None,
            throttled_ms=throttled_ms() - throttled_before_ms,
            energy_j=steady.energy_j,
        )


def batches(inputs: NDArray[np.float32], batch: int) -> list[NDArray[np.float32]]:
    """Return batches, each starting one row further on: views of one array, which take no time and no room to make."""
    count = len(inputs)
    rows = np.ascontiguousarray(inputs[np.arange(count + batch - 1) % count])
    return [rows[start : start + batch] for start in range(count)]


def network_alone(runtime: Runtime, name: str, inputs: NDArray[np.float32], batch: int) -> Ask:
    """Return what calls the network with the next batch of ``inputs`` (N, C, H, W)."""
    feeds = cycle({name: array} for array in batches(inputs, batch))
    return lambda: runtime.run(next(feeds))


def _timed(ask: Ask) -> int:
    before = time.perf_counter_ns()
    ask()
    return time.perf_counter_ns() - before


def _alone(runtime: Runtime, ask: Ask, extent: Extent) -> _Steady:
    """One call after the other, in this thread."""
    steady = _Steady(_warm_up(lambda: _timed(ask), extent))
    meter = EnergyMeter()
    begun = time.perf_counter()
    while len(steady.latencies_ns) < extent.least_calls or time.perf_counter() - begun < extent.duration_s:
        if steady.latencies_ns and extent.over:
            steady.cut = True
            break
        steady.latencies_ns.append(_timed(ask))
        if (taken := runtime.device_ns) is not None:
            steady.device_ns.append(taken)
    steady.energy_j = meter.joules()
    steady.wall_ns = sum(steady.latencies_ns)
    return steady


def _side_by_side(asks: Sequence[Ask], extent: Extent) -> _Steady:
    """A thread for each stream. All are busy from the first timed call to the last; a call counts if it ended between.

    The clock starts when every stream's warm-up has ended, and streams run on until it stops.
    """
    warm = threading.Barrier(len(asks) + 1)
    stop = threading.Event()
    ended: list[tuple[int, int]] = []  # when, and how long it took; appending is atomic
    stable: list[bool] = []
    cut = False

    def work(ask: Ask) -> None:
        try:
            stable.append(_warm_up(lambda: _timed(ask), extent))
            warm.wait()
        except BaseException:
            warm.abort()  # else the others would wait for this one
            raise
        while not stop.is_set():
            taken = _timed(ask)
            ended.append((time.perf_counter_ns(), taken))

    with ThreadPoolExecutor(len(asks)) as pool:
        running = [pool.submit(work, ask) for ask in asks]
        try:
            warm.wait()
            meter = EnergyMeter()
            begun = time.perf_counter_ns()
            while len(ended) < extent.least_calls or time.perf_counter_ns() - begun < extent.duration_s * 1e9:
                if extent.over or any(run.done() for run in running):
                    cut = True
                    break
                time.sleep(0.005)
            wall_ns = time.perf_counter_ns() - begun
            energy_j = meter.joules()
        except threading.BrokenBarrierError:
            begun = wall_ns = 0
            energy_j = None
        finally:
            stop.set()
        for run in running:
            if not isinstance(run.exception(), (threading.BrokenBarrierError, type(None))):
                run.result()
    counted = [taken for when, taken in ended if when <= begun + wall_ns]
    if not counted:
        raise StageFailed(f"no call of {len(asks)} streams ended in time; expected a longer limit, or fewer streams")
    return _Steady(all(stable), counted, [], wall_ns, cut, energy_j)


def _proven_layers(runtime: Runtime, promised: float) -> dict[str, int]:
    layers = runtime.inspect().layers()
    missing = shortfall(layers, runtime.precision, promised)
    if missing is not None and runtime.support.cannot_compute(runtime.precision) is None:
        raise StageFailed(f"{runtime.name} runs {missing}")
    return layers


def _warm_up(call: Callable[[], int], extent: Extent) -> bool:
    """Call until time, calls and stability are reached; return False if stability never was."""
    warm_up = extent.warm_up
    latencies: list[int] = []
    begun = time.perf_counter()
    latest = begun + (extent.deadline_s - begun) / 2  # the rest is for what is measured
    while time.perf_counter() < latest:
        latencies.append(call())
        elapsed = time.perf_counter() - begun
        if elapsed < warm_up.least_s or len(latencies) < warm_up.least_calls:
            continue
        if settled(latencies, warm_up.window_calls):
            return True
        if elapsed > warm_up.limit * warm_up.least_s:
            return False
    return False


def settled(latencies: list[int], least_window: int = WARM_UP.window_calls) -> bool:
    """Whether the medians of the last three windows agree within 3 %.

    Args:
        latencies: of all calls so far.
        least_window: least number of calls in a window, which is a tenth of all.
    """
    size = max(least_window, len(latencies) // 10)
    if len(latencies) < STABLE_WINDOWS * size:
        return False
    medians = [float(np.median(latencies[-(i + 1) * size : len(latencies) - i * size])) for i in range(STABLE_WINDOWS)]
    return max(medians) <= (1 + STABLE_WITHIN) * min(medians)


def _forget_peak_rss() -> None:
    """Let the peak begin at what is resident now, where the system knows how (Linux: proc(5), clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_rss_mb() -> float:
    # getrusage's figure survives exec, so that a small process would report its parent's peak; VmHWM does not.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024  # KiB
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024  # bytes there, KiB elsewhere
