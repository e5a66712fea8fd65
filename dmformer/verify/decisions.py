"""Decisions: does a runtime choose the classes that PyTorch chooses, and by what margin where it does not?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from dmformer.verify.accuracy import wilson_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Flip(Struct, frozen=True, kw_only=True):
    """An image for which a runtime chose another class than PyTorch.

    Attributes:
        image: its row.
        expected: the class that PyTorch chose.
        answered: the class that the runtime chose.
        margin: by how much PyTorch preferred its own, in units of the output.
        below_noise: the margin is so small that the two may part within the limit of parity.
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
    """Compare the decisions of two sets of outputs (N, classes).

    Args:
        candidate: a runtime's.
        expected: PyTorch's.
        limit: how far any value may be from PyTorch's; two values may part by twice as much.
    """
    count = len(expected)
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
