"""The kinds of fault of a network that labels pixels: in its decoder, in its maps, and in annotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from benchmarks.fault_kinds import Fault, attribute, drop_operand, graph, reads, swap_filters, weight
from benchmarks.fault_kinds_elsewhere import answering
from dmformer.data import annotated

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

UP, ABOVE = "decoder.levels.2.up0", "decoder.above.1"

IN_DECODER = (
    graph(f"{UP}/Resize", UP, attribute(coordinate_transformation_mode="asymmetric"), "positions from the corner"),
    graph(f"{UP}/Resize", UP, attribute(coordinate_transformation_mode="align_corners"), "corners that are aligned"),
    graph("up/Resize", "up", attribute(coordinate_transformation_mode="align_corners"), "aligned corners at the end"),
    graph(f"{UP}/Resize", UP, attribute(mode="nearest"), "nearest in the place of linear"),
    graph(f"{ABOVE}/Resize", ABOVE, attribute(mode="linear"), "linear in the place of nearest"),
    graph(f"{ABOVE}/Resize", ABOVE, attribute(nearest_mode="ceil"), "the nearest above"),
    graph("decoder/Add_1", "decoder", drop_operand(0), "a level of the pyramid left out"),
    graph(
        "decoder.smooth.0/Conv",
        "decoder.smooth.0",
        reads(0, "/decoder/lateral.0/Conv_output_0"),
        "a pyramid that is not built",
    ),
    weight(
        "decoder.levels.1.conv0.conv.weight",
        "decoder.levels.1.conv0.conv",
        lambda a: 1.01 * a,
        "1 % of the decoder",
    ),
    weight("decoder.classifier.conv.weight", "decoder.classifier.conv", swap_filters, "two classes exchanged"),
    weight(
        "decoder.smooth.2.weight",
        "decoder.smooth.2",
        lambda a: a.transpose(0, 1, 3, 2),
        "a transposed kernel of the decoder",
    ),
    Fault("engine", "rows and columns exchanged", None, answering(lambda _, __, a: a.swapaxes(2, 3).copy())),
    Fault("engine", "a map out by one column", None, answering(lambda _, __, a: np.roll(a, 1, axis=3))),
    Fault("engine", "one row of a map left over", None, answering(lambda _, __, a: _last_row_zero(a))),
)


def _last_row_zero(answers: NDArray[Any]) -> NDArray[Any]:
    answers[:, :, -1] = 0
    return answers


def numbering(change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Callable[[Path], list[Any]]:
    """A reader of annotations that takes their numbers for others."""

    def inject(_: Path) -> list[Any]:
        right = annotated.load_labels
        return [mock.patch.object(annotated, "load_labels", lambda path, classes: change(right(path, classes)))]

    return inject


def _as_classes(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The number in the file is the class."""
    numbers: NDArray[np.uint8] = labels + np.uint8(1)  # the ignored 255 wraps to 0
    return np.where(numbers > 10, annotated.IGNORED, numbers).astype(np.uint8)


ANNOTATIONS = (
    Fault("annotations", "numbers taken for classes", None, numbering(_as_classes)),
    Fault(
        "annotations",
        "numbers from two on",
        None,
        numbering(lambda labels: np.where(labels == 0, annotated.IGNORED, labels - (labels < 255)).astype(np.uint8)),
    ),
)
