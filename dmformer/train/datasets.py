"""The data sets of the two checkpoints that ship, as folders of images; both come with scikit-learn.

Digits: the 1,797 images of the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI
Machine Learning Repository, 1998), 8x8 pixels. One fifth is held out, the same fifth in every run.

Scenes, with a class for every pixel, in ADE20K's folders: white digits on the two photographs of
``load_sample_images`` (by danielbuechele and vultilion, both CC BY 2.0), dimmed. Validation has the digits that are
held out, and the right quarter of each photograph, which training never shows. The network starts from the
demonstration checkpoint, which has seen the same training digits, as segmentation networks start from ImageNet.

The checkpoints were made so::

    python -m dmformer.train.datasets digits --images FOLDER
    dmformer train --recipe digits --data FOLDER --output RUN

    python -m dmformer.train.datasets scenes --images FOLDER
    dmformer train --recipe scenes --data FOLDER --weights dmformer/assets/dmformer_nano_digits.safetensors --output RUN
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dmformer._optional import require
from dmformer.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Sequence

DIGIT_CLASSES = tuple("0123456789")
DIGIT_PREPROCESSING = Preprocessing(image_size=32, crop_fraction=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
_CALIBRATION_PER_CLASS = 20

SCENE_CLASSES = ("background", *(f"digit {name}" for name in DIGIT_CLASSES))
TRAINING_SCENES, VALIDATION_SCENES = 2400, 200
_SCENE_SIDE = 64  # pixels
_DIGIT_SIDES = (36, 53)  # pixels, the second excluded
_MOST_DIGITS = 2
_DIMMED = 0.6  # brightness of the photographs, so that white digits stand out
_INK = 0.35  # a pixel belongs to the digit from this share of the darkest ink on
_TRAINING_SHARE = 0.75  # of each photograph, from the left

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Digits:
    """Images, uint8 (N, 32, 32, 3), with their labels, and the indices of those held out and of those to train on."""

    pixels: Pixels
    labels: NDArray[np.int64]
    held_out: NDArray[np.intp]
    training: NDArray[np.intp]


def load_digits() -> Digits:
    """Load the digits, enlarged to 32x32 pixels, with their fixed split."""
    data = require("sklearn.datasets", extra="train", purpose="the digits recipe").load_digits()
    pixels = []
    for grey in data.images:  # (8, 8), values 0 to 16
        image = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))
        pixels.append(DIGIT_PREPROCESSING.pixels(image.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")))
    order = np.random.RandomState(0).permutation(len(pixels))  # RandomState's stream is frozen by NumPy's policy
    cut = len(pixels) // 5
    return Digits(np.stack(pixels), data.target.astype(np.int64), np.sort(order[:cut]), np.sort(order[cut:]))


def write_digits(folder: Path, digits: Digits, indices: NDArray[np.intp], most_per_class: int | None = None) -> None:
    """Write the digits of some indices as PNG files in a folder for each class, of each the first ones."""
    for label, name in enumerate(DIGIT_CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in indices[digits.labels[indices] == label][:most_per_class]:
            grey = Image.fromarray(digits.pixels[index][..., 0])  # the three channels are equal
            grey.save(folder / name / f"{index:04}.png", optimize=True)


def write_samples(folder: Path, digits: Digits) -> None:
    """Write the images that ship: one held-out image of each digit, and training images to calibrate on."""
    samples = folder / "digits"
    samples.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(DIGIT_CLASSES):
        index = digits.held_out[digits.labels[digits.held_out] == label][-1]
        Image.fromarray(digits.pixels[index]).save(samples / f"{name}.png")
    write_digits(folder / "digits-training", digits, digits.training, _CALIBRATION_PER_CLASS)


def load_photographs() -> list[Pixels]:
    """Load the two sample photographs, uint8 (427, 640, 3)."""
    data = require("sklearn.datasets", extra="train", purpose="the scenes data set").load_sample_images()
    return [np.asarray(image, np.uint8) for image in data.images]


def compose_scene(
    photographs: Sequence[Pixels], digits: Pixels, labels: NDArray[np.int64], seed: int
) -> tuple[Pixels, Pixels]:
    """Compose one scene: an image, uint8 (64, 64, 3), and its annotation (64, 64): 1 is background, 2 … 11 the digits.

    Args:
        photographs: to cut a background from.
        digits: to choose from, uint8 (N, 32, 32, 3), light on dark.
        labels: of the digits.
        seed: of the scene.
    """
    draw = np.random.default_rng(seed)
    photograph = photographs[int(draw.integers(len(photographs)))]
    top, left = (int(draw.integers(side - _SCENE_SIDE + 1)) for side in photograph.shape[:2])
    scene = _DIMMED * photograph[top : top + _SCENE_SIDE, left : left + _SCENE_SIDE].astype(np.float64)
    annotation = np.ones((_SCENE_SIDE, _SCENE_SIDE), np.uint8)
    for _ in range(int(draw.integers(1, _MOST_DIGITS + 1))):
        chosen, side = int(draw.integers(len(digits))), int(draw.integers(*_DIGIT_SIDES))
        y, x = (int(draw.integers(_SCENE_SIDE - side + 1)) for _ in range(2))
        place = slice(y, y + side), slice(x, x + side)
        if (annotation[place] > 1).any():  # not over another digit
            continue
        grey = Image.fromarray(digits[chosen][..., 0]).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(grey, np.float64)[..., None] / 255
        scene[place] = scene[place] * (1 - ink) + draw.uniform(190, 255, 3) * ink  # white, tinted
        annotation[place][ink[..., 0] > _INK] = 2 + labels[chosen]
    return np.round(scene).astype(np.uint8), annotation


def write_scenes(folder: Path, training: int = TRAINING_SCENES, validation: int = VALIDATION_SCENES) -> None:
    """Write scenes in ADE20K's layout; the same files for the same numbers, whatever the machine."""
    digits, photographs = load_digits(), load_photographs()
    cut = round(photographs[0].shape[1] * _TRAINING_SHARE)
    parts = {
        "training": (training, [photo[:, :cut] for photo in photographs], digits.training, 0),
        "validation": (validation, [photo[:, cut:] for photo in photographs], digits.held_out, 1),
    }
    for part, (count, backgrounds, chosen, stream) in parts.items():
        if not count:
            continue
        images, annotations = (folder / kind / part for kind in ("images", "annotations"))
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            seed = 2 * index + stream
            image, annotation = compose_scene(backgrounds, digits.pixels[chosen], digits.labels[chosen], seed)
            Image.fromarray(image).save(images / f"{index:04}.png")
            Image.fromarray(annotation).save(annotations / f"{index:04}.png", optimize=True)
    (folder / "classes.txt").write_text("\n".join(SCENE_CLASSES) + "\n", encoding="utf-8")


def main() -> None:
    """Write a data set from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True)
    of_digits = names.add_parser("digits", help="images of one digit each")
    of_digits.add_argument("--images", type=Path, help="folder for all images, as dmformer train takes them")
    of_digits.add_argument("--samples", type=Path, help="folder for the few that ship with the package")
    of_scenes = names.add_parser("scenes", help="images with a class for every pixel")
    of_scenes.add_argument("--images", type=Path, required=True, help="folder for the data set")
    of_scenes.add_argument("--training", type=int, default=TRAINING_SCENES, help="images to train on")
    of_scenes.add_argument("--validation", type=int, default=VALIDATION_SCENES, help="images that are held out")
    arguments = parser.parse_args()
    if arguments.name == "scenes":
        write_scenes(arguments.images, arguments.training, arguments.validation)
        sys.stdout.write(f"{arguments.training} images to train on, {arguments.validation} held out\n")
        return
    if arguments.images is None and arguments.samples is None:
        of_digits.error("expected --images or --samples")
    digits = load_digits()
    if arguments.images is not None:
        write_digits(arguments.images / "train", digits, digits.training)
        write_digits(arguments.images / "val", digits, digits.held_out)
        sys.stdout.write(f"{len(digits.training)} images to train on, {len(digits.held_out)} held out\n")
    if arguments.samples is not None:
        write_samples(arguments.samples, digits)


if __name__ == "__main__":
    main()
