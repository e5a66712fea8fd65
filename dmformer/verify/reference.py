"""The reference: golden images, and PyTorch's answers to them in float32 and float64."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dmformer.bundle.golden import Golden
from dmformer.data.images import load_pixels, spread, synthetic_pixels
from dmformer.machine import usable_cores
from dmformer.verify.accuracy import collect

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from dmformer.data.labelled import ImageSet
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.models.dmformer import DMFormerBackbone

GOLDEN_IMAGES = 5
_MOST_REAL = 3  # of the golden images; the others are noise, which reaches what few images may not
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


def source_images(preprocessing: Preprocessing) -> tuple[NDArray[np.uint8], ...]:
    """Noise before resizing and cropping, uint8 (H, W, 3): a wide image to be made smaller, a tall one larger."""
    side = preprocessing.image_size
    wide = synthetic_pixels(1, round(1.5 * side), 3, seed=_SEED)[0]
    tall = synthetic_pixels(1, round(0.75 * side), 3, seed=_SEED + 1)[0]
    return wide[:side], tall[:, : side // 2]


def make_golden(model: DMFormerBackbone, preprocessing: Preprocessing, pixels: NDArray[np.uint8]) -> Golden:
    """Run the network on preprocessed images, in float32 as one batch and in float64 image by image.

    PyTorch's dilated depth-wise convolutions in float64 use one thread, so the images share the cores.
    """
    import torch

    from dmformer.models.dmformer import OUTPUT_NAME

    inputs = preprocessing.normalize(pixels)
    with torch.inference_mode():
        single_outputs = model(torch.from_numpy(inputs)).numpy()
    double_outputs = _in_float64(model, inputs)
    sources = source_images(preprocessing)
    return Golden(
        images=pixels,
        inputs=inputs,
        outputs={OUTPUT_NAME: single_outputs},
        outputs_float64={OUTPUT_NAME: double_outputs},
        sources=sources,
        source_pixels=np.stack([preprocessing.pixels(Image.fromarray(source)) for source in sources]),
    )


def torch_logits(model: DMFormerBackbone, images: ImageSet, advance: Callable[[], object]) -> NDArray[np.float32]:
    """The network's float32 outputs for each image, (N, classes).

    Raises:
        StageFailed: an answer is NaN or infinite.
        UsageError: an image cannot be read.
    """
    import torch

    def answer(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = model(torch.from_numpy(batch)).numpy()
        return output

    not_finite = "PyTorch itself answers with NaN or infinity; expected a network that gives numbers"
    with torch.inference_mode():
        return collect(images, answer, advance, not_finite)


def in_double(model: nn.Module) -> nn.Module:
    """A copy of a network in float64, with depth-wise convolutions by :func:`depthwise`."""
    import torch

    double = copy.deepcopy(model).double()
    for module in double.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == module.in_channels == module.out_channels:
            module.forward = functools.partial(_depthwise, module)  # type: ignore[method-assign]
    return double


def _in_float64(model: DMFormerBackbone, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    import torch

    double = in_double(model)

    def run(row: NDArray[np.float32]) -> NDArray[np.float64]:
        with torch.inference_mode():  # holds for one thread
            output: NDArray[np.float64] = double(torch.from_numpy(row[None]).double()).numpy()
        return output

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(usable_cores()) as pool:
            return np.concatenate(list(pool.map(run, inputs)))
    finally:
        torch.set_num_threads(threads)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dilation: int) -> Tensor:
    """A depth-wise convolution of stride 1 as shifted products added up: (N, C, H, W) -> (N, C, H, W).

    PyTorch has no kernel of its own for it in float64, and takes two to three times as long.
    """
    from torch.nn import functional as F

    height, width = x.shape[2:]
    padded = F.pad(x, (padding,) * 4)
    taps = weight[:, 0].permute(1, 2, 0)  # (C, k, k) -> (k, k, C)
    total = x.new_zeros(x.shape)
    for top, row in enumerate(taps):
        for left, tap in enumerate(row):
            window = padded[:, :, top * dilation :, left * dilation :][:, :, :height, :width]
            total.addcmul_(window, tap[:, None, None])
    return total if bias is None else total + bias[:, None, None]


def _depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return depthwise(x, conv.weight, conv.bias, int(conv.padding[0]), conv.dilation[0])
