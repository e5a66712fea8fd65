"""How good a network's answers are, by its task: what is kept of them, and what they are scored by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import msgspec
import numpy as np

from dmformer.bundle.manifest import Accuracy
from dmformer.data.annotated import annotated_images, label_maps
from dmformer.data.images import image_set
from dmformer.errors import StageFailed, UsageError
from dmformer.task import OUTPUT_NAME
from dmformer.verify.tasks.classification import paired, points_lost, score
from dmformer.verify.tasks.segmentation import confusion_matrix, pixel_accuracy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from dmformer.data.annotated import Part
    from dmformer.data.images import ImageSet
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.runtimes.base import Runtime
    from dmformer.task import Task
    from dmformer.verify.tasks.classification import Paired

    Outputs = Mapping[str, NDArray[Any]]
    Keep = Callable[[Outputs], NDArray[Any]]


@dataclass(frozen=True)
class Measure(ABC):
    """Scores a network's answers to sets of images.

    Attributes:
        classes: that it tells apart.
        batch: images that are asked at once.
    """

    classes: int
    batch: ClassVar[int]

    @abstractmethod
    def images(
        self, folder: Path, preprocessing: Preprocessing, names: tuple[str, ...], part: Part = "validation"
    ) -> ImageSet:
        """The images of a folder, with the right answers where the folder has them.

        Args:
            folder: in the layout of the task's data sets, or with images and nothing else.
            preprocessing: of the network.
            names: of its classes; empty where it has none.
            part: of a data set that has several.

        Raises:
            UsageError: there are none, or they do not fit the network.
        """

    @abstractmethod
    def kept(self, outputs: Outputs) -> NDArray[Any]:
        """What of a batch's outputs the scores need, rows first."""

    @abstractmethod
    def tally(self) -> Tally:
        """Nothing counted yet."""

    @abstractmethod
    def truths(self, images: ImageSet) -> Iterator[NDArray[Any] | None]:
        """The right answers to each batch of images, rows first; ``None`` where they are not known.

        Raises:
            UsageError: an annotation cannot be read.
        """

    def score(self, kept: NDArray[Any], images: ImageSet, torch: NDArray[Any] | None) -> Accuracy:
        """Compare what was kept with the right answers, and with PyTorch's, where there are such.

        Raises:
            UsageError: an annotation cannot be read.
        """
        tally = self.tally()
        for number, truth in enumerate(self.truths(images)):
            rows = slice(number * self.batch, (number + 1) * self.batch)
            tally.add(kept[rows], truth, None if torch is None else torch[rows])
        return tally.accuracy()

    @abstractmethod
    def points_lost(self, accuracy: Accuracy, reference: Accuracy) -> float:
        """Percentage points lost against PyTorch's accuracy; of agreement where there is no accuracy to lose."""

    def parts(self, images: ImageSet) -> int:
        """How often asking about images advances."""
        return -(-len(images) // self.batch)

    def answers(
        self, runtime: Runtime, images: ImageSet, advance: Callable[[], object], keep: Keep | None = None
    ) -> NDArray[Any]:
        """What is kept of a runtime's answers to each image.

        Args:
            runtime: not open yet.
            images: at least one.
            advance: told after each batch.
            keep: of a batch's outputs; otherwise what the scores need.

        Raises:
            StageFailed: the runtime failed, or answered with NaN or infinity.
            UnavailableError: the runtime cannot run on this machine.
            UsageError: an image cannot be read.
        """
        with runtime:
            (name,) = (spec.name for spec in runtime.inputs)
            return self.collect(images, lambda batch: runtime.run_rows({name: batch}), advance, runtime.name, keep)

    def collect(
        self,
        images: ImageSet,
        answer: Callable[[NDArray[np.float32]], Outputs],
        advance: Callable[[], object],
        who: str,
        keep: Keep | None = None,
    ) -> NDArray[Any]:
        """What is kept of the answers to each image, made batch by batch (n, C, H, W) -> outputs by name.

        Raises:
            StageFailed: an answer is NaN or infinite; the message says whose.
            UsageError: an image cannot be read.
        """
        found = []
        for batch in images.batches(self.batch):
            found.append((keep or self.kept)(finite(answer(batch), who)))
            advance()
        return np.concatenate(found)


def finite(outputs: Outputs, who: str) -> Outputs:
    """The same outputs.

    Raises:
        StageFailed: one is NaN or infinite; the message says whose.
    """
    if not all(np.isfinite(array).all() for array in outputs.values()):
        raise StageFailed(f"{who} answers with NaN or infinity; expected finite logits")
    return outputs


class Tally(ABC):
    """How good answers are, counted batch by batch."""

    @abstractmethod
    def add(self, kept: NDArray[Any], truth: NDArray[Any] | None, torch: NDArray[Any] | None) -> None:
        """Count what was kept of the answers to a batch, beside the right answers and PyTorch's, where there are such.

        Args:
            kept: of a batch's outputs, rows first.
            truth: for the same rows.
            torch: what is kept of PyTorch's outputs for the same rows.
        """

    @abstractmethod
    def accuracy(self) -> Accuracy:
        """Of all that was counted."""

    def paired(self) -> Paired | None:
        """A test of whether PyTorch is better; ``None`` where there is none for the task, no labels, or no PyTorch."""
        return None

    def doubt(self) -> str | None:
        """Why the right answers may be no such, in a sentence; ``None`` where nothing speaks against them."""
        return None


class Classification(Measure):
    """Top-1 and top-5; logits (N, classes) are kept."""

    batch = 8

    def images(
        self, folder: Path, preprocessing: Preprocessing, names: tuple[str, ...], part: Part = "validation"
    ) -> ImageSet:
        """In subfolders named after their classes, or loose."""
        del part
        return image_set(folder, preprocessing, names, self.classes)

    def kept(self, outputs: Outputs) -> NDArray[Any]:
        """Logits (n, classes)."""
        return outputs[OUTPUT_NAME]

    def tally(self) -> Tally:
        """Logits are few, and kept."""
        return _Logits()

    def truths(self, images: ImageSet) -> Iterator[NDArray[Any] | None]:
        """Indices of classes (n,)."""
        for start in range(0, len(images), self.batch):
            yield None if images.labels is None else images.labels[start : start + self.batch]

    def points_lost(self, accuracy: Accuracy, reference: Accuracy) -> float:
        """Of top-1."""
        return points_lost(accuracy, reference, self.classes)


class _Logits(Tally):
    """Top-1 and top-5, and McNemar's exact test."""

    def __init__(self) -> None:
        self._found: tuple[list[NDArray[Any]], list[NDArray[Any]], list[NDArray[Any]]] = ([], [], [])

    def add(self, kept: NDArray[Any], truth: NDArray[Any] | None, torch: NDArray[Any] | None) -> None:
        for found, arrays in zip(self._found, (kept, truth, torch), strict=True):
            if arrays is not None:
                found.append(arrays)

    def _joined(self) -> list[Any]:
        """Logits, labels and PyTorch's logits, the latter two where there are such."""
        return [np.concatenate(found) if found else None for found in self._found]

    def accuracy(self) -> Accuracy:
        return score(*self._joined())

    def paired(self) -> Paired | None:
        logits, labels, torch = self._joined()
        return None if labels is None or torch is None else paired(logits, torch, labels)


class Segmentation(Measure):
    """Mean intersection over union; the class of each pixel (N, H, W) is kept.

    There is no test of pairs: neighbouring pixels are not independent.
    """

    batch = 1  # there are enough pixels in one image for every core

    def images(
        self, folder: Path, preprocessing: Preprocessing, names: tuple[str, ...], part: Part = "validation"
    ) -> ImageSet:
        """In ADE20K's layout, or loose."""
        return annotated_images(folder, preprocessing, names, self.classes, part)

    def kept(self, outputs: Outputs) -> NDArray[Any]:
        """Classes (n, H, W); ties go to the lower one."""
        classes: NDArray[Any] = outputs[OUTPUT_NAME].argmax(1).astype(np.min_scalar_type(self.classes))
        return classes

    def tally(self) -> Tally:
        """Nothing is kept but a confusion matrix."""
        return _Pixels(self.classes)

    def truths(self, images: ImageSet) -> Iterator[NDArray[Any] | None]:
        """Labels of pixels (1, H, W), read one after the other."""
        if not images.annotations:
            yield from [None] * len(images)
            return
        for labels in label_maps(images, self.classes):
            yield labels[None]

    def points_lost(self, accuracy: Accuracy, reference: Accuracy) -> float:
        """Of mean intersection over union."""
        if accuracy.miou is not None and reference.miou is not None and reference.miou > 1 / self.classes:
            return 100 * (reference.miou - accuracy.miou)
        assert accuracy.agreement_with_torch is not None
        return 100 * (1 - accuracy.agreement_with_torch)


class _Pixels(Tally):
    """Intersection over union, from a confusion matrix (classes, classes) with labels in its rows."""

    def __init__(self, classes: int) -> None:
        self._matrix = np.zeros((classes, classes), np.int64)
        self._images = self._pixels = self._alike = 0
        self._labelled = self._compared = False

    def add(self, kept: NDArray[Any], truth: NDArray[Any] | None, torch: NDArray[Any] | None) -> None:
        self._images += len(kept)
        self._pixels += kept.size
        if torch is not None:
            self._compared = True
            self._alike += int((kept == torch).sum())
        if truth is not None:
            self._labelled = True
            self._matrix += confusion_matrix(kept, truth, len(self._matrix))

    def accuracy(self) -> Accuracy:
        agreement = self._alike / self._pixels if self._compared else None
        found = Accuracy(images=self._images, agreement_with_torch=agreement)
        if not self._labelled:
            return found
        pixels = pixel_accuracy(self._matrix)
        return msgspec.structs.replace(found, miou=pixels.miou, pixel_accuracy=pixels.pixel_accuracy, iou=pixels.iou)

    def doubt(self) -> str | None:
        """Annotations that are numbered from another start fit best beside the diagonal of the confusion matrix."""
        total, right = int(self._matrix.sum()), int(np.trace(self._matrix))
        for offset, start in ((1, "0"), (-1, "2")):
            beside = int(np.trace(self._matrix, offset=offset))
            if 2 * beside > total and beside > 2 * right:
                return (
                    f"the classes fit {beside / total:.0%} of the pixels if the annotations number them from {start} "
                    f"on, and {right / total:.0%} as they are read; expected 0 for what is ignored and 1 for the first"
                )
        return None


_MEASURES: dict[str, type[Measure]] = {"classification": Classification, "segmentation": Segmentation}


def measure_of(task: Task, classes: int) -> Measure:
    """How a network of a task is scored.

    Raises:
        UsageError: features decide nothing that could be right or wrong.
    """
    if task not in _MEASURES:
        raise UsageError(
            f"task {task}: accuracy needs classes; expected a network with its head (verify compares maps)"
        )
    return _MEASURES[task](classes)
