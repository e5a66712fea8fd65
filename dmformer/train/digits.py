"""The recipe of the demonstration checkpoint: DMFormer-nano on scikit-learn's handwritten digits.

The data are the 1,797 images of the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
UCI Machine Learning Repository, 1998), 8x8 pixels, which scikit-learn ships. One fifth is held out, the same fifth in
every run. Run with::

    python -m dmformer.train.digits --output FOLDER

or, for the images alone, sorted into ``held-out`` and ``training`` and there by class::

    python -m dmformer.train.digits --images FOLDER
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from dmformer._optional import require
from dmformer.data.preprocessing import Preprocessing
from dmformer.models.checkpoint import Checkpoint, save_checkpoint
from dmformer.models.dmformer import DMFormer, variant_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

NAME = "dmformer_nano_digits"
CLASSES = tuple("0123456789")
PREPROCESSING = Preprocessing(image_size=32, crop_fraction=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
SAMPLES = 10
_CALIBRATION_PER_CLASS = 20


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters; the defaults made the checkpoint that is shipped."""

    seed: int = 0
    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    drop_path: float = 0.05
    max_rotation_degrees: float = 12.0
    max_shift: float = 0.12
    max_zoom: float = 0.12


@dataclass(frozen=True)
class Digits:
    """Images as uint8 (N, 32, 32, 3) and their labels, and which of them are held out."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    held_out: NDArray[np.intp]
    training: NDArray[np.intp]


def digit_image(grey: NDArray[np.float64]) -> Image.Image:
    """One digit of the data set, 8x8 with values 0..16, as an image of 32x32 pixels."""
    levels = np.round(grey * (255 / 16)).astype(np.uint8)
    return Image.fromarray(levels).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")


def load_digits() -> Digits:
    """The data set with its fixed split."""
    datasets = require("sklearn.datasets", extra="train", purpose="the digits recipe")
    data = datasets.load_digits()
    pixels = np.stack([PREPROCESSING.pixels(digit_image(grey)) for grey in data.images])
    order = np.random.RandomState(0).permutation(len(pixels))  # RandomState's stream is frozen by NumPy's policy
    cut = len(pixels) // 5
    return Digits(pixels, data.target.astype(np.int64), np.sort(order[:cut]), np.sort(order[cut:]))


def train(recipe: Recipe, digits: Digits) -> tuple[DMFormer, float]:
    """Train from scratch; returns the network in evaluation mode and its accuracy on the held-out images (0..1)."""
    torch.manual_seed(recipe.seed)
    model = DMFormer(variant_config("dmformer_nano", num_classes=len(CLASSES), drop_path=recipe.drop_path))
    inputs = torch.from_numpy(PREPROCESSING.normalize(digits.pixels))  # (N, 3, 32, 32)
    labels = torch.from_numpy(digits.labels)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
    )
    steps = recipe.epochs * -(-len(digits.training) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.1)
    for epoch in range(recipe.epochs):
        model.train()
        for batch in _batches(digits.training, recipe.batch_size):
            loss = F.cross_entropy(
                model(_augment(inputs[batch], recipe)), labels[batch], label_smoothing=recipe.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        sys.stderr.write(f"\repoch {epoch + 1}/{recipe.epochs}  loss {loss.item():.3f} ")
    sys.stderr.write("\n")
    return model.eval(), accuracy(model, inputs[digits.held_out], labels[digits.held_out])


def accuracy(model: DMFormer, inputs: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    with torch.inference_mode():
        return (model(inputs).argmax(1) == labels).double().mean().item()


def _batches(indices: NDArray[np.intp], size: int) -> Iterator[Tensor]:
    shuffled = torch.from_numpy(indices)[torch.randperm(len(indices))]
    yield from shuffled.split(size)


def _augment(inputs: Tensor, recipe: Recipe) -> Tensor:
    """A random small rotation, shift and zoom of each image: (N, 3, H, W) -> (N, 3, H, W)."""
    count = len(inputs)
    angle = (torch.rand(count) * 2 - 1) * np.deg2rad(recipe.max_rotation_degrees)
    zoom = 1 + (torch.rand(count) * 2 - 1) * recipe.max_zoom
    shift = (torch.rand(count, 2) * 2 - 1) * recipe.max_shift * 2  # the grid spans -1..1
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(inputs.shape), align_corners=False)
    return F.grid_sample(inputs, grid, padding_mode="border", align_corners=False)


def write(output: Path, recipe: Recipe) -> float:
    """Train, then write the checkpoint and sample images of held-out digits; returns the accuracy (0..1)."""
    digits = load_digits()
    model, held_out_accuracy = train(recipe, digits)
    training = {
        "data": f"scikit-learn load_digits, {len(digits.training)} images",
        "recipe": {"script": "dmformer.train.digits", **vars(recipe)},
        "held_out_images": len(digits.held_out),
        "held_out_top1": round(held_out_accuracy, 6),
    }
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(".num_batches_tracked")}
    output.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        output / f"{NAME}.safetensors",
        Checkpoint("dmformer_nano", model.config, state, PREPROCESSING, CLASSES, training=training),
    )
    samples = output / "digits"
    samples.mkdir(exist_ok=True)
    for label in range(SAMPLES):
        index = digits.held_out[digits.labels[digits.held_out] == label][-1]
        Image.fromarray(digits.pixels[index]).save(samples / f"{label}.png")
    write_images(output / "digits-training", digits, digits.training, _CALIBRATION_PER_CLASS)
    return held_out_accuracy


def write_images(folder: Path, digits: Digits, indices: NDArray[np.intp], most_per_class: int | None = None) -> None:
    """Write images as PNG files in a folder for each class, the first ones of each."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in indices[digits.labels[indices] == label][:most_per_class]:
            grey = Image.fromarray(digits.pixels[index][..., 0])  # the three channels are equal
            grey.save(folder / name / f"{index:04}.png", optimize=True)


def main() -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="train; folder for the checkpoint and its sample images")
    what.add_argument("--images", type=Path, help="train nothing; folder for all images of the data set")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    if arguments.images is not None:
        digits = load_digits()
        write_images(arguments.images / "held-out", digits, digits.held_out)
        write_images(arguments.images / "training", digits, digits.training)
        sys.stdout.write(f"{len(digits.held_out)} held-out and {len(digits.training)} training images\n")
        return
    reached = write(arguments.output, Recipe(seed=arguments.seed, epochs=arguments.epochs))
    sys.stdout.write(f"held-out accuracy {reached:.2%}\n")


if __name__ == "__main__":
    main()
