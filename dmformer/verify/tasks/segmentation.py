"""Classes of pixels: accuracy, and agreement with PyTorch.

It uses NumPy only, for it runs on devices. The measures are those of PASCAL VOC and ADE20K: one confusion matrix over
all pixels of all images, from which the intersection over union of each class follows, its mean over classes, and the
share of pixels that are right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

from dmformer.bundle.manifest import Accuracy
from dmformer.data.annotated import IGNORED, annotated_images, label_maps
from dmformer.errors import UsageError
from dmformer.task import OUTPUT_NAME
from dmformer.verify.tasks import Measure, RunningScore
from dmformer.verify.tasks.order import Counts, better_order, shifted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.data.annotated import Part
    from dmformer.data.images import ImageSet
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.verify.tasks import Outputs


class Segmentation(Measure):
    """Mean intersection over union; the class of each pixel (N, H, W) is kept.

    There is no test of pairs: neighbouring pixels are not independent.
    """

    batch = 1  # there are enough pixels in one image for every core

    def images(
        self, folder: Path, preprocessing: Preprocessing, names: tuple[str, ...], part: Part = "validation"
    ) -> ImageSet:
        """Find images in ADE20K's layout, or loose ones."""
        return annotated_images(folder, preprocessing, names, self.classes, part)

    def keep(self, outputs: Outputs) -> NDArray[Any]:
        """Keep the class of each pixel (n, H, W); ties go to the lower one."""
        classes: NDArray[Any] = outputs[OUTPUT_NAME].argmax(1).astype(np.min_scalar_type(self.classes))
        return classes

    def new_score(self) -> RunningScore:
        """Make a score that keeps nothing but a confusion matrix."""
        return _PixelScore(self.classes)

    def labels(self, images: ImageSet) -> Iterator[NDArray[Any] | None]:
        """Give labels of pixels (1, H, W), read one image after the other."""
        if not images.annotations:
            yield from [None] * len(images)
            return
        for label_map in label_maps(images, self.classes):
            yield label_map[None]

    def points_lost(self, accuracy: Accuracy, reference: Accuracy) -> float:
        """Count the percentage points of mean intersection over union lost against PyTorch's.

        Without labels, and where PyTorch itself may be guessing, points of agreement with PyTorch are counted.
        """
        if accuracy.miou is not None and reference.miou is not None and reference.miou > 1 / self.classes:
            return 100 * (reference.miou - accuracy.miou)
        assert accuracy.agreement_with_torch is not None
        return 100 * (1 - accuracy.agreement_with_torch)


class _PixelScore(RunningScore):
    """Intersection over union, from a confusion matrix (classes, classes) with labels in its rows."""

    def __init__(self, classes: int) -> None:
        self._matrix = np.zeros((classes, classes), np.int64)
        self._images = self._pixels = self._alike = 0
        self._labelled = self._compared = False

    def add(self, kept: NDArray[Any], labels: NDArray[Any] | None, torch: NDArray[Any] | None) -> None:
        self._images += len(kept)
        self._pixels += kept.size
        if torch is not None:
            self._compared = True
            self._alike += int((kept == torch).sum())
        if labels is not None:
            self._labelled = True
            self._matrix += confusion_matrix(kept, labels, len(self._matrix))

    def accuracy(self) -> Accuracy:
        agreement = self._alike / self._pixels if self._compared else None
        found = Accuracy(images=self._images, agreement_with_torch=agreement)
        if not self._labelled:
            return found
        pixels = pixel_accuracy(self._matrix)
        return msgspec.structs.replace(found, miou=pixels.miou, pixel_accuracy=pixels.pixel_accuracy, iou=pixels.iou)

    def label_doubt(self, folders: Sequence[str] = ()) -> str | None:
        """Say where annotations are numbered from another start: they fit best beside the matrix's diagonal."""
        del folders
        labels, answers = np.nonzero(self._matrix)
        starts = [shifted(len(self._matrix), by, start) for by, start in ((1, "0"), (-1, "2"))]
        better = better_order(Counts(labels, answers, self._matrix[labels, answers]), starts)
        if better is None:
            return None
        return (
            f"the classes fit {better.fits:.0%} of the pixels if the annotations number them from {better.order.name} "
            f"on, and {better.as_read:.0%} as they are read; expected 0 for what is ignored and 1 for the first"
        )


class PixelAccuracy(Struct, frozen=True, kw_only=True):
    """How well pixels are labelled; shares from 0 to 1.

    Attributes:
        pixels: how many have a label that counts.
        pixel_accuracy: share of those that are right; ``None`` where there are none.
        miou: mean of ``iou`` over the classes that have one; ``None`` where none has.
        iou: intersection over union of each class; ``None`` for a class that occurs neither in the labels nor in the
            answers.
    """

    pixels: int
    pixel_accuracy: float | None
    miou: float | None
    iou: tuple[float | None, ...]


class PixelAgreement(Struct, frozen=True, kw_only=True):
    """How many pixels two sets of answers label alike.

    There is no interval: neighbouring pixels are not independent, so that one from their number would be far too
    narrow. ``lowest`` shows how much images differ instead.

    Attributes:
        images: how many.
        pixels: of all images together.
        agreement: share of pixels with equal classes (0 to 1).
        lowest: the same of the image where it is smallest.
        flips: pixels with another class.
        below_noise: those of them whose margin is so small that the two may part within the limit of parity.
        worst_margin: by how much the other preferred its own class where they differ, at most; in units of the logits.
        miou: mean intersection over union, with the other's classes as the truth.
    """

    images: int
    pixels: int
    agreement: float
    lowest: float
    flips: int
    below_noise: int
    worst_margin: float
    miou: float


def confusion_matrix(
    predicted: NDArray[Any], labels: NDArray[Any], classes: int, ignored: int = IGNORED
) -> NDArray[np.int64]:
    """Count pixels by label and answer: (classes, classes), rows are labels, columns answers.

    Matrices of several images add up.

    Args:
        predicted: integers 0 to ``classes - 1``, of any shape.
        labels: integers of the same shape, 0 to ``classes - 1`` or ``ignored``.
        classes: how many there are.
        ignored: the label of pixels that are left out, whatever was answered there.

    Raises:
        UsageError: shapes differ, or a value is no class.
    """
    if predicted.shape != labels.shape:
        raise UsageError(f"answers of shape {predicted.shape} for labels of shape {labels.shape}; expected the same")
    for name, values in (("answer", predicted), ("label", labels)):
        if not np.issubdtype(values.dtype, np.integer):
            raise UsageError(f"{name}s of type {values.dtype}; expected integers")
    counted = labels != ignored
    found, wanted = predicted[counted].astype(np.int64), labels[counted].astype(np.int64)
    for name, values in (("answer", found), ("label", wanted)):
        if values.size and (values.min() < 0 or values.max() >= classes):
            strange = values.min() if values.min() < 0 else values.max()
            raise UsageError(f"{name} {strange} is no class; expected 0 to {classes - 1}, or {ignored} in labels")
    counts = np.bincount(wanted * classes + found, minlength=classes * classes)
    return counts.reshape(classes, classes)


def pixel_accuracy(matrix: NDArray[np.int64]) -> PixelAccuracy:
    """Score a confusion matrix (classes, classes) with labels in its rows."""
    right = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - right
    iou = tuple(float(r) / float(u) if u else None for r, u in zip(right, union, strict=True))
    present = [value for value in iou if value is not None]
    pixels = int(matrix.sum())
    return PixelAccuracy(
        pixels=pixels,
        pixel_accuracy=float(right.sum()) / pixels if pixels else None,
        miou=float(np.mean(present)) if present else None,
        iou=iou,
    )


def pixel_agreement(candidate: NDArray[Any], expected: NDArray[Any], limit: float = 0.0) -> PixelAgreement:
    """Compare the classes that two sets of logits (N, classes, H, W) choose; ties go to the lower class.

    Args:
        candidate: a runtime's.
        expected: PyTorch's.
        limit: how far any value may be from PyTorch's; two values may part by twice as much.

    Raises:
        UsageError: shapes differ, or there is nothing to compare.
    """
    if candidate.shape != expected.shape or candidate.ndim != 4 or not candidate.size:
        raise UsageError(
            f"logits of shapes {candidate.shape} and {expected.shape}; expected the same, (N, classes, H, W)"
        )
    chosen, wanted = candidate.argmax(1)[:, None], expected.argmax(1)[:, None]  # (N, 1, H, W)
    flipped = chosen != wanted
    margin = np.take_along_axis(expected, wanted, 1) - np.take_along_axis(expected, chosen, 1)
    flips = int(flipped.sum())
    matrix = confusion_matrix(chosen, wanted, candidate.shape[1], ignored=-1)
    miou = pixel_accuracy(matrix).miou
    assert miou is not None  # there are pixels
    return PixelAgreement(
        images=len(expected),
        pixels=flipped.size,
        agreement=1 - flips / flipped.size,
        lowest=float(1 - flipped.mean((1, 2, 3)).max()),
        flips=flips,
        below_noise=int((flipped & (margin <= 2 * limit)).sum()),
        worst_margin=float(margin.max(where=flipped, initial=0.0)),
        miou=miou,
    )
