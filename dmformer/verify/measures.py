"""How good a network's answers are, by its task: what is kept of them, and what they are scored by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import msgspec
import numpy as np

from dmformer.bundle.manifest import Accuracy
from dmformer.data.annotated import annotated_images, label_maps
from dmformer.data.labelled import image_set
from dmformer.errors import StageFailed, UsageError
from dmformer.task import OUTPUT_NAME
from dmformer.verify.accuracy import paired, points_lost, score
from dmformer.verify.segmentation import confusion_matrix, pixel_accuracy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from dmformer.data.annotated import Part
    from dmformer.data.labelled import ImageSet
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.runtimes.base import Runtime
    from dmformer.task import Task
    from dmformer.verify.accuracy import Paired

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
    def score(self, kept: NDArray[Any], images: ImageSet, torch: NDArray[Any] | None) -> Accuracy:
        """Compare what was kept with the right answers, and with PyTorch's, where there are such.

        Raises:
            UsageError: an annotation cannot be read.
        """

    @abstractmethod
    def points_lost(self, accuracy: Accuracy, reference: Accuracy) -> float:
        """Percentage points lost against PyTorch's accuracy; of agreement where there is no accuracy to lose."""

    def paired(self, kept: NDArray[Any], torch: NDArray[Any], images: ImageSet) -> Paired | None:
        """A test of whether one is better than PyTorch; ``None`` where there is none for the task, or no labels."""
        del kept, torch, images
        return None

    def doubt(self, kept: NDArray[Any], images: ImageSet) -> str | None:
        """Why the right answers may be no such, in a sentence; ``None`` where nothing speaks against them.

        Raises:
            UsageError: an annotation cannot be read.
        """
        del kept, images
        return None

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
            outputs = answer(batch)
            if not all(np.isfinite(array).all() for array in outputs.values()):
                raise StageFailed(f"{who} answers with NaN or infinity; expected finite logits")
            found.append((keep or self.kept)(outputs))
            advance()
        return np.concatenate(found)


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

    def score(self, kept: NDArray[Any], images: ImageSet, torch: NDArray[Any] | None) -> Accuracy:
        """Top-1 and top-5."""
        return score(kept, images.labels, torch)

    def points_lost(self, accuracy: Accuracy, reference: Accuracy) -> float:
        """Of top-1."""
        return points_lost(accuracy, reference, self.classes)

    def paired(self, kept: NDArray[Any], torch: NDArray[Any], images: ImageSet) -> Paired | None:
        """McNemar's exact test."""
        return None if images.labels is None else paired(kept, torch, images.labels)


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

    def score(self, kept: NDArray[Any], images: ImageSet, torch: NDArray[Any] | None) -> Accuracy:
        """Of all pixels of all images together."""
        found = Accuracy(
            images=len(kept), agreement_with_torch=None if torch is None else float((kept == torch).mean())
        )
        if not images.labelled:
            return found
        pixels = pixel_accuracy(self._matrix(kept, images))
        return msgspec.structs.replace(found, miou=pixels.miou, pixel_accuracy=pixels.pixel_accuracy, iou=pixels.iou)

    def doubt(self, kept: NDArray[Any], images: ImageSet) -> str | None:
        """Annotations that are numbered from another start fit best beside the diagonal of the confusion matrix."""
        if not images.labelled:
            return None
        matrix = self._matrix(kept, images)
        total, right = int(matrix.sum()), int(np.trace(matrix))
        for offset, start in ((1, "0"), (-1, "2")):
            beside = int(np.trace(matrix, offset=offset))
            if 2 * beside > total and beside > 2 * right:
                return (
                    f"the classes fit {beside / total:.0%} of the pixels if the annotations number them from {start} "
                    f"on, and {right / total:.0%} as they are read; expected 0 for what is ignored and 1 for the first"
                )
        return None

    def _matrix(self, kept: NDArray[Any], images: ImageSet) -> NDArray[np.int64]:
        """Of all images together, (classes, classes), labels in its rows."""
        matrix = np.zeros((self.classes, self.classes), np.int64)
        for classes, labels in zip(kept, label_maps(images, self.classes), strict=True):
            matrix += confusion_matrix(classes, labels, self.classes)
        return matrix

    def points_lost(self, accuracy: Accuracy, reference: Accuracy) -> float:
        """Of mean intersection over union."""
        if accuracy.miou is not None and reference.miou is not None and reference.miou > 1 / self.classes:
            return 100 * (reference.miou - accuracy.miou)
        assert accuracy.agreement_with_torch is not None
        return 100 * (1 - accuracy.agreement_with_torch)


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
