"""The export, stage by stage: composition only, each stage is another module's function."""

from __future__ import annotations

import filecmp
import functools
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from dmformer.bundle.manifest import (
    GOLDEN,
    MANIFEST,
    AccuracyEvidence,
    Artifact,
    Evidence,
    LatencyEvidence,
    ParityEvidence,
    Simplification,
    file_entry,
)
from dmformer.bundle.reader import own_bundle
from dmformer.bundle.select import cannot_run, saturation
from dmformer.bundle.writer import staged
from dmformer.cache import NoCache
from dmformer.errors import CheckFailed, StageFailed
from dmformer.export.artifact import Built, Proven, check_onnx, make_artifact, proven, runtime_of
from dmformer.export.describe import describe_export
from dmformer.export.formats import ConversionSource, is_compiled
from dmformer.export.graph import GraphSource, VerifiedGraph, verified_graph
from dmformer.export.precisions import Calibration, Made, PrecisionSource, make
from dmformer.export.reduced import Reduced, prove
from dmformer.export.request import BENCH_REPORT, PARITY_REPORT, ExportRequest, ExportResult, check_possible
from dmformer.export.speed import Timed, compare_precisions, fastest
from dmformer.files import indented_json
from dmformer.machine import gpu_state
from dmformer.progress import Progress, silent
from dmformer.runtimes import registry
from dmformer.verify.parity import check_accuracy
from dmformer.verify.reference import torch_answers
from dmformer.verify.report import Check, explained, failure, report
from dmformer.verify.tasks.measures import measure_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.manifest import Manifest
    from dmformer.export.known import KnownExport
    from dmformer.models.dmformer import DMFormerBackbone
    from dmformer.verify.answers import Answers

_MOST_CALIBRATION = 512
T = TypeVar("T")


def export(request: ExportRequest, stage: Progress = silent, known: KnownExport | None = None) -> ExportResult:
    """Trace, simplify, reduce the precision, convert, verify each step, and write the bundle.

    Args:
        request: what to export.
        stage: told about each step.
        known: its cache has the results of stages that were done before with the same inputs, and keeps what is made
            now, where its checks held.

    Raises:
        CheckFailed: a check failed; nothing was written, unless ``request.force``.
        StageFailed: a stage broke, or the only engine that was asked for; nothing was written.
        UnavailableError: a package that a format needs is not installed.
        UsageError: the output folder or an image cannot be used.
    """
    check_possible(request)
    with staged(request.output) as folder:
        scratch = folder.with_name("scratch")
        scratch.mkdir()
        cache = known.cache if known is not None else NoCache()
        made = _Export(request, folder, scratch, stage, cache).run()
        if known is not None:
            known.keep(folder, made)
    return replace(made, not_kept=cache.trouble)


def _held(found: VerifiedGraph | Reduced | Proven) -> bool:
    return all(check.passed for check in found.checks)


def _gpu(artifacts: Sequence[Artifact]) -> list[object]:
    """Name and driver of the GPU, where one may run an artifact: what is measured depends on them."""
    if all(artifact.target is None for artifact in artifacts):
        return []
    state = gpu_state() or {}
    return [state.get("name"), state.get("driver")]


class _Export:
    """One export under way: a folder that becomes the bundle, and the checks so far."""

    def __init__(self, request: ExportRequest, folder: Path, scratch: Path, stage: Progress, cache: NoCache) -> None:
        self.request = request
        self.checkpoint = request.checkpoint
        self.folder = folder
        self.scratch = scratch
        self.stage = stage
        self.cache = cache
        self.checks: list[Check] = []
        self.left_out: list[str] = list(request.not_made)
        self.broken: list[str] = []
        self.answers: Answers | None = None  # of onnxruntime to the float32 file, where it was asked just now

    @functools.cached_property
    def network(self) -> list[object]:
        """What every stage depends on: the checkpoint by its content, and the form that is traced."""
        return [self.cache.digest(self.checkpoint), self.request.deploy_form]

    def run(self) -> ExportResult:
        model = self.checkpoint.model()
        calibration = self._calibrate(model)
        source = GraphSource(
            self.checkpoint,
            model,
            self.request.deploy_form,
            self.request.images,
            self.scratch,
            self.stage,
        )
        graph = self._trace(source)
        self.checks.extend(graph.checks)
        golden = graph.golden
        artifacts: list[Artifact] = []
        for precision in self._precisions():
            found = self._reduce(precision, source, graph, golden, calibration)
            if found is None:
                continue
            made, golden = found.made, found.golden
            for row in self._rows(precision):
                try:
                    artifacts += self._take(*self._convert(row, precision, made, graph, golden, calibration))
                except StageFailed as error:
                    if not is_compiled(row):
                        raise
                    self._give_up(row, precision, error)
        if not artifacts:
            raise StageFailed("; ".join(self.broken))
        return self._finish(model, golden, artifacts, graph.simplification, calibration)

    def _once(
        self,
        what: str,
        inputs: object,
        kind: type[T],
        make: Callable[[], T],
        root: Path,
        sound: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """What a stage gives, or gave before (:meth:`dmformer.cache.NoCache.get_or_make`)."""
        return self.cache.get_or_make(f"{self.checkpoint.arch}: {what}", inputs, kind, make, root, sound)

    def _trace(self, source: GraphSource) -> VerifiedGraph:
        def make() -> VerifiedGraph:
            graph, self.answers = verified_graph(source)
            return graph

        what, inputs = "trace to ONNX, simplify, verify", (self.network, self.request.images)
        return self._once(what, inputs, VerifiedGraph, make, self.scratch, _held)

    def _give_up(self, row: registry.RuntimeEntry, precision: str, error: StageFailed) -> None:
        """An engine that cannot be built takes nothing else down with it."""
        shutil.rmtree(self.folder / row.format / precision)
        self.broken.append(f"{row.format} {precision}: {error}")
        self.left_out.append(self.broken[-1])

    def _precisions(self) -> list[str]:
        """Those asked for, and float32 to compare the others with."""
        return list(dict.fromkeys(("fp32", *self.request.precisions)))

    def _rows(self, precision: str) -> list[registry.RuntimeEntry]:
        """Formats to make at a precision: those asked for, and at float32 those that others are timed against here."""
        rows = map(registry.entry_of_format, self.request.formats)
        return [
            row
            for row in rows
            if precision in registry.support(row).precisions
            and (precision in self.request.precisions or self._runs_here(row))
        ]

    def _runs_here(self, row: registry.RuntimeEntry) -> bool:
        """Whether a format can be timed on this machine; one that is built for named targets is for other machines."""
        return registry.support(row).probe().available and not (is_compiled(row) and self.request.engine.targets)

    def _calibrate(self, model: DMFormerBackbone) -> Calibration | None:
        """PyTorch's answers to the calibration images, where a reduced precision is asked for."""
        if not self.request.reduced:
            return None
        if self.request.calibration is None:
            self.left_out.append("accuracy: not measured without calibration images; give --calibration DIR")
            return None
        images = self.request.calibration.spread(_MOST_CALIBRATION)
        measure = measure_of(self.checkpoint.config.task, self.checkpoint.config.num_classes)
        what = "PyTorch on the calibration images"

        def make() -> NDArray[Any]:
            with self.stage(what, measure.parts(images)) as advance:
                return torch_answers(model, images, measure, advance)

        kept = self._once(what, (self.network, images), np.ndarray, make, self.scratch)
        return Calibration(images, measure, kept, measure.score(kept, images, kept))

    def _reduce(
        self,
        precision: str,
        graph: GraphSource,
        verified: VerifiedGraph,
        golden: Golden,
        calibration: Calibration | None,
    ) -> Reduced | None:
        """The ONNX file at a precision; ``None`` where it cannot be had and need not be."""
        if precision == "fp32":
            return Reduced(Made(verified.onnx, promised=1.0), golden)
        if not all(check.passed for check in self.checks if check.precision == "fp32"):
            self.left_out.append(f"{precision}: float32 failed its checks")
            return None
        source = PrecisionSource(
            onnx=verified.onnx,
            inputs=golden.inputs,
            calibration=calibration,
            max_points_lost=self.request.max_points_lost,
            weight_bits=self.request.weight_bits,
            scratch=self.scratch,
            stage=self.stage,
        )

        def reduce() -> Reduced:
            made = make(precision, source)
            with self.stage(f"literal execution of {precision}, emulation in PyTorch"):
                made, completed, checks = prove(precision, made, graph.form, source, golden)
            return Reduced(made, completed, tuple(checks))

        options = (self.request.max_points_lost, self.request.weight_bits if precision == "int8" else None)
        inputs = (self.network, precision, verified.onnx, golden, calibration, *options)
        try:
            found = self._once(f"ONNX at {precision}", inputs, Reduced, reduce, self.scratch, _held)
        except (CheckFailed, StageFailed) as error:
            if not self.request.choose_fastest:
                raise
            self.left_out.append(f"{precision}: {error}")
            return None
        wrong = [check.reason for check in found.checks if not check.passed]
        if wrong and self.request.choose_fastest:
            self.left_out.append(f"{precision}: {wrong[0]}")
            return None
        self.checks.extend(found.checks)
        return found

    def _take(self, artifact: Artifact, checks: Sequence[Check]) -> list[Artifact]:
        """The artifact, unless a check of it failed and another precision may take its place."""
        wrong = [check for check in checks if not check.passed]
        if wrong and self.request.choose_fastest and artifact.precision != "fp32":
            self.left_out.append(f"{artifact.format} {artifact.precision}: {wrong[0].where}: {wrong[0].reason}")
            shutil.rmtree(self.folder / artifact.format / artifact.precision)
            return []
        self.checks.extend(checks)
        return [artifact]

    def _convert(
        self,
        row: registry.RuntimeEntry,
        precision: str,
        made: Made,
        graph: VerifiedGraph,
        golden: Golden,
        calibration: Calibration | None,
    ) -> tuple[Artifact, list[Check]]:
        """An artifact, and what its runtime answers with it; onnxruntime where that cannot run here."""
        artifact = self._build(row, precision, made)
        reason = cannot_run(row, artifact)
        if reason:
            self.left_out.append(
                f"{row.format} {precision}: built and not run, {reason}. Its ONNX file was compared in onnxruntime; "
                "run dmformer verify on the device"
            )

        def prove_artifact() -> Proven:
            if reason:
                return Proven(artifact, tuple(self._check_onnx(precision, made, golden)))
            return self._prove(row, artifact, made, graph, golden, calibration)

        inputs = (artifact, made.onnx, golden, calibration, self.request.max_points_lost, reason, _gpu([artifact]))
        what = f"verify {row.format} {precision}"
        found = self._once(what, inputs, Proven, prove_artifact, self.folder, _held)
        return found.artifact, list(found.checks)

    def _build(self, row: registry.RuntimeEntry, precision: str, made: Made) -> Artifact:
        def build() -> Built:
            (self.folder / row.format / precision).mkdir(parents=True, exist_ok=True)
            artifact = make_artifact(
                row,
                ConversionSource(made.onnx, precision, self.checkpoint, self.request.engine, self.stage),
                self.folder,
                promised_share=made.promised,
                kept_in_fp32=made.kept_in_fp32,
                sensitivity=made.sensitivity,
                weight_bits=made.weight_bits,
            )
            return Built(artifact, tuple(self.folder / entry.path for entry in artifact.files))

        if is_compiled(row) and not self.request.engine.targets:  # tuned on the GPU of this machine, as it is just now
            return build().artifact
        inputs = (self.network, row.format, precision, replace(made, answers=None), self.request.engine)
        what = f"convert to {row.format} {precision}"
        return self._once(what, inputs, Built, build, self.folder).artifact

    def _prove(
        self,
        row: registry.RuntimeEntry,
        artifact: Artifact,
        made: Made,
        graph: VerifiedGraph,
        golden: Golden,
        calibration: Calibration | None,
    ) -> Proven:
        path = self.folder / artifact.files[0].path
        known = None
        if self.answers is not None and self.answers.layers and filecmp.cmp(path, graph.onnx, shallow=False):
            known = self.answers  # asked already, under another name
        with self.stage(f"verify {artifact.format} {artifact.precision} in {row.name}"):
            artifact, checks = proven(row, artifact, self.folder, golden, known)
        if calibration is not None and artifact.layers:
            asked = row.name == "onnxruntime" and filecmp.cmp(path, made.onnx, shallow=False)
            artifact, check = self._measure(row, artifact, calibration, made.answers if asked else None)
            checks.append(check)
        return Proven(artifact, tuple(checks))

    def _check_onnx(self, precision: str, made: Made, golden: Golden) -> list[Check]:
        """The ONNX file in onnxruntime, in place of an engine that is built for other machines."""
        with self.stage(f"verify the ONNX at {precision} in onnxruntime"):
            return check_onnx(made.onnx, precision, golden)

    def _measure(
        self, row: registry.RuntimeEntry, artifact: Artifact, calibration: Calibration, kept: NDArray[Any] | None
    ) -> tuple[Artifact, Check]:
        """Accuracy on the calibration images, against the budget; ``kept`` of the answers where it was asked before."""
        images, measure = calibration.images, calibration.measure
        if kept is None:
            with self.stage(f"accuracy of {artifact.precision} in {row.name}", measure.parts(images)) as advance:
                kept = measure.answers(runtime_of(row, artifact, self.folder), images, advance)
        accuracy, lost = calibration.points_lost(kept)
        check = check_accuracy(row.name, artifact.precision, accuracy, lost, self.request.max_points_lost)
        (check,) = explained([check], saturation(row, artifact.full_range))
        return msgspec.structs.replace(artifact, accuracy=accuracy, points_lost=lost), check

    def _finish(
        self,
        model: DMFormerBackbone,
        golden: Golden,
        artifacts: list[Artifact],
        simplification: Simplification,
        calibration: Calibration | None,
    ) -> ExportResult:
        comparing = self.request.reduced and self._runnable(artifacts)
        if not comparing:
            artifacts = self._keep(artifacts, self._asked_for(artifacts))
        parity = report(self.checks, self.left_out)
        failed = [check for check in parity.checks if not check.passed]
        if failed and not self.request.force:
            raise CheckFailed(f"nothing was written: {failure(parity)}; --force writes the bundle all the same")
        golden.save(self.folder / GOLDEN)
        self._write_report(PARITY_REPORT, parity)
        evidence = Evidence(
            parity=ParityEvidence(
                passed=parity.passed, checks=len(parity.checks), failed=len(failed), report=PARITY_REPORT
            ),
            processor=parity.processor,
            accuracy=self._accuracy_evidence(calibration),
            cached=tuple(self.cache.taken),
        )
        manifest = describe_export(
            self.checkpoint,
            model=model,
            weights=self.request.weights,
            seed=self.request.seed,
            deploy_form=self.request.deploy_form,
            simplification=simplification,
            artifacts=artifacts,
            files=[file_entry(self.folder, self.folder / name) for name in (GOLDEN, PARITY_REPORT)],
            evidence=evidence,
        )
        (self.folder / MANIFEST).write_bytes(manifest.encode())
        if comparing and not failed:  # what failed its checks is not timed, and may not even load
            manifest = self._compare_speed(manifest)
            (self.folder / MANIFEST).write_bytes(manifest.encode())
        return ExportResult(self.request.output, manifest, parity, tuple(self.broken))

    def _runnable(self, artifacts: Sequence[Artifact]) -> bool:
        """Whether anything that was made can be timed on this machine."""
        return any(cannot_run(registry.entry_of_format(artifact.format), artifact) is None for artifact in artifacts)

    def _accuracy_evidence(self, calibration: Calibration | None) -> AccuracyEvidence | None:
        if calibration is None:
            return None
        return AccuracyEvidence(
            images=len(calibration.images),
            labelled=calibration.images.labelled,
            max_points_lost=self.request.max_points_lost,
            torch=calibration.accuracy,
        )

    def _compare_speed(self, manifest: Manifest) -> Manifest:
        """Time every artifact of the folder, say which earn their place, and keep those that were asked for."""
        timed = self._once(
            "speed",
            (manifest.artifacts, _gpu(manifest.artifacts)),
            Timed,
            lambda: compare_precisions(own_bundle(self.folder), self.stage),
            self.folder,
            lambda found: found.report.noise_floor is not None,  # otherwise another run may know more
        )
        self._write_report(BENCH_REPORT, timed.report)
        kept = fastest(timed.artifacts) if self.request.choose_fastest else self._asked_for(timed.artifacts)
        kept = self._keep(timed.artifacts, kept)
        entry = file_entry(self.folder, self.folder / BENCH_REPORT)
        latency = LatencyEvidence(noise_floor=timed.report.noise_floor, report=BENCH_REPORT)
        return msgspec.structs.replace(
            manifest,
            artifacts=tuple(kept),
            files=(*manifest.files, entry),
            evidence=msgspec.structs.replace(manifest.evidence, latency=latency, cached=tuple(self.cache.taken)),
        )

    def _keep(self, artifacts: Sequence[Artifact], kept: Sequence[Artifact]) -> list[Artifact]:
        """Remove the files of all others."""
        for artifact in artifacts:
            if artifact not in kept:
                shutil.rmtree(self.folder / artifact.format / artifact.precision)
        return list(kept)

    def _asked_for(self, artifacts: Sequence[Artifact]) -> list[Artifact]:
        asked = {(row.format, precision) for row, precision in self.request.pairs()}
        return [artifact for artifact in artifacts if (artifact.format, artifact.precision) in asked]

    def _write_report(self, name: str, content: msgspec.Struct) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(indented_json(content))
