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

from dmformer.errors import StageFailed
from dmformer.machine import gpu_state
from dmformer.runtimes.inspector import shortfall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from dmformer.runtimes.base import Runtime

    Ask = Callable[[], object]

# Samples below which a percentile is not known with 99 % confidence (MLPerf LoadGen, early stopping).
SAMPLES_FOR = {"p50": 7, "p90": 64, "p99": 662}

WARM_UP_S = 1.0
WARM_UP_CALLS = 20
WARM_UP_LIMIT = 6  # gives up on stability after so many times the least warm-up
# The same where medians alone are wanted.
BRIEF_WARM_UP_S = 0.5
BRIEF_WARM_UP_CALLS = 9
BRIEF_WARM_UP_LIMIT = 2
STABLE_WINDOWS = 3
STABLE_WITHIN = 0.03
_WINDOW_CALLS = 5
_BRIEF_WINDOW_CALLS = 3


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


@dataclass(frozen=True)
class Extent:
    """How long to measure.

    Attributes:
        duration_s: least time of the steady state, in seconds.
        least_calls: least number of timed calls.
        deadline_s: when to stop in any case, on the clock of ``time.perf_counter``.
        brief: a short warm-up, which is enough for a median.
    """

    duration_s: float
    least_calls: int
    deadline_s: float = float("inf")
    brief: bool = False

    @property
    def over(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() > self.deadline_s


@dataclass
class _Steady:
    """What the steady state gave."""

    stable: bool
    latencies_ns: list[int] = field(default_factory=list)
    device_ns: list[int] = field(default_factory=list)
    wall_ns: int = 0
    cut: bool = False


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
        )


def batches(inputs: NDArray[np.float32], batch: int) -> list[NDArray[np.float32]]:
    """Batches, each starting one row further on: parts of one array, so that making them takes no time and no room."""
    count = len(inputs)
    rows = np.ascontiguousarray(inputs[np.arange(count + batch - 1) % count])
    return [rows[start : start + batch] for start in range(count)]


def network_alone(runtime: Runtime, name: str, inputs: NDArray[np.float32], batch: int) -> Ask:
    """A call of the network with the next batch of ``inputs`` (N, C, H, W)."""
    feeds = cycle({name: array} for array in batches(inputs, batch))
    return lambda: runtime.run(next(feeds))


def _timed(ask: Ask) -> int:
    before = time.perf_counter_ns()
    ask()
    return time.perf_counter_ns() - before


def _alone(runtime: Runtime, ask: Ask, extent: Extent) -> _Steady:
    """One call after the other, in this thread."""
    found = _Steady(_warm_up(lambda: _timed(ask), extent))
    begun = time.perf_counter()
    while len(found.latencies_ns) < extent.least_calls or time.perf_counter() - begun < extent.duration_s:
        if found.latencies_ns and extent.over:
            found.cut = True
            break
        found.latencies_ns.append(_timed(ask))
        if (taken := runtime.device_ns) is not None:
            found.device_ns.append(taken)
    found.wall_ns = sum(found.latencies_ns)
    return found


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
            begun = time.perf_counter_ns()
            while len(ended) < extent.least_calls or time.perf_counter_ns() - begun < extent.duration_s * 1e9:
                if extent.over or any(run.done() for run in running):
                    cut = True
                    break
                time.sleep(0.005)
            wall_ns = time.perf_counter_ns() - begun
        except threading.BrokenBarrierError:
            begun = wall_ns = 0
        finally:
            stop.set()
        for run in running:
            if not isinstance(run.exception(), (threading.BrokenBarrierError, type(None))):
                run.result()
    counted = [taken for when, taken in ended if when <= begun + wall_ns]
    if not counted:
        raise StageFailed(f"no call of {len(asks)} streams ended in time; expected a longer limit, or fewer streams")
    return _Steady(all(stable), counted, [], wall_ns, cut)


def _proven_layers(runtime: Runtime, promised: float) -> dict[str, int]:
    layers = runtime.inspect().layers()
    missing = shortfall(layers, runtime.precision, promised)
    if missing is not None and runtime.support.cannot_compute(runtime.precision) is None:
        raise StageFailed(f"{runtime.name} runs {missing}")
    return layers


def _warm_up(call: Callable[[], int], extent: Extent) -> bool:
    """Call until time, calls and stability are reached; False if the last never was."""
    least_s, least_calls, window, limit = WARM_UP_S, WARM_UP_CALLS, _WINDOW_CALLS, WARM_UP_LIMIT
    if extent.brief:
        least_s, least_calls, window = BRIEF_WARM_UP_S, BRIEF_WARM_UP_CALLS, _BRIEF_WINDOW_CALLS
        limit = BRIEF_WARM_UP_LIMIT
    latencies: list[int] = []
    begun = time.perf_counter()
    latest = begun + (extent.deadline_s - begun) / 2  # the rest is for what is measured
    while time.perf_counter() < latest:
        latencies.append(call())
        elapsed = time.perf_counter() - begun
        if elapsed < least_s or len(latencies) < least_calls:
            continue
        if settled(latencies, window):
            return True
        if elapsed > limit * least_s:
            return False
    return False


def settled(latencies: list[int], least_window: int = _WINDOW_CALLS) -> bool:
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
