"""Sources, networks and reports that the tests of the reduced precisions share."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx
import pytest
from onnx import numpy_helper

from dmformer.assets import SAMPLE_IMAGES
from dmformer.data.images import list_images
from dmformer.export.precisions import Calibration, PrecisionSource, int8
from dmformer.graph.trace import trace
from dmformer.models.deploy import deploy
from dmformer.progress import silent
from dmformer.verify.reference import golden_pixels, make_golden

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

    from dmformer.bundle.golden import Golden
    from dmformer.data.images import ImageSet
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.verify.report import ParityReport

# What is said of an artifact whose int8 sums may saturate on this machine.
SATURATES = "its int8 weights use 8 bits, and their sums may saturate in openvino"
ATTENTION = "stages.2.blocks.0.dma"


def golden_of(checkpoint: Checkpoint) -> Golden:
    pixels = golden_pixels(checkpoint.preprocessing, list_images(SAMPLE_IMAGES))
    return make_golden(checkpoint.model(), checkpoint.preprocessing, pixels)


def calibration_of(checkpoint: Checkpoint, images: ImageSet) -> Calibration:
    return Calibration.of(checkpoint.model(), images)


def source_of(
    checkpoint: Checkpoint, scratch: Path, inputs: np.ndarray, calibration: Calibration | None = None
) -> PrecisionSource:
    """What a precision is made from: the traced deploy form."""
    scratch.mkdir(exist_ok=True)
    size = checkpoint.preprocessing.image_size
    trace(checkpoint, deploy(checkpoint.model(), size), scratch / "traced.onnx")
    return PrecisionSource(
        onnx=scratch / "traced.onnx",
        inputs=inputs,
        calibration=calibration,
        max_points_lost=0.5,
        weight_bits=7,
        scratch=scratch,
        stage=silent,
        block_of=checkpoint.config.block_of,
    )


def rescaled(checkpoint: Checkpoint, exponent: int) -> Checkpoint:
    """The same function to the last bit: one linear map times a power of two, the next one divided by it."""
    state = {name: value.clone() for name, value in checkpoint.state.items()}
    for name in ("weight", "bias"):
        state[f"{ATTENTION}.expand.{name}"] *= 2.0**exponent
    for branch in range(3):
        state[f"{ATTENTION}.branches.{branch}.weight"] *= 2.0**-exponent
    return replace(checkpoint, state=state)


def arrays(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def failed(report: ParityReport) -> list[tuple[str, str, str]]:
    found = [(check.runtime, check.precision, check.stage) for check in report.checks if not check.passed]
    assert report.passed == (not found)
    return list(dict.fromkeys(found))


@contextmanager
def simulated(losses: list[float]) -> Iterator[list[str]]:
    """Blocks as sensitive as their position, and points lost by the number of blocks kept; gives the tries in order."""
    said: list[str] = []

    def points_lost(self: int8._Quantizer, path: Path, what: str) -> float:
        said.append(what)
        kept = int(what.removeprefix("int8 accuracy, ").split()[0])
        return losses[min(kept, len(losses) - 1)]

    def sensitivity(self: int8._Quantizer) -> dict[str, float]:
        return {block: float(index) for index, block in enumerate(self.blocks)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8._Quantizer, "points_lost", points_lost)
        patch.setattr(int8._Quantizer, "sensitivity", sensitivity)
        yield said


def unheld(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN as without 'make test-older'."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
