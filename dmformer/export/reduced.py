"""The proof of an ONNX file at a reduced precision, before any engine sees it: its outputs, and each of its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.bundle.golden import FIRST_AND_LAST, Golden
from dmformer.errors import StageFailed
from dmformer.export.precisions import PrecisionFile
from dmformer.graph import onnx_file
from dmformer.graph.onnx_file import compute_layers, modules_at, typed_share
from dmformer.verify.answers import Answers
from dmformer.verify.compare import TENSOR_FACTORS, Comparison, Limit, Reference, largest_difference, largest_value
from dmformer.verify.executors import Emulation, input_peaks, literal_answers, round_layers_, walk
from dmformer.verify.localize.island import find_island
from dmformer.verify.localize.search import error_limits, graph_nodes, nearest_to_limit
from dmformer.verify.parity import check_answers, references
from dmformer.verify.reference import torch_outputs
from dmformer.verify.report import Check, as_check

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import nn

    from dmformer.export.precisions import PrecisionSource

_SEEN_IMAGES = 4  # on which PyTorch checks how far the inputs of int8 layers reach


@dataclass(frozen=True)
class Reduced:
    """An ONNX file at a precision, golden outputs with its own, and its checks."""

    file: PrecisionFile
    golden: Golden
    checks: tuple[Check, ...] = ()


def prove(
    precision: str, made: PrecisionFile, form: Callable[[], nn.Module], source: PrecisionSource, golden: Golden
) -> tuple[PrecisionFile, Golden, list[Check]]:
    """The file, golden outputs with its own, and its checks; a float16 file is mended where an island is enough.

    Args:
        precision: its name.
        made: the ONNX file at it.
        form: makes the network in the form that was traced.
        source: what the file was made from.
        golden: with the float32 file's answers.

    Raises:
        StageFailed: answers at the precision are not finite, or it drowns what outputs differ by between images.
    """
    broken: StageFailed | None = None
    for _ in range(len(golden.inputs) + 1):
        broken = None
        try:
            completed, checks = reduced_golden(precision, made, form(), source, golden)
        except StageFailed as error:
            broken = error
        if precision != "fp16" or (broken is None and all(check.passed for check in checks)):
            break
        model = onnx_file.read(source.onnx)
        worst = golden.worst_row(golden.thinned(literal_answers(made.onnx, golden.inputs)))
        island = find_island(model, worst, made.kept_in_fp32, source.scratch)
        if not island.nodes:
            break
        reason = "beyond the error of float16 there"
        share = typed_share(onnx_file.read(source.scratch / island.file), precision)
        kept = made.kept_in_fp32 | dict.fromkeys(island.nodes, reason)
        made = replace(made, onnx=source.scratch / island.file, promised_share=share, kept_in_fp32=kept)
    if broken is not None:
        raise broken
    return made, completed, checks


def reduced_golden(
    precision: str, made: PrecisionFile, form: nn.Module, source: PrecisionSource, golden: Golden
) -> tuple[Golden, list[Check]]:
    """Golden outputs with those at a reduced precision, and the checks of its ONNX file: against PyTorch and fp32's.

    Args:
        precision: its name.
        made: the file at it.
        form: the network in the form that was traced; used up.
        source: what the file was made from.
        golden: with the float32 file's answers.

    Raises:
        StageFailed: answers at the precision are not finite, or it drowns what outputs differ by between images.
    """
    reduced = onnx_file.read(made.onnx)
    layers = modules_at(reduced, precision)
    inner = {name for node in reduced.graph.node for name in node.output}
    if precision == "int8":
        assert source.calibration is not None
        # Ranges that fall short of what PyTorch sees would hide in limits that are made with them.
        seen = input_peaks(form, layers, source.calibration.images.spread(_SEEN_IMAGES).batches(1))
        peaks = {name: max(seen[name], made.peaks.get(name, 0.0)) for name in layers}
        made = replace(made, peaks=peaks)
    literal = literal_answers(made.onnx, golden.inputs, inner, FIRST_AND_LAST)
    outputs = {name: literal.pop(name) for name in golden.outputs}
    tensors = check_tensors(precision, made, source, golden.first_and_last, literal | outputs)
    modules = dict(form.named_modules())
    exact = [module for name in made.kept_in_fp32 if (module := name.rpartition("/")[0]) in modules and "/" in name]
    round_layers_(form, precision, layers, made.peaks, exact, source.weight_bits)
    completed = _completed(golden, precision, outputs, form)
    if golden.other is not None:
        outputs = literal_answers(made.onnx, golden.other.inputs)
        completed = replace(completed, other=_completed(golden.other, precision, outputs, form))
    checks = []
    for size, part in completed.sizes.items():
        try:
            pytorch = references(part, precision)[0]
        except StageFailed as error:
            raise StageFailed(f"{error}; it begins at {tensors.reason}" if tensors.reason else str(error)) from error
        before = Reference("onnx fp32", part.files["fp32"], pytorch.limits)
        answers = Answers("onnxruntime", precision, {len(part.inputs): dict(part.files[precision])})
        checks += check_answers("reduced", answers, [pytorch, before], size)
    return completed, [*checks, tensors]


def _completed(golden: Golden, precision: str, literal: Mapping[str, NDArray[Any]], rounded: nn.Module) -> Golden:
    """With what the file at a precision answers, and what the network answers whose layers were rounded."""
    emulated = golden.thinned(torch_outputs(rounded, golden.inputs))
    return replace(
        golden,
        files=golden.files | {precision: golden.thinned(literal)},
        emulated=golden.emulated | {precision: emulated},
    )


def check_tensors(
    precision: str,
    made: PrecisionFile,
    source: PrecisionSource,
    rows: NDArray[np.float32],
    shown: Mapping[str, NDArray[Any]],
) -> Check:
    """Whether every tensor of a file at a reduced precision is what the float32 file has, within the precision's error.

    A fault in one layer that hardly shows in the outputs shows here.

    Args:
        precision: of the file.
        made: the file, and the nodes that stay in float32.
        source: what it was made from.
        rows: images, (N, C, H, W).
        shown: every tensor that the file makes of the golden images, taken by its word; maps of these rows alone.
    """
    model, reduced = onnx_file.read(source.onnx), onnx_file.read(made.onnx)
    inputs = {model.graph.input[0].name: rows}
    layers = frozenset(name for name, typed in compute_layers(reduced).items() if typed == precision)
    by_node = {name: made.peaks[module] for name in layers if (module := name.rpartition("/")[0]) in made.peaks}
    emulation = Emulation(precision, layers, frozenset(made.kept_in_fp32), by_node, source.weight_bits)
    peaks: dict[str, float] = {}
    errors: dict[str, float] = {}
    apart: dict[str, float] = {}
    # Side by side, so that no more is held than the next nodes read.
    both = zip(walk(model, inputs, double=True), walk(model, inputs, double=False, emulation=emulation), strict=True)
    for (name, exact), (_, emulated) in both:
        peaks[name], errors[name] = largest_value(exact), largest_difference(emulated, exact)
        array = shown.get(name)
        if array is not None and array.dtype.kind == "f":  # of shapes and positions it has nothing to reduce
            rows_of = array if array.shape == exact.shape else array[list(FIRST_AND_LAST)]
            apart[name] = largest_difference(rows_of, exact)
    limits = error_limits(peaks, errors, TENSOR_FACTORS[precision])
    name = nearest_to_limit(apart, limits)
    reason = None
    made_by = ((node.name, tensor) for node in graph_nodes(model) for tensor in node.outputs if tensor in apart)
    beyond = next((found for found in made_by if not apart[found[1]] <= limits[found[1]]), None)
    if beyond is not None:
        node, name = beyond
        reason = f"{node}: tensor {name} differs by {apart[name]:.3g}, limit {limits[name]:.3g}"
    derived = f"{TENSOR_FACTORS[precision]:g} x the error of tensor {name} at {precision}, emulated in PyTorch"
    limit, distance = Limit(limits[name], derived), apart[name]
    comparison = Comparison(beyond is None, max_abs=distance if np.isfinite(distance) else None, reason=reason)
    return as_check("tensors", "onnxruntime", precision, len(rows), comparison, limit, "onnx fp32")
