"""The demonstration checkpoints and the images that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent


class Demonstration(NamedTuple):
    """A trained checkpoint, images that it has not seen, and some that it was trained on, to calibrate with."""

    checkpoint: Path
    samples: Path
    calibration: Path | None


DEMONSTRATION_CHECKPOINT = _HERE / "dmformer_nano_digits.safetensors"
SAMPLE_IMAGES = _HERE / "digits"  # held out
CALIBRATION_IMAGES = _HERE / "digits-training"  # the network was trained on these; in folders named after the class
SEGMENTATION_CHECKPOINT = _HERE / "dmformer_nano_fpn_scenes.safetensors"
SCENES = _HERE / "scenes"  # in ADE20K's folders, with annotations; the network was trained on the training part

DEMONSTRATIONS = {
    "classification": Demonstration(DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES, CALIBRATION_IMAGES),
    "segmentation": Demonstration(SEGMENTATION_CHECKPOINT, SCENES / "images" / "validation", SCENES),
    "features": Demonstration(DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES, None),
}
