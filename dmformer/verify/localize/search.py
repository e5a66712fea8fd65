"""Where two executions of a graph part: a binary search over cuts of the graph.

A cut after a node has as its tensors all that later nodes read of what came before. Where all of them agree, whatever
is wrong comes later; where one does not, it came before. So the number of runs grows with the logarithm of the number
of nodes, and each run shows a handful of inner tensors only: with all of them shown, an engine would fuse nothing, and
a fault in a fused kernel would be gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dmformer.errors import StageFailed
from dmformer.verify.compare import largest_difference, largest_value

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import Any

    from numpy.typing import NDArray
    from onnx import ModelProto


# Of the network's largest value: what is smaller counts as this much where an error is measured against the value.
_LEAST_PEAK = 1e-4


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
    def made(self) -> tuple[str, ...]:
        """The tensors of the bad cut that the nodes between the two make."""
        return tuple(name for name in self.bad.tensors if any(name in node.outputs for node in self.nodes))


def graph_nodes(model: ModelProto) -> list[Node]:
    """The nodes of an ONNX graph, in its order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        Node(node.name, node.op_type, tuple(x for x in node.input if x and x not in weights), tuple(node.output))
        for node in model.graph.node
    ]


def cuts(nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], known: Collection[str]) -> list[Cut]:
    """Every cut of a graph in topological order whose tensors are all known, from its inputs to its outputs.

    Args:
        nodes: in topological order.
        inputs: the graph's.
        outputs: the graph's.
        known: tensors that both executions can show.
    """
    last_use = {name: index for index, node in enumerate(nodes) for name in node.inputs}
    last_use |= dict.fromkeys(outputs, len(nodes))
    found = [Cut(-1, tuple(inputs))]
    live = set(inputs)
    for index, node in enumerate(nodes):
        live |= set(node.outputs)
        live = {name for name in live if last_use.get(name, -1) > index}
        if live <= {*known, *inputs}:
            found.append(Cut(index, tuple(sorted(live - set(inputs)))))
    return found


def find_parting(
    nodes: Sequence[Node],
    found: Sequence[Cut],
    expected: Mapping[str, NDArray[Any]],
    limits: Mapping[str, float],
    show: Callable[[tuple[str, ...]], Mapping[str, NDArray[Any]]],
) -> Parting | None:
    """The first cut on which a candidate differs from what is expected; ``None`` where it does not at the last.

    Args:
        nodes: of the graph, in topological order.
        found: its cuts, the first one taken to agree.
        expected: every tensor of the cuts.
        limits: the largest difference allowed in each.
        show: runs the candidate, and gives the tensors named.
    """
    runs = most = 0

    def differing(cut: Cut) -> list[tuple[str, float]]:
        nonlocal runs, most
        runs, most = runs + 1, max(most, len(cut.tensors))
        shown = show(cut.tensors)
        apart = [(name, largest_difference(shown[name], expected[name])) for name in cut.tensors]
        return [(name, distance) for name, distance in apart if not distance <= limits[name]]

    good, bad = 0, len(found) - 1
    worst = differing(found[bad])
    if not worst:
        return None
    while bad - good > 1:
        middle = (good + bad) // 2
        if apart := differing(found[middle]):
            bad, worst = middle, apart
        else:
            good = middle
    name, distance = min(worst, key=lambda pair: next(i for i, node in enumerate(nodes) if pair[0] in node.outputs))
    return _parting(nodes, found[good], found[bad], (name, distance, limits[name]), runs, most)


def parting_at_once(
    nodes: Sequence[Node],
    found: Sequence[Cut],
    expected: Mapping[str, NDArray[Any]],
    limits: Mapping[str, float],
    shown: Mapping[str, NDArray[Any]],
) -> Parting | None:
    """The same from one run that showed every tensor; ``None`` where all agree."""
    beyond = first_beyond(nodes, shown, expected, limits)
    if beyond is None:
        return None
    node, name, distance = beyond
    index = nodes.index(node)
    good = max((cut for cut in found if cut.position < index), key=lambda cut: cut.position)
    bad = min((cut for cut in found if cut.position >= index), key=lambda cut: cut.position)
    return _parting(nodes, good, bad, (name, distance, limits[name]), 1, len(shown))


def _parting(
    nodes: Sequence[Node], good: Cut, bad: Cut, apart: tuple[str, float, float], runs: int, most_shown: int
) -> Parting:
    tensor, distance, limit = apart
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


def first_beyond(
    nodes: Sequence[Node],
    shown: Mapping[str, NDArray[Any]],
    expected: Mapping[str, NDArray[Any]],
    limits: Mapping[str, float],
) -> tuple[Node, str, float] | None:
    """The first tensor beyond its limit where all can be shown at once: its node, its name, its largest difference."""
    for node in nodes:
        for name in node.outputs:
            if name in shown and not (distance := largest_difference(shown[name], expected[name])) <= limits[name]:
                return node, name, distance
    return None


def nearest_to_limit(apart: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """The tensor whose difference is nearest to its limit, or furthest beyond it."""
    return max(apart, key=lambda name: apart[name] / limits[name] if np.isfinite(apart[name]) else np.inf)


def tensor_limits(
    truth: Mapping[str, NDArray[Any]], emulated: Mapping[str, NDArray[Any]], factor: float
) -> dict[str, float]:
    """The largest difference allowed in each tensor, from its error in an emulation.

    Args:
        truth: in float64.
        emulated: at the candidate's precision.
        factor: how many times the emulation's error is allowed.

    Raises:
        StageFailed: the truth itself is not finite.
    """
    peaks = {name: largest_value(exact) for name, exact in truth.items()}
    errors = {name: largest_difference(emulated[name], exact) for name, exact in truth.items()}
    return error_limits(peaks, errors, factor)


def error_limits(peaks: Mapping[str, float], errors: Mapping[str, float], factor: float) -> dict[str, float]:
    """The same from the largest value of each tensor and the largest error in it.

    Raises:
        StageFailed: a tensor is not finite.
    """
    limits = {}
    least = _LEAST_PEAK * max((peak for peak in peaks.values() if np.isfinite(peak)), default=0.0)
    for name, peak in peaks.items():
        if not np.isfinite(peak):
            raise StageFailed(f"tensor {name!r} is NaN or infinite in PyTorch itself; expected numbers")
        floor = float(np.finfo(np.float32).eps) * max(peak, least)
        limits[name] = factor * max(errors[name] if np.isfinite(errors[name]) else 0.0, floor)
    return limits
