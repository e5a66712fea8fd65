"""Time one runtime in this process: load, first inference and steady state apart.

The method is that of the established tools, with their weak spots mended: warm-up by time, calls and stability (most
tools: a handful of calls); enough samples for each percentile that is printed (MLPerf's early-stopping table); raw
nanoseconds kept, nothing clipped; inputs that differ from call to call.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from dmformer.errors import StageFailed
from dmformer.machine import gpu_state
from dmformer.runtimes.layers import shortfall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from dmformer.runtimes.base import Runtime

# Samples below which a percentile is not known with 99 % confidence (MLPerf LoadGen, early stopping).
SAMPLES_FOR = {"p50": 7, "p90": 64, "p99": 662}

WARM_UP_S = 1.0
WARM_UP_CALLS = 20
WARM_UP_LIMIT = 6  # gives up on stability after so many times the least warm-up
STABLE_WINDOWS = 3
STABLE_WITHIN = 0.03
_WINDOW_CALLS = 5


class Measurement(Struct, frozen=True, kw_only=True):
    """One round of one configuration in one process. Times in the units of their names.

    Attributes:
        device: what the runtime says it runs on.
        threads: as the runtime says.
        version: of the engine.
        load_ms: from opening the artifact to being ready, the engine's own import left out.
        first_inference_ms: the first call, which may allocate and compile.
        stable: whether the warm-up settled.
        latencies_ns: each timed call, in order.
        gpu: its state right after the timed calls; ``None`` on a CPU, or where it cannot be asked.
        device_ns: each timed call on the device alone, without transfers; empty on a CPU.
        layers: compute layers by the precision in which they run; empty where that was not read back.
        peak_rss_mb: largest resident memory of the whole process, Python included, in MiB.
    """

    device: str
    threads: int
    version: str
    load_ms: float
    first_inference_ms: float
    stable: bool
    latencies_ns: list[int]
    peak_rss_mb: float
    layers: dict[str, int] = {}
    device_ns: list[int] = []
    gpu: dict[str, Any] | None = None


def measure(
    runtime: Runtime,
    inputs: NDArray[np.float32],
    batch: int,
    duration_s: float,
    least_calls: int,
    promised: float | None = None,
) -> Measurement:
    """Load and time a runtime that is not open yet.

    Args:
        runtime: what to time.
        inputs: rows to make batches of, (N, C, H, W).
        batch: rows in each call.
        duration_s: least time of the steady state, in seconds.
        least_calls: least number of timed calls.
        promised: least share of the compute layers that must run in the artifact's precision, 0..1; ``None`` leaves
            out the proof, which may take as long as loading.

    Raises:
        StageFailed: the runtime failed, or runs otherwise than it was asked to.
    """
    start = time.perf_counter_ns()
    with runtime:
        load_ns = time.perf_counter_ns() - start
        used = runtime.details
        if used.threads != runtime.threads:
            raise StageFailed(f"{runtime.name} runs on {used.threads} threads; expected {runtime.threads}")
        layers = _proven_layers(runtime, promised) if promised is not None else {}
        name = runtime.inputs[0].name
        feeds = _batches(inputs, batch)

        def call() -> int:
            feed = {name: next(feeds)}
            before = time.perf_counter_ns()
            runtime.run(feed)
            return time.perf_counter_ns() - before

        first_ns = call()
        stable = _warm_up(call)
        latencies: list[int] = []
        on_device: list[int] = []
        begun = time.perf_counter()
        while len(latencies) < least_calls or time.perf_counter() - begun < duration_s:
            latencies.append(call())
            if (taken := runtime.device_ns) is not None:
                on_device.append(taken)
        return Measurement(
            device=used.device,
            threads=used.threads,
            version=used.version,
            load_ms=load_ns / 1e6,
            first_inference_ms=first_ns / 1e6,
            stable=stable,
            latencies_ns=latencies,
            peak_rss_mb=_peak_rss_mb(),
            layers=layers,
            device_ns=on_device,
            gpu=gpu_state() if on_device else None,
        )


def _proven_layers(runtime: Runtime, promised: float) -> dict[str, int]:
    layers = runtime.layers()
    missing = shortfall(layers, runtime.precision, promised)
    if missing is not None and runtime.cannot_compute(runtime.precision) is None:
        raise StageFailed(f"{runtime.name} runs {missing}")
    return layers


def _batches(inputs: NDArray[np.float32], batch: int) -> Iterator[NDArray[np.float32]]:
    """Endless batches, each starting one row further on; made beforehand, so that making them is not timed."""
    count = len(inputs)
    made = [np.ascontiguousarray(inputs[np.arange(start, start + batch) % count]) for start in range(count)]
    while True:
        yield from made


def _warm_up(call: Callable[[], int]) -> bool:
    """Call until time, calls and stability are reached; False if the last never was."""
    latencies: list[int] = []
    begun = time.perf_counter()
    while True:
        latencies.append(call())
        elapsed = time.perf_counter() - begun
        if elapsed < WARM_UP_S or len(latencies) < WARM_UP_CALLS:
            continue
        if settled(latencies):
            return True
        if elapsed > WARM_UP_LIMIT * WARM_UP_S and len(latencies) > WARM_UP_LIMIT * WARM_UP_CALLS:
            return False


def settled(latencies: list[int]) -> bool:
    """Whether the medians of the last three windows agree within 3 %; a window is a tenth of the calls, or five."""
    size = max(_WINDOW_CALLS, len(latencies) // 10)
    if len(latencies) < STABLE_WINDOWS * size:
        return False
    medians = [float(np.median(latencies[-(i + 1) * size : len(latencies) - i * size])) for i in range(STABLE_WINDOWS)]
    return max(medians) <= (1 + STABLE_WITHIN) * min(medians)


def _peak_rss_mb() -> float:
    # getrusage's figure survives exec, so that a small process would report its parent's peak; VmHWM does not.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024  # KiB
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024  # bytes there, KiB elsewhere
