"""What a network is for, and what its input and outputs are called in every exported format."""

from __future__ import annotations

from typing import Literal, get_args

Task = Literal["classification", "segmentation", "features"]
TASKS: tuple[Task, ...] = get_args(Task)

INPUT_NAME = "image"
OUTPUT_NAME = "logits"  # (N, classes), or for segmentation (N, classes, H, W)
STRIDES = (4, 8, 16, 32)  # of the stages' maps
FEATURE_NAMES = tuple(f"features_s{stride}" for stride in STRIDES)
