"""What ``bench`` reports: types, and the figures made from raw samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from dmformer.bench.measure import SAMPLES_FOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bench.measure import Measurement


class Latency(Struct, frozen=True, kw_only=True):
    """Milliseconds for one call. A percentile is ``null`` where there are too few samples to know it."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float
    min: float
    max: float


class Result(Struct, frozen=True, kw_only=True):
    """One configuration. Where ``status`` is ``failed``, ``reason`` says why and the figures are ``null``.

    ``layers`` has the compute layers by the precision in which they ran, ``samples_ns`` the raw latencies, a list for
    each process. ``device_latency_ms`` is the time on a GPU alone, from events: without transfers and without the host.
    ``gpu`` has clocks, temperature and what held the clocks back, read right after the calls of each process.
    ``attainable_ms`` and ``share_of_limit`` are ``null`` in this version, which does not measure the
    machine's limits.
    """

    runtime: str
    precision: str
    batch: int
    threads: int
    artifact_sha256: str
    status: Literal["ok", "unstable", "failed"]
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
    layers: dict[str, int] = {}
    attainable_ms: float | None = None
    share_of_limit: float | None = None
    samples_ns: tuple[tuple[int, ...], ...] = ()
    gpu: tuple[dict[str, Any], ...] = ()


class BenchReport(Struct, frozen=True, kw_only=True):
    """All configurations of one run.

    The first configuration is run twice in each round. ``noise_floor`` is the distance of the ratio of its two medians
    from 1, the median over rounds: smaller differences between configurations are ties. ``limits`` is ``null`` in this
    version. ``skipped`` has a sentence for each artifact that no runtime here can run.
    """

    environment: dict[str, Any]
    results: tuple[Result, ...]
    limits: dict[str, float] | None = None
    noise_floor: float | None = None
    skipped: tuple[str, ...] = ()


def latency(samples_ns: Sequence[int]) -> Latency:
    """Figures in milliseconds from raw nanoseconds; nothing is clipped."""
    values = np.asarray(samples_ns, np.float64) / 1e6

    def percentile(name: str) -> float | None:
        return float(np.percentile(values, int(name[1:]))) if len(values) >= SAMPLES_FOR[name] else None

    return Latency(
        p50=percentile("p50"),
        p90=percentile("p90"),
        p99=percentile("p99"),
        mean=float(values.mean()),
        min=float(values.min()),
        max=float(values.max()),
    )


def summarise(result: Result, rounds: Sequence[Measurement]) -> Result:
    """Fill a configuration's figures in from its rounds; load and first inference are medians over the rounds."""
    pooled = [sample for measured in rounds for sample in measured.latencies_ns]
    on_device = [sample for measured in rounds for sample in measured.device_ns]
    stable = all(measured.stable for measured in rounds)
    reason = None if stable else "the warm-up did not settle within 3 %: the machine is busy or its clock changes"
    return msgspec.structs.replace(
        result,
        status="ok" if stable else "unstable",
        reason=reason,
        device=rounds[0].device,
        engine_version=rounds[0].version,
        latency_ms=latency(pooled),
        device_latency_ms=latency(on_device) if on_device else None,
        samples=len(pooled),
        throughput_ips=result.batch * len(pooled) / (sum(pooled) / 1e9),
        load_ms=float(np.median([measured.load_ms for measured in rounds])),
        first_inference_ms=float(np.median([measured.first_inference_ms for measured in rounds])),
        layers=rounds[0].layers,
        peak_rss_mb=max(measured.peak_rss_mb for measured in rounds),
        gpu=tuple(measured.gpu for measured in rounds if measured.gpu is not None),
        samples_ns=tuple(tuple(measured.latencies_ns) for measured in rounds),
    )


def round_ratios(candidate: Sequence[Sequence[int]], baseline: Sequence[Sequence[int]]) -> list[float]:
    """Ratio of the medians of two configurations in each round; rounds stand side by side in time."""
    return [float(np.median(a) / np.median(b)) for a, b in zip(candidate, baseline, strict=True)]
