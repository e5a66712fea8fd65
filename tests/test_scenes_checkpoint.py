"""The segmentation checkpoint that ships, and its sample images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from dmformer.assets import SCENES, SEGMENTATION_CHECKPOINT
from dmformer.data.annotated import annotated_set, load_labels
from dmformer.data.images import load_pixels
from dmformer.models.checkpoint import Checkpoint, load_checkpoint
from dmformer.train.datasets import SCENE_CLASSES, VALIDATION_SCENES, write_scenes
from dmformer.train.recipe import make_recipe, read_recipe
from dmformer.verify.tasks.segmentation import PixelAccuracy, confusion_matrix, pixel_accuracy
from tests.networks import one_thread

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return load_checkpoint(SEGMENTATION_CHECKPOINT)


def accuracy_on(folder: Path, checkpoint: Checkpoint) -> PixelAccuracy:
    found = annotated_set(folder, "validation")
    model, size = checkpoint.model(), checkpoint.preprocessing
    matrix = np.zeros((len(SCENE_CLASSES),) * 2, np.int64)
    with torch.inference_mode(), one_thread():
        for image, annotation in zip(found.images, found.annotations, strict=True):
            inputs = torch.from_numpy(size.normalize(load_pixels([image], size)))
            labels = size.label_pixels(load_labels(annotation, len(SCENE_CLASSES)))
            matrix += confusion_matrix(model(inputs)[0].argmax(0).numpy(), labels, len(SCENE_CLASSES))
    return pixel_accuracy(matrix)


def test_it_is_small_and_complete(shipped: Checkpoint) -> None:
    assert SEGMENTATION_CHECKPOINT.stat().st_size <= 3_000_000
    assert (shipped.arch, shipped.classes, shipped.notes) == ("dmformer_nano_fpn", SCENE_CLASSES, ())
    assert (shipped.config.task, shipped.config.num_classes) == ("segmentation", 11)


def test_it_was_made_by_the_recipe_that_ships(shipped: Checkpoint) -> None:
    recipe = make_recipe(read_recipe("scenes"))
    assert shipped.training["recipe"] == {"command": "dmformer train", **recipe.to_dict()}
    assert shipped.preprocessing == recipe.preprocessing


@pytest.mark.slow
def test_it_is_as_accurate_as_it_says(shipped: Checkpoint, tmp_path: Path) -> None:
    write_scenes(tmp_path, 0, VALIDATION_SCENES)
    found = accuracy_on(tmp_path, shipped)
    assert found.miou is not None
    assert found.miou > 0.8
    assert found.miou == pytest.approx(shipped.training["held_out_miou"], abs=1e-4)
    assert found.pixel_accuracy == pytest.approx(shipped.training["held_out_pixel_accuracy"], abs=1e-4)


def test_the_samples_are_the_first_of_each_part(shipped: Checkpoint, tmp_path: Path) -> None:
    write_scenes(tmp_path, 32, 8)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert names == sorted(path.relative_to(SCENES) for path in SCENES.rglob("*.png"))
    for part in ("images", "annotations"):
        written, there = (sorted((root / part).rglob("*.png")) for root in (tmp_path, SCENES))
        for one, other in zip(written, there, strict=True):
            np.testing.assert_array_equal(
                load_pixels([one], shipped.preprocessing), load_pixels([other], shipped.preprocessing)
            )
    found = accuracy_on(SCENES, shipped)
    assert found.miou is not None
    assert found.miou > 0.7
