"""Whether a reduced precision earns its place: timed beside float32, on the runtime that it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from dmformer.bench.api import bench
from dmformer.bench.report import BenchReport, Result
from dmformer.bench.statistics import round_ratios
from dmformer.bundle.manifest import Artifact, Speed
from dmformer.errors import StageFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bundle.reader import Bundle
    from dmformer.progress import Progress

DURATION_S = 1.5


@dataclass(frozen=True)
class Timed:
    """A bundle's artifacts with their speed, and the run that it comes from."""

    artifacts: tuple[Artifact, ...]
    report: BenchReport


def compare_precisions(bundle: Bundle, stage: Progress) -> Timed:
    """Time all artifacts, rounds interleaved, each in processes of its own, for their medians alone.

    The batch is 1, or the least that every engine takes.

    Raises:
        StageFailed: an artifact could not be timed.
    """
    targets = [artifact.target for artifact in bundle.manifest.artifacts if artifact.target is not None]
    batch = max([1, *(target.min_batch for target in targets)])
    report = bench(bundle, batches=[batch], duration_s=DURATION_S, brief=True, stage=stage)
    for result in report.results:
        if not result.timed:
            raise StageFailed(f"timing {result.runtime} {result.precision}: {result.reason}")
    by_hash = {(result.artifact_sha256, result.precision): result for result in report.results}
    found = [(artifact, by_hash.get((artifact.sha256, artifact.precision))) for artifact in bundle.manifest.artifacts]
    baselines = {artifact.format: result for artifact, result in found if result and artifact.precision == "fp32"}
    return Timed(
        tuple(
            msgspec.structs.replace(artifact, speed=_speed(result, baselines[artifact.format], report))
            if result and artifact.format in baselines  # an engine for another GPU is not timed here
            else artifact
            for artifact, result in found
        ),
        report,
    )


def fastest(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """For each format the precision with the least latency; float32 where none is faster beyond the noise."""
    best: dict[str, Artifact] = {}
    for artifact in artifacts:
        held = best.get(artifact.format)
        earned = artifact.precision == "fp32" or (artifact.speed is not None and artifact.speed.faster)
        if earned and (held is None or _ratio(artifact) < _ratio(held)):
            best[artifact.format] = artifact
    return list(best.values())


def _ratio(artifact: Artifact) -> float:
    return 1.0 if artifact.speed is None else artifact.speed.ratio


def _speed(result: Result, baseline: Result, report: BenchReport) -> Speed:
    ratios = round_ratios(result.samples_ns, baseline.samples_ns)
    noise = report.noise_floor
    assert result.latency_ms is not None
    assert baseline.latency_ms is not None
    return Speed(
        p50_ms=float(result.latency_ms.p50 or result.latency_ms.mean),
        fp32_p50_ms=float(baseline.latency_ms.p50 or baseline.latency_ms.mean),
        ratio=float(np.median(ratios)),
        noise_floor=noise,
        faster=noise is not None and max(ratios) < 1 - noise,
        slower=noise is not None and min(ratios) > 1 + noise,
        cpu=str(report.environment["cpu"]),
    )
