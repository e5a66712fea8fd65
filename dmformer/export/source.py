"""Which weights an export starts from: a file, the demonstration checkpoint, or seeded random ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dmformer.assets import CALIBRATION_IMAGES, DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from dmformer.data.images import list_images
from dmformer.data.labelled import ImageSet, image_set
from dmformer.errors import UsageError
from dmformer.models.checkpoint import Checkpoint, default_preprocessing, load_checkpoint
from dmformer.models.dmformer import create_model
from dmformer.models.lively import lively_

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Source:
    """A checkpoint, where it came from, and real images to compare and to calibrate on, where there are some."""

    checkpoint: Checkpoint
    weights: Literal["checkpoint", "demonstration", "random"]
    seed: int | None
    images: tuple[Path, ...]
    calibration: ImageSet | None


def find_source(
    weights: Path | None,
    arch: str | None,
    options: Mapping[str, Any],
    image_size: int | None,
    images: Path | None,
    calibration: Path | None,
    seed: int,
) -> Source:
    """A file where one is named; random weights where only an architecture is; the demonstration where neither is.

    Raises:
        UsageError: the checkpoint, the architecture, an option or the image folder cannot be used; or the network is
            no classifier, which bundles cannot hold yet.
    """
    given = tuple(list_images(images)) if images is not None else ()
    if weights is not None:
        checkpoint = _classifier(load_checkpoint(weights, arch, options, image_size))
        return Source(checkpoint, "checkpoint", None, given, _calibration(calibration, checkpoint))
    if arch is not None:
        checkpoint = _classifier(random_checkpoint(arch, options, image_size, seed))
        return Source(checkpoint, "random", seed, given, _calibration(calibration, checkpoint))
    checkpoint = load_checkpoint(DEMONSTRATION_CHECKPOINT, None, options, image_size)
    images_for_ranges = _calibration(calibration or CALIBRATION_IMAGES, checkpoint)
    return Source(checkpoint, "demonstration", None, given or tuple(list_images(SAMPLE_IMAGES)), images_for_ranges)


def _classifier(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.config.task != "classification":
        raise UsageError(f"{checkpoint.arch}, task {checkpoint.config.task}; bundles hold classifiers only as yet")
    return checkpoint


def _calibration(folder: Path | None, checkpoint: Checkpoint) -> ImageSet | None:
    if folder is None:
        return None
    return image_set(folder, checkpoint.preprocessing, checkpoint.classes, checkpoint.config.num_classes)


def random_checkpoint(arch: str, options: Mapping[str, Any], image_size: int | None, seed: int) -> Checkpoint:
    """Untrained weights, loud enough for parity checks to mean something.

    Raises:
        UsageError: no such architecture or option.
    """
    with torch.device("meta"):  # lively_ writes every value, so that nothing needs to be drawn before
        model = create_model(arch, **options)
    lively_(model.to_empty(device="cpu"), seed)
    preprocessing = default_preprocessing(model.config)
    if image_size is not None:
        preprocessing = preprocessing.resized_to(image_size)
    return Checkpoint(arch, model.config, model.state_dict(), preprocessing)
