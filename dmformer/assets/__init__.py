"""The demonstration checkpoints and the images that ship with the package."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
DEMONSTRATION_CHECKPOINT = _HERE / "dmformer_nano_digits.safetensors"
SAMPLE_IMAGES = _HERE / "digits"  # held out
CALIBRATION_IMAGES = _HERE / "digits-training"  # the network was trained on these; in folders named after the class
SEGMENTATION_CHECKPOINT = _HERE / "dmformer_nano_fpn_scenes.safetensors"
SEGMENTATION_SAMPLES = _HERE / "scenes"  # held out; in ADE20K's folders, with annotations
