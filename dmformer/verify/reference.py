"""The reference: golden images, and PyTorch's answers to them in float32 and float64."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from dmformer.bundle.golden import Golden
from dmformer.data.images import load_pixels, spread, synthetic_pixels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.data.preprocessing import Preprocessing
    from dmformer.models.dmformer import DMFormer

GOLDEN_IMAGES = 6
_MOST_REAL = 4  # of the golden images; the others are noise, which reaches what few images may not
_SEED = 20230604


def golden_pixels(preprocessing: Preprocessing, images: Sequence[Path]) -> NDArray[np.uint8]:
    """Real images where there are some, and noise: uint8 (GOLDEN_IMAGES, H, W, C).

    Raises:
        UsageError: an image cannot be read.
    """
    chosen = spread(images, _MOST_REAL)
    noise = synthetic_pixels(
        GOLDEN_IMAGES - len(chosen), preprocessing.image_size, len(preprocessing.channels), seed=_SEED
    )
    if not chosen:
        return noise
    return np.concatenate([load_pixels(chosen, preprocessing), noise])


def make_golden(model: DMFormer, preprocessing: Preprocessing, pixels: NDArray[np.uint8]) -> Golden:
    """Run the network in float32 and in float64 on preprocessed images, one batch of all."""
    import torch

    from dmformer.models.dmformer import OUTPUT_NAME

    inputs = preprocessing.normalize(pixels)
    double = copy.deepcopy(model).double()
    with torch.inference_mode():
        single_outputs = model(torch.from_numpy(inputs)).numpy()
        double_outputs = double(torch.from_numpy(inputs).double()).numpy()
    return Golden(pixels, inputs, {OUTPUT_NAME: single_outputs}, {OUTPUT_NAME: double_outputs})
