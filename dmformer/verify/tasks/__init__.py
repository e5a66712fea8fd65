"""How good a network's answers are, by its task: which part of them is kept, and how it is scored."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dmformer.errors import StageFailed, UsageError
from dmformer.task import class_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from dmformer.bundle.manifest import Accuracy
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
    """How a network's answers to sets of images are scored.

    Attributes:
        classes: how many the network tells apart.
        batch: how many images are asked at once.
    """

    classes: int
    batch: ClassVar[int]

    @abstractmethod
    def images(
        self, folder: Path, preprocessing: Preprocessing, names: tuple[str, ...], part: Part = "validation"
    ) -> ImageSet:
        """Find the images of a folder, with the right answers where the folder has them.

        Args:
            folder: in the layout of the task's data sets, or with images and nothing else.
            preprocessing: of the network.
            names: of the network's classes; empty where they have none.
            part: of a data set that has several.

        Raises:
            UsageError: there are none, or they do not fit the network.
        """

    @abstractmethod
    def keep(self, outputs: Outputs) -> NDArray[Any]:
        """Keep of a batch's outputs what the scores need, rows first."""

    @abstractmethod
    def new_score(self) -> RunningScore:
        """Make a score that has counted nothing yet."""

    @abstractmethod
    def labels(self, images: ImageSet) -> Iterator[NDArray[Any] | None]:
        """Give the right answers to each batch of images, rows first; ``None`` where they are not known.

        Raises:
            UsageError: an annotation cannot be read.
        """

    def score(self, kept: NDArray[Any], images: ImageSet, torch: NDArray[Any] | None) -> RunningScore:
        """Compare what was kept with the right answers, and with PyTorch's, where there are such.

        Raises:
            UsageError: an annotation cannot be read.
        """
        score = self.new_score()
        for number, labels in enumerate(self.labels(images)):
            rows = slice(number * self.batch, (number + 1) * self.batch)
            score.add(kept[rows], labels, None if torch is None else torch[rows])
        return score

    @abstractmethod
    def points_lost(self, accuracy: Accuracy, reference: Accuracy) -> float:
        """Count the percentage points lost against PyTorch's accuracy; of agreement where there is none to lose."""

    def parts(self, images: ImageSet) -> int:
        """Count the batches of a set of images: how often asking for answers to them advances."""
        return -(-len(images) // self.batch)

    def answers(
        self, runtime: Runtime, images: ImageSet, advance: Callable[[], object], keep: Keep | None = None
    ) -> NDArray[Any]:
        """Ask a runtime for its answers to each image, and keep a part of them.

        Args:
            runtime: not open yet.
            images: at least one.
            advance: told after each batch.
            keep: gives the part of a batch's outputs that is kept; otherwise what the scores need.

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
        """Ask for answers to each image, batch by batch, and keep a part of them.

        Args:
            images: at least one.
            answer: gives outputs by name for a batch (n, C, H, W).
            advance: told after each batch.
            who: answers, for messages.
            keep: as for :meth:`answers`.

        Raises:
            StageFailed: an answer is NaN or infinite; the message says whose.
            UsageError: an image cannot be read.
        """
        parts = []
        for batch in images.batches(self.batch):
            parts.append((keep or self.keep)(finite(answer(batch), who)))
            advance()
        return np.concatenate(parts)


def finite(outputs: Outputs, who: str) -> Outputs:
    """Pass outputs on that are finite.

    Raises:
        StageFailed: one is NaN or infinite; the message says whose.
    """
    if not all(np.isfinite(array).all() for array in outputs.values()):
        raise StageFailed(f"{who} answers with NaN or infinity; expected finite logits")
    return outputs


class RunningScore(ABC):
    """How good answers are, counted batch by batch."""

    @abstractmethod
    def add(self, kept: NDArray[Any], labels: NDArray[Any] | None, torch: NDArray[Any] | None) -> None:
        """Count a batch.

        Args:
            kept: what was kept of the outputs, rows first.
            labels: the right answers for the same rows, where they are known.
            torch: what was kept of PyTorch's outputs for the same rows, where it was asked.
        """

    @abstractmethod
    def accuracy(self) -> Accuracy:
        """Score all batches that were counted."""

    def paired(self) -> Paired | None:
        """Test whether PyTorch is better; ``None`` where the task has no such test, without labels or PyTorch."""
        return None

    def label_doubt(self, folders: Sequence[str] = ()) -> str | None:
        """Say in a sentence why the labels may be wrong; ``None`` where nothing speaks against them.

        Args:
            folders: of the images, as :class:`~dmformer.data.images.ImageSet` has them.
        """
        del folders
        return None


# Where the measure of a task is, as ``module:Class``.
_MEASURES = {
    "classification": "dmformer.verify.tasks.classification:Classification",
    "segmentation": "dmformer.verify.tasks.segmentation:Segmentation",
}


def measure_of(task: Task, classes: int) -> Measure:
    """Make the measure by which a network of a task is scored.

    Raises:
        UsageError: the task is features, which decide nothing that could be right or wrong.
    """
    if task not in _MEASURES:
        raise UsageError(
            f"task {task}: accuracy needs classes; expected a network with its head (verify compares maps)"
        )
    module, _, name = _MEASURES[task].partition(":")
    measure: Measure = getattr(importlib.import_module(module), name)(class_count(task, classes))
    return measure
