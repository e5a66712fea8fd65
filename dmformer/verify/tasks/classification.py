"""Classes of images: accuracy, and whether a runtime chooses the classes that PyTorch chooses.

It uses NumPy only, for it runs on devices.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from dmformer.bundle.manifest import Accuracy
from dmformer.data.images import image_set
from dmformer.task import OUTPUT_NAME, class_logits
from dmformer.verify.tasks import Measure, RunningScore
from dmformer.verify.tasks.order import NO_CLASS, Counts, better_order, likely_order, numbered_orders

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.data.annotated import Part
    from dmformer.data.images import ImageSet
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.verify.tasks import Outputs


_MOST_MOVED = 3  # folders that a sentence names
_NORMAL_97_5 = 1.959964  # the quantile that leaves 5 % outside on both sides


class Classification(Measure):
    """Top-1 and top-5; logits (N, classes) are kept."""

    batch = 8

    def images(
        self, folder: Path, preprocessing: Preprocessing, names: tuple[str, ...], part: Part = "validation"
    ) -> ImageSet:
        """Find images in subfolders named after their classes, or loose ones."""
        del part
        return image_set(folder, preprocessing, names, self.classes)

    def keep(self, outputs: Outputs) -> NDArray[Any]:
        """Keep the logits (n, classes)."""
        return outputs[OUTPUT_NAME]

    def new_score(self) -> RunningScore:
        """Make a score that keeps the logits, for they are few."""
        return _ClassScore(self.classes)

    def labels(self, images: ImageSet) -> Iterator[NDArray[Any] | None]:
        """Give indices of classes (n,)."""
        for start in range(0, len(images), self.batch):
            yield None if images.labels is None else images.labels[start : start + self.batch]

    def points_lost(self, accuracy: Accuracy, reference: Accuracy) -> float:
        """Count the percentage points of top-1 accuracy lost against PyTorch's."""
        return points_lost(accuracy, reference, self.classes)


class _ClassScore(RunningScore):
    """Top-1 and top-5 accuracy, and McNemar's exact test."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._batches: tuple[list[NDArray[Any]], list[NDArray[Any]], list[NDArray[Any]]] = ([], [], [])

    def add(self, kept: NDArray[Any], labels: NDArray[Any] | None, torch: NDArray[Any] | None) -> None:
        for batches, batch in zip(self._batches, (kept, labels, torch), strict=True):
            if batch is not None:
                batches.append(batch)

    def _joined(self) -> list[Any]:
        """Logits, labels and PyTorch's logits, the latter two where there are such."""
        return [np.concatenate(batches) if batches else None for batches in self._batches]

    def accuracy(self) -> Accuracy:
        return score(*self._joined())

    def paired(self) -> Paired | None:
        logits, labels, torch = self._joined()
        return None if labels is None or torch is None else paired(logits, torch, labels)

    def label_doubt(self, folders: Sequence[str] = ()) -> str | None:
        """Say where the folders are in another order than the classes, and which folder seems to be which class."""
        logits, labels, _ = self._joined()
        if labels is None:
            return None
        counts = Counts.of(labels, class_logits(logits).argmax(1))
        better = better_order(counts, numbered_orders(self._classes), likely_order(counts, self._classes))
        if better is None:
            return None
        present = [int(label) for label in np.unique(labels)]
        moved = [(label, int(better.order.classes[label])) for label in present]
        read = [
            f"{(folders[label] if folders else str(label))!r} as class {answer}, not {label}"
            for label, answer in moved
            if answer not in (label, NO_CLASS)
        ]
        name = f" ({better.order.name})" if better.order.name else ""
        return (
            f"another order of the classes fits the answers far better{name}: {better.fits:.0%} of the images are "
            f"right with folder {', '.join(read[:_MOST_MOVED])}{', …' if len(read) > _MOST_MOVED else ''}; "
            f"{better.as_read:.0%} as they are read; expected folders named after the classes or their index"
        )


def score(
    logits: NDArray[np.float32], labels: NDArray[np.int64] | None, torch_logits: NDArray[np.float32] | None
) -> Accuracy:
    """Compare logits (N, outputs) with labels (N,), and with PyTorch's logits, where there are such."""
    logits, count, agreement = class_logits(logits), len(logits), None
    if torch_logits is not None:
        agreement = float((logits.argmax(1) == class_logits(torch_logits).argmax(1)).mean())
    if labels is None:
        return Accuracy(images=count, agreement_with_torch=agreement)
    # Ties go to the lower index, as in argmax.
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    hits = best == labels[:, None]
    top1, top5 = int(hits[:, 0].sum()), int(hits.any(1).sum())
    return Accuracy(
        images=count,
        top1=top1 / count,
        top1_interval=wilson_interval(top1, count),
        top5=top5 / count,
        top5_interval=wilson_interval(top5, count),
        agreement_with_torch=agreement,
    )


def points_lost(accuracy: Accuracy, reference: Accuracy, classes: int) -> float:
    """Count the percentage points of top-1 accuracy lost against PyTorch's.

    Without labels, and where PyTorch itself may be guessing (the interval of its top-1 reaches down to one in
    ``classes``), points of agreement with PyTorch: of accuracy there is none to lose.
    """
    count = accuracy.images
    lowest = (reference.top1_interval or (0.0, 0.0))[0]
    if accuracy.top1 is not None and reference.top1 is not None and lowest > 1 / classes:
        return 100 * (round(reference.top1 * count) - round(accuracy.top1 * count)) / count
    assert accuracy.agreement_with_torch is not None
    return 100 * (count - round(accuracy.agreement_with_torch * count)) / count


class Paired(Struct, frozen=True, kw_only=True):
    """Two classifiers on the same labelled images: how often only one of them is right.

    ``p_value`` is that of McNemar's exact test, two-sided: how likely a division as uneven as this is where neither is
    better (McNemar, "Note on the sampling error of the difference between correlated proportions", 1947).
    """

    torch_only: int
    runtime_only: int
    p_value: float


def paired(logits: NDArray[np.float32], torch_logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Paired:
    """Compare the decisions of a runtime and of PyTorch, logits (N, outputs), with labels (N,)."""
    logits, torch_logits = class_logits(logits), class_logits(torch_logits)
    right, torch_right = logits.argmax(1) == labels, torch_logits.argmax(1) == labels
    torch_only, runtime_only = int((torch_right & ~right).sum()), int((right & ~torch_right).sum())
    return Paired(torch_only=torch_only, runtime_only=runtime_only, p_value=mcnemar(torch_only, runtime_only))


def mcnemar(one: int, other: int) -> float:
    """The two-sided p-value of McNemar's exact test, from the counts of the two discordant kinds."""
    count, least = one + other, min(one, other)
    tail = math.fsum(
        math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2))
        for k in range(least + 1)
    )
    return min(1.0, 2 * tail)


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, "Probable inference", J. American Statistical Association, 1927)."""
    share, z = hits / count, _NORMAL_97_5
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low = 0.0 if hits == 0 else (centre - spread) / scale  # exactly so; rounding would miss it
    return low, 1.0 if hits == count else (centre + spread) / scale


class Flip(Struct, frozen=True, kw_only=True):
    """An image for which a runtime chose another class than PyTorch.

    Attributes:
        image: the row of the image.
        expected: the class that PyTorch chose.
        answered: the class that the runtime chose.
        margin: by how much PyTorch preferred its own class, in units of the output.
        below_noise: whether the margin is so small that the two may part within the limit of parity.
    """

    image: int
    expected: int
    answered: int
    margin: float
    below_noise: bool


class Decisions(Struct, frozen=True, kw_only=True):
    """How often a runtime decides as PyTorch does; shares from 0 to 1, with their intervals of 95 % confidence.

    ``top5`` is the share of images for which PyTorch's class is among the runtime's first five.
    """

    images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    flips: tuple[Flip, ...]


def decide(candidate: NDArray[Any], expected: NDArray[Any], limit: float) -> Decisions:
    """Compare the decisions of two sets of outputs (N, outputs).

    Args:
        candidate: a runtime's.
        expected: PyTorch's.
        limit: how far any value may be from PyTorch's; two values may part by twice as much.
    """
    count = len(expected)
    candidate, expected = class_logits(candidate), class_logits(expected)
    # Ties go to the lower index, as in argmax.
    best = np.argsort(-candidate, axis=1, kind="stable")[:, :5]
    chosen, wanted = best[:, 0], expected.argmax(1)
    among = (best == wanted[:, None]).any(1)
    flips = []
    for image in np.flatnonzero(chosen != wanted):
        margin = float(expected[image, wanted[image]]) - float(expected[image, chosen[image]])
        flips.append(
            Flip(
                image=int(image),
                expected=int(wanted[image]),
                answered=int(chosen[image]),
                margin=margin,
                below_noise=margin <= 2 * limit,
            )
        )
    top1, top5 = int((chosen == wanted).sum()), int(among.sum())
    return Decisions(
        images=count,
        top1=top1 / count,
        top1_interval=wilson_interval(top1, count),
        top5=top5 / count,
        top5_interval=wilson_interval(top5, count),
        flips=tuple(flips),
    )
