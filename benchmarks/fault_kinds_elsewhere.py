"""The kinds of fault that sit in no node of a graph (preprocessing, batching), and those of a precision's maker."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.fault_kinds import BLOCK, NODES, Fault, edit_graph
from dmformer.bundle.manifest import MANIFEST
from dmformer.data.preprocessing import Preprocessing
from dmformer.runtimes.onnxruntime import OnnxRuntime

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto

# Preprocessing


def manifest(**values: Any) -> Callable[[Path], list[Any]]:
    """Other preprocessing in the manifest than the network was trained with."""

    def inject(bundle: Path) -> list[Any]:
        path = bundle / MANIFEST
        content = json.loads(path.read_bytes())
        assert any(content["preprocessing"][key] != value for key, value in values.items())
        content["preprocessing"].update(values)
        path.write_text(json.dumps(content), encoding="utf-8")
        return []

    return inject


def of_256(_: Path) -> list[Any]:
    """A device that scales pixels by 256."""
    right = Preprocessing.normalize

    def wrong(self: Preprocessing, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        return ((right(self, pixels) * std + mean) * np.float32(255 / 256) - mean) / std

    return [mock.patch.object(Preprocessing, "normalize", wrong)]


def nearest(_: Path) -> list[Any]:
    """A device that resizes without antialiasing."""
    from PIL import Image

    resize = Image.Image.resize
    return [mock.patch.object(Image.Image, "resize", lambda self, size, _filter: resize(self, size, 0))]


PREPROCESSING = (
    Fault("preprocessing", "another resize filter", None, manifest(interpolation="bilinear")),
    Fault("preprocessing", "another crop", None, manifest(crop_fraction=0.8)),
    Fault("preprocessing", "another order of channels", None, manifest(channels="BGR")),
    Fault("preprocessing", "another mean", None, manifest(mean=[0.5, 0.5, 0.51])),
    Fault("preprocessing", "another deviation", None, manifest(std=[0.3, 0.3, 0.31])),
    Fault("preprocessing", "pixels over 256", None, of_256),
    Fault("preprocessing", "no antialiasing", None, nearest),
)


# Batching


def answering(change: Callable[[OnnxRuntime, NDArray[Any], NDArray[Any]], NDArray[Any]]) -> Callable[[Path], list[Any]]:
    """A runtime that spoils its answers, given itself, the inputs and the answers."""

    def inject(_: Path) -> list[Any]:
        infer = OnnxRuntime.infer

        def wrong(runtime: OnnxRuntime, inputs: Any) -> dict[str, NDArray[Any]]:
            (rows,) = inputs.values()
            return {name: change(runtime, rows, array.copy()) for name, array in infer(runtime, inputs).items()}

        return [mock.patch.object(OnnxRuntime, "infer", wrong)]

    return inject


def last_row_left_over(_: OnnxRuntime, rows: NDArray[Any], answers: NDArray[Any]) -> NDArray[Any]:
    """The last row of a batch is what was in the buffer."""
    if len(rows) > 1:
        answers[-1] = 0
    return answers


def remembers(runtime: OnnxRuntime, _: NDArray[Any], answers: NDArray[Any]) -> NDArray[Any]:
    """A buffer that is not cleared adds some of the last answer to the next."""
    before = getattr(runtime, "before", 0.0)
    runtime.before = float(answers.mean())  # type: ignore[attr-defined]
    return answers + np.float32(1e-3 * before)


def by_place(runtime: OnnxRuntime, rows: NDArray[Any], answers: NDArray[Any]) -> NDArray[Any]:
    """Answers that depend on the place in the batch, and not on the row."""
    if len(rows) < 5 or (rows == rows[:1]).all():
        return answers
    learnt = getattr(runtime, "learnt", None)
    runtime.learnt = answers if learnt is None else learnt  # type: ignore[attr-defined]
    return answers if learnt is None else learnt


def leaks(_: OnnxRuntime, rows: NDArray[Any], answers: NDArray[Any]) -> NDArray[Any]:
    """Rows of a batch see one another, as with a BatchNorm that was left in training."""
    return answers + np.float32(0.01) * answers.mean(0) if len(rows) > 1 else answers


def bake(bundle: Path) -> list[Any]:
    """A batch of one in the graph's input and output."""

    def edit(model: ModelProto) -> None:
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 1

    return edit_graph(bundle, edit)


BATCHING = (
    Fault("batching", "the first row for all", None, answering(lambda _, __, a: np.repeat(a[:1], len(a), axis=0))),
    Fault("batching", "rows out by one", None, answering(lambda _, __, a: np.roll(a, 1, axis=0))),
    Fault("batching", "a last row left over", None, answering(last_row_left_over)),
    Fault("batching", "the last answer in the next", None, answering(remembers)),
    Fault("batching", "answers by place", None, answering(by_place)),
    Fault("batching", "rows that see one another", None, answering(leaks)),
    Fault("batching", "a batch of one baked in", None, bake),
)


# Precision: the makers' own work is spoilt, before any artifact is made of it.


def precision(
    name: str, module: str, precision_name: str, edit: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]
) -> Fault:
    """A fault in what a precision's maker writes: weights, scales or zero points."""

    def inject(path: Path) -> list[Any]:
        model = onnx.load(path)
        arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
        changed = edit(arrays)
        assert changed.keys() <= arrays.keys()
        for tensor in model.graph.initializer:
            if tensor.name in changed:
                value = np.asarray(changed[tensor.name], arrays[tensor.name].dtype)
                assert not np.array_equal(value, arrays[tensor.name])
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        onnx.save(model, path)
        return []

    return Fault(f"precision {precision_name}", name, module, inject)


def scaled(name: str, factor: float) -> Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    """One array times a factor."""
    return lambda arrays: {name: arrays[name] * factor}


def one_scale(name: str) -> Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    """The scale of the first channel for all of them."""
    return lambda arrays: {name: np.full_like(arrays[name], arrays[name].max() * 3)}


FC1 = "stages.1.blocks.0.ffn.fc1"
FC1_WEIGHT = (f"{FC1}.weight",)
CONV = "stages.2.downsample.conv"
PRECISION = (
    precision("a weight's scale", FC1, "int8", scaled(f"{FC1}.weight_scale", 1.5)),
    precision("one scale for all channels", CONV, "int8", one_scale(f"{CONV}.weight_scale")),
    precision(
        "an input's range too small", CONV, "int8", scaled("/stages.1/blocks/blocks.0/Add_1_output_0_scale", 0.1)
    ),
    precision(
        "a zero point that is not zero",
        CONV,
        "int8",
        lambda arrays: {name: arrays[name] + 100 for name in ["/stages.1/blocks/blocks.0/Add_1_output_0_zero_point"]},
    ),
    precision("quantised weights of zero", FC1, "int8", scaled(f"{FC1}.weight_quantized", 0)),
    precision(
        "a weight beyond float16", FC1, "fp16", lambda a: {f"{FC1}.weight": np.full_like(a[f"{FC1}.weight"], 6e4)}
    ),
    precision("half the bits of a layer", FC1, "fp16", lambda a: {f"{FC1}.weight": np.round(a[f"{FC1}.weight"], 1)}),
    precision("5 % of a layer", f"{BLOCK}.dma.expand", "fp16", scaled(f"{BLOCK}.dma.expand.weight", 1.05)),
)
IN_BUNDLES = (*NODES, *PREPROCESSING, *BATCHING)
