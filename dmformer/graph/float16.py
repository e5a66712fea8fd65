"""float32 ONNX -> float16 inside, float32 input and output, with onnxruntime's converter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmformer._optional import require
from dmformer.graph import onnx_file
from dmformer.graph.onnx_file import metadata_at

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from onnx import ModelProto


_ADDING_UP = ("GlobalAveragePool", "ReduceMean", "ReduceSum")


def convert(model: ModelProto, kept: Collection[str], destination: Path) -> ModelProto:
    """Write a float32 graph, which is changed, in float16, but for the nodes named and those that add up a map."""
    float16 = require("onnxruntime.transformers.float16", extra="onnxruntime", purpose="precision fp16")
    metadata = metadata_at("fp16", model)
    converted: ModelProto = float16.convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *_ADDING_UP],
        node_block_list=list(kept),
    )
    graph = require("onnxruntime.transformers.onnx_model", extra="onnxruntime", purpose="precision fp16")
    edited = graph.OnnxModel(converted)
    # Between two nodes that stay in float32 the converter puts a cast to float16 and one back.
    edited.remove_cascaded_cast_nodes()
    edited.remove_useless_cast_nodes()
    # It appends its casts at the end; the specification wants nodes in the order of their use.
    edited.topological_sort(is_deterministic=True)
    onnx_file.write(converted, destination, metadata)
    return converted
