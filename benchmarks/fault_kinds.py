"""The kinds of fault that ``benchmarks/faults.py`` seeds, on the demonstration checkpoint.

A fault spoils the files of a finished export, whose hashes are made to fit, or what runs them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dmformer.bundle.manifest import MANIFEST
from dmformer.files import hash_file
from dmformer.runtimes.onnxruntime import OnnxRuntime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

FP32 = "onnx/fp32/model.onnx"
BLOCK = "stages.2.blocks.0"
Inject = Callable[[Path], list[Any]]


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        kind: weights, graph, engine, precision, preprocessing or batching.
        name: what is wrong.
        module: where it sits; ``None`` where it sits in no node.
        inject: spoils a bundle, or gives patches under which the bundle is verified, or both.
        runtime: in which it shows.
    """

    kind: str
    name: str
    module: str | None
    inject: Inject
    runtime: str = "onnxruntime"


@dataclass(frozen=True)
class Outcome:
    """What became of a fault: the stages that failed, and the modules that were named."""

    fault: Fault
    failed: tuple[str, ...]
    modules: tuple[str, ...] = ()
    said: tuple[str, ...] = field(default=(), compare=False)

    @property
    def caught(self) -> bool:
        """Whether a check failed."""
        return bool(self.failed)

    @property
    def located(self) -> bool:
        """Whether the module that was named is the one that was spoilt; true where there is none."""
        return self.fault.module is None or self.modules == (self.fault.module,)


def adopt(bundle: Path, name: str) -> None:
    """Make the manifest's entry of a file fit the file."""
    path = bundle / MANIFEST
    content = json.loads(path.read_bytes())
    sha256, size = hash_file(bundle / name)
    for entry in [*content["files"], *(file for made in content["artifacts"] for file in made["files"])]:
        if entry["path"] == name:
            entry.update(sha256=sha256, bytes=size)
    path.write_text(json.dumps(content), encoding="utf-8")


# Weights


def weight(name: str, module: str, spoil: Callable[[NDArray[Any]], NDArray[Any]], what: str) -> Fault:
    """A fault in one weight tensor of the ONNX file."""
    return Fault("weights", what, module, lambda bundle: spoil_weights(bundle, {name: spoil}))


def spoil_weights(bundle: Path, changes: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]]) -> list[Any]:
    """Change weight tensors of the float32 ONNX file."""

    def edit(model: ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name in changes:
                array = numpy_helper.to_array(tensor)
                changed = np.ascontiguousarray(changes[tensor.name](array.copy())).astype(array.dtype)
                assert changed.shape == array.shape
                assert not np.array_equal(changed, array)
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))

    return edit_graph(bundle, edit)


def edit_graph(bundle: Path, edit: Callable[[ModelProto], None]) -> list[Any]:
    """Change the float32 ONNX file."""
    model = onnx.load(bundle / FP32)
    before = model.SerializeToString(deterministic=True)
    edit(model)
    assert model.SerializeToString(deterministic=True) != before
    onnx.save(model, bundle / FP32)
    adopt(bundle, FP32)
    return []


def zero_channel(array: NDArray[Any]) -> NDArray[Any]:
    """The first output channel is lost."""
    array[0] = 0
    return array


def swap_filters(array: NDArray[Any]) -> NDArray[Any]:
    """Two output channels change places."""
    array[[0, 1]] = array[[1, 0]]
    return array


def one_nan(array: NDArray[Any]) -> NDArray[Any]:
    """One value is no number."""
    array.flat[3] = np.nan
    return array


def bfloat16(array: NDArray[Any]) -> NDArray[Any]:
    """The lower half of each value is cut off."""
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)


def flip_bit(array: NDArray[Any]) -> NDArray[Any]:
    """One bit of one exponent, as a worn flash cell flips it."""
    array.view(np.uint32).flat[int(np.abs(array).argmax())] ^= 1 << 24
    return array


WEIGHTS = (
    weight(f"{BLOCK}.dma.branches.1.weight", f"{BLOCK}.dma.branches.1", lambda a: 1.01 * a, "1 % of a kernel"),
    weight("stages.1.blocks.0.dma.expand.weight", "stages.1.blocks.0.dma.expand", zero_channel, "a lost channel"),
    weight("stages.3.blocks.0.ffn.fc1.bias", "stages.3.blocks.0.ffn.fc1", lambda a: -a, "a bias of the wrong sign"),
    weight("stages.0.blocks.0.dma.mix.weight", "stages.0.blocks.0.dma.mix", swap_filters, "two swapped filters"),
    weight(
        "stages.0.blocks.0.dma.branches.2.weight",
        "stages.0.blocks.0.dma.branches.2",
        lambda a: a.transpose(0, 1, 3, 2),
        "a transposed kernel",
    ),
    weight(
        "stages.1.blocks.0.dma.branches.0.weight",
        "stages.1.blocks.0.dma.branches.0",
        lambda a: a[:, :, ::-1, ::-1],
        "a mirrored kernel",
    ),
    weight("stages.1.blocks.0.ffn.fc1.weight", "stages.1.blocks.0.ffn.fc1", one_nan, "a NaN"),
    weight(f"{BLOCK}.ffn.fc2.weight", f"{BLOCK}.ffn.fc2", bfloat16, "a layer in bfloat16"),
    weight("stages.2.downsample.conv.weight", "stages.2.downsample.conv", flip_bit, "one flipped bit"),
    weight(
        "stages.3.blocks.0.ffn.fc2.weight", "stages.3.blocks.0.ffn.fc2", lambda a: a / 2, "a layer scale of one half"
    ),
    weight(
        "stages.0.downsample.conv1.weight",
        "stages.0.downsample.conv1",
        lambda a: a[:, ::-1] if a.shape[1] > 1 else a[:, :, ::-1],
        "the stem's input flipped",
    ),
    weight("head.weight", "head", swap_filters, "two swapped classes"),
    weight(f"{BLOCK}.dma.gate.fc2.weight", f"{BLOCK}.dma.gate.fc2", lambda a: 0.9 * a, "a gate that opens less"),
)


# Graph


def graph(name: str, module: str, edit: Callable[[NodeProto, ModelProto], None], what: str) -> Fault:
    """A fault in one node of the ONNX file."""

    def inject(bundle: Path) -> list[Any]:
        def at_node(model: ModelProto) -> None:
            (node,) = [node for node in model.graph.node if node.name == name]
            edit(node, model)

        return edit_graph(bundle, at_node)

    return Fault("graph", what, module, inject)


def becomes(operator: str, **attributes: Any) -> Callable[[NodeProto, ModelProto], None]:
    """Another operator in the node's place."""

    def edit(node: NodeProto, _: ModelProto) -> None:
        node.op_type = operator
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        if operator == "Identity":
            del node.input[1:]

    return edit


def attribute(**values: Any) -> Callable[[NodeProto, ModelProto], None]:
    """Other attributes."""

    def edit(node: NodeProto, _: ModelProto) -> None:
        kept = [one for one in node.attribute if one.name not in values]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(key, value) for key, value in values.items())])

    return edit


def reads(position: int, tensor: str) -> Callable[[NodeProto, ModelProto], None]:
    """Another tensor at an input."""

    def edit(node: NodeProto, _: ModelProto) -> None:
        node.input[position] = tensor

    return edit


def exchanged(node: NodeProto, _: ModelProto) -> None:
    """Minuend and subtrahend: an addition that became a subtraction."""
    node.op_type = "Sub"


def drop_operand(keep: int) -> Callable[[NodeProto, ModelProto], None]:
    """One operand alone goes on."""

    def edit(node: NodeProto, _: ModelProto) -> None:
        kept = node.input[keep]
        node.op_type = "Identity"
        del node.input[:]
        node.input.append(kept)

    return edit


GRAPH = (
    graph(f"{BLOCK}.dma/Relu", f"{BLOCK}.dma", becomes("Identity"), "a lost ReLU"),
    graph("stages.1.blocks.0.ffn.act/Gelu", "stages.1.blocks.0.ffn.act", attribute(approximate="tanh"), "GELU by tanh"),
    graph(
        "stages.0.blocks.0.dma.branches.1/Conv",
        "stages.0.blocks.0.dma.branches.1",
        attribute(dilations=[1, 1], pads=[2, 2, 2, 2]),
        "a dilation of 1",
    ),
    graph(
        "stages.0.blocks.0.dma.branches.0/Conv",
        "stages.0.blocks.0.dma.branches.0",
        attribute(pads=[0, 0, 2, 2]),
        "padding on one side",
    ),
    graph(
        f"{BLOCK}.dma.gate/Sigmoid", f"{BLOCK}.dma.gate", becomes("HardSigmoid", alpha=0.2, beta=0.5), "a hard sigmoid"
    ),
    graph(f"{BLOCK}.dma/Mul", f"{BLOCK}.dma", drop_operand(1), "a gate that is left out"),
    graph(
        "stages.1.blocks.0.dma.gate/GlobalAveragePool",
        "stages.1.blocks.0.dma.gate",
        becomes("GlobalMaxPool"),
        "maximum in the place of average",
    ),
    graph("stages.1.blocks.0.dma/Add", "stages.1.blocks.0.dma", exchanged, "a branch subtracted"),
    graph(f"{BLOCK}/Add", BLOCK, drop_operand(1), "a lost residual"),
    graph(
        "stages.2.blocks.1/Add_1",
        "stages.2.blocks.1",
        reads(0, "/stages.2/blocks/blocks.0/Add_1_output_0"),
        "a residual from the wrong place",
    ),
    graph(
        "stages.1.downsample.conv/Conv",
        "stages.1.downsample.conv",
        attribute(dilations=[2, 2], pads=[1, 1, 0, 0]),
        "a wider downsampling",
    ),
    graph(
        f"{BLOCK}.ffn.fc2/Conv",
        f"{BLOCK}.ffn.fc2",
        reads(1, "stages.2.blocks.1.ffn.fc2.weight"),
        "a neighbour's weights",
    ),
)


# Engine


def spoil_ir(bundle: Path) -> list[Any]:
    """One weight in OpenVINO's own file."""
    path = bundle / "openvino/fp32/model.bin"
    data = np.fromfile(path, np.float32)
    wanted = next(t for t in onnx.load(bundle / FP32).graph.initializer if t.name == f"{BLOCK}.ffn.fc1.weight")
    first = numpy_helper.to_array(wanted).ravel()[:16]
    (start,) = [i for i in np.flatnonzero(data == first[0]) if np.array_equal(data[i : i + 16], first)]
    data[start : start + 16] *= 1.5
    data.tofile(path)
    adopt(bundle, "openvino/fp32/model.bin")
    return []


def approximate_gelu(_: Path) -> list[Any]:
    """An engine whose GELU kernel is another function than the file asks for."""
    load = OnnxRuntime.load

    def wrong(runtime: OnnxRuntime) -> None:
        model = onnx.load(runtime.path)
        for node in model.graph.node:
            if node.op_type == "Gelu":
                attribute(approximate="tanh")(node, model)
        with tempfile.TemporaryDirectory() as folder:
            checked, runtime.path, runtime.files = (runtime.path, runtime.files), Path(folder) / "model.onnx", ()
            onnx.save(model, runtime.path)
            load(runtime)
            runtime.path, runtime.files = checked

    return [mock.patch.object(OnnxRuntime, "load", wrong)]


ENGINE = (
    Fault("engine", "a weight in OpenVINO's own file", f"{BLOCK}.ffn.fc1", spoil_ir, "openvino"),
    Fault("engine", "a kernel that computes another GELU", "stages.0.blocks.0.ffn.act", approximate_gelu),
)


NODES = (*WEIGHTS, *GRAPH, *ENGINE)
