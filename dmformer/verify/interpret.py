"""An ONNX graph executed by PyTorch, every tensor of it kept: in float64 the truth that inner tensors are judged by.

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
from dmformer.errors import StageFailed
from dmformer.verify.emulate import quantized
from dmformer.verify.reference import depthwise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto
    from torch import Tensor

    Operator = Callable[[list[Tensor], dict[str, Any]], Tensor]


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
