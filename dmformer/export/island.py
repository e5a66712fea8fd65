"""Which nodes of a float16 graph have to stay in float32: proposed, rebuilt, and checked again, until it holds."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.export.fp16 import convert
from dmformer.export.literal import literal_answers
from dmformer.export.precision import compute_layers
from dmformer.verify.bisect import cuts, find_parting, graph_nodes, tensor_limits
from dmformer.verify.compare import TENSOR_FACTORS
from dmformer.verify.findings import Island
from dmformer.verify.interpret import interpret

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto

    from dmformer.bundle.golden import Golden

_MOST_ROUNDS = 32
ISLAND = "fp16-island.onnx"


def find_island(model: ModelProto, golden: Golden, known: Collection[str], folder: Path) -> Island:
    """Keep nodes in float32, one place after another, until the float16 graph answers as PyTorch does.

    Args:
        model: the float32 graph.
        golden: images and PyTorch's answers.
        known: nodes that stay in float32 already; the island has those that have to be added to them.
        folder: where the rebuilt file is written.
    """
    nodes = graph_nodes(model)
    start, outputs = model.graph.input[0].name, [value.name for value in model.graph.output]
    inputs = {start: golden.inputs}
    truth = inputs | interpret(model, inputs, double=True)
    kept, path = list(known), folder / ISLAND
    for _ in range(_MOST_ROUNDS):
        made = convert(_copy(model), kept, path)
        shown = {name for node in made.graph.node for name in node.output} & set(truth)
        values = literal_answers(path, golden.inputs, shown)
        layers = frozenset(name for name, typed in compute_layers(made).items() if typed == "fp16")
        emulated = interpret(model, inputs, double=False, precision="fp16", layers=layers, exact=frozenset(kept))
        limits = tensor_limits(truth, inputs | emulated, TENSOR_FACTORS["fp16"])
        show = functools.partial(_given, values)
        parting = find_parting(nodes, cuts(nodes, [start], outputs, shown), truth, limits, show)
        more = [] if parting is None else [node.name for node in parting.nodes if node.name not in kept]
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


def _given(values: dict[str, NDArray[Any]], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """No run is needed: a literal execution shows every tensor at once, and fuses nothing anyway."""
    return {name: values[name] for name in names}


def _copy(model: ModelProto) -> ModelProto:
    copied = type(model)()
    copied.CopyFrom(model)
    return copied
