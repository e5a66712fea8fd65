"""Where an artifact that failed begins to fail: the node, the module, whose fault it is, and a case to run alone.

The truth is the network's graph executed in float64 (:mod:`dmformer.verify.executors`), with the limits of each tensor
from the same execution at the artifact's precision.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from dmformer.bundle.manifest import FULL_WEIGHT_BITS, file_entry
from dmformer.bundle.select import Choice, select
from dmformer.errors import CheckFailed, DMFormerError, StageFailed, UsageError, first_line
from dmformer.graph import onnx_file
from dmformer.graph.onnx_file import compute_layers
from dmformer.graph.simplify import Simplifier
from dmformer.runtimes import registry
from dmformer.verify.compare import TENSOR_FACTORS, float32_limit, largest_difference
from dmformer.verify.executors import Emulation, interpret, literal_answers
from dmformer.verify.localize.case import Case, run_case, save_case, staged_case
from dmformer.verify.localize.differences import differences
from dmformer.verify.localize.island import find_island
from dmformer.verify.localize.search import Parting, cuts, find_parting, graph_nodes, parting_at_once, tensor_limits
from dmformer.verify.reference import form_in, reference_checkpoint
from dmformer.verify.report import Finding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.reader import Bundle
    from dmformer.progress import Progress
    from dmformer.verify.report import Check, ParityReport

_LOCATED = ("runtime", "layers")  # stages whose failures sit in a node
_NOTHING_TO_TRUST = (
    "--bisect has nothing to trust: the bundle has no float32 ONNX file that is as PyTorch was; "
    "expected --weights FILE, or a bundle exported with --format torch"
)
_SPREAD = "no tensor is beyond its limit when it is asked for alone: what failed is spread over the network"


class Trusted(NamedTuple):
    """The graph that is taken to be right, and the golden images of one size; as ``Golden.sizes`` names it."""

    model: ModelProto
    golden: Golden
    size: str | None

    @property
    def input(self) -> str:
        """Name of its input."""
        name: str = self.model.graph.input[0].name
        return name

    @property
    def outputs(self) -> list[str]:
        """Names of its outputs."""
        return [value.name for value in self.model.graph.output]


class _Candidate:
    """A graph to trust at each size at which it answers as PyTorch did.

    Args:
        model: the graph.
        golden: what PyTorch answered, at every size.
        refusal: what is raised at a size where the graph answers otherwise.
    """

    def __init__(self, model: ModelProto, golden: Golden, refusal: DMFormerError) -> None:
        self.model, self.golden, self.refusal = model, golden, refusal
        self._trusted: dict[str | None, Trusted] = {}

    def at(self, size: str | None) -> Trusted:
        """The graph with the golden images of a size; looked at once."""
        if size not in self._trusted:
            found = Trusted(self.model, self.golden.sizes[size], size)
            part = found.golden
            exact = part.thinned(interpret(self.model, {found.input: part.inputs}, double=True))
            for name, limit in float32_limit(part.outputs, part.outputs_float64).items():
                if not largest_difference(exact[name], part.outputs_float64[name]) <= limit.max_abs:
                    raise self.refusal
            self._trusted[size] = found
        return self._trusted[size]


def diagnose(
    bundle: Bundle, report: ParityReport, *, weights: Path | None, folder: Path, stage: Progress
) -> ParityReport:
    """The report with a finding for each artifact that failed, or a sentence why there is none.

    Whatever goes wrong here is such a sentence: what was verified stays to be told.

    Args:
        bundle: that was verified.
        report: what was found.
        weights: the checkpoint, where the bundle has not the ``torch`` format; without either, the bundle's float32
            ONNX file is trusted if it answers as PyTorch did.
        folder: where cases are written, one folder each; made where there is something to write.
        stage: told about each step.
    """
    failed: dict[tuple[str, str], list[Check]] = {}
    for check in report.checks:
        if not check.passed and check.stage in _LOCATED:
            failed.setdefault((check.runtime, check.precision), []).append(check)
    unsaid = list(report.skipped)
    if not failed:
        stages = ", ".join(dict.fromkeys(check.where for check in report.checks if not check.passed))
        unsaid.append(f"bisection: what failed ({stages}) sits in no node of the graph")
        return msgspec.structs.replace(report, skipped=tuple(unsaid))
    findings = []
    with tempfile.TemporaryDirectory(prefix="dmformer-") as scratch:
        try:
            with stage("the graph that is trusted"):
                candidate = _trusted(bundle, weights, Path(scratch))
        except Exception as error:  # noqa: BLE001 - files under suspicion break parsers in ways of their own
            unsaid.append(f"bisection: {first_line(error)}")
            failed = {}
        for (runtime, precision), checks in failed.items():
            try:
                with stage(f"bisect {runtime} {precision}"):
                    findings.append(_bisect(bundle, candidate, checks, folder, Path(scratch)))
            except Exception as error:  # noqa: BLE001 - as above
                unsaid.append(f"bisection of {runtime} {precision}: {first_line(error)}")
    return msgspec.structs.replace(report, findings=tuple(findings), skipped=tuple(unsaid))


def _bisect(bundle: Bundle, candidate: _Candidate, checks: Sequence[Check], folder: Path, scratch: Path) -> Finding:
    runtime, precision = checks[0].runtime, checks[0].precision
    (choice,) = [one for one in select(bundle, [runtime])[0] if one.artifact.precision == precision]
    least = max(1, choice.runtime().batches[0])
    size, failed_at = _where(checks, least)
    # Another size was asked for in one batch only; rows of their own tell a node from the batching.
    batch = min(failed_at, least)
    try:
        search = _Search(choice, candidate.at(size), batch, scratch)
    except StageFailed as error:
        if size is None:
            raise
        raise StageFailed(f"at {size} {error}: look at what was traced for one size") from error
    with staged_case(folder / f"{runtime}-{precision}") as case:
        found = search.find(case, folder / f"{runtime}-{precision}")
        if found is None:
            raise StageFailed(_rows_alone(failed_at) if batch < failed_at else _SPREAD)
    return found


def _where(checks: Sequence[Check], least: int) -> tuple[str | None, int]:
    """The size to search at, and the smallest batch that failed there.

    Another size than that of the golden images where these are right in the ``least`` batch.
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
    raise StageFailed(_rows_alone(failed_at[None]))


def _rows_alone(batch: int) -> str:
    return f"it answers right row by row, and not in batches of {batch}: look at the batching, not at a node"


def _trusted(bundle: Bundle, weights: Path | None, scratch: Path) -> _Candidate:
    """The checkpoint traced anew, or the bundle's float32 ONNX file.

    Raises:
        UsageError: there is neither.
    """
    from dmformer.graph.trace import trace

    golden = bundle.golden()
    if weights is not None or bundle.artifacts("torch"):
        given = reference_checkpoint(bundle, weights)
        manifest = bundle.manifest
        checkpoint = replace(given, preprocessing=manifest.preprocessing, open_size=manifest.open_size)
        path = scratch / "trusted.onnx"
        folded = bundle.manifest.model.deploy_form
        trace(checkpoint, form_in(bundle, checkpoint.model()), path)
        if not folded and bundle.manifest.simplification.kept:
            # It fuses what the deploy form has folded already; tensors keep their names and not their meaning.
            with Simplifier() as simplifier:
                simplifier.simplify(path, scratch / "simplified.onnx")
            path = scratch / "simplified.onnx"
        refusal = "the golden answers are not those of the checkpoint; expected the one it was made of"
        return _Candidate(onnx_file.read(path), golden, CheckFailed(refusal))
    files = bundle.artifacts("onnx", "fp32")
    if not files:
        raise UsageError(_NOTHING_TO_TRUST)
    return _Candidate(onnx_file.read(bundle.load_path(files[0])), golden, UsageError(_NOTHING_TO_TRUST))


class _Search:
    """The bisection of one artifact.

    Args:
        choice: the artifact and its runtime.
        trusted: the graph to compare with.
        batch: the smallest at which it failed.
        scratch: an existing folder.
    """

    def __init__(self, choice: Choice, trusted: Trusted, batch: int, scratch: Path) -> None:
        self.choice, self.trusted, self.scratch = choice, trusted, scratch
        self.precision = choice.artifact.precision
        self.batch = batch
        files = choice.bundle.artifacts("onnx", self.precision)
        self.file = choice.bundle.load_path(files[0]) if files else None
        self.rows = self._rows()
        self.truth = {trusted.input: self.rows} | interpret(trusted.model, {trusted.input: self.rows}, double=True)
        self.limits = self._limits()

    def _rows(self) -> NDArray[np.float32]:
        """The golden row that shows the failure most, or as many as the batch has."""
        inputs = self.trusted.golden.inputs
        if self.batch > 1:
            return inputs
        golden = self.trusted.golden
        return golden.worst_row(golden.thinned(self._show(self.trusted.outputs, inputs)))

    def _limits(self) -> dict[str, float]:
        model, inputs = self.trusted.model, {self.trusted.input: self.rows}
        reduced: frozenset[str] = frozenset()
        if self.precision != "fp32":
            layers = compute_layers(onnx_file.read(self.file) if self.file else model)
            reduced = frozenset(name for name, typed in layers.items() if typed == self.precision or not self.file)
        kept = frozenset(self.choice.artifact.kept_in_fp32)
        bits = self.choice.artifact.weight_bits or FULL_WEIGHT_BITS
        emulation = Emulation(self.precision, reduced, kept, weight_bits=bits)
        emulated = inputs | interpret(model, inputs, double=False, emulation=emulation)
        return tensor_limits(self.truth, emulated, TENSOR_FACTORS[self.precision])

    def _show(self, names: list[str] | tuple[str, ...], rows: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        taps = [name for name in names if name not in self.trusted.outputs]
        with self.choice.runtime(taps=taps) as runtime:
            (name,) = (spec.name for spec in runtime.inputs)
            return runtime.run_rows({name: rows}, max(self.batch, runtime.batches[0]))

    def find(self, folder: Path, known_as: Path) -> Finding | None:
        """Search, judge, and save the case into ``folder``, which will be ``known_as``; ``None`` where all is right.

        Raises:
            StageFailed: the engine shows nothing of its inside.
        """
        with self.choice.runtime() as runtime:
            inner = runtime.inspect().inner_tensors()
        if not inner:
            raise StageFailed(f"an engine of {self.choice.entry.name} shows no inner tensors; bisect its ONNX file")
        nodes = graph_nodes(self.trusted.model)
        known = {*inner, *self.trusted.outputs} & set(self.truth)
        found = cuts(nodes, [self.trusted.input], self.trusted.outputs, known)
        parting = find_parting(nodes, found, self.truth, self.limits, lambda names: self._show(names, self.rows))
        # What a small fault does may sink below the limit and come up again further on, where the halving finds it.
        at_once = parting_at_once(nodes, found, self.truth, self.limits, self._show(tuple(known), self.rows))
        if at_once is not None and (parting is None or at_once.bad.position < parting.bad.position):
            parting = at_once
        if parting is None:
            return None
        at_fault, explanation = self._judge(parting)
        names = [node.name for node in parting.nodes]
        unlike: list[str] = []
        if at_fault == "file" and self.file is not None:
            unlike = differences(onnx_file.read(self.file), self.trusted.model, names)
        island = None
        self._save(folder, parting, at_fault)
        if all(check.passed for check in run_case(folder)):
            explanation += "; the case alone does not show it"
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
            case=str(known_as),
            island=island,
            size=self.trusted.size,
        )

    def _judge(self, parting: Parting) -> tuple[Any, str]:
        name, precision = self.choice.entry.name, self.precision
        if self.file is None:
            return None, f"the bundle has no ONNX file at {precision} to compare with"
        literal = literal_answers(self.file, self.rows, parting.made)
        if self._differs(literal, parting.made):
            return "file", f"the ONNX file at {precision} does the same, executed one operator at a time"
        try:
            piece, inputs = self._piece(parting, self.scratch / "piece.onnx")
            with registry.available_adapter(self.choice.entry)(piece, precision=precision) as runtime:
                answered = runtime.run({spec.name: inputs[spec.name] for spec in runtime.inputs})
        except DMFormerError as error:
            return "engine", f"the ONNX file is right, and {name} cannot run this piece of it: {error}"
        if self._differs(answered, parting.made):
            cause = f"; {self.choice.saturation}" if self.choice.saturation else ""
            return "engine", f"the ONNX file is right, and {name} computes this piece of it wrongly{cause}"
        return "artifact", (
            f"the ONNX file is right, and {name} computes this piece of it right: the artifact's own files are not "
            f"made from it; build them again (dmformer build --format {self.choice.artifact.format})"
        )

    def _differs(self, shown: Mapping[str, NDArray[Any]], names: Sequence[str]) -> bool:
        return not all(largest_difference(shown[name], self.truth[name]) <= self.limits[name] for name in names)

    def _piece(self, parting: Parting, path: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        """The part of the ONNX file between the two cuts, and what it is to be given."""
        assert self.file is not None
        model = onnx_file.read(self.file)
        types = onnx_file.element_types(model)
        starts = dict.fromkeys((*parting.good.tensors, self.trusted.input))
        inputs = {name: self.truth[name].astype(types[name]) for name in starts}
        path.write_bytes(onnx_file.cut(model, inputs, parting.made).SerializeToString())
        return path, inputs

    def _save(self, folder: Path, parting: Parting, at_fault: str | None) -> None:
        """The piece where that shows the failure, or else the whole artifact."""
        if at_fault in ("file", "engine"):
            path, inputs = self._piece(parting, folder / "cut.onnx")
            files = [path]
            runtime = self.choice.entry.name if at_fault == "engine" else "onnxruntime"
        else:
            self.choice.bundle.load_path(self.choice.artifact)
            sources = [self.choice.bundle.root / entry.path for entry in self.choice.artifact.files]
            files = [Path(shutil.copy(source, folder)) for source in sources]
            inputs, runtime = {self.trusted.input: self.rows}, self.choice.entry.name
        case = Case(
            runtime=runtime,
            precision=self.precision,
            files=tuple(file_entry(folder, path) for path in files),
            node=parting.nodes[0].name,
            limits={name: self.limits[name] for name in parting.made},
            full_range=self.choice.artifact.full_range,
        )
        save_case(folder, case, inputs, {name: self.truth[name] for name in parting.made})
