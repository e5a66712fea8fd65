"""What is different about a node in two ONNX files, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer._optional import require
from dmformer.graph import onnx_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto


def differences(wrong: ModelProto, right: ModelProto, names: Sequence[str]) -> list[str]:
    """A sentence for each difference of the nodes named.

    Args:
        wrong: the file under suspicion, at any precision.
        right: the float32 graph that it was made from.
        names: of nodes.
    """
    theirs = {node.name: node for node in wrong.graph.node}
    ours = {node.name: node for node in right.graph.node}
    found = []
    for name in names:
        if name not in theirs:
            found.append(f"{name} is missing")
        else:
            found += [f"{name}: {what}" for what in _of_node(wrong, theirs[name], right, ours[name])]
    return found


def _of_node(wrong: ModelProto, theirs: NodeProto, right: ModelProto, ours: NodeProto) -> list[str]:
    if theirs.op_type != ours.op_type:
        return [f"is {theirs.op_type}; expected {ours.op_type}"]
    onnx = require("onnx", extra="export", purpose="reading ONNX files")
    have = {one.name: onnx.helper.get_attribute_value(one) for one in theirs.attribute}
    want = {one.name: onnx.helper.get_attribute_value(one) for one in ours.attribute}
    found = [
        f"{key} is {have.get(key)}; expected {want.get(key)}"
        for key in sorted({*have, *want})
        if have.get(key) != want.get(key)
    ]
    their_weights, our_weights = _Weights(wrong), _Weights(right)
    for position, name in enumerate(ours.input):
        expected = our_weights.value(name)
        given = theirs.input[position] if position < len(theirs.input) else None
        if expected is None:
            if given is not None and their_weights.source(given) != name:
                found.append(f"reads {their_weights.source(given)}; expected {name}")
        elif given is None or their_weights.value(given) is None:
            found.append(f"has no weights in the place of {name}")
        else:
            found += _of_weights(name, their_weights.value(given), expected, their_weights.step(given))
    return found


def _of_weights(name: str, have: NDArray[Any] | None, want: NDArray[Any], step: float) -> list[str]:
    assert have is not None
    if have.shape != want.shape:
        return [f"{name} has shape {have.shape}; expected {want.shape}"]
    if not np.isfinite(have).all():
        return [f"{name} holds {int(have.size - np.isfinite(have).sum())} values that are NaN or infinite"]
    apart = np.abs(have.astype(np.float64) - want)
    # float16 has 11 bits; an int8 value is half a step off at most.
    tolerance = step or (2.0**-11 * np.abs(want) + 2.0**-24 if have.dtype == np.float16 else 0.0)
    count = int((apart > tolerance).sum())
    return [f"{name}: {count} of {have.size} values differ, by up to {apart.max():.3g}"] if count else []


class _Weights:
    """Weights of a graph, through the nodes that dequantise or cast them."""

    def __init__(self, model: ModelProto) -> None:
        self.arrays = onnx_file.weights(model)
        self.producers = {name: node for node in model.graph.node for name in node.output}

    def value(self, name: str) -> NDArray[Any] | None:
        """The values of a tensor that is a weight, in float32 where it was int8; ``None`` for any other."""
        if name in self.arrays:
            return self.arrays[name]
        node = self.producers.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.arrays:
            return None
        quantized, scale = self.arrays[node.input[0]], self.arrays[node.input[1]]
        shape = (-1, *[1] * (quantized.ndim - 1))  # one scale for each output channel
        zero = self.arrays[node.input[2]].reshape(shape) if len(node.input) > 2 else 0
        values: NDArray[Any] = (quantized.astype(np.float32) - zero) * scale.reshape(shape)
        return values

    def step(self, name: str) -> float:
        """How far an int8 weight may be from its float32 value; 0 for any other."""
        node = self.producers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return 0.0
        return 0.51 * float(np.abs(self.arrays[node.input[1]]).max())

    def source(self, name: str) -> str:
        """The tensor that a node reads, behind casts and quantisation."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Cast", "DequantizeLinear", "QuantizeLinear"):
            name = node.input[0]
            node = self.producers.get(name)
        return name
