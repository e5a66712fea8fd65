"""Whether another order of the classes fits the answers far better than the one in which the labels are read.

A network answers by number, and which class has a number is a convention of whoever made its training set: folders in
the order of their numbers or of their names as text (``1, 10, 2``), counted from 0 or from 1. Where labels are read by
another convention, a good network looks like a bad one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable

NO_CLASS = -1


@dataclass(frozen=True)
class Counts:
    """How often each answer was given to each label: three arrays of one length, of what occurs alone."""

    labels: NDArray[np.int64]
    answers: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, labels: NDArray[np.int64], answers: NDArray[np.int64]) -> Counts:
        """Count single labels and their answers."""
        (found, answered), counts = np.unique(np.stack([labels, answers]), axis=1, return_counts=True)
        return cls(found, answered, counts)

    def fitting(self, order: Order) -> int:
        """Count the answers that are right where labels are numbered in another order."""
        return int(self.counts[order.classes[self.labels] == self.answers].sum())


@dataclass(frozen=True)
class Order:
    """Another order of the classes: the class that each label would be, or -1, and the order's name."""

    classes: NDArray[np.int64]
    name: str = ""


@dataclass(frozen=True)
class BetterOrder:
    """An order that fits far better, with the shares of answers that are right in it and as labels are read (0..1)."""

    order: Order
    fits: float
    as_read: float


def shifted(classes: int, by: int, name: str) -> Order:
    """Return the order in which each label is a number too small by ``by``."""
    moved = np.arange(classes) + by
    return Order(np.where((moved >= 0) & (moved < classes), moved, NO_CLASS), name)


def numbered_orders(classes: int) -> list[Order]:
    """Return the orders that differ in how numbers are counted and sorted, of a number of classes."""
    from_0 = np.array(sorted(range(classes), key=str))  # 0, 1, 10, 11, 2, …
    from_1 = np.array(sorted(range(1, classes + 1), key=str)) - 1
    as_text_from_1 = np.argsort(from_1)
    return [
        shifted(classes, -1, "counted from 1"),
        shifted(classes, 1, "counted from 0"),
        Order(np.argsort(from_0), "numbers sorted as text, as torchvision's ImageFolder does"),
        Order(np.append(NO_CLASS, as_text_from_1[:-1]), "numbers from 1 sorted as text, as ImageFolder does"),
        Order(from_1, "numbers from 1 in their order, not sorted as text"),
    ]


def likely_order(counts: Counts, classes: int) -> Order:
    """Return the order that the answers themselves suggest: each label is the class that is answered to it most often.

    A label whose most frequent answer another label claims with more answers is no class, as is one for which leaving
    a single answer out would change it: answers that follow no order suggest none.
    """
    order = np.full(classes, NO_CLASS)
    by_count = np.lexsort((-counts.counts, counts.labels))
    labels, first = np.unique(counts.labels[by_count], return_index=True)
    most = counts.counts[by_count][first]
    following = np.append(by_count[1:], -1)[first]
    same = (following >= 0) & (counts.labels[following] == labels)
    second = np.where(same, counts.counts[following], 0)
    taken = set()
    for at in np.argsort(-most, kind="stable"):
        answer = int(counts.answers[by_count][first[at]])
        if most[at] - 1 > second[at] and answer not in taken:
            order[labels[at]] = answer
            taken.add(answer)
    return Order(order)


def better_order(counts: Counts, orders: Iterable[Order], likely: Order | None = None) -> BetterOrder | None:
    """Return the order that fits best, where it fits far better than the labels as they are read; or ``None``.

    That is more than half of the answers, and twice as many right or half as many wrong.

    Args:
        counts: of labels and answers.
        orders: to try, each of which somebody may have meant.
        likely: :func:`likely_order`; it must also explain half of what one answer to everything would leave wrong.
    """
    total, right = int(counts.counts.sum()), int(counts.counts[counts.labels == counts.answers].sum())
    tried = list(orders)
    if likely is not None:
        constant = int(np.bincount(counts.answers, weights=counts.counts).max(initial=0))
        tried += [likely] if 2 * (counts.fitting(likely) - constant) > total - constant else []
    best = max(tried, key=counts.fitting, default=None)
    if best is None:
        return None
    fits = counts.fitting(best)
    if 2 * fits <= total or not (fits > 2 * right or 2 * (total - fits) < total - right):
        return None
    return BetterOrder(best, fits / total, right / total)
