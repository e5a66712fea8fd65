"""What the machine can do with the same threads, measured in the same run: the distance to it is what is left to gain.

The roofline model (Williams, Waterman, Patterson, CACM 2009): no network runs faster than its arithmetic at the rate of
a large matrix product, nor faster than its least traffic at the rate of a large copy.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from dmformer.runtimes import registry
from dmformer.task import STRIDES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dmformer.bundle.manifest import Artifact, Manifest

# What the libraries behind NumPy's matrix product read when they are loaded.
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

_MATRIX = 2048
_COPY_BYTES = 1 << 27  # well beyond the caches of small machines, well within their memory
_LEAST_CALLS = 3
_LEAST_S = 0.4


class Peak(Struct, frozen=True, kw_only=True):
    """What an engine attains at a precision that NumPy has no matrix product for; 10^9 operations a second."""

    runtime: str
    precision: str
    gops: float


class Limits(Struct, frozen=True, kw_only=True):
    """What the machine attains with so many threads.

    Attributes:
        threads: of the matrix product and of the copy.
        gflops: of a float32 matrix product of 2048 x 2048, 10^9 a second; a multiply and an add are two.
        gbytes_per_s: of a copy of 128 MiB, bytes read plus bytes written, 10^9 a second.
        peaks: at reduced precisions, of the engines that were timed.
    """

    threads: int
    gflops: float
    gbytes_per_s: float
    peaks: tuple[Peak, ...] = ()


class LimitsOrder(Struct, frozen=True, kw_only=True):
    """What to measure: with how many threads, and of which runtimes at which precisions the peaks too."""

    threads: int
    peaks: tuple[tuple[str, str], ...] = ()


def measure_limits(order: LimitsOrder) -> Limits:
    """Measure in this process, in which NumPy was imported after its :data:`THREAD_VARIABLES` were set."""
    threads = order.threads
    rng = np.random.default_rng(0)
    left, right = rng.random((2, _MATRIX, _MATRIX), dtype=np.float32)
    product = np.empty_like(left)
    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # NumPy copies with one thread, without the interpreter's lock

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

        bytes_per_s = 2 * _COPY_BYTES / _best(copy)
    flops = 2 * _MATRIX**3 / _best(lambda: np.matmul(left, right, out=product))
    peaks = []
    for runtime, precision in order.peaks:
        gops = registry.available_adapter(registry.entry(runtime)).support.peak_gops(precision, threads)
        if gops is not None:
            peaks.append(Peak(runtime=runtime, precision=precision, gops=gops))
    return Limits(threads=threads, gflops=flops / 1e9, gbytes_per_s=bytes_per_s / 1e9, peaks=tuple(peaks))


def _best(work: Callable[[], object]) -> float:
    """Seconds of the quickest of a few calls, the first left out: a limit is what the machine can do undisturbed."""
    work()
    taken: list[float] = []
    while len(taken) < _LEAST_CALLS or sum(taken) < _LEAST_S:
        before = time.perf_counter()
        work()
        taken.append(time.perf_counter() - before)
    return min(taken)


def least_work(manifest: Manifest, artifact: Artifact, batch: int) -> tuple[float, float]:
    """Return the operations and bytes that one call cannot do without.

    Returns:
        Two operations for each multiply-accumulate of the network; the artifact's largest file, which is its weights,
        read once, with the images in and the answers out. What layers hand to one another may stay in caches.
    """
    weights = max(file.bytes for file in artifact.files)
    side = manifest.preprocessing.image_size  # what is open in the manifest has the size of the preprocessing
    strides = (1, *(STRIDES if manifest.model.task == "features" else (1,)))
    values = sum(
        math.prod(size if isinstance(size, int) else side // stride for size in tensor.shape[1:])
        for tensor, stride in zip((*manifest.inputs, *manifest.outputs), strides, strict=True)
    )
    return 2.0 * manifest.model.macs * batch, float(weights + 4 * values * batch)


def attainable_ms(limits: Limits, runtime: str, layers: Mapping[str, int], work: tuple[float, float]) -> float | None:
    """Return the least milliseconds that one call can take on this machine, all threads used.

    Args:
        limits: of the machine.
        runtime: that ran it.
        layers: compute layers by the precision in which they ran; all arithmetic is taken at the quickest of these, so
            that the figure is a limit also for a network of several precisions.
        work: operations and bytes, from :func:`least_work`.

    Returns:
        ``None`` where the rate at one of the precisions is not known.
    """
    gops = {peak.precision: peak.gops for peak in limits.peaks if peak.runtime == runtime} | {"fp32": limits.gflops}
    if not layers or not layers.keys() <= gops.keys():
        return None
    operations, least_bytes = work
    quickest = max(gops[precision] for precision in layers)
    return 1e3 * max(operations / (quickest * 1e9), least_bytes / (limits.gbytes_per_s * 1e9))


def environment_for(threads: int) -> dict[str, str]:
    """Return the environment of a process that measures with so many threads."""
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
