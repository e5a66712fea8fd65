"""The steps after the ONNX file, each a function: convert, verify, time. They import no PyTorch: a device has them too.

Before them are :func:`dmformer.export.graph.verified_graph` (reference, trace, simplify) and
:mod:`dmformer.export.precisions` (make and verify a file at a precision).
"""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dmformer.bench.api import bench
from dmformer.bench.report import BenchReport, Result
from dmformer.bench.statistics import round_ratios
from dmformer.bundle.golden import Golden
from dmformer.bundle.manifest import Artifact, Speed, file_entry
from dmformer.bundle.select import cannot_run, saturation_risk
from dmformer.errors import StageFailed
from dmformer.export import formats
from dmformer.export.formats import ConversionSource
from dmformer.export.options import EngineOptions
from dmformer.export.precisions import Calibration, PrecisionFile
from dmformer.progress import Progress
from dmformer.runtimes import registry
from dmformer.verify.answers import Answers, ask
from dmformer.verify.parity import (
    check_accuracy,
    check_answers,
    check_artifact,
    check_consistency,
    check_other_size,
    references,
)
from dmformer.verify.report import Check, add_cause

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence  # noqa: TC004 - only the names of types

    from numpy.typing import NDArray
    from torch import nn  # noqa: TC004 - as above

    from dmformer.bundle.reader import Bundle
    from dmformer.models.checkpoint import Checkpoint  # noqa: TC004 - it imports torch, which a device has not
    from dmformer.runtimes.base import Runtime

TIMED_S = 1.5


@dataclass(frozen=True)
class Work:
    """What steps work with.

    Attributes:
        folder: becomes the bundle.
        stage: told about each step.
        engine: how formats that are compiled are compiled.
        golden: images, and what PyTorch and the ONNX files so far answered.
        checkpoint: where the ONNX files came from; ``None`` on a device, which has these alone.
        calibration: images to measure accuracy on, where there are some.
        max_accuracy_drop: accuracy that a precision may lose on them, in percentage points.
        answers: onnxruntime's to the float32 ONNX file, where it was asked just now.
        float32: the float32 ONNX file; ``None`` on a device whose bundle has none.
        form: makes the network in the form that was traced; ``None`` on a device.
    """

    folder: Path
    stage: Progress
    engine: EngineOptions
    golden: Golden
    checkpoint: Checkpoint | None = None
    calibration: Calibration | None = None
    max_accuracy_drop: float = 0.0
    answers: Answers | None = None
    float32: Path | None = None
    form: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class ConvertedArtifact:
    """An artifact as its converter made it, and its files."""

    artifact: Artifact
    files: tuple[Path, ...]


@dataclass(frozen=True)
class VerifiedArtifact:
    """An artifact with all that was found of it, and its checks."""

    artifact: Artifact
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class TimedArtifacts:
    """A bundle's artifacts with their speed, and the run that it comes from."""

    artifacts: tuple[Artifact, ...]
    report: BenchReport


def convert_artifact(work: Work, row: registry.RuntimeEntry, file: PrecisionFile) -> ConvertedArtifact:
    """Make a format of an ONNX file; what is known of that file holds for the artifact too.

    Raises:
        StageFailed: the converter failed.
        UnavailableError: a package that it needs is not installed.
    """
    folder = work.folder / row.format / file.precision
    folder.mkdir(parents=True, exist_ok=True)
    source = ConversionSource(
        onnx=file.onnx,
        precision=file.precision,
        checkpoint=work.checkpoint,
        engine=work.engine,
        stage=work.stage,
        float32=work.float32,
        kept_in_fp32=tuple(file.kept_in_fp32),
        form=work.form,
    )
    with work.stage(f"convert to {row.format} {file.precision}"):
        converted = formats.convert(row, source, folder)
        entries = tuple(file_entry(work.folder, path) for path in converted.files)
    artifact = Artifact(
        format=row.format,
        precision=file.precision,
        files=entries,
        built_with=converted.built_with,
        promised_share=file.promised_share,
        kept_in_fp32=file.kept_in_fp32,
        sensitivity=file.sensitivity,
        weight_bits=file.weight_bits,
        target=converted.target,
        engine_batch=converted.engine_batch,
    )
    return ConvertedArtifact(artifact, converted.files)


def verify_artifact(
    work: Work, row: registry.RuntimeEntry, artifact: Artifact, file: PrecisionFile
) -> VerifiedArtifact:
    """What the runtime answers with an artifact, in which precision it computes, and how accurate it is.

    Where it cannot run here, the ONNX file is asked in onnxruntime instead; a device has no such file of its own.
    """
    if cannot_run(row, artifact):
        return VerifiedArtifact(artifact, () if work.checkpoint is None else tuple(_check_onnx(work, file)))
    path = work.folder / artifact.files[0].path
    same = row.name == "onnxruntime" and filecmp.cmp(path, file.onnx, shallow=False)
    with work.stage(f"verify {artifact.format} {artifact.precision} in {row.name}"):
        answers = work.answers if same and file.precision == "fp32" else None
        if answers is None or not answers.layers:
            answers = _ask(work.golden, _runtime(work, row, artifact))
        checks = check_artifact(answers, work.golden, row, artifact)
        artifact = msgspec.structs.replace(artifact, layers=answers.layers)
    if work.calibration is not None and artifact.layers:
        artifact, check = _measure(work, row, artifact, file.answers if same else None)
        checks.append(check)
    return VerifiedArtifact(artifact, tuple(checks))


def _check_onnx(work: Work, file: PrecisionFile) -> list[Check]:
    row = registry.entry("onnxruntime")
    adapter, float16_sums = registry.available_adapter(row), registry.support(row).sums_in_float16()
    with work.stage(f"verify the ONNX at {file.precision} in onnxruntime"):
        answers = _ask(work.golden, adapter(file.onnx, precision=file.precision))
    compared_with = references(work.golden, file.precision, float16_sums=float16_sums)
    return [
        *check_answers("onnx", answers, compared_with),
        *check_consistency(answers, compared_with),
        *check_other_size("onnx", answers, work.golden, float16_sums),
    ]


def _ask(golden: Golden, runtime: Runtime) -> Answers:
    return ask(runtime, golden.inputs, golden.thinned, other_size=golden.other_size)


def _runtime(work: Work, row: registry.RuntimeEntry, artifact: Artifact) -> Runtime:
    adapter = registry.available_adapter(row)
    return adapter(work.folder / artifact.files[0].path, precision=artifact.precision, target=artifact.target)


def _measure(
    work: Work, row: registry.RuntimeEntry, artifact: Artifact, kept: NDArray[Any] | None
) -> tuple[Artifact, Check]:
    """Accuracy on the calibration images, against the budget; ``kept`` of the answers where it was asked before."""
    assert work.calibration is not None
    images, measure = work.calibration.images, work.calibration.measure
    if kept is None:
        with work.stage(f"accuracy of {artifact.precision} in {row.name}", measure.parts(images)) as advance:
            kept = measure.answers(_runtime(work, row, artifact), images, advance)
    accuracy, lost = work.calibration.points_lost(kept)
    check = check_accuracy(row.name, artifact.precision, accuracy, lost, work.max_accuracy_drop)
    (check,) = add_cause([check], saturation_risk(row, artifact.full_range))
    return msgspec.structs.replace(artifact, accuracy=accuracy, points_lost=lost), check


def time_artifacts(bundle: Bundle, stage: Progress) -> TimedArtifacts:
    """Time all artifacts beside float32, rounds interleaved, each in processes of its own, for their medians alone.

    The batch is 1, or the least that every engine takes.

    Raises:
        StageFailed: an artifact could not be timed.
    """
    targets = [artifact.target for artifact in bundle.manifest.artifacts if artifact.target is not None]
    batch = max([1, *(target.min_batch for target in targets)])
    report = bench(bundle, batches=[batch], duration_s=TIMED_S, brief=True, stage=stage)
    for result in report.results:
        if not result.timed:
            raise StageFailed(f"timing {result.runtime} {result.precision}: {result.reason}")
    by_hash = {(result.artifact_sha256, result.precision): result for result in report.results}
    rows = [(artifact, by_hash.get((artifact.sha256, artifact.precision))) for artifact in bundle.manifest.artifacts]
    baselines = {artifact.format: result for artifact, result in rows if result and artifact.precision == "fp32"}
    return TimedArtifacts(
        tuple(
            msgspec.structs.replace(artifact, speed=_speed(result, baselines[artifact.format], report))
            if result and artifact.format in baselines  # an engine for another GPU is not timed here
            else artifact
            for artifact, result in rows
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
