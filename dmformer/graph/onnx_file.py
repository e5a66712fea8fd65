"""ONNX files as this project writes them: deterministic bytes, our metadata, nothing of the machine that made them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmformer._optional import require

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray
    from onnx import ModelProto, TensorProto

COMPUTE_OPERATORS = ("Conv", "Gemm", "MatMul")
_ADDING_UP = ("GlobalAveragePool", "ReduceMean", "ReduceSum")


def read(path: Path) -> ModelProto:
    """Parse an ONNX file."""
    onnx = require("onnx", extra="export", purpose="export to ONNX")
    model: ModelProto = onnx.load(path)
    return model


def metadata(model: ModelProto) -> dict[str, str]:
    """What a model says of itself."""
    return {entry.key: entry.value for entry in model.metadata_props}


def weights(model: ModelProto) -> dict[str, NDArray[Any]]:
    """Every initializer by its name."""
    onnx = require("onnx", extra="export", purpose="reading ONNX files")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def write(model: ModelProto, path: Path, says: Mapping[str, str]) -> None:
    """Check the model against the ONNX specification and write it with this metadata, and no other.

    Exporters and simplifiers leave stack traces, file paths and logs in documentation strings and metadata. Constants
    become initializers, as weights are, so that every reader finds them in one place.
    """
    onnx = require("onnx", extra="export", purpose="export to ONNX")
    _constants_to_initializers(model)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    model.graph.doc_string = ""
    model.doc_string = ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted(says.items())))
    data = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(data, full_check=True)  # of a model it would make bytes of its own
    path.write_bytes(data)


def same_but_for_names(one: ModelProto, other: ModelProto) -> bool:
    """Whether two graphs compute the same in the same order, whatever nodes and weights are called."""
    if len(one.graph.node) != len(other.graph.node):
        return False
    ours, theirs = ({tensor.name: tensor for tensor in model.graph.initializer} for model in (one, other))
    equal: set[tuple[str, str]] = set()  # names of weights that were found equal

    def matches(name: str, counterpart: str) -> bool:
        if (name in ours) is not (counterpart in theirs):
            return False
        if name not in ours:
            return name == counterpart
        if (name, counterpart) not in equal and _content(ours[name]) != _content(theirs[counterpart]):
            return False
        equal.add((name, counterpart))
        return True

    ends = [[*model.graph.input, *model.graph.output] for model in (one, other)]
    return (
        ends[0] == ends[1]
        and _opsets(one) == _opsets(other)
        and all(
            (node.op_type, node.domain, node.attribute, node.output, len(node.input))
            == (twin.op_type, twin.domain, twin.attribute, twin.output, len(twin.input))
            and all(map(matches, node.input, twin.input))
            for node, twin in zip(one.graph.node, other.graph.node, strict=True)
        )
    )


def _opsets(model: ModelProto) -> set[tuple[str, int]]:
    """Of the domains that nodes are of."""
    used = {node.domain for node in model.graph.node}
    return {(opset.domain, opset.version) for opset in model.opset_import if opset.domain in used}


def _content(tensor: TensorProto) -> tuple[int, tuple[int, ...], bytes]:
    onnx = require("onnx", extra="export", purpose="reading ONNX files")
    return tensor.data_type, tuple(tensor.dims), onnx.numpy_helper.to_array(tensor).tobytes()


def _constants_to_initializers(model: ModelProto) -> None:
    constants = [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]
    for node in constants:
        tensor = node.attribute[0].t
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)


def element_types(model: ModelProto) -> dict[str, Any]:
    """The NumPy type of every tensor but the weights."""
    onnx = require("onnx", extra="export", purpose="reading ONNX files")
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def cut(
    model: ModelProto,
    given: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
    types: Mapping[str, Any] | None = None,
) -> ModelProto:
    """The part of a graph that makes some tensors out of others.

    Args:
        model: the whole graph.
        given: tensors that the part starts from, with values of their types; some may turn out not to be needed.
        outputs: tensors that it gives.
        types: NumPy types of these tensors, where they are known; otherwise inferred from a copy of the graph.
    """
    onnx = require("onnx", extra="export", purpose="reading ONNX files")
    helper, types = onnx.helper, types or element_types(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = _nodes_between(model, given, outputs)
    read = {name for node in nodes for name in node.input}
    starts = [name for name in (*given, *(value.name for value in model.graph.input)) if name in read]
    graph = helper.make_graph(
        nodes,
        "cut",
        [_value(name, types[name], given[name].ndim if name in given else 4) for name in dict.fromkeys(starts)],
        [_value(name, types[name], None) for name in outputs],
        [weights[name] for name in weights if name in read],
    )
    made: ModelProto = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return made


def _nodes_between(model: ModelProto, given: Collection[str], outputs: Sequence[str]) -> list[Any]:
    producers = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    wanted, needed = list(outputs), set()
    while wanted:
        name = wanted.pop()
        index = producers.get(name)
        if index is None or index in needed or (name in given and name not in outputs):
            continue
        needed.add(index)
        wanted.extend(model.graph.node[index].input)
    return [model.graph.node[index] for index in sorted(needed)]


def _value(name: str, dtype: Any, rank: int | None) -> Any:
    onnx = require("onnx", extra="export", purpose="reading ONNX files")
    shape = None if rank is None else [f"{name}_{axis}" for axis in range(rank)]
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(dtype), shape)


def metadata_at(precision: str, model: ModelProto) -> dict[str, str]:
    """What the file at a precision says of itself: what the float32 one says, and the precision."""
    return metadata(model) | {"dmformer.precision": precision}


def compute_layers(model: ModelProto) -> dict[str, str]:
    """The precision in which each compute layer of a graph is typed, by the name of its node."""
    onnx = require("onnx", extra="export", purpose="export to ONNX")
    producers = {name: node for node in model.graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}

    def precision_of(node: Any) -> str:
        producer = producers.get(node.input[0])
        if producer is not None and producer.op_type == "DequantizeLinear":
            return "int8"
        return "fp16" if types.get(node.input[1]) == onnx.TensorProto.FLOAT16 else "fp32"

    return {node.name: precision_of(node) for node in model.graph.node if node.op_type in COMPUTE_OPERATORS}


def typed_share(model: ModelProto, precision: str) -> float:
    """Share of a graph's compute layers that are typed in a precision, 0..1."""
    found = list(compute_layers(model).values())
    return found.count(precision) / len(found)


def to_float16(model: ModelProto, kept: Collection[str], destination: Path) -> ModelProto:
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
    write(converted, destination, metadata)
    return converted
