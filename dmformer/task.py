"""What a network is for, and what its input and outputs are called in every exported format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from numpy.typing import NDArray

Task = Literal["classification", "segmentation", "features"]
TASKS: tuple[Task, ...] = get_args(Task)

INPUT_NAME = "image"
OUTPUT_NAME = "logits"  # (N, classes), or for segmentation (N, classes, H, W)
THRESHOLD = 0.5  # of the sigmoid of a classifier's only output: above it an image is of the second of two classes
STRIDES = (4, 8, 16, 32)  # of the stages' maps
FEATURE_NAMES = tuple(f"features_s{stride}" for stride in STRIDES)


def class_count(task: Task, outputs: int) -> int:
    """Return how many classes a network with so many output channels tells apart: one logit tells two."""
    return 2 if task == "classification" and outputs == 1 else outputs


def class_logits(logits: NDArray[Any]) -> NDArray[Any]:
    """Return a logit for each class: (N, classes, …) as it is, and (N, 1) as (N, 2).

    The first of the two is 0: then softmax gives the sigmoid of the logit, and the larger one is that on its side of
    :data:`THRESHOLD`.
    """
    import numpy as np

    if logits.ndim != 2 or logits.shape[1] != 1:
        return logits
    return np.concatenate([np.zeros_like(logits), logits], 1)
