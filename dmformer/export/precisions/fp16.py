"""float32 ONNX -> float16 inside, float32 input and output, with onnxruntime's converter.

float16 ends at 65,504. Average pools stay in float32, for they add up a whole map before they divide; so does every
node that meets a weight, or on calibration images a value, within a factor of :data:`HEADROOM` of that end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dmformer.errors import CheckFailed
from dmformer.export.precisions import PrecisionFile, tensor_peaks
from dmformer.graph import onnx_file
from dmformer.graph.onnx_file import to_float16, typed_share

if TYPE_CHECKING:
    from onnx import ModelProto

    from dmformer.export.precisions import PrecisionSource

LARGEST = 65504.0
HEADROOM = 8.0  # other images reach further than those that were looked at


def to_fp16(source: PrecisionSource) -> PrecisionFile:
    """The graph in float16, on ranges measured on the calibration images, or else on the golden ones.

    Raises:
        CheckFailed: the network itself gives NaN or infinity on the images, or is out of range everywhere.
    """
    model = onnx_file.read(source.onnx)
    with source.stage("ranges for fp16", source.range_count) as advance:
        made = [name for node in model.graph.node for name in node.output]
        peaks = _weight_peaks(model) | tensor_peaks(source.onnx, made, source.range_batches(), advance)
    kept = {
        node.name: f"reaches {peak:.3g}, float16 ends at {LARGEST:g}"
        for node in model.graph.node
        if (peak := max((peaks.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)) * HEADROOM
        > LARGEST
    }
    destination = source.scratch / "fp16.onnx"
    converted = to_float16(model, kept, destination)
    share = typed_share(converted, "fp16")
    if not share:
        raise CheckFailed(
            f"precision fp16: every compute layer meets values beyond {LARGEST / HEADROOM:g}; expected a network whose "
            "values float16 can hold: export fp32"
        )
    return PrecisionFile(destination, "fp16", share, kept)


def _weight_peaks(model: ModelProto) -> dict[str, float]:
    arrays = onnx_file.weights(model).items()
    return {name: float(np.abs(array).max()) for name, array in arrays if array.size and array.dtype.kind == "f"}
