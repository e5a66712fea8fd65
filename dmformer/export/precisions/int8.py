"""float32 ONNX -> int8 by QuantizeLinear and DequantizeLinear pairs, with onnxruntime's static quantiser.

The graph keeps the rules that TensorRT's parser has, so that onnxruntime and OpenVINO take it too: symmetric and
signed, weights one scale a channel, biases in float32. Quantised are the inputs and weights of full convolutions; what
else reads such an input (a residual addition, a gate's pool) reads it rounded as well, which lets OpenVINO keep it in
int8. Computed in floating point, because int8 was measured to cost accuracy there and to gain no time
(``docs/measurements.md``): depth-wise convolutions, the gates' layers, the classifier, the outputs of convolutions, and
convolutions of stacked branches, which OpenVINO rounds once more before it stacks them.

Weights use 7 bits, -64 to 64, unless 8 are asked for. A processor without VNNI adds pairs of products of 8-bit numbers
in 16 bits that saturate: 2 x 255 x 127 does not fit, 2 x 255 x 64 does.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dmformer._optional import require
from dmformer.bundle.golden import thinned
from dmformer.bundle.manifest import SAFE_WEIGHT_BITS
from dmformer.errors import CheckFailed
from dmformer.export.precisions import PrecisionFile, check_calibrated, tensor_peaks
from dmformer.graph import onnx_file
from dmformer.graph.onnx_file import metadata_at, typed_share
from dmformer.runtimes.onnxruntime import OnnxRuntime
from dmformer.task import INPUT_NAME, OUTPUT_NAME, STRIDES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

    from dmformer.export.precisions import Calibration, PrecisionSource

# Sensitivity takes as many images as it needs for so many logits, within these bounds: DMFormer-S's figures from 4
# images are within a tenth of those from 8.
_SENSITIVITY_LOGITS = 4000
_SENSITIVITY_IMAGES = (4, 16)


def to_int8(source: PrecisionSource) -> PrecisionFile:
    """The quantised graph, with as many blocks left in float32 as the accuracy budget needs, most sensitive first.

    Raises:
        CheckFailed: nothing can be quantised within the budget.
        UsageError: there are no calibration images.
    """
    check_calibrated(("int8",), source.calibration.images if source.calibration else None)
    assert source.calibration is not None
    quantizer = _Quantizer(source, source.calibration)
    blocks = quantizer.blocks
    sensitivity = quantizer.sensitivity()
    order = sorted(blocks, key=lambda block: -sensitivity[block])

    def quantized(kept: int) -> Path:
        return quantizer.quantize([name for block in order[kept:] for name in blocks[block]])

    def lost_with(kept: int) -> float:
        return quantizer.points_lost(quantized(kept), f"int8 accuracy, {kept} of {len(order)} blocks in fp32")

    kept = _fewest_kept(lost_with, len(order), source.max_points_lost)
    made = quantized(kept)
    model = onnx_file.read(made)
    _check_range(model, source.weight_bits)
    onnx_file.write(model, made, quantizer.metadata)
    reason = f"among the {kept} most sensitive blocks: the accuracy budget holds with them in float32"
    return PrecisionFile(
        onnx=made,
        precision="int8",
        promised_share=typed_share(model, "int8"),
        kept_in_fp32=dict.fromkeys(order[:kept], reason),
        sensitivity=sensitivity,
        weight_bits=source.weight_bits,
        peaks=quantizer.module_peaks,
        answers=quantizer.answers.get(made),
    )


def _check_range(model: ModelProto, weight_bits: int) -> None:
    """Make sure that no weight is beyond its range: what the manifest says of it decides where the file is trusted."""
    most = 1 << (weight_bits - 1)
    for name, array in onnx_file.weights(model).items():
        if array.dtype != np.int8 or array.ndim != 4:
            continue
        largest = int(np.abs(array.astype(np.int16)).max())
        if largest > most:
            raise CheckFailed(
                f"precision int8: onnxruntime's quantiser wrote weight {name!r} up to {largest}; expected {most} at "
                f"most, {weight_bits} bits"
            )


def _fewest_kept(lost_with: Callable[[int], float], blocks: int, most: float) -> int:
    """How few blocks have to stay in float32, by doubling and then halving; accuracy grows with their number."""
    failed, kept = -1, 0
    while (lost := lost_with(kept)) > most:
        if kept == blocks - 1:
            raise CheckFailed(
                f"precision int8 loses {lost:.2f} points with 1 of {blocks} blocks in int8; the budget is {most:g}: "
                "give better calibration images, a larger `max_accuracy_drop`, or leave int8 out"
            )
        failed, kept = kept, min(max(1, 2 * kept), blocks - 1)
    while kept - failed > 1:
        middle = (failed + kept) // 2
        if lost_with(middle) > most:
            failed = middle
        else:
            kept = middle
    return kept


class _Quantizer:
    """Quantises chosen convolutions of one graph; ranges are measured once."""

    def __init__(self, source: PrecisionSource, calibration: Calibration) -> None:
        self.source = source
        self.calibration = calibration
        model = onnx_file.read(source.onnx)
        self.blocks = quantizable(model, source.block_of)
        if not self.blocks:
            raise CheckFailed(
                "precision int8: the network has no full convolution with constant weights in any block, and no other "
                "layer is quantised; expected `precisions` without int8"
            )
        self.metadata = metadata_at("int8", model)
        self.graph = source.scratch / "int8-source.onnx"
        self.answers: dict[Path, NDArray[Any]] = {}  # to the calibration images, of the file that was asked last
        self._inputs = {node.name: str(node.input[0]) for node in model.graph.node if node.op_type == "Conv"}
        self._written: dict[frozenset[str], Path] = {}
        # What the quantiser's own preprocessing would do (fold, infer shapes) is done; without this mark it warns.
        marked = {**self.metadata, "onnx.quant.pre_process": "onnxruntime.quant"}
        onnx_file.write(model, self.graph, marked)

    @functools.cached_property
    def peaks(self) -> dict[str, float]:
        """How far each tensor that may be quantised reaches on the calibration images."""
        names = dict.fromkeys(self._inputs[name] for names in self.blocks.values() for name in names)
        with self.source.stage("ranges for int8", self.source.range_count) as advance:
            return tensor_peaks(self.source.onnx, list(names), self.source.range_batches(), advance)

    @property
    def module_peaks(self) -> dict[str, float]:
        """The same by the module whose input it is."""
        names = [name for names in self.blocks.values() for name in names]
        return {name.rpartition("/")[0]: self.peaks[self._inputs[name]] for name in names}

    def quantize(self, nodes: Sequence[str]) -> Path:
        """The graph with these nodes quantised, written when it is first asked for."""
        destination = self._written.get(frozenset(nodes))
        if destination is not None:
            return destination
        extra, purpose = "onnxruntime", "precision int8"
        quantization = require("onnxruntime.quantization", extra=extra, purpose=purpose)
        calibrate = require("onnxruntime.quantization.calibrate", extra=extra, purpose=purpose)
        utils = require("onnxruntime.quantization.quant_utils", extra=extra, purpose=purpose)
        destination = self.source.scratch / f"int8-{len(self._written)}.onnx"
        reach = {name: np.float32(peak) for name, peak in self.peaks.items()}
        ranges = {name: calibrate.TensorData(lowest=-peak, highest=peak) for name, peak in reach.items()}
        # As quantize_static does, which would measure the ranges first, with a slower graph.
        quantizer = quantization.QDQQuantizer(
            utils.load_model_with_shape_infer(self.graph),
            per_channel=True,
            reduce_range=self.source.weight_bits == SAFE_WEIGHT_BITS,
            weight_qType=quantization.QuantType.QInt8,
            activation_qType=quantization.QuantType.QInt8,
            tensors_range=calibrate.TensorsData(calibrate.CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=list(nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=["Conv"],
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": ["Conv"],
            },
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(destination), False)
        self._written[frozenset(nodes)] = destination
        return destination

    def sensitivity(self) -> dict[str, float]:
        """For each block, the error of the outputs where it alone is quantised, over their spread between images.

        The block's own error comes from its part of the quantised graph, on its exact inputs; what becomes of it, from
        the float32 graph with that error added behind the block. So nothing is quantised or loaded for each block alone
        but the block.
        """
        measure = self.calibration.measure
        model = onnx_file.read(self.graph)
        images = self.calibration.images.spread(_images_for(model, measure.classes))
        borders = {block: _border(model, block, self.source.block_of) for block in self.blocks}
        made = dict.fromkeys(name for border in borders.values() for name in border.outputs)
        read = dict.fromkeys(name for border in borders.values() for name in border.inputs)
        taps = [name for name in (read | made) if name != INPUT_NAME]
        parts = measure.parts(images) * len(borders) + 1
        with ExitStack() as opened, self.source.stage("int8 sensitivity of each block", parts) as advance:
            quantized = onnx_file.read(self.quantize([name for names in self.blocks.values() for name in names]))
            advance()
            exact = opened.enter_context(OnnxRuntime(self.source.onnx, taps=taps))
            erring: OnnxRuntime | None = None
            alone: dict[str, OnnxRuntime] = {}
            answers: list[NDArray[Any]] = []
            squares: dict[str, list[float]] = {block: [] for block in borders}
            for batch in images.batches(measure.batch):
                known = {INPUT_NAME: batch} | exact.run({INPUT_NAME: batch})
                answers.append(_coarse(known))
                ranks = {name: known[name].ndim for name in made if known[name].dtype == np.float32}
                nothing = {_error_of(name): np.zeros([1] * rank, np.float32) for name, rank in ranks.items()}
                if erring is None:
                    probe = _add_errors(model, ranks, self.source.scratch / "int8-probe.onnx")
                    erring = opened.enter_context(OnnxRuntime(probe))
                for block, border in borders.items():
                    if block not in alone:
                        part = self._part(quantized, border, known, f"int8-block-{len(alone)}")
                        alone[block] = opened.enter_context(OnnxRuntime(part, precision="int8"))
                    given = {name: known[name] for name in border.inputs}
                    part_answers = alone[block].run(given).items()
                    errors = {_error_of(name): array - known[name] for name, array in part_answers if name in ranks}
                    wrong = _coarse(erring.run({INPUT_NAME: batch} | nothing | errors))
                    squares[block].append(float(np.sum((wrong - answers[-1]) ** 2)))
                    advance()
        together = np.concatenate(answers)
        spread = float((together - together.mean(0)).std())
        if not spread:
            raise CheckFailed("precision int8: the network answers all calibration images alike; expected others")
        return {block: float(np.sqrt(sum(found) / together.size)) / spread for block, found in squares.items()}

    def _part(self, model: ModelProto, border: _Border, known: Mapping[str, NDArray[Any]], name: str) -> Path:
        """Write what lies between a block's borders, whose tensors have the types of those that are known."""
        given = {tensor: known[tensor] for tensor in border.inputs}
        types = {tensor: known[tensor].dtype for tensor in (*border.inputs, *border.outputs)}
        path = self.source.scratch / f"{name}.onnx"
        path.write_bytes(onnx_file.cut(model, given, border.outputs, types).SerializeToString())
        return path

    def points_lost(self, path: Path, said: str) -> float:
        """Of accuracy on the calibration images."""
        images, measure = self.calibration.images, self.calibration.measure
        with self.source.stage(said, measure.parts(images)) as advance:
            self.answers = {path: measure.answers(OnnxRuntime(path, precision="int8"), images, advance)}
        return self.calibration.points_lost(self.answers[path])[1]


class _Border(NamedTuple):
    """The tensors that a block reads from elsewhere, and those of its own that others read."""

    inputs: list[str]
    outputs: list[str]


def _border(model: ModelProto, block: str, block_of: Callable[[str], str | None]) -> _Border:
    weights = {tensor.name for tensor in model.graph.initializer}
    inside = [node for node in model.graph.node if block_of(node.name) == block]
    names = {node.name for node in inside}
    made = [name for node in inside for name in node.output]
    elsewhere = {name for node in model.graph.node if node.name not in names for name in node.input}
    elsewhere |= {value.name for value in model.graph.output}
    read = dict.fromkeys(name for node in inside for name in node.input if name and name not in weights)
    return _Border([name for name in read if name not in made], [name for name in made if name in elsewhere])


def _images_for(model: ModelProto, classes: int) -> int:
    least, most = _SENSITIVITY_IMAGES
    if len(model.graph.output[0].type.tensor_type.shape.dim) > 2:  # logits of pixels: any image has enough
        return least
    return min(most, max(least, -(-_SENSITIVITY_LOGITS // classes)))


def _error_of(tensor: str) -> str:
    """Name of the input that is added to a tensor."""
    return f"{tensor}_error"


def _add_errors(model: ModelProto, ranks: Mapping[str, int], destination: Path) -> Path:
    """Write the graph, which is changed, with an input for each tensor whose rank is given, which is added to it."""
    onnx = require("onnx", extra="export", purpose="precision int8")
    producers = {name: node for node in model.graph.node for name in node.output}
    for name, rank in ranks.items():
        node, exact = producers[name], f"{name}_exact"
        position = list(model.graph.node).index(node)
        node.output[list(node.output).index(name)] = exact
        added = onnx.helper.make_node("Add", [exact, _error_of(name)], [name], f"{name}/Add")
        model.graph.node.insert(position + 1, added)
        sides = [f"{name}_{axis}" for axis in range(rank)]
        model.graph.input.append(onnx.helper.make_tensor_value_info(_error_of(name), onnx.TensorProto.FLOAT, sides))
    destination.write_bytes(model.SerializeToString())
    return destination


def quantizable(model: ModelProto, block_of: Callable[[str], str | None]) -> dict[str, list[str]]:
    """Names of the full convolutions worth quantising, by the block that they belong to, in the graph's order.

    Left out are those whose weights the graph computes (a weight standardisation that the simplifier did not fold):
    the quantiser has no range for them.
    """
    found: dict[str, list[str]] = {}
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        block = block_of(node.name)
        if node.op_type != "Conv" or block is None or _groups(node) > 1 or ".gate." in node.name:
            continue
        if node.input[1] not in constants:
            continue
        before = producers.get(node.input[0])
        if before is not None and before.op_type == "Relu":
            before = producers.get(before.input[0])
        if before is None or before.op_type != "Concat":
            found.setdefault(block, []).append(node.name)
    return found


def _coarse(outputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Logits; those of pixels before they were enlarged, which has all that they know."""
    return thinned(outputs, {OUTPUT_NAME: STRIDES[0]})[OUTPUT_NAME]


def _groups(node: NodeProto) -> int:
    found: list[Any] = [attribute.i for attribute in node.attribute if attribute.name == "group"]
    return int(found[0]) if found else 1
