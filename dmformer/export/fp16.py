"""float32 ONNX -> float16 inside, float32 input and output, with onnxruntime's converter.

float16 ends at 65,504. Average pools stay in float32, for they add up a whole map before they divide; so does every
node that meets a weight, or on calibration images a value, within a factor of :data:`HEADROOM` of that end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dmformer.errors import CheckFailed
from dmformer.export import onnx_file
from dmformer.export.island import convert
from dmformer.export.precision import RANGE_IMAGES, Made, typed_share
from dmformer.runtimes.onnxruntime import OnnxRuntime

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto

    from dmformer.export.precision import PrecisionSource

LARGEST = 65504.0
HEADROOM = 8.0  # other images reach further than those that were looked at


def to_fp16(source: PrecisionSource) -> Made:
    """The graph in float16, on ranges measured on the calibration images, or else on the golden ones.

    Raises:
        CheckFailed: the network itself gives NaN or infinity on the images, or is out of range everywhere.
    """
    model = onnx_file.read(source.onnx)
    with source.stage("ranges for fp16"):
        peaks = _weight_peaks(model) | tensor_peaks(source.onnx, _inputs(source), source.scratch)
    kept = {
        node.name: f"reaches {peak:.3g}, float16 ends at {LARGEST:g}"
        for node in model.graph.node
        if (peak := max((peaks.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)) * HEADROOM
        > LARGEST
    }
    destination = source.scratch / "fp16.onnx"
    converted = convert(model, kept, destination)
    share = typed_share(converted, "fp16")
    if not share:
        raise CheckFailed(
            f"precision fp16: every compute layer meets values beyond {LARGEST / HEADROOM:g}; expected a network whose "
            "values float16 can hold: export fp32"
        )
    return Made(destination, share, kept)


def tensor_peaks(path: Path, batches: Iterable[NDArray[np.float32]], scratch: Path) -> dict[str, float]:
    """Largest absolute value of every tensor of a float32 graph over batches (N, C, H, W).

    Raises:
        CheckFailed: one of them is NaN or infinite.
    """
    from onnx import ValueInfoProto

    model = onnx_file.read(path)
    names = [name for node in model.graph.node for name in node.output]
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in known)
    shown = scratch / "ranges.onnx"
    shown.write_bytes(model.SerializeToString())
    peaks = dict.fromkeys(names, 0.0)
    with OnnxRuntime(shown) as runtime:
        for batch in batches:
            for name, array in runtime.run({runtime.inputs[0].name: batch}).items():
                if array.dtype.kind != "f":  # a shape, or a position
                    continue
                peaks[name] = max(peaks[name], float(np.abs(array).max()))
                if not np.isfinite(array).all():
                    raise CheckFailed(
                        f"tensor {name!r} is NaN or infinite in float32 on these images; expected numbers"
                    )
    return peaks


def _inputs(source: PrecisionSource) -> Iterable[NDArray[np.float32]]:
    if source.calibration is None:
        return [source.inputs]
    return source.calibration.images.spread(RANGE_IMAGES).batches(1)


def _weight_peaks(model: ModelProto) -> dict[str, float]:
    arrays = onnx_file.weights(model).items()
    return {name: float(np.abs(array).max()) for name, array in arrays if array.size and array.dtype.kind == "f"}
