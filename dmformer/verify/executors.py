"""Ways to run an ONNX graph other than in the engine that is judged; each yields every tensor of the graph.

:func:`exact` computes in float64 with PyTorch: the truth that inner tensors are judged by. :func:`emulated` computes in
float32 with PyTorch and rounds as a precision rounds; its error against the truth is a measure for files and engines at
that precision. At float16 it may round each sum as well (:mod:`dmformer.verify.float16_sums`). Both know the operators
that a DMFormer in float32 consists of and owe nothing to the engines or to the tool that made the file. What computes
with shapes and positions, and every operator of other networks, is left to ONNX's reference implementation, in the same
type; :func:`by_reference` names these. :func:`round_layers_` emulates a precision in the network itself, without any
graph.

:func:`literal` takes a file at any precision by its word: onnxruntime runs one operator at a time, and each result is
rounded to its type. An engine that runs the whole graph may fuse operators, and may skip the rounding to float16
between two of them even with its optimisations off (onnxruntime removes the casts that it puts around float16
operators, the rounding with them). Here each operator is a graph of its own, and adds up in float32.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dmformer._optional import require
from dmformer.bundle.manifest import FULL_WEIGHT_BITS
from dmformer.errors import StageFailed, first_line
from dmformer.graph.onnx_file import COMPUTE_OPERATORS, compute_layers
from dmformer.verify.float16_sums import convolve, multiply
from dmformer.verify.reference import depthwise

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import torch
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto
    from torch import Tensor, nn

    Operator = Callable[[list[Tensor], dict[str, Any]], Tensor | None]  # None: a use of it that is not ours
    Inputs = Mapping[str, NDArray[Any]]
    Tensors = Iterator[tuple[str, NDArray[Any]]]

T = TypeVar("T")
# Steps of a symmetric int8 scale on each side of zero, by the bits that it uses, as onnxruntime's quantiser has them.
_STEPS = {8: 127, 7: 64}
_ERRORS_ONLY = 3  # onnxruntime's level of messages
# Operators that compute with the sizes of tensors, or move values and leave them as they are.
_ON_SHAPES = (
    "And", "Cast", "ConstantOfShape", "Div", "Expand", "Gather", "GreaterOrEqual", "Less", "Not", "Range", "Reshape",
    "Shape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip


@dataclass(frozen=True)
class Emulation:
    """A precision to emulate; as it stands, plain float32.

    A node is called after the module that it belongs to: ``stages.0.downsample.conv1/Conv``.

    Attributes:
        precision: at ``fp16`` every result and the weights of ``layers`` are rounded, at ``int8`` the weights and the
            first input of ``layers``.
        layers: names of the nodes that compute in it.
        exact: names of nodes whose results are not rounded.
        peaks: for int8, how far the input of a module was found to reach; of a module that is not named, as far as it
            does here.
        weight_bits: for int8, how many bits the weights use.
        float16_sums: for fp16, whether convolutions and matrix products add up in float16 too, not in float32.
    """

    precision: str = "fp32"
    layers: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()
    peaks: Mapping[str, float] = field(default_factory=dict)
    weight_bits: int | None = None
    float16_sums: bool = False

    @property
    def modules(self) -> list[str]:
        """Names of the modules that compute in the precision."""
        return [_module(node) for node in self.layers]


def emulation_of(
    model: ModelProto,
    precision: str,
    exact: Collection[str] = (),
    peaks: Mapping[str, float] | None = None,
    weight_bits: int | None = None,
) -> Emulation:
    """The emulation of a file at a reduced precision: of the layers that the file has typed in it."""
    layers = frozenset(name for name, typed in compute_layers(model).items() if typed == precision)
    return Emulation(precision, layers, frozenset(exact), peaks or {}, weight_bits)


def exact(model: ModelProto, inputs: Inputs) -> Tensors:
    """Run a float32 graph in float64; arguments and errors as :func:`emulated`."""
    import torch

    return _in_pytorch(model, inputs, torch.float64, Emulation())


def emulated(model: ModelProto, inputs: Inputs, emulation: Emulation | None = None) -> Tensors:
    """Run a float32 graph in float32, rounded as a precision rounds.

    Args:
        model: a graph in float32.
        inputs: an array for each input.
        emulation: of a reduced precision; without it nothing is rounded.

    Yields:
        Every tensor with its name, in the order of the nodes; it is held no longer than nodes need it.

    Raises:
        StageFailed: the graph has an operator that ONNX's reference implementation cannot compute either.
    """
    import torch

    return _in_pytorch(model, inputs, torch.float32, emulation or Emulation())


def literal(model: ModelProto, inputs: Inputs) -> Tensors:
    """Run a graph at any precision in onnxruntime, one operator at a time; the graph has no subgraphs.

    Args:
        model: a graph.
        inputs: an array for each input.

    Yields:
        Every tensor with its name, in the order of the nodes; it is held no longer than nodes need it.

    Raises:
        StageFailed: onnxruntime cannot run an operator by itself.
        UnavailableError: onnx or onnxruntime is not installed.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return _walk(model, dict(inputs), lambda node, given: _run_alone(node, given, weights, model))


def graph_outputs(model: ModelProto, tensors: Iterable[tuple[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Run an executor to its end and keep the outputs of the graph, by name."""
    names = {value.name for value in model.graph.output}
    return {name: array for name, array in tensors if name in names}


def input_name(model: ModelProto) -> str:
    """The name of a graph's only input."""
    name: str = model.graph.input[0].name
    return name


def _walk(
    model: ModelProto, values: dict[str, T], compute: Callable[[NodeProto, dict[str, T]], list[T]]
) -> Iterator[tuple[str, T]]:
    """Every result of a graph's nodes with its name; a value is dropped when its last reader has run.

    Args:
        model: a graph.
        values: by name, inputs and whatever else ``compute`` wants to be given.
        compute: the results of a node from what it reads of ``values``.
    """
    uses = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        results = compute(node, {name: values[name] for name in node.input if name in values})
        for name, result in zip(node.output, results, strict=True):
            if uses[name]:
                values[name] = result
            yield name, result
        for name in node.input:
            uses[name] -= 1
            if not uses[name]:
                values.pop(name, None)


def _run_alone(
    node: NodeProto, given: dict[str, NDArray[Any]], weights: dict[str, Any], model: ModelProto
) -> list[NDArray[Any]]:
    onnx = require("onnx", extra="export", purpose="literal execution")
    ort = require("onnxruntime", extra="onnxruntime", purpose="literal execution")
    helper, fixed = onnx.helper, [weights[name] for name in dict.fromkeys(node.input) if name in weights]
    # Where the processor adds up in float16, onnxruntime does; a file is judged alike on every processor.
    summed = node.op_type in COMPUTE_OPERATORS and any(array.dtype == np.float16 for array in given.values())
    if summed:
        to_array, from_array = onnx.numpy_helper.to_array, onnx.numpy_helper.from_array
        given = {name: array.astype(np.float32) for name, array in given.items()}
        fixed = [from_array(to_array(tensor).astype(np.float32), tensor.name) for tensor in fixed]
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        fixed,
    )
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    try:
        session = ort.InferenceSession(single.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results: list[NDArray[Any]] = session.run(list(node.output), given)
    except Exception as error:
        raise StageFailed(f"node {node.name!r} cannot be executed by itself: {first_line(error)}") from error
    with np.errstate(over="ignore"):  # what is beyond float16 is infinite there
        return [one.astype(np.float16) for one in results] if summed else results


def _in_pytorch(model: ModelProto, inputs: Inputs, dtype: torch.dtype, emulation: Emulation) -> Tensors:
    import torch

    onnx = require("onnx", extra="export", purpose="reading ONNX files")
    plain = _operators()
    summed = plain | _float16_operators() if emulation.float16_sums else plain

    def compute(node: NodeProto, values: dict[str, Tensor]) -> list[Tensor]:
        given = [values[name] for name in node.input if name]
        rounded = emulation.precision == "fp16" and node.name not in emulation.exact
        operators = summed if rounded else plain
        with torch.inference_mode():
            if node.name in emulation.layers:
                given = _reduced(given, emulation, node.name)
            result = None
            floating = all(tensor.is_floating_point() for tensor in given)
            if node.op_type in operators and floating and len(node.output) == 1:
                attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
                result = operators[node.op_type](given, attributes)
            results = _by_reference(node, given, model, dtype) if result is None else [result]
            return [one.half().to(dtype) if rounded and one.is_floating_point() else one for one in results]

    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values = {name: _as(dtype, array.copy()) for name, array in {**weights, **inputs}.items()}
    return ((name, tensor.numpy()) for name, tensor in _walk(model, values, compute))


def by_reference(model: ModelProto) -> list[str]:
    """Names of a graph's operators whose arithmetic is ONNX's reference implementation's, in :func:`exact` too."""
    own = {*_operators(), *_ON_SHAPES, "Constant"}
    return sorted({node.op_type for node in model.graph.node} - own)


def _as(dtype: torch.dtype, array: NDArray[Any]) -> Tensor:
    """Numbers of any precision in one; whole numbers and truth values as they are."""
    import torch

    tensor = torch.from_numpy(np.array(array, order="C"))  # a copy: PyTorch takes no steps backwards
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _by_reference(node: NodeProto, given: list[Tensor], model: ModelProto, dtype: torch.dtype) -> list[Tensor]:
    reference = require("onnx.reference", extra="export", purpose="reading ONNX files")
    names = [name for name in node.input if name]
    arrays = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    try:
        results = reference.ReferenceEvaluator(node, opsets=opsets).run(None, arrays)
    except Exception as error:
        raise StageFailed(
            f"node {node.name!r} is {node.op_type}, which ONNX's reference implementation cannot compute: "
            f"{first_line(error)}"
        ) from error
    return [_as(dtype, np.asarray(result)) for result in results]


def _reduced(given: list[Tensor], emulation: Emulation, node: str) -> list[Tensor]:
    """What a layer at a precision is given: input, weight (O, I, k, k) or (O, I), and perhaps a bias."""
    import torch

    if emulation.precision == "fp16":
        return [given[0], *(tensor.half().to(tensor.dtype) for tensor in given[1:])]
    weight, peak = given[1], emulation.peaks.get(_module(node))
    reach = given[0].abs().max() if peak is None else torch.tensor(peak, dtype=weight.dtype)
    return [quantized(given[0], reach), _quantized_weight(weight, emulation.weight_bits), *given[2:]]


def _operators() -> dict[str, Operator]:
    import torch
    from torch.nn import functional as F

    return {
        "Add": lambda x, _: x[0] + x[1],
        "BatchNormalization": lambda x, a: F.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=a.get("epsilon", 1e-5)),
        "Concat": lambda x, a: torch.cat(x, dim=a["axis"]),
        "Conv": _conv,
        "Flatten": lambda x, a: x[0].reshape(math.prod(x[0].shape[: a.get("axis", 1)]), -1),
        "Gelu": lambda x, a: F.gelu(x[0], approximate=a.get("approximate", b"none").decode()),
        "Gemm": _gemm,
        "GlobalAveragePool": lambda x, _: x[0].mean(tuple(range(2, x[0].ndim)), keepdim=True),
        "Identity": lambda x, _: x[0],
        "MatMul": lambda x, _: x[0] @ x[1],
        "Mul": lambda x, _: x[0] * x[1],
        "Relu": lambda x, _: x[0].relu(),
        "Resize": _resize,
        "Sigmoid": lambda x, _: x[0].sigmoid(),
    }


def _float16_operators() -> dict[str, Operator]:
    """Return those that add up in float16."""
    return {"Conv": convolve, "Gemm": functools.partial(_gemm, multiply=multiply), "MatMul": multiply}


def _gemm(
    given: list[Tensor],
    attributes: dict[str, Any],
    multiply: Operator = lambda x, _: x[0] @ x[1],
) -> Tensor | None:
    if attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        return None
    product = multiply([given[0], given[1].T if attributes.get("transB") else given[1]], {})
    return product + given[2] if product is not None and len(given) > 2 else product


def _resize(given: list[Tensor], attributes: dict[str, Any]) -> Tensor | None:
    """To twice and more the size: positions of samples are those of their centres, or the nearest below."""
    from torch.nn import functional as F

    x, scales = given[0], [float(scale) for scale in given[1][2:]]
    how = tuple(attributes.get(name, b"") for name in ("mode", "coordinate_transformation_mode", "nearest_mode"))
    if how[:2] == (b"linear", b"half_pixel"):
        return F.interpolate(x, scale_factor=scales, mode="bilinear", align_corners=False)
    if how == (b"nearest", b"asymmetric", b"floor"):
        return F.interpolate(x, scale_factor=scales, mode="nearest")
    return None


def _conv(given: list[Tensor], attributes: dict[str, Any]) -> Tensor | None:
    from torch.nn import functional as F

    x, weight, bias = given[0], given[1], given[2] if len(given) > 2 else None
    groups, dilations = attributes.get("group", 1), attributes.get("dilations", [1, 1])
    strides, pads = attributes.get("strides", [1, 1]), attributes.get("pads", [0, 0, 0, 0])
    if weight.ndim != 4 or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    square = weight.shape[-1] == weight.shape[-2]
    even = len({*pads}) == 1 and len({*dilations}) == 1 and pads[0] == dilations[0] * (weight.shape[-1] // 2)
    if groups == len(weight) == x.shape[1] and square and even and {*strides} == {1} and weight.shape[-1] % 2:
        return depthwise(x, weight, bias, pads[0], dilations[0])
    top, left, bottom, right = pads
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, weight, bias, strides, 0, dilations, groups)


def round_layers_(model: nn.Module, emulation: Emulation) -> None:
    """Make a network answer as it does at a reduced precision, in place.

    In float16 every module rounds its output and the layers round their weights; in int8 the layers round their
    weights, one scale for each output channel, and their inputs, one scale each. Arithmetic stays in float32, and what
    lies between modules (additions, pools) is not rounded.

    Args:
        model: the network, in the form that was traced.
        emulation: with the peaks of every layer where it is of int8.
    """
    import torch

    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in emulation.modules}
    without = [name for name, layer in layers.items() if not isinstance(getattr(layer, "weight", None), torch.Tensor)]
    if emulation.precision == "int8" and without:
        raise StageFailed(
            f"precision int8: the convolution in module {without[0]!r} has no weight of that module's own; expected a "
            "torch.nn.Conv2d, or `precisions` without int8"
        )
    with torch.no_grad():
        if emulation.precision == "fp16":
            unrounded = {modules[_module(node)] for node in emulation.exact if "/" in node and _module(node) in modules}
            _round_to_float16(model, layers, unrounded)
        else:
            _round_to_int8(layers, emulation.peaks, emulation.weight_bits)


def _module(node: str) -> str:
    """The module that a node belongs to: ``stages.0.downsample.conv1/Conv`` -> ``stages.0.downsample.conv1``."""
    return node.rpartition("/")[0]


def input_peaks(model: nn.Module, layers: Collection[str], batches: Iterable[NDArray[np.float32]]) -> dict[str, float]:
    """The largest absolute value in the input of each layer named, over batches of images (n, C, H, W)."""
    import torch

    peaks = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def look(_module: nn.Module, given: tuple[Tensor]) -> None:
            peaks[name] = max(peaks[name], float(given[0].abs().max()))

        return look

    watching = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        with torch.inference_mode():
            for batch in batches:
                model(torch.from_numpy(batch))
    finally:
        for hook in watching:
            hook.remove()
    return peaks


def _round_to_float16(model: nn.Module, layers: dict[str, nn.Module], unrounded: set[nn.Module]) -> None:
    for layer in layers.values():
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(parameter.half())
    for module in model.modules():
        computes = next(module.parameters(recurse=False), None) is not None
        rounded = module in layers.values() if computes else module not in unrounded
        if next(module.children(), None) is None and rounded:
            module.register_forward_hook(_round_output)


def _round_output(_module: nn.Module, _given: object, output: Any) -> Any:
    """Round a tensor to float16; what is none has parts that other modules round."""
    import torch

    is_number = isinstance(output, torch.Tensor) and output.is_floating_point()
    return output.half().float() if is_number else output


def _round_to_int8(layers: dict[str, nn.Module], peaks: Mapping[str, float], weight_bits: int | None) -> None:
    import torch

    for name, layer in layers.items():
        weight: Tensor = layer.get_parameter("weight")
        weight.copy_(_quantized_weight(weight, weight_bits))
        peak = torch.tensor(peaks[name])
        layer.register_forward_pre_hook(lambda _module, given, peak=peak: (quantized(given[0], peak),))


def _quantized_weight(weight: Tensor, bits: int | None) -> Tensor:
    """A weight (O, I, k, k) or (O, I) with one scale for each output channel."""
    return quantized(weight, weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.ndim - 1)), bits)


def quantized(values: Tensor, peak: Tensor, bits: int | None = 8) -> Tensor:
    """Values rounded to the steps of a symmetric integer scale that reaches up to ``peak``, one or one for each row."""
    import torch

    steps = _STEPS[bits or FULL_WEIGHT_BITS]
    scale = torch.clamp(peak / steps, min=torch.finfo(torch.float32).tiny)
    return (values / scale).round().clamp(-steps - 1, steps) * scale
