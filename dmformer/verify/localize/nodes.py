"""Nodes of a graph: where two executions part, what is different about a node, and which must stay in float32.

The search is a binary one over cuts of the graph. A cut after a node has as its tensors all that later nodes read of
what came before. Where all of them agree, whatever is wrong comes later; where one does not, it came before. So the
number of runs grows with the logarithm of the number of nodes, and each run shows a handful of inner tensors only: with
all of them shown, an engine would fuse nothing, and a fault in a fused kernel would be gone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dmformer._optional import require
from dmformer.graph import onnx_file
from dmformer.graph.onnx_file import to_float16
from dmformer.verify.compare import TENSOR_FACTORS, largest_difference, tensor_limits
from dmformer.verify.executors import emulated, emulation_of, exact, input_name, literal
from dmformer.verify.report import Island

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

_MOST_ROUNDS = 32  # in which an island grows
_ISLAND_FILE = "fp16-island.onnx"


class Node(NamedTuple):
    """A node of a graph; inputs are tensors, weights left out."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Cut(NamedTuple):
    """A cut after the node at ``position``, and the tensors that cross it; -1 is the graph's input."""

    position: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Parting:
    """Where two executions part.

    Attributes:
        good: the last cut on which they agree.
        bad: the first on which they do not.
        nodes: between the two, in the graph's order; mostly one.
        tensor: the first that differs.
        max_abs: by how much at most; ``None`` where it is NaN or infinite.
        limit: what was allowed.
        runs: how often the candidate ran.
        most_shown: the most inner tensors that one run showed.
    """

    good: Cut
    bad: Cut
    nodes: tuple[Node, ...]
    tensor: str
    max_abs: float | None
    limit: float
    runs: int
    most_shown: int

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors of the bad cut that the nodes between the two compute."""
        return tuple(name for name in self.bad.tensors if any(name in node.outputs for node in self.nodes))


def graph_nodes(model: ModelProto) -> list[Node]:
    """The nodes of an ONNX graph, in its order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        Node(node.name, node.op_type, tuple(x for x in node.input if x and x not in weights), tuple(node.output))
        for node in model.graph.node
    ]


def cuts(nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], visible: Collection[str]) -> list[Cut]:
    """Every cut of a graph whose tensors are all visible, from its inputs to its outputs.

    Args:
        nodes: in topological order.
        inputs: the graph's.
        outputs: the graph's.
        visible: tensors that both executions can show.
    """
    last_use = {name: index for index, node in enumerate(nodes) for name in node.inputs}
    last_use |= dict.fromkeys(outputs, len(nodes))
    found = [Cut(-1, tuple(inputs))]
    live = set(inputs)
    for index, node in enumerate(nodes):
        live |= set(node.outputs)
        live = {name for name in live if last_use.get(name, -1) > index}
        if live <= {*visible, *inputs}:
            found.append(Cut(index, tuple(sorted(live - set(inputs)))))
    return found


def find_parting(
    nodes: Sequence[Node],
    cuts: Sequence[Cut],
    expected: Mapping[str, NDArray[Any]],
    limits: Mapping[str, float],
    show: Callable[[tuple[str, ...]], Mapping[str, NDArray[Any]]],
) -> Parting | None:
    """The first cut on which a candidate differs from what is expected; ``None`` where it does not at the last.

    Args:
        nodes: of the graph, in topological order.
        cuts: of the graph, in order; the first one is taken to agree.
        expected: every tensor of the cuts.
        limits: the largest difference allowed in each.
        show: runs the candidate, and gives the tensors named.
    """
    runs = most = 0

    def differing(cut: Cut) -> list[tuple[str, float]]:
        nonlocal runs, most
        runs, most = runs + 1, max(most, len(cut.tensors))
        shown = show(cut.tensors)
        distances = [(name, largest_difference(shown[name], expected[name])) for name in cut.tensors]
        return [(name, distance) for name, distance in distances if not distance <= limits[name]]

    good, bad = 0, len(cuts) - 1
    wrong = differing(cuts[bad])
    if not wrong:
        return None
    while bad - good > 1:
        middle = (good + bad) // 2
        if wrong_there := differing(cuts[middle]):
            bad, wrong = middle, wrong_there
        else:
            good = middle
    name, distance = min(wrong, key=lambda pair: next(i for i, node in enumerate(nodes) if pair[0] in node.outputs))
    return _parting(nodes, cuts[good], cuts[bad], (name, distance, limits[name]), runs, most)


def parting_at_once(
    nodes: Sequence[Node],
    cuts: Sequence[Cut],
    expected: Mapping[str, NDArray[Any]],
    limits: Mapping[str, float],
    shown: Mapping[str, NDArray[Any]],
) -> Parting | None:
    """The first tensor beyond its limit, from one run that showed every tensor; ``None`` where all agree."""
    for index, node in enumerate(nodes):
        for name in node.outputs:
            if name in shown and not (distance := largest_difference(shown[name], expected[name])) <= limits[name]:
                good = max((cut for cut in cuts if cut.position < index), key=lambda cut: cut.position)
                bad = min((cut for cut in cuts if cut.position >= index), key=lambda cut: cut.position)
                return _parting(nodes, good, bad, (name, distance, limits[name]), 1, len(shown))
    return None


def _parting(
    nodes: Sequence[Node], good: Cut, bad: Cut, first: tuple[str, float, float], runs: int, most_shown: int
) -> Parting:
    tensor, distance, limit = first
    return Parting(
        good=good,
        bad=bad,
        nodes=tuple(nodes[good.position + 1 : bad.position + 1]),
        tensor=tensor,
        max_abs=distance if np.isfinite(distance) else None,
        limit=limit,
        runs=runs,
        most_shown=most_shown,
    )


def find_island(model: ModelProto, inputs: NDArray[np.float32], kept: Collection[str], folder: Path) -> Island:
    """Keep nodes in float32, one place after another, until the float16 graph is right in every tensor.

    A float16 island too few is an infinity or a sum that has lost its digits, a float32 island too many costs time.

    Args:
        model: the float32 graph.
        inputs: images, (N, C, H, W).
        kept: nodes that stay in float32 already; the island has those that have to be added to them.
        folder: where the rebuilt file is written.
    """
    nodes, images = graph_nodes(model), {input_name(model): inputs}
    outputs = [value.name for value in model.graph.output]
    truth = images | dict(exact(model, images))
    in_float32, path = list(kept), folder / _ISLAND_FILE
    for _ in range(_MOST_ROUNDS):
        copied = type(model)()
        copied.CopyFrom(model)
        float16 = to_float16(copied, in_float32, path)
        shown = {name: array for name, array in literal(float16, images) if name in truth}
        emulation = emulation_of(float16, "fp16", in_float32)
        limits = tensor_limits(truth, images | dict(emulated(model, images, emulation)), TENSOR_FACTORS["fp16"])
        # Every tensor is shown at once: a literal execution fuses nothing anyway.
        all_cuts = cuts(nodes, list(images), outputs, shown)
        parting = find_parting(nodes, all_cuts, truth, limits, functools.partial(_select, shown))
        if parting is None:
            break
        # What leaves a node in float32 is cast to float16 for those that read it, under the same name.
        readers = [node for node in nodes if parting.tensor in node.inputs]
        more = _names_without(parting.nodes, in_float32) or _names_without(readers, in_float32)
        if not more:
            break
        in_float32 += more
    largest = max(float(np.abs(shown[name] - truth[name]).max()) for name in outputs)
    return Island(
        nodes=tuple(name for name in in_float32 if name not in kept),
        passed=parting is None,
        max_abs=largest if np.isfinite(largest) else None,
        limit=max(limits[name] for name in outputs),
        file=_ISLAND_FILE,
    )


def _select(shown: Mapping[str, NDArray[Any]], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    return {name: shown[name] for name in names}


def _names_without(nodes: Sequence[Node], names: Collection[str]) -> list[str]:
    return [node.name for node in nodes if node.name not in names]


def differences(wrong: ModelProto, right: ModelProto, names: Sequence[str]) -> list[str]:
    """Say what is different about some nodes in two ONNX files, a sentence for each difference.

    Args:
        wrong: the file under suspicion, at any precision.
        right: the float32 graph that it was made from.
        names: of the nodes.
    """
    theirs = {node.name: node for node in wrong.graph.node}
    ours = {node.name: node for node in right.graph.node}
    found = []
    for name in names:
        if name not in theirs:
            found.append(f"{name} is missing")
        else:
            found += [f"{name}: {what}" for what in _node_differences(wrong, theirs[name], right, ours[name])]
    return found


def _node_differences(wrong: ModelProto, theirs: NodeProto, right: ModelProto, ours: NodeProto) -> list[str]:
    if theirs.op_type != ours.op_type:
        return [f"is {theirs.op_type}; expected {ours.op_type}"]
    onnx = require("onnx", extra="export", purpose="reading ONNX files")
    have, want = ({one.name: onnx.helper.get_attribute_value(one) for one in node.attribute} for node in (theirs, ours))
    found = [
        f"{key} is {have.get(key)}; expected {want.get(key)}"
        for key in sorted({*have, *want})
        if have.get(key) != want.get(key)
    ]
    their_weights, our_weights = _Weights(wrong), _Weights(right)
    for position, name in enumerate(ours.input):
        expected = our_weights.value(name)
        given = theirs.input[position] if position < len(theirs.input) else None
        values = None if given is None else their_weights.value(given)
        if expected is None:
            if given is not None and their_weights.source(given) != name:
                found.append(f"reads {their_weights.source(given)}; expected {name}")
        elif given is None or values is None:
            found.append(f"has no weights in the place of {name}")
        else:
            found += _weight_differences(name, values, expected, their_weights.step(given))
    return found


def _weight_differences(name: str, have: NDArray[Any], want: NDArray[Any], step: float) -> list[str]:
    if have.shape != want.shape:
        return [f"{name} has shape {have.shape}; expected {want.shape}"]
    if not np.isfinite(have).all():
        return [f"{name} holds {int(have.size - np.isfinite(have).sum())} values that are NaN or infinite"]
    distance = np.abs(have.astype(np.float64) - want)
    # float16 has 11 bits; an int8 value is half a step off at most.
    tolerance = step or (2.0**-11 * np.abs(want) + 2.0**-24 if have.dtype == np.float16 else 0.0)
    count = int((distance > tolerance).sum())
    return [f"{name}: {count} of {have.size} values differ, by up to {distance.max():.3g}"] if count else []


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
