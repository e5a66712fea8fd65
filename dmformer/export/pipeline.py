"""The export, stage by stage: composition only, each stage is another module's function."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from dmformer import __version__
from dmformer._optional import require
from dmformer.bundle.manifest import (
    GOLDEN,
    MANIFEST,
    SCHEMA_VERSION,
    Artifact,
    Evidence,
    Manifest,
    Model,
    ParityEvidence,
    Simplification,
    Tensor,
    file_entry,
    hash_file,
)
from dmformer.bundle.writer import check_destination, staged
from dmformer.errors import CheckFailed, UnavailableError
from dmformer.export import onnx_file
from dmformer.export.formats import ConversionSource, converter, versions
from dmformer.export.simplify import Simplifier
from dmformer.export.torch_onnx import onnx_metadata, trace
from dmformer.models.checkpoint import Checkpoint
from dmformer.models.dmformer import INPUT_NAME, OUTPUT_NAME
from dmformer.models.flops import count_macs
from dmformer.runtimes import registry
from dmformer.verify.parity import Answers, Check, ParityReport, ask, check_answers, report
from dmformer.verify.reference import golden_pixels, make_golden

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bundle.golden import Golden
    from dmformer.models.dmformer import DMFormer

PARITY_REPORT = "reports/parity.json"


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        checkpoint: weights, configuration and preprocessing.
        weights: where they came from; ``random`` is marked in the manifest.
        seed: of random weights.
        formats: canonical names of the formats to make.
        precisions: canonical names of the precisions to make each format in.
        output: the bundle's folder.
        images: real images for the golden set; noise fills it up.
        force: write the bundle although a parity check failed.
    """

    checkpoint: Checkpoint
    weights: Literal["checkpoint", "demonstration", "random"]
    formats: tuple[str, ...]
    output: Path
    precisions: tuple[str, ...] = ("fp32",)
    seed: int | None = None
    images: tuple[Path, ...] = ()
    force: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what was found on the way."""

    output: Path
    manifest: Manifest
    parity: ParityReport


@dataclass
class Progress:
    """Told about each stage; the default says nothing."""

    stage: Callable[[str], AbstractContextManager[object]] = field(default=lambda _: nullcontext())


def planned_artifacts(request: ExportRequest) -> list[str]:
    """Paths of what an export would write, relative to the bundle; nothing is run."""
    artifacts = [f"{name}/{precision}/" for name in request.formats for precision in request.precisions]
    return [MANIFEST, GOLDEN, *artifacts, PARITY_REPORT]


def check_possible(request: ExportRequest) -> list[registry.Entry]:
    """The formats' rows, once everything that the export needs was seen to be there; nothing is run.

    Raises:
        UnavailableError: a package that the export or a format needs is not installed.
        UsageError: the output folder cannot be used.
    """
    check_destination(request.output)
    require("onnx", extra="export", purpose="export to ONNX")
    if importlib.util.find_spec("onnxsim") is None:  # only its own process imports it
        raise UnavailableError("simplification needs 'onnxsim', not installed; run: pip install 'dmformer[export]'")
    rows = [registry.entry_of_format(name) for name in request.formats]
    for row in [registry.entry("onnxruntime"), *rows]:  # onnxruntime checks the ONNX stages of every export
        registry.available_adapter(row)
    return rows


def export(request: ExportRequest, progress: Progress | None = None) -> ExportResult:
    """Trace, simplify, convert, verify each step, and write the bundle.

    Raises:
        CheckFailed: a parity check failed; nothing was written, unless ``request.force``.
        StageFailed: a stage broke; nothing was written.
        UnavailableError: a package that a format needs is not installed.
        UsageError: the output folder or an image cannot be used.
    """
    progress = progress or Progress()
    rows = check_possible(request)
    with staged(request.output) as folder, tempfile.TemporaryDirectory(prefix="dmformer-") as scratch:
        return _Export(request, folder, Path(scratch), progress).run(rows)


class _Export:
    """One export under way: a folder that becomes the bundle, and the checks so far."""

    def __init__(self, request: ExportRequest, folder: Path, scratch: Path, progress: Progress) -> None:
        self.request = request
        self.checkpoint = request.checkpoint
        self.folder = folder
        self.scratch = scratch
        self.progress = progress
        self.checks: list[Check] = []
        self._answers: dict[tuple[str, ...], Answers] = {}

    def run(self, rows: Sequence[registry.Entry]) -> ExportResult:
        traced, simplified = self.scratch / "traced.onnx", self.scratch / "simplified.onnx"
        # What needs no other step's result runs beside it: a cold export keeps two cores busy.
        with Simplifier() as simplifier, ThreadPoolExecutor(1) as pool:
            model = self.checkpoint.model()
            with self.progress.stage("PyTorch reference, trace to ONNX"):
                referring = pool.submit(self._reference, self.checkpoint.model())
                trace(self.checkpoint, model, traced)
                golden = referring.result()
            simplifying = pool.submit(simplifier.simplify, traced, simplified)
            with self.progress.stage("verify the traced ONNX"):
                self.checks.extend(check_answers("traced", self._ask("onnxruntime", [traced], golden), golden))
            with self.progress.stage("simplify and verify"):
                simplifying.result()
                onnx, simplification = self._choose(traced, simplified, golden)
        artifacts = [artifact for row in rows for artifact in self._convert(row, onnx, golden)]
        return self._finish(model, artifacts, simplification)

    def _reference(self, model: DMFormer) -> Golden:
        pixels = golden_pixels(self.checkpoint.preprocessing, self.request.images)
        golden = make_golden(model, self.checkpoint.preprocessing, pixels)
        golden.save(self.folder / GOLDEN)
        return golden

    def _ask(self, runtime: str, files: Sequence[Path], golden: Golden, precision: str = "fp32") -> Answers:
        """A runtime's answers to the golden inputs; files of the same content are run once."""
        key = (runtime, precision, *(hash_file(path)[0] for path in files))
        if key not in self._answers:
            adapter = registry.available_adapter(registry.entry(runtime))
            self._answers[key] = ask(adapter(files[0], precision=precision), golden)
        return self._answers[key]

    def _choose(self, traced: Path, simplified: Path, golden: Golden) -> tuple[Path, Simplification]:
        """The simplified graph where it answers as the traced one and as PyTorch do, or else the traced one."""
        before = len(onnx_file.read(traced).graph.node)
        if not all(check.passed for check in self.checks):
            reason = "the traced graph failed its checks, so there is nothing to compare a simplified one with"
            return traced, Simplification(kept=False, reason=reason, nodes_before=before, nodes_after=None)
        model = onnx_file.read(simplified)
        after = len(model.graph.node)
        onnx_file.write(model, simplified, onnx_metadata(self.checkpoint) | _version_metadata("onnxsim"))
        answers = self._ask("onnxruntime", [simplified], golden)
        traced_answers = self._ask("onnxruntime", [traced], golden)
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

    def _convert(self, row: registry.Entry, onnx: Path, golden: Golden) -> list[Artifact]:
        artifacts = []
        for precision in self.request.precisions:
            target = self.folder / row.format / precision
            target.mkdir(parents=True)
            with self.progress.stage(f"convert to {row.format} {precision}"):
                converted = converter(row)(ConversionSource(self.checkpoint, onnx, precision), target)
            with self.progress.stage(f"verify {row.format} {precision} in {row.name}"):
                answers = self._ask(row.name, converted.files, golden, precision)
                self.checks.extend(check_answers("runtime", answers, golden))
            files = tuple(file_entry(self.folder, path) for path in converted.files)
            artifacts.append(
                Artifact(format=row.format, precision=precision, files=files, built_with=converted.built_with)
            )
        return artifacts

    def _finish(self, model: DMFormer, artifacts: list[Artifact], simplification: Simplification) -> ExportResult:
        parity = report(self.checks)
        failed = [check for check in parity.checks if not check.passed]
        if failed and not self.request.force:
            raise CheckFailed(
                f"parity failed in {len(failed)} of {len(parity.checks)} checks, nothing was written; first: "
                f"{failed[0].stage} in {failed[0].runtime} at batch {failed[0].batch}: {failed[0].reason}; "
                "--force writes the bundle all the same"
            )
        path = self.folder / PARITY_REPORT
        path.parent.mkdir()
        path.write_bytes(msgspec.json.format(msgspec.json.encode(parity), indent=2) + b"\n")
        manifest = self._manifest(model, artifacts, simplification, parity)
        (self.folder / MANIFEST).write_bytes(manifest.encode())
        return ExportResult(self.request.output, manifest, parity)

    def _manifest(
        self, model: DMFormer, artifacts: list[Artifact], simplification: Simplification, parity: ParityReport
    ) -> Manifest:
        checkpoint, size = self.checkpoint, self.checkpoint.preprocessing.image_size
        failed = sum(not check.passed for check in parity.checks)
        shape = ("batch", checkpoint.config.in_channels, size, size)
        return Manifest(
            schema_version=SCHEMA_VERSION,
            tool_version=__version__,
            model=Model(
                arch=checkpoint.arch,
                config=checkpoint.config.to_dict(),
                task="classification",
                classes=checkpoint.classes,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                macs=count_macs(checkpoint.config, size),
                weights=self.request.weights,
                seed=self.request.seed,
                checkpoint_sha256=checkpoint.sha256,
                notes=checkpoint.notes,
                training=dict(checkpoint.training),
            ),
            preprocessing=checkpoint.preprocessing,
            inputs=(Tensor(name=INPUT_NAME, dtype="float32", shape=shape),),
            outputs=(Tensor(name=OUTPUT_NAME, dtype="float32", shape=("batch", checkpoint.config.num_classes)),),
            simplification=simplification,
            artifacts=tuple(artifacts),
            files=tuple(file_entry(self.folder, self.folder / name) for name in (GOLDEN, PARITY_REPORT)),
            evidence=Evidence(
                parity=ParityEvidence(
                    passed=parity.passed, checks=len(parity.checks), failed=failed, report=PARITY_REPORT
                )
            ),
        )


def _version_metadata(package: str) -> dict[str, str]:
    return {f"{package}.version": versions(package)[package]}
