"""Training and validation images: what is in the folders, and how batches are made of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dmformer.data.annotated import annotated_set, load_labels
from dmformer.data.images import image_set, open_image
from dmformer.errors import UsageError
from dmformer.train.augment import Augmentation, seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from dmformer.data.preprocessing import Preprocessing
    from dmformer.task import Task
    from dmformer.train.recipe import Recipe


@dataclass(frozen=True)
class Labelled:
    """Images with what belongs to each: the index of its class, or the file with those of its pixels."""

    paths: tuple[Path, ...]
    labels: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Data:
    """A data set: names of its classes, images to train on and images to validate on."""

    classes: tuple[str, ...]
    training: Labelled
    validation: Labelled

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names of the classes and files: another one is another data set."""
        names = [*self.classes, *(str(p.name) for p in (*self.training.paths, *self.validation.paths))]
        return hashlib.sha256("\0".join(names).encode()).hexdigest()


def find_data(folder: Path, task: Task, preprocessing: Preprocessing) -> Data:
    """The data set in a folder: ``train`` and ``val`` with a subfolder for each class, or ADE20K's layout.

    Raises:
        UsageError: a part is missing or empty, there are fewer than two classes, or validation has a class of its own.
    """
    if task == "segmentation":
        training, validation = (annotated_set(folder, part) for part in ("training", "validation"))
        parts = [Labelled(each.images, each.annotations) for each in (training, validation)]
        return Data(training.classes, *parts)
    train, val = folder / "train", folder / "val"
    for part in (train, val):
        if not part.is_dir():
            raise UsageError(f"no folder {str(part)!r}; expected train/CLASS/… and val/CLASS/… below {str(folder)!r}")
    classes, held = (sorted(path.name for path in part.iterdir() if path.is_dir()) for part in (train, val))
    if len(classes) < 2:
        raise UsageError(f"{train}: {len(classes)} class folders; expected two or more")
    if strange := sorted(set(held) - set(classes)):
        raise UsageError(f"{val}: {', '.join(strange[:5])} not in {train}; expected classes that are trained on")
    training_set, validation_set = (image_set(part, preprocessing, classes, len(classes)) for part in (train, val))
    assert training_set.labels is not None
    if validation_set.labels is None:
        raise UsageError(f"{val}: no class folders; expected them named as in {train}")
    present = set(training_set.labels.tolist())
    if empty := [name for index, name in enumerate(classes) if index not in present]:
        raise UsageError(f"{train / empty[0]}: no image in it; expected some of every class")
    parts = [Labelled(each.paths, tuple(each.labels.tolist())) for each in (training_set, validation_set)]  # type: ignore[union-attr]
    return Data(tuple(classes), *parts)


class Place(NamedTuple):
    """Which image, and in which pass over the data."""

    epoch: int
    image: int


class StepSampler(Sampler[list[Place]]):
    """The images of each part of each optimizer step, for one process.

    The order of an epoch follows from the seed and the epoch alone. A step has ``accumulate * world`` parts; process
    ``rank`` computes those at rank, rank + world, … so that as many parts are the same parts however they are shared
    out. What is left of an epoch when no whole step is, is left out.
    """

    def __init__(self, images: int, recipe: Recipe, steps: range, rank: int, world: int) -> None:
        self.images, self.recipe, self.steps, self.rank, self.world = images, recipe, steps, rank, world

    def __len__(self) -> int:
        return len(self.steps) * self.recipe.accumulate

    def __iter__(self) -> Iterator[list[Place]]:
        size = self.recipe.batch_size
        part = size // (self.recipe.accumulate * self.world)
        each = self.images // size
        epoch, order = -1, np.empty(0, np.int64)
        for step in self.steps:
            if step // each != epoch:
                epoch = step // each
                order = np.random.default_rng((self.recipe.seed, epoch)).permutation(self.images)
            begin = step % each * size
            for index in range(self.recipe.accumulate):
                start = begin + (index * self.world + self.rank) * part
                yield [Place(epoch, int(image)) for image in order[start : start + part]]


class _Images(ABC):
    """Images that are decoded as they are asked for.

    A file that cannot be read is given back as the exception: raised in a worker process it would lose its one line.
    """

    def __init__(self, labelled: Labelled, preprocessing: Preprocessing, classes: int | None) -> None:
        self.labelled, self.preprocessing, self.classes = labelled, preprocessing, classes

    def __len__(self) -> int:
        return len(self.labelled)

    @abstractmethod
    def read(self, key: Any) -> tuple[NDArray[np.uint8], Any]:
        """One image as uint8 (size, size, C), and its label or labels."""

    def __getitem__(self, key: Any) -> tuple[NDArray[np.uint8], Any] | UsageError:
        try:
            return self.read(key)
        except UsageError as error:
            path = str(self.labelled.paths[key.image if isinstance(key, Place) else key])
            return error if path in str(error) or ": annotation" in str(error) else UsageError(f"{path}: {error}")

    def pixel_labels(self, index: int, image_size: tuple[int, int]) -> NDArray[np.uint8]:
        """The annotation of an image of so many pixels (width, height)."""
        assert self.classes is not None
        path = self.labelled.labels[index]
        labels = load_labels(path, self.classes)
        if labels.shape[::-1] != image_size:
            raise UsageError(f"{path}: annotation of {labels.shape[::-1]} pixels for an image of {image_size}")
        return labels

    def collate(self, rows: Sequence[Any]) -> tuple[Tensor, Tensor] | UsageError:
        """Inputs (N, C, H, W) in float32, and labels in int64: (N,), or (N, H, W) for pixels."""
        for row in rows:
            if isinstance(row, UsageError):
                return row
        inputs = self.preprocessing.normalize(np.stack([pixels for pixels, _ in rows]))
        return torch.from_numpy(inputs), torch.from_numpy(np.stack([label for _, label in rows]).astype(np.int64))


class TrainingImages(_Images, Dataset[Any]):
    """Random views: the one of an image in an epoch follows from the seed, the epoch and the image alone."""

    def __init__(self, labelled: Labelled, recipe: Recipe, preprocessing: Preprocessing, classes: int | None) -> None:
        super().__init__(labelled, preprocessing, classes)
        self.seed, self.augmentation = recipe.seed, Augmentation(recipe, preprocessing)

    def read(self, key: Place) -> tuple[NDArray[np.uint8], Any]:
        """One random view."""
        seed = seed_of(self.seed, *key)
        image = self.preprocessing.upright(open_image(self.labelled.paths[key.image]))
        if self.classes is None:
            return self.augmentation.classification(image, seed), self.labelled.labels[key.image]
        return self.augmentation.segmentation(image, self.pixel_labels(key.image, image.size), seed)


class ValidationImages(_Images, Dataset[Any]):
    """What the network sees at deployment."""

    def read(self, key: int) -> tuple[NDArray[np.uint8], Any]:
        """One image by the preprocessing alone."""
        image = self.preprocessing.upright(open_image(self.labelled.paths[key]))
        pixels = self.preprocessing.pixels(image)
        if self.classes is None:
            return pixels, self.labelled.labels[key]
        return pixels, self.preprocessing.label_pixels(self.pixel_labels(key, image.size))
