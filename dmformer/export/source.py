"""Which weights an export starts from: a file, the demonstration checkpoint, or seeded random ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dmformer.assets import DEMONSTRATIONS
from dmformer.data.images import list_images
from dmformer.data.labelled import ImageSet
from dmformer.errors import UsageError
from dmformer.models.checkpoint import Checkpoint, default_preprocessing, load_checkpoint
from dmformer.models.dmformer import FEATURES_ONLY, create_model
from dmformer.models.lively import lively_
from dmformer.verify.measures import measure_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dmformer.task import Task


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
    task: Task | None,
    options: Mapping[str, Any],
    open_size: bool,
    image_size: int | None,
    images: Path | None,
    calibration: Path | None,
    seed: int,
) -> Source:
    """A file where one is named; random weights where only an architecture is; the task's demonstration otherwise.

    Task ``features`` takes any network's stages; the others have to be the network's own.

    Raises:
        UsageError: the checkpoint, the architecture, an option or a folder of images cannot be used, or the task is
            another than the network's.
    """
    given = tuple(list_images(images)) if images is not None else ()
    options = {**options, **(FEATURES_ONLY if task == "features" else {})}
    if weights is not None:
        checkpoint = _of_task(load_checkpoint(weights, arch, options, image_size), task, open_size)
        return Source(checkpoint, "checkpoint", None, given, _calibration(calibration, checkpoint))
    if arch is not None:
        checkpoint = _of_task(random_checkpoint(arch, options, image_size, seed), task, open_size)
        return Source(checkpoint, "random", seed, given, _calibration(calibration, checkpoint))
    shipped = DEMONSTRATIONS[task or "classification"]
    checkpoint = _of_task(load_checkpoint(shipped.checkpoint, None, options, image_size), task, open_size)
    images_for_ranges = _calibration(calibration or shipped.calibration, checkpoint)
    return Source(checkpoint, "demonstration", None, given or tuple(list_images(shipped.samples)), images_for_ranges)


def _of_task(checkpoint: Checkpoint, task: Task | None, open_size: bool) -> Checkpoint:
    own = checkpoint.config.task
    if task not in (None, own):
        raise UsageError(f"--task {task} for {checkpoint.arch}, task {own}; expected --task {own} or features")
    return replace(checkpoint, open_size=open_size)


def _calibration(folder: Path | None, checkpoint: Checkpoint) -> ImageSet | None:
    config = checkpoint.config
    if folder is None or config.task == "features":
        return None
    measure = measure_of(config.task, config.num_classes)
    return measure.images(folder, checkpoint.preprocessing, checkpoint.classes, "training")


def random_checkpoint(arch: str, options: Mapping[str, Any], image_size: int | None, seed: int) -> Checkpoint:
    """Untrained weights, loud enough for parity checks to mean something.

    Raises:
        UsageError: no such architecture or option.
    """
    with torch.device("meta"):  # lively_ writes every value, so that nothing needs to be drawn before
        model = create_model(arch, **options)
    room = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(room, assign=True)
    lively_(model, seed)
    preprocessing = default_preprocessing(model.config)
    if image_size is not None:
        preprocessing = preprocessing.resized_to(image_size)
    return Checkpoint(arch, model.config, model.state_dict(), preprocessing)
