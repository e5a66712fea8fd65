"""ONNX -> ncnn, by the program ``pnnx``.

pnnx numbers tensors and leaves sizes out. Both are put back: a layer whose weights are those of one ONNX node, byte for
byte, gives what that node gives, and a layer without weights what the one node gives that reads the same tensors.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dmformer.errors import StageFailed, UnavailableError, UsageError
from dmformer.export.formats import Converted, run_converter, versions
from dmformer.runtimes.inspector import module_path
from dmformer.runtimes.ncnn import (
    FEATURE_MASK,
    FLOAT16,
    IN_FLOAT32,
    NcnnLayer,
    Weights,
    locate_weights,
    read_param,
    write_param,
)
from dmformer.runtimes.onnx_weights import Field, fields, read_varint
from dmformer.task import STRIDES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from dmformer.export.formats import ConversionSource
    from dmformer.export.options import EngineOptions

_OPEN_SIZES = (2 * STRIDES[-1], 2 * STRIDES[-1]), (3 * STRIDES[-1], 4 * STRIDES[-1])  # pnnx compares two
_ACTIVATION = 9  # the parameter of a compute layer into which an activation is fused
# Field numbers of onnx.proto3.
_GRAPH, _NODE, _INITIALIZER, _INPUT, _OUTPUT = 7, 1, 5, 11, 12
_READS, _GIVES = 1, 2  # of NodeProto
_RAW_DATA, _TENSOR_NAME = 9, 8  # of TensorProto


@dataclass(frozen=True)
class _Node:
    reads: tuple[str, ...]  # weights left out
    weights: tuple[bytes, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class _Graph:
    """What naming needs of an ONNX file, read without the package ``onnx``, which a device has not."""

    nodes: tuple[_Node, ...]
    inputs: dict[str, tuple[int | None, ...]]
    outputs: tuple[str, ...]


def check_pnnx(engine: EngineOptions) -> None:
    """Make sure that the program ``pnnx`` is there.

    Raises:
        UnavailableError: it is not.
    """
    del engine
    _program()


def _program() -> str:
    """Return the path of the program, in its package or on the path; the package itself would import PyTorch."""
    spec = find_spec("pnnx")
    places = [os.fspath(Path(folder) / "pnnx") for folder in (spec and spec.submodule_search_locations) or ()]
    for place in (*places, "pnnx"):
        if found := shutil.which(place):
            return found
    raise UnavailableError(
        "conversion to ncnn needs the program 'pnnx', which is not installed; run: pip install --no-deps pnnx "
        "(it stands alone, though its package asks for PyTorch)"
    )


def to_ncnn(source: ConversionSource, folder: Path) -> Converted:
    """Write ``model.param`` and ``model.bin``, with weights in float16 at that precision.

    ncnn computes in float16 by its options; pnnx cannot read a graph that is typed so, and starts from float32.

    Raises:
        StageFailed: pnnx refused the graph, or what it wrote cannot be read.
        UnavailableError: pnnx is not installed.
        UsageError: there is no float32 ONNX file.
    """
    program = _program()
    onnx = source.onnx if source.precision == "fp32" else source.float32
    if onnx is None:
        raise UsageError(
            f"format ncnn at {source.precision} without the ONNX file in float32; expected a bundle with that as well: "
            "dmformer export --format onnx --precision fp32"
        )
    graph = _read_graph(onnx.read_bytes())
    (shape,) = graph.inputs.values()
    sides = [shape[2:]] if None not in shape[2:] else list(_OPEN_SIZES)
    sizes = [f"[1,{shape[1]},{height},{width}]" for height, width in sides]
    with tempfile.TemporaryDirectory(prefix="dmformer-") as scratch:
        shutil.copyfile(onnx, Path(scratch) / "model.onnx")  # it writes beside what it reads
        shapes = [f"inputshape{number or ''}={size}" for number, size in zip(("", 2), sizes, strict=False)]
        wanted = Path(scratch) / "model.ncnn.bin"
        run_converter("ncnn", [program, "model.onnx", *shapes, "fp16=0"], scratch, wanted)
        try:
            layers = read_param((Path(scratch) / "model.ncnn.param").read_text("ascii"))
            data = wanted.read_bytes()
            located = locate_weights(layers, data)
        except (OSError, ValueError) as error:
            raise StageFailed(f"conversion to ncnn failed: pnnx wrote what cannot be read: {error}") from error
    names = _names(layers, {weights.layer.name: data[weights.first : weights.last] for weights in located}, graph)
    named = [_renamed(layer, names, shape) for layer in layers]
    if source.precision == "fp16":
        named = [_kept(layer, source.kept_in_fp32) for layer in named]
        in_float32 = {layer.name for layer in named if layer.number(FEATURE_MASK)}
        data = _in_half(data, [weights for weights in located if weights.layer.name not in in_float32])
    path = folder / "model.param"
    path.write_text(write_param(named), encoding="ascii")
    path.with_suffix(".bin").write_bytes(data)
    return Converted((path, path.with_suffix(".bin")), versions("pnnx") if find_spec("pnnx") else {}, engine_batch=1)


def _read_graph(data: bytes) -> _Graph:
    (graph,) = (part for part in fields(data, 0, len(data)) if part.number == _GRAPH)

    def parts(message: Field, number: int) -> Iterator[Field]:
        return (part for part in fields(data, message.first, message.last) if part.number == number)

    def texts(message: Field, number: int) -> list[str]:
        return [data[part.first : part.last].decode() for part in parts(message, number)]

    def shape(value: Field) -> tuple[int | None, ...]:
        (kind,) = parts(value, 2)
        (tensor,) = parts(kind, 1)
        return tuple(
            read_varint(data, size.first + 1, most=10)[0] if data[size.first : size.first + 1] == b"\x08" else None
            for sizes in parts(tensor, 2)
            for size in parts(sizes, 1)
        )

    initializers = {
        texts(tensor, _TENSOR_NAME)[0]: b"".join(data[raw.first : raw.last] for raw in parts(tensor, _RAW_DATA))
        for tensor in parts(graph, _INITIALIZER)
    }
    nodes = []
    for node in parts(graph, _NODE):
        reads = texts(node, _READS)
        weights = tuple(initializers[name] for name in reads if name in initializers)
        reads = [name for name in reads if name and name not in initializers]
        nodes.append(_Node(tuple(reads), weights, tuple(texts(node, _GIVES))))
    inputs = {texts(value, 1)[0]: shape(value) for value in parts(graph, _INPUT)}
    return _Graph(tuple(nodes), inputs, tuple(name for value in parts(graph, _OUTPUT) for name in texts(value, 1)))


def _names(layers: Sequence[NcnnLayer], weights: Mapping[str, bytes], graph: _Graph) -> dict[str, str]:
    """Return the ONNX file's names of tensors, by pnnx's; of vectors, which have another shape there, none."""
    readers: defaultdict[tuple[str, ...], list[_Node]] = defaultdict(list)  # without weights
    by_weights: defaultdict[bytes, list[_Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.weights:
            by_weights[node.weights[0]].append(node)
        else:
            readers[tuple(sorted(node.reads))].append(node)
    inputs = iter(graph.inputs)
    same: dict[str, str] = {}  # the tensor of the ONNX file that each stands for
    vectors: set[str] = set()
    for layer in layers:
        if layer.operator == "Input":
            same[layer.outputs[0]] = next(inputs)
        elif layer.operator == "Split":
            same |= {name: same[layer.inputs[0]] for name in layer.outputs if layer.inputs[0] in same}
        else:
            read = tuple(sorted(same.get(name, "") for name in layer.inputs))
            found = by_weights[weights[layer.name]] if layer.name in weights else readers[read]
            if len(found) == 1 and len(found[0].gives) == 1:
                same[layer.outputs[0]] = _after(found[0], readers, fused=layer.number(_ACTIVATION) > 0)
        if _gives_vector(layer, vectors):
            vectors.update(layer.outputs)
    outputs = dict(zip(sorted((name for name in _last(layers)), key=_place), graph.outputs, strict=True))
    inner = {ours: name for ours, name in same.items() if ours not in vectors}
    shown = {name: ours for ours, name in reversed(inner.items())}  # of copies, the first
    return {ours: name for name, ours in shown.items() if name not in graph.outputs} | outputs


def _after(node: _Node, readers: Mapping[tuple[str, ...], Sequence[_Node]], *, fused: bool) -> str:
    """Return what a node gives, or the activation after it that is fused into its layer."""
    if not fused:
        return node.gives[0]
    following = readers.get(node.gives, ())
    return following[0].gives[0] if len(following) == 1 else node.gives[0]


def _gives_vector(layer: NcnnLayer, vectors: set[str]) -> bool:
    """Whether a layer gives a vector, where ONNX has a map of one by one: after a global mean."""
    is_mean = layer.operator == "Pooling" and layer.number(4) == 1
    return is_mean or (bool(layer.inputs) and vectors.issuperset(layer.inputs))


def _last(layers: Sequence[NcnnLayer]) -> list[str]:
    read = {name for layer in layers for name in layer.inputs}
    return [name for layer in layers for name in layer.outputs if name not in read]


def _place(name: str) -> int:
    """Return the place of an output, which pnnx calls ``out0``."""
    number = re.search(r"\d+$", name)
    return int(number[0]) if number else 0


def _renamed(layer: NcnnLayer, names: Mapping[str, str], shape: Sequence[int | None]) -> NcnnLayer:
    """Return a layer with other names; an input with its width, height and channels, as :class:`NcnnRuntime` reads."""
    layer = replace(
        layer,
        inputs=tuple(names.get(name, name) for name in layer.inputs),
        outputs=tuple(names.get(name, name) for name in layer.outputs),
    )
    if layer.operator != "Input":
        return layer
    sizes = {at: str(size) for at, size in enumerate((shape[3], shape[2], shape[1])) if size is not None}
    return replace(layer, parameters=sizes)


def _in_half(data: bytes, located: Sequence[Weights]) -> bytes:
    """Return the values of a ``.bin`` with some weights in float16, rounded to the nearest; pnnx would cut them off."""
    parts, at = [], 0
    for weights in located:
        values = np.frombuffer(data[weights.first : weights.last], np.float32).astype(np.float16).tobytes()
        parts += [data[at : weights.first - len(FLOAT16)], FLOAT16, values, bytes(-len(values) % len(FLOAT16))]
        at = weights.last
    return b"".join([*parts, data[at:]])


def _kept(layer: NcnnLayer, kept: Collection[str]) -> NcnnLayer:
    """Return a layer that stays in float32 where what it gives is of a node or of a block that does."""
    if not layer.outputs[0].startswith("/"):
        return layer
    module, operator = module_path(layer.outputs[0]), layer.outputs[0].rpartition("/")[2].rpartition("_output_")[0]
    if not any(name in (module, f"{module}/{operator}") or module.startswith(f"{name}.") for name in kept):
        return layer
    return replace(layer, parameters=layer.parameters | {FEATURE_MASK: str(IN_FLOAT32)})
