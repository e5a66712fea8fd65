"""What an ONNX graph answers taken by its word: one operator at a time, each result rounded to its type.

An engine that runs the whole graph may fuse operators, and may skip the rounding to float16 between two of them even
with its optimisations off (onnxruntime removes the casts that it puts around float16 operators, the rounding with
them). Here each operator is a graph of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer._optional import require
from dmformer.errors import StageFailed, first_line
from dmformer.export import onnx_file

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

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
