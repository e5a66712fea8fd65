"""The images of the demonstration checkpoint: scikit-learn's handwritten digits, as folders of images.

The data are the 1,797 images of the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
UCI Machine Learning Repository, 1998), 8x8 pixels, which scikit-learn ships. One fifth is held out, the same fifth in
every run. The checkpoint that ships was made so::

    python -m dmformer.train.digits --images FOLDER
    dmformer train --recipe digits --data FOLDER --output RUN
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dmformer._optional import require
from dmformer.data.preprocessing import Preprocessing

CLASSES = tuple("0123456789")
PREPROCESSING = Preprocessing(image_size=32, crop_fraction=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
_CALIBRATION_PER_CLASS = 20


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


def write_images(folder: Path, digits: Digits, indices: NDArray[np.intp], most_per_class: int | None = None) -> None:
    """Write images as PNG files in a folder for each class, the first ones of each."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in indices[digits.labels[indices] == label][:most_per_class]:
            grey = Image.fromarray(digits.pixels[index][..., 0])  # the three channels are equal
            grey.save(folder / name / f"{index:04}.png", optimize=True)


def write_samples(folder: Path, digits: Digits) -> None:
    """Write what ships: one held-out image of each digit, and training images to calibrate on."""
    samples = folder / "digits"
    samples.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(CLASSES):
        index = digits.held_out[digits.labels[digits.held_out] == label][-1]
        Image.fromarray(digits.pixels[index]).save(samples / f"{name}.png")
    write_images(folder / "digits-training", digits, digits.training, _CALIBRATION_PER_CLASS)


def main() -> None:
    """Write the images from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder for all images, as dmformer train takes them")
    parser.add_argument("--samples", type=Path, help="folder for the few that ship with the package")
    arguments = parser.parse_args()
    if arguments.images is None and arguments.samples is None:
        parser.error("expected --images or --samples")
    digits = load_digits()
    if arguments.images is not None:
        write_images(arguments.images / "train", digits, digits.training)
        write_images(arguments.images / "val", digits, digits.held_out)
        sys.stdout.write(f"{len(digits.training)} images to train on, {len(digits.held_out)} held out\n")
    if arguments.samples is not None:
        write_samples(arguments.samples, digits)


if __name__ == "__main__":
    main()
