"""The export, stage by stage: composition only, each stage is another module's function."""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dmformer.bundle.manifest import (
    GOLDEN,
    MANIFEST,
    AccuracyEvidence,
    Artifact,
    Evidence,
    LatencyEvidence,
    Manifest,
    ParityEvidence,
    Simplification,
    file_entry,
    indented_json,
)
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import cannot_run
from dmformer.bundle.writer import staged
from dmformer.errors import CheckFailed, StageFailed
from dmformer.export import onnx_file
from dmformer.export.describe import describe_export
from dmformer.export.formats import ConversionSource, converter, versions
from dmformer.export.literal import literal_answers
from dmformer.export.precision import Calibration, Made, PrecisionSource, make
from dmformer.export.request import BENCH_REPORT, PARITY_REPORT, ExportRequest, check_possible
from dmformer.export.simplify import Simplifier
from dmformer.export.speed import compare_precisions, fastest
from dmformer.export.torch_onnx import onnx_metadata, trace
from dmformer.models.deploy import deploy
from dmformer.progress import Stage, silent
from dmformer.runtimes import registry
from dmformer.verify.accuracy import logits_of, parts, points_lost, score
from dmformer.verify.compare import reduced_limit
from dmformer.verify.parity import (
    Answers,
    Check,
    ParityReport,
    ask,
    check_accuracy,
    check_answers,
    check_layers,
    check_rows,
    failure,
    report,
)
from dmformer.verify.reference import golden_pixels, make_golden, torch_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.manifest import Accuracy
    from dmformer.models.dmformer import DMFormer
    from dmformer.runtimes.base import Runtime

_MOST_CALIBRATION = 512


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what was found on the way; ``broken`` has the engines that could not be built, and why."""

    output: Path
    manifest: Manifest
    parity: ParityReport
    broken: tuple[str, ...] = ()


def export(request: ExportRequest, stage: Stage = silent) -> ExportResult:
    """Trace, simplify, reduce the precision, convert, verify each step, and write the bundle.

    Raises:
        CheckFailed: a check failed; nothing was written, unless ``request.force``.
        StageFailed: a stage broke, or the only engine that was asked for; nothing was written.
        UnavailableError: a package that a format needs is not installed.
        UsageError: the output folder or an image cannot be used.
    """
    check_possible(request)
    with staged(request.output) as folder, tempfile.TemporaryDirectory(prefix="dmformer-") as scratch:
        return _Export(request, folder, Path(scratch), stage).run()


class _Export:
    """One export under way: a folder that becomes the bundle, and the checks so far."""

    def __init__(self, request: ExportRequest, folder: Path, scratch: Path, stage: Stage) -> None:
        self.request = request
        self.checkpoint = request.checkpoint
        self.folder = folder
        self.scratch = scratch
        self.stage = stage
        self.checks: list[Check] = []
        self.left_out: list[str] = list(request.not_made)
        self.broken: list[str] = []
        self._known: dict[Path, Answers] = {}  # by the ONNX file that was asked

    def run(self) -> ExportResult:
        traced, simplified = self.scratch / "traced.onnx", self.scratch / "simplified.onnx"
        # What needs no other step's result runs beside it: a cold export keeps two cores busy.
        # The process is left first: an exception does not wait for it.
        with ThreadPoolExecutor(1) as pool, Simplifier() as simplifier:
            model = self.checkpoint.model()
            calibration = self._calibrate(model)
            with self.stage("PyTorch reference, trace to ONNX"):
                referring = pool.submit(self._reference, model)
                trace(self.checkpoint, self._form(model), traced)
                golden = referring.result()
            simplifying = pool.submit(simplifier.simplify, traced, simplified)
            with self.stage("verify the traced ONNX"):
                answers = self._ask_onnxruntime(traced, golden, layers=False)
                self.checks.extend(check_answers("traced", answers, golden))
            with self.stage("simplify and verify"):
                simplifying.result()
                onnx, simplification = self._choose(traced, answers, simplified, golden)
        artifacts: list[Artifact] = []
        for precision in self._precisions():
            found = self._reduce(precision, onnx, golden, calibration)
            if found is None:
                continue
            made, golden = found
            for row in self._rows(precision):
                try:
                    artifacts += self._take(*self._convert(row, precision, made, golden, calibration))
                except StageFailed as error:
                    if row.buildable is None:
                        raise
                    self._give_up(row, precision, error)
        if not artifacts:
            raise StageFailed("; ".join(self.broken))
        return self._finish(model, golden, artifacts, simplification, calibration)

    def _give_up(self, row: registry.Entry, precision: str, error: StageFailed) -> None:
        """An engine that cannot be built takes nothing else down with it."""
        shutil.rmtree(self.folder / row.format / precision)
        self.broken.append(f"{row.format} {precision}: {error}")
        self.left_out.append(self.broken[-1])

    def _precisions(self) -> list[str]:
        """Those asked for, and float32 to compare the others with."""
        return list(dict.fromkeys(("fp32", *self.request.precisions)))

    def _rows(self, precision: str) -> list[registry.Entry]:
        """Formats to make at a precision: those asked for, and at float32 those that others are timed against here."""
        rows = map(registry.entry_of_format, self.request.formats)
        return [
            row
            for row in rows
            if precision in registry.adapter(row).precisions
            and (precision in self.request.precisions or self._runs_here(row))
        ]

    def _runs_here(self, row: registry.Entry) -> bool:
        """Whether a format can be timed on this machine; one that is built for named targets is for other machines."""
        return registry.adapter(row).probe().available and not (row.buildable and self.request.engine.targets)

    def _form(self, model: DMFormer) -> nn.Module:
        """What is traced; a trace writes into its modules, so it never gets the network itself."""
        if not self.request.deploy_form:
            return self.checkpoint.model()
        return deploy(model, self.checkpoint.preprocessing.image_size)

    def _reference(self, model: DMFormer) -> Golden:
        pixels = golden_pixels(self.checkpoint.preprocessing, self.request.images)
        return make_golden(model, self.checkpoint.preprocessing, pixels)

    def _ask_onnxruntime(self, file: Path, golden: Golden, *, layers: bool = True) -> Answers:
        adapter = registry.available_adapter(registry.entry("onnxruntime"))
        return ask(adapter(file), golden, layers=layers)

    def _known_answers(self, runtime: str, files: Sequence[Path]) -> Answers | None:
        """What the runtime answered with a file of the same content."""
        for asked, answers in self._known.items():
            if answers.runtime == runtime and len(files) == 1 and filecmp.cmp(asked, files[0], shallow=False):
                return answers
        return None

    def _choose(
        self, traced: Path, traced_answers: Answers, simplified: Path, golden: Golden
    ) -> tuple[Path, Simplification]:
        """The simplified graph where it answers as the traced one and as PyTorch do, or else the traced one."""
        before = len(onnx_file.read(traced).graph.node)
        if not all(check.passed for check in self.checks):
            reason = "the traced graph failed its checks, so there is nothing to compare a simplified one with"
            return traced, Simplification(kept=False, reason=reason, nodes_before=before, nodes_after=None)
        model = onnx_file.read(simplified)
        after = len(model.graph.node)
        onnx_file.write(model, simplified, onnx_metadata(self.checkpoint) | versions_metadata("onnxsim"))
        answers = self._ask_onnxruntime(simplified, golden)
        self._known[simplified] = answers
        checks = [
            *check_answers("simplified against traced", answers, golden, expected=traced_answers),
            *check_answers("simplified", answers, golden),
        ]
        wrong = [check.reason for check in checks if not check.passed]
        if wrong:
            reason = f"the simplified graph is not equal to the traced one: {wrong[0]}"
            return traced, Simplification(kept=False, reason=reason, nodes_before=before, nodes_after=after)
        self.checks.extend(checks)
        reason = f"{before} nodes became {after}, with equal outputs within the limit of float32"
        return simplified, Simplification(kept=True, reason=reason, nodes_before=before, nodes_after=after)

    def _calibrate(self, model: DMFormer) -> Calibration | None:
        """PyTorch's answers to the calibration images, where a reduced precision is asked for."""
        if not self.request.reduced:
            return None
        if self.request.calibration is None:
            self.left_out.append("accuracy: not measured without calibration images; give --calibration DIR")
            return None
        images = self.request.calibration.spread(_MOST_CALIBRATION)
        with self.stage("PyTorch on the calibration images", parts(images)) as advance:
            logits = torch_logits(model, images, advance)
        return Calibration(images, logits, score(logits, images.labels, logits))

    def _reduce(
        self, precision: str, onnx: Path, golden: Golden, calibration: Calibration | None
    ) -> tuple[Made, Golden] | None:
        """The ONNX file at a precision and golden outputs with its own; ``None`` where it cannot be and need not be."""
        if precision != "fp32" and not all(check.passed for check in self.checks if check.precision == "fp32"):
            self.left_out.append(f"{precision}: float32 failed its checks")
            return None
        source = PrecisionSource(
            onnx=onnx,
            inputs=golden.inputs,
            calibration=calibration,
            max_points_lost=self.request.max_points_lost,
            scratch=self.scratch,
            stage=self.stage,
        )
        try:
            made = make(precision, source)
            if precision == "fp32":
                return made, golden
            with self.stage(f"literal execution of {precision}"):
                literal = literal_answers(made.onnx, golden.inputs)
            reduced_limit(precision, literal, golden.outputs_float64)  # refuses what drowns in the precision's error
        except (CheckFailed, StageFailed) as error:
            if not self.request.choose_fastest:
                raise
            self.left_out.append(f"{precision}: {error}")
            return None
        return made, replace(golden, reduced=golden.reduced | {precision: literal})

    def _take(self, artifact: Artifact, checks: Sequence[Check]) -> list[Artifact]:
        """The artifact, unless a check of it failed and another precision may take its place."""
        wrong = [check for check in checks if not check.passed]
        if wrong and self.request.choose_fastest and artifact.precision != "fp32":
            self.left_out.append(f"{artifact.format} {artifact.precision}: {wrong[0].stage}: {wrong[0].reason}")
            shutil.rmtree(self.folder / artifact.format / artifact.precision)
            return []
        self.checks.extend(checks)
        return [artifact]

    def _convert(
        self, row: registry.Entry, precision: str, made: Made, golden: Golden, calibration: Calibration | None
    ) -> tuple[Artifact, list[Check]]:
        """An artifact, and what its runtime answers with it; onnxruntime where that cannot run here."""
        target = self.folder / row.format / precision
        target.mkdir(parents=True)
        with self.stage(f"convert to {row.format} {precision}"):
            source = ConversionSource(made.onnx, precision, self.checkpoint, self.request.engine, self.stage)
            converted = converter(row)(source, target)
            files = tuple(file_entry(self.folder, path) for path in converted.files)
        artifact = Artifact(
            format=row.format,
            precision=precision,
            files=files,
            built_with=converted.built_with,
            promised_share=made.promised,
            kept_in_fp32=made.kept_in_fp32,
            sensitivity=made.sensitivity,
            target=converted.target,
        )
        if reason := cannot_run(row, artifact):
            self.left_out.append(
                f"{row.format} {precision}: built and not run, {reason}. Its ONNX file was compared in onnxruntime; "
                "run dmformer verify on the device"
            )
            stand_in = registry.entry("onnxruntime")
            return artifact, self._judge(stand_in, precision, (made.onnx,), golden, calibration)[0]
        checks, answers, accuracy, lost = self._judge(row, precision, converted.files, golden, calibration, artifact)
        checks.append(check_layers(answers, made.promised, registry.adapter(row).cannot_compute(precision)))
        return msgspec.structs.replace(artifact, layers=answers.layers, accuracy=accuracy, points_lost=lost), checks

    def _judge(
        self,
        row: registry.Entry,
        precision: str,
        files: Sequence[Path],
        golden: Golden,
        calibration: Calibration | None,
        artifact: Artifact | None = None,
    ) -> tuple[list[Check], Answers, Accuracy | None, float | None]:
        """Parity of files in a runtime, and accuracy on the calibration images where there are some."""
        adapter = registry.available_adapter(row)
        tied = artifact.target if artifact else None

        def runtime() -> Runtime:
            return adapter(files[0], precision=precision, target=tied)

        with self.stage(f"verify {artifact.format if artifact else 'the ONNX at'} {precision} in {row.name}"):
            answers = self._known_answers(row.name, files) or ask(runtime(), golden)
            checks = check_answers("runtime" if artifact else "onnx", answers, golden)
            checks.extend(check_rows(answers, golden))
        if calibration is None or not answers.layers:
            return checks, answers, None, None
        images = calibration.images
        with self.stage(f"accuracy of {precision} in {row.name}", parts(images)) as advance:
            logits = logits_of(runtime(), images, advance)
        accuracy = score(logits, images.labels, calibration.logits)
        lost = points_lost(accuracy, calibration.accuracy, logits.shape[1])
        checks.append(check_accuracy(row.name, precision, accuracy, lost, self.request.max_points_lost))
        return checks, answers, accuracy, lost

    def _finish(
        self,
        model: DMFormer,
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
            accuracy=self._accuracy_evidence(calibration),
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
            labelled=calibration.images.labels is not None,
            max_points_lost=self.request.max_points_lost,
            torch=calibration.accuracy,
        )

    def _compare_speed(self, manifest: Manifest) -> Manifest:
        """Time every artifact of the folder, say which earn their place, and keep those that were asked for."""
        timed = compare_precisions(open_bundle(self.folder), self.stage)
        self._write_report(BENCH_REPORT, timed.report)
        kept = fastest(timed.artifacts) if self.request.choose_fastest else self._asked_for(timed.artifacts)
        kept = self._keep(timed.artifacts, kept)
        entry = file_entry(self.folder, self.folder / BENCH_REPORT)
        latency = LatencyEvidence(noise_floor=timed.report.noise_floor, report=BENCH_REPORT)
        return msgspec.structs.replace(
            manifest,
            artifacts=tuple(kept),
            files=(*manifest.files, entry),
            evidence=msgspec.structs.replace(manifest.evidence, latency=latency),
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


def versions_metadata(package: str) -> dict[str, str]:
    """A package's version, as ONNX metadata."""
    return {f"{package}.version": versions(package)[package]}
