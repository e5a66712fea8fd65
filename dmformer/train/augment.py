"""Random changes of training images.

RandAugment, affine maps, colour jitter and erasing are Kornia's (Apache-2.0, released several times a year), which
needs nothing beside PyTorch. Those of torchvision and timm need torchvision, which has no build for PyTorch without
CUDA on PyPI; Albumentations is no longer maintained, and its successor is AGPL. Crops are Pillow's, so that an image
is resized as at deployment; mixup and CutMix are written out, for Kornia's mixup has no Beta distribution.

Kornia draws from PyTorch's generator. Every function here leaves that as it found it and draws from a seed that the
caller gives, so that a run does not depend on the number of processes, nor on where it was interrupted.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dmformer._optional import require
from dmformer.data.annotated import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from dmformer.data.preprocessing import Preprocessing
    from dmformer.train.recipe import Recipe

_TRIES = 10  # to find a crop that fits, as torchvision and mmsegmentation have it


def seed_of(*numbers: int) -> int:
    """Mix several numbers into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's generator of the CPU for the length of the block; afterwards it goes on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Augmentation:
    """Draws random views of single images as the recipe says: Pillow images in, uint8 arrays out."""

    def __init__(self, recipe: Recipe, preprocessing: Preprocessing) -> None:
        self.recipe, self.preprocessing = recipe, preprocessing
        self.layers = _kornia_layers(recipe)

    def classification(self, image: Image, seed: int) -> NDArray[np.uint8]:
        """Return a random part of the image, flipped and changed by chance: uint8 (size, size, C)."""
        draw = np.random.default_rng(seed)
        if self.recipe.crop_scale == (1.0, 1.0):
            pixels = self.preprocessing.pixels(image)
        else:
            pixels = self._random_crop(self.preprocessing.upright(image), draw)
        if draw.random() < self.recipe.horizontal_flip:
            pixels = pixels[:, ::-1]
        return self._augment(pixels, int(draw.integers(2**63)))

    def segmentation(
        self, image: Image, labels: NDArray[np.uint8], seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return a random part of the image at a random size, uint8 (size, size, C), and its labels (size, size)."""
        draw = np.random.default_rng(seed)
        pixels, labels = self._resized(self.preprocessing.upright(image), labels, draw)
        for _ in range(_TRIES):
            size = self.preprocessing.image_size
            top, left = (int(draw.integers(side - size + 1)) for side in labels.shape)
            part = labels[top : top + size, left : left + size]
            counted = np.bincount(part[part != IGNORED], minlength=2)
            if counted.max() <= self.recipe.largest_class * max(1, counted.sum()):
                break
        pixels = pixels[top : top + size, left : left + size]
        if draw.random() < self.recipe.horizontal_flip:
            pixels, part = pixels[:, ::-1], part[:, ::-1]
        return self._augment(pixels, int(draw.integers(2**63))), np.ascontiguousarray(part)

    def _random_crop(self, image: Image, draw: np.random.Generator) -> NDArray[np.uint8]:
        """The crop of Szegedy et al. (arXiv:1409.4842): its area and its ratio are random."""
        from PIL.Image import Resampling

        width, height = image.size
        low, high = np.log(self.recipe.crop_ratio)
        for _ in range(_TRIES):
            area = width * height * draw.uniform(*self.recipe.crop_scale)
            ratio = np.exp(draw.uniform(low, high))
            across, down = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
            if 0 < across <= width and 0 < down <= height:
                break
        else:
            across = down = min(width, height)
        left, top = int(draw.integers(width - across + 1)), int(draw.integers(height - down + 1))
        size, resampling = self.preprocessing.image_size, Resampling[self.preprocessing.interpolation.upper()]
        resized = image.resize((size, size), resampling, box=(left, top, left + across, top + down))
        return np.asarray(resized, np.uint8).reshape(size, size, -1)

    def _resized(
        self, image: Image, labels: NDArray[np.uint8], draw: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Resize the image at random; where a side is then shorter than the input's, add ignored grey pixels."""
        from PIL.Image import Resampling, fromarray

        size, (width, height) = self.preprocessing.image_size, image.size
        scale = size * draw.uniform(*self.recipe.resize_range) / min(width, height)
        shape = max(1, round(width * scale)), max(1, round(height * scale))
        resized = np.asarray(image.resize(shape, Resampling[self.preprocessing.interpolation.upper()]), np.uint8)
        pixels = resized.reshape(shape[1], shape[0], -1)
        found = np.asarray(fromarray(labels).resize(shape, Resampling.NEAREST))
        missing = [(0, max(0, size - side)) for side in found.shape]
        grey = round(255 * float(np.mean(self.preprocessing.mean)))
        filled = np.pad(pixels, [*missing, (0, 0)], constant_values=max(0, min(255, grey)))
        return filled, np.pad(found, missing, constant_values=IGNORED)

    def _augment(self, pixels: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Apply Kornia's layers to the pixels (H, W, C)."""
        if not self.layers:
            return np.ascontiguousarray(pixels)
        x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float() / 255  # (1, C, H, W)
        with seeded(seed), torch.no_grad():
            for layer in self.layers:
                x = layer(x)
        rounded = (x[0].clamp(0, 1) * 255).round().to(torch.uint8)
        return np.ascontiguousarray(rounded.permute(1, 2, 0).numpy())  # (C, H, W) -> (H, W, C)


def _kornia_layers(recipe: Recipe) -> list[Any]:
    layers: list[Any] = []
    moves = recipe.rotation_degrees or recipe.shift or recipe.zoom
    if not (moves or recipe.randaugment_operations or recipe.color_jitter):
        return layers
    kornia = require("kornia.augmentation", extra="train", purpose="augmentation of training images")
    if moves:
        layers.append(
            kornia.RandomAffine(
                recipe.rotation_degrees,
                translate=(recipe.shift, recipe.shift),
                scale=(1 - recipe.zoom, 1 + recipe.zoom),
                padding_mode="border",
                p=1.0,
            )
        )
    if recipe.color_jitter:
        amount = recipe.color_jitter
        layers.append(kornia.ColorJiggle(amount, amount, amount, amount / 6, p=1.0))
    if recipe.randaugment_operations:
        auto = require("kornia.augmentation.auto", extra="train", purpose="RandAugment")
        layers.append(auto.RandAugment(n=recipe.randaugment_operations, m=recipe.randaugment_magnitude))
    return layers


class BatchAugmentation:
    """Changes a batch on its device: mixup or CutMix, and erasing."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self.recipe, self.classes = recipe, classes
        self.erase: Any = None
        if recipe.erasing:
            kornia = require("kornia.augmentation", extra="train", purpose="random erasing")
            self.erase = kornia.RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 3.3), p=recipe.erasing)

    def __call__(self, inputs: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Change inputs (N, C, H, W); make of labels (N,) targets (N, classes) whose rows sum to 1."""
        draw = np.random.default_rng(seed)
        if self.erase is not None:
            with seeded(int(draw.integers(2**63))):
                inputs = self.erase(inputs)  # with 0, which is the mean colour
        targets = torch.nn.functional.one_hot(labels, self.classes).to(inputs.dtype)
        kinds = [name for name in ("mixup", "cutmix") if getattr(self.recipe, name)]
        if not kinds:
            return inputs, targets
        kind = kinds[int(draw.integers(len(kinds)))]
        share = float(draw.beta(getattr(self.recipe, kind), getattr(self.recipe, kind)))
        other = inputs.flip(0)
        if kind == "mixup":
            inputs = share * inputs + (1 - share) * other
        else:
            top, bottom, left, right = _box(inputs.shape[-2], inputs.shape[-1], share, draw)
            inputs = inputs.clone()
            inputs[..., top:bottom, left:right] = other[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (inputs.shape[-2] * inputs.shape[-1])
        return inputs, share * targets + (1 - share) * targets.flip(0)


def _box(height: int, width: int, share: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a rectangle that covers at most 1 - share of the image: top, bottom, left, right."""
    down, across = (round(side * (1 - share) ** 0.5) for side in (height, width))
    y, x = int(draw.integers(height)), int(draw.integers(width))
    top, left = max(0, y - down // 2), max(0, x - across // 2)
    return top, min(height, y - down // 2 + down), left, min(width, x - across // 2 + across)
