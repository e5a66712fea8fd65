"""Which nodes of a float16 graph have to stay in float32: proposed, rebuilt, and checked again, until it holds.

A float16 island too few is an infinity or a sum that has lost its digits, a float32 island too many costs time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.graph.float16 import convert
from dmformer.graph.onnx_file import compute_layers
from dmformer.verify.compare import TENSOR_FACTORS
from dmformer.verify.executors import Emulation, interpret, literal_answers
from dmformer.verify.localize.search import Node, cuts, find_parting, graph_nodes, tensor_limits
from dmformer.verify.report import Island

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto

_MOST_ROUNDS = 32
ISLAND = "fp16-island.onnx"


def find_island(model: ModelProto, inputs: NDArray[np.float32], known: Collection[str], folder: Path) -> Island:
    """Keep nodes in float32, one place after another, until the float16 graph is right in every tensor.

    Args:
        model: the float32 graph.
        inputs: images, (N, C, H, W).
        known: nodes that stay in float32 already; the island has those that have to be added to them.
        folder: where the rebuilt file is written.
    """
    nodes = graph_nodes(model)
    start, outputs = model.graph.input[0].name, [value.name for value in model.graph.output]
    given = {start: inputs}
    truth = given | interpret(model, given, double=True)
    kept, path = list(known), folder / ISLAND
    for _ in range(_MOST_ROUNDS):
        made = convert(_copy(model), kept, path)
        shown = {name for node in made.graph.node for name in node.output} & set(truth)
        values = literal_answers(path, inputs, shown)
        layers = frozenset(name for name, typed in compute_layers(made).items() if typed == "fp16")
        emulation = Emulation("fp16", layers, exact=frozenset(kept))
        emulated = interpret(model, given, double=False, emulation=emulation)
        limits = tensor_limits(truth, given | emulated, TENSOR_FACTORS["fp16"])
        show = functools.partial(_given, values)
        parting = find_parting(nodes, cuts(nodes, [start], outputs, shown), truth, limits, show)
        if parting is None:
            break
        # What leaves a node in float32 is cast to float16 for those that read it, under the same name.
        readers = [node for node in nodes if parting.tensor in node.inputs]
        more = _others(parting.nodes, kept) or _others(readers, kept)
        if not more:
            break
        kept += more
    apart = max(float(np.abs(values[name] - truth[name]).max()) for name in outputs)
    return Island(
        nodes=tuple(name for name in kept if name not in known),
        passed=parting is None,
        max_abs=apart if np.isfinite(apart) else None,
        limit=max(limits[name] for name in outputs),
        file=ISLAND,
    )


def _others(nodes: Sequence[Node], kept: Collection[str]) -> list[str]:
    return [node.name for node in nodes if node.name not in kept]


def _given(values: dict[str, NDArray[Any]], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """No run is needed: a literal execution shows every tensor at once, and fuses nothing anyway."""
    return {name: values[name] for name in names}


def _copy(model: ModelProto) -> ModelProto:
    copied = type(model)()
    copied.CopyFrom(model)
    return copied
