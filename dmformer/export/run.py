"""``dmformer.export``: a checkpoint in, a verified bundle out.

Importing this needs no PyTorch: an export that was made before is found without it.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dmformer import __version__
from dmformer._optional import require
from dmformer.bundle import manifest as written
from dmformer.bundle.manifest import (
    BENCH_REPORT,
    GOLDEN,
    MANIFEST,
    PARITY_REPORT,
    AccuracyEvidence,
    Artifact,
    Evidence,
    LatencyEvidence,
    Manifest,
    ParityEvidence,
    Simplification,
    file_entry,
)
from dmformer.bundle.reader import own_bundle
from dmformer.bundle.select import cannot_run
from dmformer.bundle.writer import staged
from dmformer.cache import Cache, open_cache
from dmformer.errors import CheckFailed, StageFailed
from dmformer.export import cached, precisions, steps
from dmformer.export.cached import ExportResult
from dmformer.export.formats import is_compiled
from dmformer.export.loop import Loop, gpu_of, write_report
from dmformer.export.options import ExportOptions, keywords_of
from dmformer.export.precisions import Calibration, PrecisionFile, PrecisionSource, Reduced
from dmformer.export.steps import TimedArtifacts, VerifiedArtifact, Work
from dmformer.runtimes import registry
from dmformer.task import THRESHOLD
from dmformer.verify.report import ParityReport, failure, parity_report
from dmformer.verify.tasks import measure_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from dmformer.export.graph import GraphSource, VerifiedGraph
    from dmformer.export.plan import ExportPlan

_MOST_CALIBRATION = 512


@keywords_of(ExportOptions)
def export(options: ExportOptions) -> ExportResult:
    """Export a checkpoint to a verified bundle.

    Raises:
        CheckFailed: a check failed; nothing was written, unless ``force``.
        StageFailed: a step broke, or the only engine that was asked for; nothing was written.
        UnavailableError: a package that a format needs is not installed.
        UsageError: an option or a file cannot be used.
    """
    return run_export(options)


def run_export(options: ExportOptions, announce: Callable[[ExportPlan], object] = lambda _: None) -> ExportResult:
    """As :func:`export`; ``announce`` is told the plan before its first step, unless the cache has the whole export."""
    cache = open_cache() if options.use_cache else Cache()
    key = cached.key_of(cache, options)
    result = cached.find(cache, key, Path(options.output))
    if result is not None:
        return result
    plan = plan_export(options)
    announce(plan)
    plan.check_possible()
    checkpoint = plan.network.checkpoint
    if options.save_key_map is not None and checkpoint.key_map is not None:
        from dmformer.models.key_map import write_key_map

        write_key_map(Path(options.save_key_map), checkpoint.key_map)
    with staged(plan.output) as folder:
        result = _Export(plan, folder, cache).run()
        cached.keep(cache, key, options, folder, result)
    return replace(result, not_kept=cache.trouble)


def plan_export(options: ExportOptions) -> ExportPlan:
    """Everything that an export needs, read and checked; nothing is run.

    Raises:
        UnavailableError: PyTorch is not installed.
        UsageError: an option or a file cannot be used.
    """
    require("torch", extra="export", purpose="dmformer export")
    from dmformer.export.plan import make_plan

    return make_plan(options)


class _Export(Loop):
    """One export under way."""

    def __init__(self, plan: ExportPlan, folder: Path, cache: Cache) -> None:
        super().__init__(cache, plan.network.checkpoint.arch, plan.not_made)
        self.plan, self.options = plan, plan.options
        self.checkpoint, self.stage = plan.network.checkpoint, plan.options.stage
        self.folder, self.scratch = folder, folder.with_name("scratch")
        self.scratch.mkdir()
        self.runs_own_code = self.options.module is not None and self.checkpoint.config.origin is not None
        # What every step depends on: the checkpoint by its content, and the form that is traced.
        self.network = [cache.digest(self.checkpoint), self.options.deploy_form]

    def run(self) -> ExportResult:
        from dmformer.export.graph import GraphSource

        source = GraphSource(
            self.checkpoint,
            self.checkpoint.model(),
            self.options.deploy_form,
            self.plan.network.images,
            self.scratch,
            self.stage,
        )
        calibration = self.calibrate(source.model)
        graph, work = self.trace(source, calibration)
        artifacts: list[Artifact] = []
        for precision in dict.fromkeys(("fp32", *self.plan.precisions)):  # float32 to compare the others with
            reduced = self.reduce(precision, source, graph, work)
            if reduced is None:
                continue
            work = replace(work, golden=reduced.golden)
            for row in self.rows(precision):
                try:
                    verified = self.artifact(work, row, reduced.file, self.network)
                except StageFailed as error:
                    if not is_compiled(row):
                        raise
                    # An engine that cannot be built takes nothing else down with it.
                    shutil.rmtree(self.folder / row.format / precision)
                    self.broken.append(f"{row.format} {precision}: {error}")
                    self.left_out.append(self.broken[-1])
                else:
                    artifacts += self.accept(verified)
        if not artifacts:
            raise StageFailed("; ".join(self.broken))
        return self.finish(source.model, work, artifacts, graph.simplification)

    def calibrate(self, model: nn.Module) -> Calibration | None:
        """PyTorch's answers to the calibration images, where a reduced precision is asked for."""
        if not self.plan.reduces:
            return None
        if self.plan.network.calibration is None:
            self.left_out.append("accuracy: not measured without calibration images; give a folder of them")
            return None
        from dmformer.verify.reference import torch_answers

        images = self.plan.network.calibration.spread(_MOST_CALIBRATION)
        measure = measure_of(self.checkpoint.config.task, self.checkpoint.config.num_classes)
        what = "PyTorch on the calibration images"

        def ask() -> NDArray[Any]:
            with self.stage(what, measure.parts(images)) as advance:
                return torch_answers(model, images, measure, advance)

        kept = self.ask_network(what, (self.network, images), np.ndarray, ask, self.scratch)
        return Calibration.scored(images, measure, kept)

    def trace(self, source: GraphSource, calibration: Calibration | None) -> tuple[VerifiedGraph, Work]:
        """The float32 ONNX file, and what the steps after it work with."""
        from dmformer.export import graph as traced

        answers = None

        def make() -> VerifiedGraph:
            nonlocal answers
            graph, answers = traced.verified_graph(source)
            return graph

        inputs = (self.network, source.images)
        what = "trace to ONNX, simplify, verify"
        graph = self.ask_network(what, inputs, traced.VerifiedGraph, make, self.scratch)
        self.checks.extend(graph.checks)
        return graph, Work(
            folder=self.folder,
            stage=self.stage,
            engine=self.options.engine,
            golden=graph.golden,
            checkpoint=self.checkpoint,
            calibration=calibration,
            max_accuracy_drop=self.options.max_accuracy_drop,
            answers=answers,
            float32=graph.onnx,
            form=source.form,
        )

    def reduce(self, precision: str, source: GraphSource, graph: VerifiedGraph, work: Work) -> Reduced | None:
        """The ONNX file at a precision; ``None`` where it cannot be had and need not be."""
        if precision == "fp32":
            return Reduced(PrecisionFile(graph.onnx, precision, promised_share=1.0), work.golden)
        if not all(check.passed for check in self.checks if check.precision == "fp32"):
            self.left_out.append(f"{precision}: float32 failed its checks")
            return None
        measured = PrecisionSource(
            onnx=graph.onnx,
            inputs=work.golden.inputs,
            calibration=work.calibration,
            max_points_lost=self.options.max_accuracy_drop,
            weight_bits=self.options.weight_bits,
            scratch=self.scratch,
            stage=self.stage,
            block_of=self.checkpoint.config.block_of,
        )

        def verify(file: PrecisionFile) -> Reduced:
            with self.stage(f"literal execution of {precision}, emulation in PyTorch"):
                return precisions.verify_reduced(file, measured, source.form, work.golden)

        bits = self.options.weight_bits if precision == "int8" else None
        budget = (work.calibration, self.options.max_accuracy_drop)
        inputs = (self.network, precision, graph.onnx, work.golden, *budget, bits)
        what = f"ONNX at {precision}"
        try:
            made = self.once(
                what, inputs, PrecisionFile, functools.partial(precisions.make, precision, measured), self.scratch
            )
            found = self.ask_network(f"verify the {what}", (*inputs, made), Reduced, lambda: verify(made), self.scratch)
        except (CheckFailed, StageFailed) as error:
            if not self.plan.choose_fastest:
                raise
            self.left_out.append(f"{precision}: {error}")
            return None
        wrong = [check.reason for check in found.checks if not check.passed]
        if wrong and self.plan.choose_fastest:
            self.left_out.append(f"{precision}: {wrong[0]}")
            return None
        self.checks.extend(found.checks)
        return found

    def rows(self, precision: str) -> list[registry.RuntimeEntry]:
        """Formats to make at a precision: those asked for, and at float32 those that others are timed against here."""
        found = []
        for row in map(registry.entry_of_format, self.plan.formats):
            ahead = is_compiled(row) and self.options.engine.targets  # built for other machines
            support = registry.support(row)
            if precision in support.precisions and (
                precision in self.plan.precisions or (support.probe().available and not ahead)
            ):
                found.append(row)
        return found

    def accept(self, verified: VerifiedArtifact) -> list[Artifact]:
        """The artifact, unless a check of it failed and another precision may take its place."""
        artifact, wrong = verified.artifact, [check for check in verified.checks if not check.passed]
        if wrong and self.plan.choose_fastest and artifact.precision != "fp32":
            self.left_out.append(f"{artifact.format} {artifact.precision}: {wrong[0].where}: {wrong[0].reason}")
            shutil.rmtree(self.folder / artifact.format / artifact.precision)
            return []
        self.checks.extend(verified.checks)
        return [artifact]

    def finish(
        self, model: nn.Module, work: Work, artifacts: list[Artifact], simplification: Simplification
    ) -> ExportResult:
        """Write golden answers, reports and manifest, once every check is known; time what can be timed here."""
        runnable = (cannot_run(registry.entry_of_format(one.format), one) is None for one in artifacts)
        compares = self.plan.reduces and any(runnable)
        if not compares:
            artifacts = self.keep(artifacts, self.asked_for(artifacts))
        parity = parity_report(self.checks, self.left_out)
        failed = [check for check in parity.checks if not check.passed]
        if failed and not self.options.force:
            raise CheckFailed(f"nothing was written: {failure(parity)}; `force` writes the bundle all the same")
        work.golden.save(self.folder / GOLDEN)
        write_report(self.folder / PARITY_REPORT, parity)
        manifest = self.manifest(model, parity, work.calibration, artifacts, simplification)
        (self.folder / MANIFEST).write_bytes(manifest.encode())
        if compares and not failed:  # what failed its checks is not timed, and may not even load
            manifest = self.time(manifest)
            (self.folder / MANIFEST).write_bytes(manifest.encode())
        return ExportResult(self.plan.output, manifest, parity, tuple(self.broken))

    def manifest(
        self,
        model: nn.Module,
        parity: ParityReport,
        calibration: Calibration | None,
        artifacts: Sequence[Artifact],
        simplification: Simplification,
    ) -> Manifest:
        """What is in the bundle, where its weights came from, and what was found on the way."""
        from dmformer.export.networks import count_macs

        checkpoint, network = self.checkpoint, self.plan.network
        one_output = checkpoint.config.num_classes == 1
        given, *outputs = (
            written.Tensor(name=name, dtype="float32", shape=shape) for name, shape in checkpoint.shapes.items()
        )
        failed = sum(not check.passed for check in parity.checks)
        accuracy = None
        if calibration is not None:
            accuracy = AccuracyEvidence(
                images=len(calibration.images),
                labelled=calibration.images.labelled,
                max_points_lost=self.options.max_accuracy_drop,
                torch=calibration.accuracy,
                label_doubt=calibration.label_doubt,
            )
        return Manifest(
            schema_version=written.SCHEMA_VERSION,
            tool_version=__version__,
            model=written.Model(
                arch=checkpoint.arch,
                config=checkpoint.config.to_dict(),
                task=checkpoint.config.task,
                classes=checkpoint.classes,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                macs=count_macs(model, checkpoint.preprocessing.image_size),
                weights=network.weights,
                deploy_form=self.options.deploy_form,
                seed=network.seed,
                checkpoint_sha256=checkpoint.sha256,
                notes=network.notes,
                training=dict(checkpoint.training),
                threshold=THRESHOLD if checkpoint.config.task == "classification" and one_output else None,
                overridden=checkpoint.overridden,
                module=checkpoint.config.origin,
                key_map=checkpoint.key_map,
            ),
            preprocessing=checkpoint.preprocessing,
            inputs=(given,),
            outputs=tuple(outputs),
            simplification=simplification,
            artifacts=tuple(artifacts),
            files=tuple(file_entry(self.folder, self.folder / name) for name in (GOLDEN, PARITY_REPORT)),
            evidence=Evidence(
                parity=ParityEvidence(
                    passed=parity.passed, checks=len(parity.checks), failed=failed, report=PARITY_REPORT
                ),
                processor=parity.processor,
                accuracy=accuracy,
                cached=tuple(self.cache.taken),
            ),
        )

    def time(self, manifest: Manifest) -> Manifest:
        """Time every artifact of the folder, say which earn their place, and keep those that were asked for."""
        inputs = (manifest.artifacts, gpu_of(manifest.artifacts))
        timed = self.once(
            "speed",
            inputs,
            TimedArtifacts,
            lambda: steps.time_artifacts(own_bundle(self.folder), self.stage),
            self.folder,
        )
        write_report(self.folder / BENCH_REPORT, timed.report)
        chosen = steps.fastest(timed.artifacts) if self.plan.choose_fastest else self.asked_for(timed.artifacts)
        latency = LatencyEvidence(noise_floor=timed.report.noise_floor, report=BENCH_REPORT)
        return msgspec.structs.replace(
            manifest,
            artifacts=tuple(self.keep(timed.artifacts, chosen)),
            files=(*manifest.files, file_entry(self.folder, self.folder / BENCH_REPORT)),
            evidence=msgspec.structs.replace(manifest.evidence, latency=latency, cached=tuple(self.cache.taken)),
        )

    def keep(self, artifacts: Sequence[Artifact], chosen: Sequence[Artifact]) -> list[Artifact]:
        """Those chosen; the files of all others are removed."""
        for artifact in artifacts:
            if artifact not in chosen:
                shutil.rmtree(self.folder / artifact.format / artifact.precision)
        return list(chosen)

    def asked_for(self, artifacts: Sequence[Artifact]) -> list[Artifact]:
        asked = {(row.format, precision) for row, precision in self.plan.pairs}
        return [artifact for artifact in artifacts if (artifact.format, artifact.precision) in asked]
