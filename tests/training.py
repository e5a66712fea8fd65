"""A small recipe and small images to train on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dmformer.models.checkpoint import load_checkpoint
from dmformer.train.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from pathlib import Path

    import torch

COLOURS = {"blue": (40, 60, 220), "red": (220, 60, 40)}
# Everything that is random is on: stochastic depth, RandAugment, mixup and CutMix, erasing, crops and flips.
SMALL = {
    "arch": "dmformer_nano",
    "model": {"widths": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "learning_rate_batch": 8,
    "warmup_epochs": 0.5,
    "drop_path": 0.2,
    "ema_decay": 0.5,
    "preprocessing": {"image_size": 32, "crop_fraction": 1.0},
    "workers": 0,
}
STILL = {"randaugment_operations": 0, "erasing": 0, "mixup": 0, "cutmix": 0, "drop_path": 0, "crop_scale": [1, 1]}


def small(**changes: Any) -> Recipe:
    return make_recipe({**SMALL, **changes})


def toml(values: dict[str, Any]) -> str:
    """Those of the values that are no tables."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).state


def write_colours(folder: Path) -> None:
    """Noise around one of two colours: 16 images of each to train on, 5 to validate on."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 5)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(draw.normal(colour, 40, (36, 44, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
