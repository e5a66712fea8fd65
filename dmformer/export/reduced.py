"""The proof of an ONNX file at a reduced precision, before any engine sees it: its outputs, and each of its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.bundle.golden import Golden
from dmformer.errors import StageFailed
from dmformer.export import onnx_file
from dmformer.export.island import find_island
from dmformer.export.literal import literal_answers
from dmformer.export.precision import RANGE_IMAGES, Made, compute_layers, modules_at, typed_share
from dmformer.verify.answers import Answers
from dmformer.verify.bisect import first_beyond, graph_nodes, largest_share, tensor_limits
from dmformer.verify.check import Check, as_check
from dmformer.verify.compare import TENSOR_FACTORS, Comparison, Limit, Reference
from dmformer.verify.emulate import input_peaks, round_layers_
from dmformer.verify.interpret import interpret
from dmformer.verify.parity import check_answers, references
from dmformer.verify.reference import torch_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from dmformer.export.precision import PrecisionSource


@dataclass(frozen=True)
class Reduced:
    """An ONNX file at a precision, golden outputs with its own, and its checks."""

    made: Made
    golden: Golden
    checks: tuple[Check, ...] = ()


def prove(
    precision: str, made: Made, form: Callable[[], nn.Module], source: PrecisionSource, golden: Golden
) -> tuple[Made, Golden, list[Check]]:
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
        island = find_island(model, golden.worst_row(_literal(made.onnx, golden)), made.kept_in_fp32, source.scratch)
        if not island.nodes:
            break
        reason = "beyond the error of float16 there"
        share = typed_share(onnx_file.read(source.scratch / island.file), precision)
        kept = made.kept_in_fp32 | dict.fromkeys(island.nodes, reason)
        made = replace(made, onnx=source.scratch / island.file, promised=share, kept_in_fp32=kept)
    if broken is not None:
        raise broken
    return made, completed, checks


def reduced_golden(
    precision: str, made: Made, form: nn.Module, source: PrecisionSource, golden: Golden
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
    model = onnx_file.read(made.onnx)
    layers = modules_at(model, precision)
    peaks: dict[str, float] = {}
    if precision == "int8":
        assert source.calibration is not None
        peaks = input_peaks(form, layers, source.calibration.images.spread(RANGE_IMAGES).batches(1))
    tensors = check_tensors(precision, made, source, golden.first_and_last, peaks)
    modules = dict(form.named_modules())
    exact = [module for name in made.kept_in_fp32 if (module := name.rpartition("/")[0]) in modules and "/" in name]
    round_layers_(form, precision, layers, peaks, exact, source.weight_bits)
    completed = _completed(golden, precision, made, form)
    if golden.other is not None:
        completed = replace(completed, other=_completed(golden.other, precision, made, form))
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


def _completed(golden: Golden, precision: str, made: Made, rounded: nn.Module) -> Golden:
    """With what the file at a precision answers, and what the network answers whose layers were rounded."""
    emulated = golden.thinned(torch_outputs(rounded, golden.inputs))
    return replace(
        golden,
        files=golden.files | {precision: _literal(made.onnx, golden)},
        emulated=golden.emulated | {precision: emulated},
    )


def _literal(path: Path, golden: Golden) -> dict[str, NDArray[Any]]:
    return golden.thinned(literal_answers(path, golden.inputs))


def check_tensors(
    precision: str, made: Made, source: PrecisionSource, rows: NDArray[np.float32], peaks: Mapping[str, float]
) -> Check:
    """Whether every tensor of a file at a reduced precision is what the float32 file has, within the precision's error.

    A fault in one layer that hardly shows in the outputs shows here.

    Args:
        precision: of the file.
        made: the file, and the nodes that stay in float32.
        source: what it was made from.
        rows: images, (N, C, H, W).
        peaks: for int8, how far the input of each module reaches on the calibration images.
    """
    model, reduced = onnx_file.read(source.onnx), onnx_file.read(made.onnx)
    inputs = {model.graph.input[0].name: rows}
    truth = interpret(model, inputs, double=True)
    layers = frozenset(name for name, typed in compute_layers(reduced).items() if typed == precision)
    kept = frozenset(made.kept_in_fp32)
    by_node = {name: peaks[module] for name in layers if (module := name.rpartition("/")[0]) in peaks}
    emulated = interpret(
        model,
        inputs,
        double=False,
        precision=precision,
        layers=layers,
        exact=kept,
        peaks=by_node,
        weight_bits=source.weight_bits,
    )
    limits = tensor_limits(truth, emulated, TENSOR_FACTORS[precision])
    shown = literal_answers(made.onnx, rows, {name for node in reduced.graph.node for name in node.output} & set(truth))
    name, distance = largest_share(shown, truth, limits)
    beyond, reason = first_beyond(graph_nodes(model), shown, truth, limits), None
    if beyond is not None:
        node, name, distance = beyond
        reason = f"{node.name}: tensor {name} differs by {distance:.3g}, limit {limits[name]:.3g}"
    derived = f"{TENSOR_FACTORS[precision]:g} x the error of tensor {name} at {precision}, emulated in PyTorch"
    limit = Limit(limits[name], derived)
    comparison = Comparison(beyond is None, max_abs=distance if np.isfinite(distance) else None, reason=reason)
    return as_check("tensors", "onnxruntime", precision, len(rows), comparison, limit, "onnx fp32")
