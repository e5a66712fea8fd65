"""Training and validation images: the data set in a folder, and how batches are made of it."""

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
from dmformer.data.description import plain_name
from dmformer.data.images import class_folders, image_set, open_image
from dmformer.errors import UsageError
from dmformer.files import hash_file
from dmformer.train.augment import Augmentation, seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from dmformer.data.annotated import Part
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.task import Task
    from dmformer.train.recipe import Recipe


_ANNOTATED_PARTS: tuple[Part, Part] = ("training", "validation")


@dataclass(frozen=True)
class LabelledImages:
    """Paths of images, with a label of each: the index of its class, or the file with the classes of its pixels."""

    paths: tuple[Path, ...]
    labels: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class DataSet:
    """A data set: names of its classes, images to train on and to validate on, and sentences about what is no part."""

    classes: tuple[str, ...]
    training: LabelledImages
    validation: LabelledImages
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the names of classes and files, by which two data sets are told apart."""
        names = [*self.classes, *(str(p.name) for p in (*self.training.paths, *self.validation.paths))]
        return hashlib.sha256("\0".join(map(plain_name, names)).encode()).hexdigest()


def find_data_set(folder: Path, task: Task, preprocessing: Preprocessing) -> DataSet:
    """Find the data set in a folder: ``train`` and ``val`` with a subfolder for each class, or ADE20K's layout.

    Raises:
        UsageError: a part is missing or empty, there are fewer than two classes, or validation has a class of its own.
    """
    if task == "segmentation":
        training, validation = (annotated_set(folder, part) for part in _ANNOTATED_PARTS)
        return DataSet(
            training.classes,
            LabelledImages(training.images, training.annotations),
            LabelledImages(validation.images, validation.annotations),
            (*training.notes, *validation.notes),
        )
    train, val = folder / "train", folder / "val"
    for part in (train, val):
        if not part.is_dir():
            raise UsageError(f"no folder {str(part)!r}; expected train/CLASS/… and val/CLASS/… below {str(folder)!r}")
    classes, held = class_folders(train), class_folders(val)
    if len(classes) < 2:
        raise UsageError(f"{train}: {len(classes)} class folders; expected two or more")
    if strange := sorted(set(held) - set(classes)):
        raise UsageError(f"{val}: {', '.join(strange[:5])} not in {train}; expected classes that are trained on")
    training_set, validation_set = (image_set(part, preprocessing, classes, len(classes)) for part in (train, val))
    if validation_set.labels is None:
        raise UsageError(f"{val}: no class folders; expected them named as in {train}")
    assert training_set.labels is not None
    present = set(training_set.labels.tolist())
    if empty := [name for index, name in enumerate(classes) if index not in present]:
        raise UsageError(f"{train / empty[0]}: no image in it; expected some of every class")
    return DataSet(
        tuple(classes),
        LabelledImages(training_set.paths, tuple(training_set.labels.tolist())),
        LabelledImages(validation_set.paths, tuple(validation_set.labels.tolist())),
        (*training_set.notes, *validation_set.notes),
    )


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
    """Images that are decoded when they are read.

    A file that cannot be read gives the exception as its item: raised in a worker process, it would lose its one line.
    """

    def __init__(self, images: LabelledImages, preprocessing: Preprocessing, classes: int | None) -> None:
        self.images, self.preprocessing, self.classes = images, preprocessing, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Any) -> tuple[NDArray[np.uint8], Any] | UsageError:
        index = key.image if isinstance(key, Place) else key
        try:
            return self.view(key, *self._read(index))
        except UsageError as error:
            path = str(self.images.paths[index])
            return error if path in str(error) or ": annotation" in str(error) else UsageError(f"{path}: {error}")

    def _read(self, index: int) -> tuple[Image, Any]:
        image, label = self.preprocessing.upright(open_image(self.images.paths[index])), self.images.labels[index]
        if self.classes is None:
            return image, label
        labels = load_labels(label, self.classes)  # the label is a file
        if labels.shape[::-1] != image.size:
            raise UsageError(f"{label}: annotation of {labels.shape[::-1]} pixels for an image of {image.size}")
        return image, labels

    def digest(self, index: int, part: int) -> NDArray[np.int64]:
        """Return the SHA-256 of an image's file, with its annotation's, place and part of the data set: four numbers.

        Raises:
            UsageError: a file cannot be read.
        """
        digest = hashlib.sha256(f"{part} {index}".encode())
        label = self.images.labels[index]
        try:
            for path in (self.images.paths[index], *([label] if isinstance(label, Path) else [])):
                digest.update(hash_file(path)[0].encode())
        except OSError as error:
            raise UsageError(f"{error.filename}: cannot be read: {error.strerror}; expected an image") from error
        return np.frombuffer(digest.digest(), np.int64)

    @abstractmethod
    def view(self, key: Any, image: Image, label: Any) -> tuple[NDArray[np.uint8], Any]:
        """Return what the network sees of an image, uint8 (size, size, C), with its class or labels (size, size)."""

    def collate(self, rows: Sequence[Any]) -> tuple[Tensor, Tensor] | UsageError:
        """Make a batch: inputs (N, C, H, W) in float32, and labels in int64: (N,), or (N, H, W) for pixels."""
        for row in rows:
            if isinstance(row, UsageError):
                return row
        inputs = self.preprocessing.normalize(np.stack([pixels for pixels, _ in rows]))
        return torch.from_numpy(inputs), torch.from_numpy(np.stack([label for _, label in rows]).astype(np.int64))


class TrainingImages(_Images, Dataset[Any]):
    """Random views of images; the seed, the epoch and the image alone decide each view."""

    def __init__(
        self, images: LabelledImages, recipe: Recipe, preprocessing: Preprocessing, classes: int | None
    ) -> None:
        super().__init__(images, preprocessing, classes)
        self.seed, self.augmentation = recipe.seed, Augmentation(recipe, preprocessing)

    def view(self, key: Place, image: Image, label: Any) -> tuple[NDArray[np.uint8], Any]:
        """Draw the random view of an image in an epoch."""
        seed = seed_of(self.seed, *key)
        if self.classes is None:
            return self.augmentation.classification(image, seed), label
        return self.augmentation.segmentation(image, label, seed)


class ValidationImages(_Images, Dataset[Any]):
    """Images as the network sees them at deployment."""

    def view(self, key: int, image: Image, label: Any) -> tuple[NDArray[np.uint8], Any]:
        """Apply the preprocessing alone."""
        del key
        pixels = self.preprocessing.pixels(image)
        return pixels, label if self.classes is None else self.preprocessing.label_pixels(label)
