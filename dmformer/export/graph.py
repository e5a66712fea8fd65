"""From a checkpoint to a verified ONNX file in float32: each form of the network is compared with the one before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from dmformer.bundle.golden import FIRST_AND_LAST, Golden
from dmformer.bundle.manifest import Simplification
from dmformer.errors import DMFormerError, StageFailed
from dmformer.export.formats import versions
from dmformer.graph import onnx_file
from dmformer.graph.simplify import Simplifier
from dmformer.graph.trace import onnx_metadata, trace
from dmformer.machine import give_memory_back
from dmformer.models.checkpoint import Checkpoint
from dmformer.models.deploy import deploy
from dmformer.progress import Progress
from dmformer.runtimes import registry
from dmformer.runtimes.torch import ModuleRuntime
from dmformer.verify.answers import Answers, ask, batch_sizes
from dmformer.verify.compare import Reference
from dmformer.verify.inner import ModuleTruth
from dmformer.verify.parity import check_answers, check_other_size, references
from dmformer.verify.reference import golden_at_other_size, golden_pixels, make_golden
from dmformer.verify.report import Check


@dataclass(frozen=True)
class VerifiedGraph:
    """A float32 ONNX file, and how it was checked.

    Attributes:
        onnx: the file: simplified where that changed nothing, or else as it was traced.
        golden: PyTorch's answers, and the file's at fp32.
        checks: of all stages up to it.
        simplification: whether the simplified graph was kept, and why.
    """

    onnx: Path
    golden: Golden
    checks: list[Check]
    simplification: Simplification


@dataclass(frozen=True)
class GraphSource:
    """What a graph is made from.

    Attributes:
        checkpoint: with its preprocessing.
        model: its network, which is left as it is.
        deploy_form: fold the network before it is traced.
        images: some of them become golden images.
        scratch: an existing folder for files that do not outlive the export.
        stage: told about each step.
    """

    checkpoint: Checkpoint
    model: nn.Module
    deploy_form: bool
    images: Sequence[Path]
    scratch: Path
    stage: Progress

    def form(self) -> nn.Module:
        """What is traced; never the network itself, for some callers write into its modules."""
        if not self.deploy_form:
            return self.checkpoint.model()
        return deploy(self.model, self.checkpoint.side)


def verified_graph(source: GraphSource) -> tuple[VerifiedGraph, Answers]:
    """Trace, simplify and verify; gives onnxruntime's answers to the file as well.

    Raises:
        StageFailed: the exporter or the simplifier broke, or PyTorch's own answers are no reference.
        UsageError: an image cannot be read.
    """
    traced, simplified = source.scratch / "traced.onnx", source.scratch / "simplified.onnx"
    # onnxsim needs one core, and PyTorch is asked meanwhile; PyTorch beside PyTorch would take longer than in turns.
    # The process is left first: an exception does not wait for it.
    with ThreadPoolExecutor(1) as pool, Simplifier() as simplifier:
        with source.stage("PyTorch reference"):
            golden = _reference(source)
            (pytorch,) = references(golden, "fp32")
        with source.stage("trace to ONNX"):
            form = source.form()
            trace(source.checkpoint, copy.deepcopy(form), traced)
        simplifying = pool.submit(simplifier.simplify, traced, simplified)
        give_memory_back()  # what PyTorch freed and an engine cannot use
        with source.stage("verify PyTorch's forms"):
            checks, before = _check_forms(source, form, golden, pytorch)
        give_memory_back()
        with source.stage("simplify, verify the ONNX"):
            simplifying.result()
            kept, simplification = _verified(source, traced, simplified, golden, [pytorch, *before])
            kept.checks[:0] = checks
        with source.stage("verify each layer"):
            adapter = registry.available_adapter(registry.entry("onnxruntime"))
            layers = ModuleTruth(form, golden.noise)
            found = layers.check(lambda taps: adapter(kept.file, taps=taps))
            if isinstance(found, str):
                raise StageFailed(f"{found}; expected nearly all of them in a file that was just traced")
            kept.checks.append(found)
    largest = kept.answers.at_largest_batch
    if not isinstance(largest, DMFormerError):
        golden = replace(golden, files={"fp32": largest})
    other_size = kept.answers.other_size
    if golden.other_size is not None and other_size is not None and not isinstance(other_size, DMFormerError):
        golden = replace(golden, other_size=replace(golden.other_size, files={"fp32": other_size}))
    return VerifiedGraph(kept.file, golden, kept.checks, simplification), kept.answers


class _Graph(NamedTuple):
    file: Path
    answers: Answers
    checks: list[Check]


def _reference(source: GraphSource) -> Golden:
    checkpoint = source.checkpoint
    preprocessing = checkpoint.preprocessing
    golden = make_golden(source.model, preprocessing, golden_pixels(preprocessing, source.images))
    other_size = golden_at_other_size(source.model, preprocessing) if checkpoint.open_size else None
    return replace(golden, other_size=other_size)


def _check_forms(
    source: GraphSource, form: nn.Module, golden: Golden, pytorch: Reference
) -> tuple[list[Check], list[Reference]]:
    """The network at each batch size, and the form that is traced; gives the last as what comes before the trace."""
    forms: dict[str, nn.Module] = {"training form": source.model}
    if source.deploy_form:
        forms["deploy form"] = form
    checks: list[Check] = []
    before: list[Reference] = []
    sizes = batch_sizes(golden.inputs)
    for name, model in forms.items():
        runtime = ModuleRuntime(model, source.checkpoint)
        # PyTorch is slow: all images are asked at the largest batch alone.
        ask_it = functools.partial(ask, runtime, keep=golden.thinned, layers=False, consistency=False)
        few = ask_it(golden.first_and_last, sizes=sizes[:-1])
        for reference in (pytorch, *before):
            ends = {output: array[list(FIRST_AND_LAST)] for output, array in reference.outputs.items()}
            checks += check_answers(name, few, [replace(reference, outputs=ends)])
        if model is source.model:  # of which the golden answers are those at the largest batch
            before = [replace(pytorch, name=name)]
            continue
        whole = ask_it(golden.inputs, sizes=sizes[-1:], other_size=golden.other_size)
        checks += check_answers(name, whole, [pytorch, *before])
        checks += check_other_size(name, whole, golden)
        before = _as_reference(name, whole, pytorch)
    return checks, before


def _verified(
    source: GraphSource, traced: Path, simplified: Path, golden: Golden, before: Sequence[Reference]
) -> tuple[_Graph, Simplification]:
    """The simplified graph where it answers as the traced one and as PyTorch do, or else the traced one.

    Where simplification changed nothing but names of weights, the answers of one are those of the other.
    """
    model, ours = onnx_file.read(simplified), onnx_file.read(traced)
    onnx_file.write(model, simplified, onnx_metadata(source.checkpoint) | _version("onnxsim"))
    unchanged = onnx_file.same_but_for_names(ours, model)
    nodes, after = len(ours.graph.node), len(model.graph.node)
    answers = _ask_onnxruntime(simplified if unchanged else traced, golden, whole=unchanged)
    kept = _Graph(traced, answers, _checked("traced", answers, golden, before))
    if not all(check.passed for check in kept.checks):
        reason = "the traced graph failed its checks, so there is nothing to compare a simplified one with"
        return kept, Simplification(kept=False, reason=reason, nodes_before=nodes)
    if not unchanged:
        answers = _ask_onnxruntime(simplified, golden, whole=True)
    pytorch = before[0]
    checks = _checked("simplified", answers, golden, [pytorch, *_as_reference("traced", kept.answers, pytorch)])
    if wrong := [check.reason for check in checks if not check.passed]:
        reason = f"the simplified graph is not equal to the traced one: {wrong[0]}"
        return kept, Simplification(kept=False, reason=reason, nodes_before=nodes, nodes_after=after)
    reason = f"{nodes} nodes became {after}, with equal outputs within the limit of float32"
    found = Simplification(kept=True, reason=reason, nodes_before=nodes, nodes_after=after)
    return _Graph(simplified, answers, [*kept.checks, *checks]), found


def _checked(stage: str, answers: Answers, golden: Golden, compared_with: Sequence[Reference]) -> list[Check]:
    return [*check_answers(stage, answers, compared_with), *check_other_size(stage, answers, golden)]


def _ask_onnxruntime(file: Path, golden: Golden, *, whole: bool) -> Answers:
    adapter = registry.available_adapter(registry.entry("onnxruntime"))
    return ask(
        adapter(file), golden.inputs, golden.thinned, layers=whole, consistency=whole, other_size=golden.other_size
    )


def _as_reference(name: str, answers: Answers, pytorch: Reference) -> list[Reference]:
    """A stage as what the next one is compared with; nothing where it did not answer, which its own checks say."""
    largest = answers.at_largest_batch
    return [] if isinstance(largest, DMFormerError) else [Reference(name, largest, pytorch.limits)]


def _version(package: str) -> dict[str, str]:
    return {f"{package}.version": versions(package)[package]}
