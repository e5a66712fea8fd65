"""A small segmentation data set: white digits on dimmed photographs, a class for every pixel, in ADE20K's folders.

Both are real and come with scikit-learn: the digits of ``load_digits`` (see :mod:`dmformer.train.digits`) and the two
photographs of ``load_sample_images`` (by danielbuechele and vultilion, both CC BY 2.0). Validation has
the digits that are held out, and the right quarter of each photograph, which training never shows. The network starts
from the demonstration checkpoint, which has seen the same training digits, as segmentation networks start from
ImageNet. ::

    python -m dmformer.train.scenes --images FOLDER
    dmformer train --recipe scenes --data FOLDER --weights dmformer/assets/dmformer_nano_digits.safetensors --output RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dmformer._optional import require
from dmformer.train.digits import CLASSES as DIGITS
from dmformer.train.digits import load_digits

if TYPE_CHECKING:
    from collections.abc import Sequence

CLASSES = ("background", *(f"digit {name}" for name in DIGITS))
SIDE = 64  # pixels
TRAINING, VALIDATION = 2400, 200  # images
_DIGIT_SIDES = (36, 53)  # pixels, the second excluded
_MOST_DIGITS = 2
_DIMMED = 0.6  # brightness of the photographs, so that white digits stand out
_INK = 0.35  # a pixel belongs to the digit from this share of the darkest ink on
_TRAINING_SHARE = 0.75  # of each photograph, from the left

Pixels = NDArray[np.uint8]


def load_photographs() -> list[Pixels]:
    """The two sample photographs, uint8 (427, 640, 3)."""
    datasets = require("sklearn.datasets", extra="train", purpose="the scenes data set")
    return [np.asarray(image, np.uint8) for image in datasets.load_sample_images().images]


def compose(
    photographs: Sequence[Pixels], digits: Pixels, labels: NDArray[np.int64], seed: int
) -> tuple[Pixels, Pixels]:
    """One scene: an image, uint8 (64, 64, 3), and its annotation (64, 64): 1 is background, 2 … 11 the digits.

    Args:
        photographs: to cut a background from.
        digits: to choose from, uint8 (N, 32, 32, 3), light on dark.
        labels: of the digits.
        seed: of the scene.
    """
    draw = np.random.default_rng(seed)
    photograph = photographs[int(draw.integers(len(photographs)))]
    top, left = (int(draw.integers(side - SIDE + 1)) for side in photograph.shape[:2])
    scene = _DIMMED * photograph[top : top + SIDE, left : left + SIDE].astype(np.float64)
    annotation = np.ones((SIDE, SIDE), np.uint8)
    for _ in range(int(draw.integers(1, _MOST_DIGITS + 1))):
        chosen, side = int(draw.integers(len(digits))), int(draw.integers(*_DIGIT_SIDES))
        y, x = (int(draw.integers(SIDE - side + 1)) for _ in range(2))
        place = slice(y, y + side), slice(x, x + side)
        if (annotation[place] > 1).any():  # not over another digit
            continue
        grey = Image.fromarray(digits[chosen][..., 0]).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(grey, np.float64)[..., None] / 255
        scene[place] = scene[place] * (1 - ink) + draw.uniform(190, 255, 3) * ink  # white, tinted
        annotation[place][ink[..., 0] > _INK] = 2 + labels[chosen]
    return np.round(scene).astype(np.uint8), annotation


def write_scenes(folder: Path, training: int = TRAINING, validation: int = VALIDATION) -> None:
    """Write the data set in ADE20K's layout; the same files for the same numbers, whatever the machine."""
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
            image, annotation = compose(backgrounds, digits.pixels[chosen], digits.labels[chosen], seed)
            Image.fromarray(image).save(images / f"{index:04}.png")
            Image.fromarray(annotation).save(annotations / f"{index:04}.png", optimize=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def main() -> None:
    """Write the data set from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder for the data set")
    parser.add_argument("--training", type=int, default=TRAINING, help="images to train on")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="images that are held out")
    arguments = parser.parse_args()
    write_scenes(arguments.images, arguments.training, arguments.validation)
    sys.stdout.write(f"{arguments.training} images to train on, {arguments.validation} held out\n")


if __name__ == "__main__":
    main()
