"""Where an artifact that failed begins to fail: the node, the module, whose fault it is, and a case to run alone.

The truth is the network's graph executed in float64 (:mod:`dmformer.verify.executors`), with the limits of each tensor
from the same execution at the artifact's precision.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import msgspec

from dmformer.bundle.manifest import FULL_WEIGHT_BITS, file_entry
from dmformer.bundle.select import Choice, select
from dmformer.errors import CheckFailed, DMFormerError, StageFailed, UsageError, first_line
from dmformer.graph import onnx_file
from dmformer.graph.simplify import Simplifier
from dmformer.runtimes import registry
from dmformer.verify.compare import TENSOR_FACTORS, float32_limit, largest_difference, tensor_limits
from dmformer.verify.executors import (
    Emulation,
    emulated,
    emulation_of,
    exact,
    graph_outputs,
    input_name,
    literal,
)
from dmformer.verify.localize.case import Case, run_case, save_case, staged_case
from dmformer.verify.localize.nodes import (
    Parting,
    cuts,
    differences,
    find_island,
    find_parting,
    graph_nodes,
    parting_at_once,
)
from dmformer.verify.reference import ReferenceSource, form_in, reference_checkpoint
from dmformer.verify.report import Finding

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray
    from onnx import ModelProto

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.reader import Bundle
    from dmformer.progress import Progress
    from dmformer.verify.reference import OwnModule
    from dmformer.verify.report import Check, ParityReport

_IN_NODES = ("runtime", "layers")  # stages whose failures sit in a node
_NOTHING_TO_TRUST = (
    "the bisection has nothing to trust: the bundle has no float32 ONNX file that is as PyTorch was; "
    "expected the checkpoint with it, or a bundle with the format torch"
)
_SPREAD = "no tensor is beyond its limit when it is asked for alone: what failed is spread over the network"


def localize(
    bundle: Bundle,
    report: ParityReport,
    *,
    weights: Path | None,
    folder: Path,
    stage: Progress,
    module: OwnModule | None = None,
    weights_key: str | None = None,
) -> ParityReport:
    """Add a finding to a report for each artifact that failed, or a sentence why there is none.

    Whatever goes wrong here becomes such a sentence: the checks of the report are not lost over it.

    Args:
        bundle: that was verified.
        report: its checks.
        weights: the checkpoint, where the bundle has not the ``torch`` format; without either, the bundle's float32
            ONNX file is trusted if it answers as PyTorch did.
        folder: where cases are written, one folder each; it is created where there is something to write.
        stage: told about each step.
        module: a network of one's own, where the bundle is of one.
        weights_key: which of several sets of weights in the checkpoint.
    """
    failed: dict[tuple[str, str], list[Check]] = {}
    for check in report.checks:
        if not check.passed and check.stage in _IN_NODES:
            failed.setdefault((check.runtime, check.precision), []).append(check)
    skipped = list(report.skipped)
    if not failed:
        stages = ", ".join(dict.fromkeys(check.where for check in report.checks if not check.passed))
        skipped.append(f"bisection: what failed ({stages}) sits in no node of the graph")
        return msgspec.structs.replace(report, skipped=tuple(skipped))
    findings = []
    with tempfile.TemporaryDirectory(prefix="dmformer-") as scratch:
        try:
            with stage("the graph that is trusted"):
                trusted = _trusted(bundle, ReferenceSource(weights, module, weights_key), Path(scratch))
        except Exception as error:  # noqa: BLE001 - files under suspicion break parsers in ways of their own
            skipped.append(f"bisection: {first_line(error)}")
            failed = {}
        for (runtime, precision), checks in failed.items():
            try:
                with stage(f"bisect {runtime} {precision}"):
                    findings.append(_bisect(bundle, trusted, checks, folder, Path(scratch)))
            except Exception as error:  # noqa: BLE001 - as above
                skipped.append(f"bisection of {runtime} {precision}: {first_line(error)}")
    return msgspec.structs.replace(report, findings=tuple(findings), skipped=tuple(skipped))


class Trusted:
    """A graph to compare with, at each size of images at which it answers as PyTorch did.

    Args:
        model: the graph.
        golden: what PyTorch answered, at every size.
        refusal: raised at a size where the graph answers otherwise.
    """

    def __init__(self, model: ModelProto, golden: Golden, refusal: DMFormerError) -> None:
        self.model, self.golden, self.refusal = model, golden, refusal
        self.input = input_name(model)
        self.outputs = [value.name for value in model.graph.output]
        self._compared: set[str | None] = set()

    def golden_at(self, size: str | None) -> Golden:
        """The golden images of a size, as ``Golden.sizes`` names it; the graph is compared once for each."""
        part = self.golden.sizes[size]
        if size not in self._compared:
            answered = part.thinned(graph_outputs(self.model, exact(self.model, {self.input: part.inputs})))
            for name, limit in float32_limit(part.outputs, part.outputs_float64).items():
                if not largest_difference(answered[name], part.outputs_float64[name]) <= limit.max_abs:
                    raise self.refusal
            self._compared.add(size)
        return part


def _trusted(bundle: Bundle, source: ReferenceSource, scratch: Path) -> Trusted:
    """The checkpoint traced anew, or the bundle's float32 ONNX file.

    Raises:
        UsageError: there is neither.
    """
    from dmformer.graph.trace import trace

    golden, manifest = bundle.golden(), bundle.manifest
    if source.is_given or bundle.artifacts("torch"):
        given = reference_checkpoint(bundle, *source)
        checkpoint = replace(given, preprocessing=manifest.preprocessing, open_size=manifest.open_size)
        path = scratch / "trusted.onnx"
        trace(checkpoint, form_in(bundle, checkpoint.model()), path)
        if not manifest.model.deploy_form and manifest.simplification.kept:
            # It fuses what the deploy form has folded already; tensors keep their names and not their meaning.
            with Simplifier() as simplifier:
                simplifier.simplify(path, scratch / "simplified.onnx")
            path = scratch / "simplified.onnx"
        refusal = "the golden answers are not those of the checkpoint; expected the one it was made of"
        return Trusted(onnx_file.read(path), golden, CheckFailed(refusal))
    files = bundle.artifacts("onnx", "fp32")
    if not files:
        raise UsageError(_NOTHING_TO_TRUST)
    return Trusted(onnx_file.read(bundle.load_path(files[0])), golden, UsageError(_NOTHING_TO_TRUST))


def _bisect(bundle: Bundle, trusted: Trusted, checks: Sequence[Check], folder: Path, scratch: Path) -> Finding:
    """The finding about one artifact, from its checks that failed."""
    runtime, precision = checks[0].runtime, checks[0].precision
    (choice,) = [one for one in select(bundle, [runtime])[0] if one.artifact.precision == precision]
    least = max(1, choice.runtime().batches[0])
    size, failed_at = _size_and_batch(checks, least)
    # Another size was asked for in one batch only; rows of their own tell a node from the batching.
    batch = min(failed_at, least)
    try:
        bisection = _Bisection(choice, trusted, size, batch, scratch)
    except StageFailed as error:
        if size is None:
            raise
        raise StageFailed(f"at {size} {error}: look at what was traced for one size") from error
    destination = folder / f"{runtime}-{precision}"
    with staged_case(destination) as case:
        finding = bisection.find(case)
        if finding is None:
            raise StageFailed(_right_by_rows(failed_at) if batch < failed_at else _SPREAD)
    return msgspec.structs.replace(finding, case=str(destination))


def _size_and_batch(checks: Sequence[Check], least: int) -> tuple[str | None, int]:
    """The size to search at, and the smallest batch that failed there.

    It is another size than that of the golden images where these are right in the ``least`` batch.
    """
    failed_at: dict[str | None, int] = {}
    for check in checks:
        batch = check.batch if check.stage == "runtime" else 1
        failed_at[check.size] = min(batch, failed_at.get(check.size, batch))
    if failed_at.get(None, least + 1) <= least:
        return None, failed_at[None]
    for size, batch in failed_at.items():
        if size is not None:
            return size, batch
    raise StageFailed(_right_by_rows(failed_at[None]))


def _right_by_rows(batch: int) -> str:
    return f"it answers right row by row, and not in batches of {batch}: look at the batching, not at a node"


class _Bisection:
    """The search for the node at which one artifact parts from the trusted graph.

    Args:
        choice: the artifact and its runtime.
        trusted: the graph to compare with.
        size: of the golden images to search with.
        batch: the smallest at which the artifact failed.
        scratch: an existing folder.

    Raises:
        CheckFailed, UsageError: the graph is not to be trusted at this size.
        StageFailed: the trusted graph cannot be executed.
    """

    def __init__(self, choice: Choice, trusted: Trusted, size: str | None, batch: int, scratch: Path) -> None:
        self.choice, self.trusted, self.size, self.batch, self.scratch = choice, trusted, size, batch, scratch
        self.precision = choice.artifact.precision
        files = choice.bundle.artifacts("onnx", self.precision)
        self.file = onnx_file.read(choice.bundle.load_path(files[0])) if files else None
        golden = trusted.golden_at(size)
        self.rows = golden.inputs
        if batch == 1:  # the row that shows the failure most
            self.rows = golden.worst_row(golden.thinned(self._show(trusted.outputs)))
        images = {trusted.input: self.rows}
        self.truth = images | dict(exact(trusted.model, images))
        rounded = images | dict(emulated(trusted.model, images, self._emulation()))
        self.limits = tensor_limits(self.truth, rounded, TENSOR_FACTORS[self.precision])

    def _emulation(self) -> Emulation:
        if self.precision == "fp32":
            return Emulation()
        artifact = self.choice.artifact
        # Without a file at the precision every layer is taken to compute in it.
        model, typed = (self.file, self.precision) if self.file is not None else (self.trusted.model, "fp32")
        found = emulation_of(model, typed, artifact.kept_in_fp32, weight_bits=artifact.weight_bits or FULL_WEIGHT_BITS)
        float16_sums = registry.support(self.choice.entry).sums_in_float16()
        return replace(found, precision=self.precision, float16_sums=float16_sums)

    def _show(self, names: Collection[str]) -> dict[str, NDArray[Any]]:
        """What the runtime gives for tensors of the graph, inner ones too."""
        taps = [name for name in names if name not in self.trusted.outputs]
        with self.choice.runtime(taps=taps) as runtime:
            (name,) = (spec.name for spec in runtime.inputs)
            return runtime.run_rows({name: self.rows}, max(self.batch, runtime.batches[0]))

    def find(self, folder: Path) -> Finding | None:
        """Search, judge, and save the case into an existing folder; ``None`` where no tensor is beyond its limit.

        Raises:
            StageFailed: the engine shows nothing of its inside.
        """
        parting = self._parting()
        if parting is None:
            return None
        at_fault, explanation = self._judge(parting)
        names = [node.name for node in parting.nodes]
        unlike: list[str] = []
        if at_fault == "file" and self.file is not None:
            unlike = differences(self.file, self.trusted.model, names)
        self._save(folder, parting, at_fault)
        if run_case(folder).passed:
            explanation += "; the case alone does not show it"
        island = None
        if at_fault == "file" and self.precision == "fp16":
            island = find_island(self.trusted.model, self.rows, self.choice.artifact.kept_in_fp32, folder)
            if not island.nodes:
                explanation += "; made anew from the float32 file it holds: export again"
        return Finding(
            runtime=self.choice.entry.name,
            precision=self.precision,
            batch=self.batch,
            nodes=tuple(names),
            module=next(node.name for node in parting.nodes if parting.tensor in node.outputs).rpartition("/")[0],
            tensor=parting.tensor,
            max_abs=parting.max_abs,
            limit=parting.limit,
            runs=parting.runs,
            most_shown=parting.most_shown,
            at_fault=at_fault,
            explanation=explanation,
            differences=tuple(unlike),
            island=island,
            size=self.size,
        )

    def _parting(self) -> Parting | None:
        with self.choice.runtime() as runtime:
            inner = runtime.inspect().inner_tensors()
        if not inner:
            raise StageFailed(f"an engine of {self.choice.entry.name} shows no inner tensors; bisect its ONNX file")
        nodes = graph_nodes(self.trusted.model)
        visible = {*inner, *self.trusted.outputs} & set(self.truth)
        all_cuts = cuts(nodes, [self.trusted.input], self.trusted.outputs, visible)
        parting = find_parting(nodes, all_cuts, self.truth, self.limits, self._show)
        # What a small fault does may sink below the limit and come up again further on, where the halving finds it.
        at_once = parting_at_once(nodes, all_cuts, self.truth, self.limits, self._show(visible))
        earlier = at_once is not None and (parting is None or at_once.bad.position < parting.bad.position)
        return at_once if earlier else parting

    def _judge(self, parting: Parting) -> tuple[Any, str]:
        """What is at fault, as ``Finding.at_fault`` has it, and why."""
        name, precision = self.choice.entry.name, self.precision
        if self.file is None:
            return None, f"the bundle has no ONNX file at {precision} to compare with"
        executed = literal(self.file, {input_name(self.file): self.rows})
        if self._differs({tensor: array for tensor, array in executed if tensor in parting.outputs}, parting.outputs):
            return "file", f"the ONNX file at {precision} does the same, executed one operator at a time"
        if not registry.support(self.choice.entry).reads_onnx:
            return None, (
                f"the ONNX file is right; {name} reads no ONNX, and cannot be asked for this piece of it alone: build "
                f"the artifact's own files again (dmformer build --format {self.choice.artifact.format})"
            )
        try:
            piece, inputs = self._write_piece(parting, self.scratch / "piece.onnx")
            with registry.available_adapter(self.choice.entry)(piece, precision=precision) as runtime:
                answered = runtime.run({spec.name: inputs[spec.name] for spec in runtime.inputs})
        except DMFormerError as error:
            return "engine", f"the ONNX file is right, and {name} cannot run this piece of it: {error}"
        if self._differs(answered, parting.outputs):
            cause = f"; {self.choice.saturation_risk}" if self.choice.saturation_risk else ""
            return "engine", f"the ONNX file is right, and {name} computes this piece of it wrongly{cause}"
        return "artifact", (
            f"the ONNX file is right, and {name} computes this piece of it right: the artifact's own files are not "
            f"made from it; build them again (dmformer build --format {self.choice.artifact.format})"
        )

    def _differs(self, shown: Mapping[str, NDArray[Any]], names: Sequence[str]) -> bool:
        return not all(largest_difference(shown[name], self.truth[name]) <= self.limits[name] for name in names)

    def _write_piece(self, parting: Parting, path: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        """Write the part of the ONNX file between the two cuts; gives what it is to be given as well."""
        assert self.file is not None
        types = onnx_file.element_types(self.file)
        starts = dict.fromkeys((*parting.good.tensors, self.trusted.input))
        inputs = {name: self.truth[name].astype(types[name]) for name in starts}
        path.write_bytes(onnx_file.cut(self.file, inputs, parting.outputs, types).SerializeToString())
        return path, inputs

    def _save(self, folder: Path, parting: Parting, at_fault: str | None) -> None:
        """Save the piece where that shows the failure, or else the whole artifact."""
        artifact, runtime = self.choice.artifact, self.choice.entry.name
        if at_fault in ("file", "engine"):
            path, inputs = self._write_piece(parting, folder / "cut.onnx")
            files = [path]
            runtime = runtime if at_fault == "engine" else "onnxruntime"
        else:
            self.choice.bundle.load_path(artifact)
            files = [folder / PurePosixPath(entry.path).name for entry in artifact.files]
            for entry, path in zip(artifact.files, files, strict=True):
                self.choice.bundle.copy(entry, path)
            inputs = {self.trusted.input: self.rows}
        case = Case(
            runtime=runtime,
            precision=self.precision,
            files=tuple(file_entry(folder, path) for path in files),
            node=parting.nodes[0].name,
            limits={name: self.limits[name] for name in parting.outputs},
            full_range=artifact.full_range,
        )
        save_case(folder, case, inputs, {name: self.truth[name] for name in parting.outputs})
