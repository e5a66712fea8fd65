"""What an ONNX graph answers taken by its word: one operator at a time, each result rounded to its type.

An engine that runs the whole graph may fuse operators, and may skip the rounding to float16 between two of them even
with its optimisations off (onnxruntime removes the casts that it puts around float16 operators, the rounding with
them). Here each operator is a graph of its own.

A reduced precision emulated in PyTorch: layers rounded as the precision rounds them, arithmetic in float32.

It owes nothing to the graph at that precision or to the tool that made it, so its error against float64 is a measure
for both. What lies between layers (additions, pools) is not rounded.

An ONNX graph executed by PyTorch, every tensor of it kept: in float64 the truth that inner tensors are judged by.

It knows the operators that a DMFormer in float32 consists of, and owes nothing to the engines. What computes with
shapes and positions, where height and width are open, is left to ONNX's reference implementation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer._optional import require
from dmformer.errors import StageFailed, first_line
from dmformer.graph import onnx_file
from dmformer.verify.reference import depthwise

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import torch
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto
    from torch import Tensor, nn

    Operator = Callable[[list[Tensor], dict[str, Any]], Tensor]
    from collections.abc import Sequence
    from pathlib import Path


# Steps of a symmetric int8 scale on each side of zero, by the bits that it uses, as onnxruntime's quantiser has them.
_STEPS: dict[int | None, int] = {8: 127, 7: 64}


def round_layers_(
    model: nn.Module,
    precision: str,
    layers: Collection[str],
    peaks: Mapping[str, float],
    exact: Collection[str] = (),
    weight_bits: int | None = None,
) -> None:
    """Make a network answer as it does at ``fp16`` or ``int8``, in place.

    Args:
        model: any.
        precision: in float16 every module rounds its output and the layers their weights; in int8 the layers round
            their weights, one scale for each output channel, and their inputs, one scale each.
        layers: names of the convolutions and linear layers that compute in it.
        peaks: for int8, how far the input of each layer reaches.
        exact: names of modules that stay in float32.
        weight_bits: for int8, how many bits the weights use.
    """
    import torch

    modules = dict(model.named_modules())
    with torch.no_grad():
        if precision == "fp16":
            _round_to_float16(model, {name: modules[name] for name in layers}, {modules[name] for name in exact})
        else:
            _round_to_int8({name: modules[name] for name in layers}, peaks, weight_bits)


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


def _round_to_float16(model: nn.Module, layers: dict[str, nn.Module], exact: set[nn.Module]) -> None:
    for layer in layers.values():
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(parameter.half())
    for module in model.modules():
        computes = next(module.parameters(recurse=False), None) is not None
        rounded = module in layers.values() if computes else module not in exact
        if next(module.children(), None) is None and rounded:
            module.register_forward_hook(lambda _module, _inputs, output: output.half().float())


def _round_to_int8(layers: dict[str, nn.Module], peaks: Mapping[str, float], weight_bits: int | None) -> None:
    import torch

    for name, layer in layers.items():
        weight: Tensor = layer.get_parameter("weight")
        largest = weight.flatten(1).abs().amax(1)[:, None, None, None]  # (O, I, k, k)
        weight.copy_(quantized(weight, largest, weight_bits))
        peak = torch.tensor(peaks[name])
        layer.register_forward_pre_hook(lambda _module, given, peak=peak: (quantized(given[0], peak),))


def quantized(values: Tensor, peak: Tensor, bits: int | None = 8) -> Tensor:
    """Values rounded to the steps of a symmetric integer scale that reaches up to ``peak``, one or one for each row."""
    import torch

    steps = _STEPS[bits]
    scale = torch.clamp(peak / steps, min=torch.finfo(torch.float32).tiny)
    return (values / scale).round().clamp(-steps - 1, steps) * scale


# Of which a tensor's size makes others.
_ON_SHAPES = (
    "And", "Cast", "ConstantOfShape", "Div", "Expand", "Gather", "GreaterOrEqual", "Less", "Not", "Range", "Reshape",
    "Shape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip


@dataclass(frozen=True)
class Emulation:
    """A precision to emulate.

    Attributes:
        precision: at ``fp16`` every result and the weights of ``layers`` are rounded, at ``int8`` the weights and the
            first input of ``layers``.
        layers: names of the nodes that compute in it.
        exact: names of nodes whose results are not rounded.
        peaks: for int8, how far the input of a node was found to reach; for others, as far as it does here.
        weight_bits: for int8, how many bits the weights use.
    """

    precision: str
    layers: frozenset[str]
    exact: frozenset[str] = frozenset()
    peaks: Mapping[str, float] = field(default_factory=dict)
    weight_bits: int | None = None


def interpret(
    model: ModelProto, inputs: Mapping[str, NDArray[Any]], *, double: bool, emulation: Emulation | None = None
) -> dict[str, NDArray[Any]]:
    """Every tensor of a graph by its name; as :func:`walk`, and all of them kept."""
    return dict(walk(model, inputs, double=double, emulation=emulation))


def walk(
    model: ModelProto, inputs: Mapping[str, NDArray[Any]], *, double: bool, emulation: Emulation | None = None
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every tensor of a graph with its name, in the order of its nodes, and held no longer than nodes need it.

    Args:
        model: a graph in float32.
        inputs: an array for each input.
        double: compute in float64, or else in float32.
        emulation: of a reduced precision.

    Raises:
        StageFailed: the graph has an operator that no DMFormer has.
    """
    import torch

    onnx = require("onnx", extra="export", purpose="reading ONNX files")
    dtype = torch.float64 if double else torch.float32
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values = {name: _as(dtype, array.copy()) for name, array in {**weights, **inputs}.items()}
    operators = _operators()
    uses = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        with torch.inference_mode():
            if node.op_type not in operators and node.op_type not in _ON_SHAPES:
                raise StageFailed(
                    f"node {node.name!r} is {node.op_type}; expected one of {', '.join((*operators, *_ON_SHAPES))}"
                )
            given = [values[name] for name in node.input if name]
            if emulation is not None and node.name in emulation.layers:
                given = _reduced(given, emulation, node.name)
            if node.op_type in operators and all(tensor.is_floating_point() for tensor in given):
                attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
                result = operators[node.op_type](given, attributes)
            else:
                result = _as(dtype, _by_reference(node, given, model))
            rounded = emulation is not None and emulation.precision == "fp16" and node.name not in emulation.exact
            if rounded and result.is_floating_point():
                result = result.half().to(dtype)
        (made,) = node.output
        values[made] = result
        yield made, result.numpy()
        for name in node.input:
            uses[name] -= 1
            if not uses[name]:
                values.pop(name, None)


def _as(dtype: torch.dtype, array: NDArray[Any]) -> Tensor:
    """Numbers of any precision in one; whole numbers and truths as they are."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _by_reference(node: NodeProto, given: list[Tensor], model: ModelProto) -> NDArray[Any]:
    reference = require("onnx.reference", extra="export", purpose="reading ONNX files")
    evaluator = reference.ReferenceEvaluator(node, opsets={opset.domain: opset.version for opset in model.opset_import})
    names = [name for name in node.input if name]
    arrays = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
    (result,) = evaluator.run(None, arrays)
    return np.asarray(result)


def _reduced(given: list[Tensor], emulation: Emulation, node: str) -> list[Tensor]:
    """What a layer at a precision is given: input, weight (O, I, k, k) or (O, I), and perhaps a bias."""
    import torch

    if emulation.precision == "fp16":
        return [given[0], *(tensor.half().to(tensor.dtype) for tensor in given[1:])]
    weight, peak = given[1], emulation.peaks.get(node)
    peaks = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.ndim - 1))
    reach = given[0].abs().max() if peak is None else torch.tensor(peak, dtype=weight.dtype)
    return [quantized(given[0], reach), quantized(weight, peaks, emulation.weight_bits), *given[2:]]


def _operators() -> dict[str, Operator]:
    import torch
    from torch.nn import functional as F

    return {
        "Add": lambda x, _: x[0] + x[1],
        "BatchNormalization": lambda x, a: F.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=a.get("epsilon", 1e-5)),
        "Concat": lambda x, a: torch.cat(x, dim=a["axis"]),
        "Conv": _conv,
        "Flatten": lambda x, a: x[0].flatten(a.get("axis", 1)),
        "Gelu": lambda x, a: F.gelu(x[0], approximate=a.get("approximate", b"none").decode()),
        "Gemm": lambda x, a: x[0] @ (x[1].T if a.get("transB") else x[1]) + x[2],
        "GlobalAveragePool": lambda x, _: x[0].mean((2, 3), keepdim=True),
        "Identity": lambda x, _: x[0],
        "MatMul": lambda x, _: x[0] @ x[1],
        "Mul": lambda x, _: x[0] * x[1],
        "Relu": lambda x, _: x[0].relu(),
        "Resize": _resize,
        "Sigmoid": lambda x, _: x[0].sigmoid(),
    }


def _resize(given: list[Tensor], attributes: dict[str, Any]) -> Tensor:
    """To twice and more the size: positions of samples are those of their centres, or the nearest below."""
    from torch.nn import functional as F

    x, scales = given[0], [float(scale) for scale in given[1][2:]]
    how = tuple(attributes.get(name, b"") for name in ("mode", "coordinate_transformation_mode", "nearest_mode"))
    if how[:2] == (b"linear", b"half_pixel"):
        return F.interpolate(x, scale_factor=scales, mode="bilinear", align_corners=False)
    if how == (b"nearest", b"asymmetric", b"floor"):
        return F.interpolate(x, scale_factor=scales, mode="nearest")
    raise StageFailed(
        f"a Resize by {b', '.join(how).decode()}; expected linear, half_pixel or nearest, asymmetric, floor"
    )


def _conv(given: list[Tensor], attributes: dict[str, Any]) -> Tensor:
    from torch.nn import functional as F

    x, weight, bias = given[0], given[1], given[2] if len(given) > 2 else None
    groups, dilations = attributes.get("group", 1), attributes.get("dilations", [1, 1])
    strides, pads = attributes.get("strides", [1, 1]), attributes.get("pads", [0, 0, 0, 0])
    even = len({*pads}) == 1 and len({*dilations}) == 1 and pads[0] == dilations[0] * (weight.shape[-1] // 2)
    if groups == len(weight) == x.shape[1] and even and {*strides} == {1}:
        return depthwise(x, weight, bias, pads[0], dilations[0])
    top, left, bottom, right = pads
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, weight, bias, strides, 0, dilations, groups)


_ERRORS_ONLY = 3


def literal_answers(
    path: Path, inputs: NDArray[np.float32], keep: Collection[str] = (), rows: Sequence[int] | None = None
) -> dict[str, NDArray[np.float32]]:
    """The graph's outputs for all rows at once, and inner tensors; the graph has one input, and no subgraphs.

    Args:
        path: an ONNX file.
        inputs: (N, C, H, W).
        keep: inner tensors to give as well.
        rows: which rows of inner maps (N, C, H, W) to give; of other tensors, and otherwise, all.

    Raises:
        UnavailableError: onnx or onnxruntime is not installed.
    """
    model = onnx_file.read(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = [value.name for value in model.graph.output]
    uses = Counter(name for node in model.graph.node for name in node.input) + Counter(outputs)
    values: dict[str, NDArray[Any]] = {model.graph.input[0].name: inputs}
    kept: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        made = _run(node, {name: values[name] for name in node.input if name in values}, weights, model)
        for name, array in made.items():
            if name in keep:
                cut = rows is not None and array.ndim == 4 and len(array) == len(inputs)
                kept[name] = array[np.asarray(rows)] if cut else array
        values.update(made)
        for name in node.input:
            uses[name] -= 1
            if not uses[name]:
                values.pop(name, None)
    return kept | {name: values[name] for name in outputs}


def _run(
    node: NodeProto, given: dict[str, NDArray[Any]], weights: dict[str, Any], model: ModelProto
) -> dict[str, NDArray[Any]]:
    onnx = require("onnx", extra="export", purpose="literal execution")
    ort = require("onnxruntime", extra="onnxruntime", purpose="literal execution")
    helper = onnx.helper
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [weights[name] for name in dict.fromkeys(node.input) if name in weights],
    )
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    names = list(node.output)
    try:
        session = ort.InferenceSession(single.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, given), strict=True))
    except Exception as error:
        raise StageFailed(f"node {node.name!r} cannot be executed by itself: {first_line(error)}") from error
