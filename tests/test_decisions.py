"""Decisions and their margins, and the paired test, against figures worked out by hand or by SciPy's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dmformer.errors import StageFailed
from dmformer.verify.answers import Answers
from dmformer.verify.compare import Limit, Reference
from dmformer.verify.parity import check_decisions, check_paired
from dmformer.verify.tasks.classification import decide, mcnemar, paired, wilson_interval

if TYPE_CHECKING:
    from dmformer.verify.report import Check

EXPECTED = np.array(
    [[3.0, 1, 0, 0, 0, 0, 0], [0, 2, 1.9, 0, 0, 0, 0], [0, 0, 0, 5, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]], np.float32
)


def answered(outputs: np.ndarray | StageFailed, limit: float = 0.1) -> Check:
    answers = Answers("engine", "fp32", {4: {"logits": outputs} if isinstance(outputs, np.ndarray) else outputs})
    reference = Reference("PyTorch", {"logits": EXPECTED}, {"logits": Limit(limit, "test")})
    (check,) = check_decisions(answers, answers.at_largest_batch, reference)
    return check


def test_equal_decisions() -> None:
    found = decide(EXPECTED, EXPECTED, 0.1)
    assert (found.images, found.top1, found.top5, found.flips) == (4, 1.0, 1.0, ())
    assert found.top1_interval == wilson_interval(4, 4)


def test_a_flip_below_the_noise_is_told_and_no_failure() -> None:
    moved = EXPECTED.copy()
    moved[1, 2] += 0.2
    check = answered(moved)
    assert check.passed
    assert check.decisions is not None
    assert check.top1_agreement == check.decisions.top1 == 0.75
    assert check.decisions.top5 == 1.0
    (flip,) = check.decisions.flips
    assert (flip.image, flip.expected, flip.answered, flip.below_noise) == (1, 1, 2, True)
    assert flip.margin == pytest.approx(0.1)
    assert "1 of 4 images get another class; image 1: class 2 for 1" in (check.reason or "")


def test_a_flip_beyond_the_noise_fails() -> None:
    moved = EXPECTED.copy()
    moved[3, 0] = 9
    check = answered(moved)
    assert not check.passed
    assert check.decisions is not None
    assert check.decisions.flips[0].margin == pytest.approx(6)
    assert check.decisions.top5 == 1.0  # class 6 is second
    moved[3, 6] = -1
    assert decide(moved, EXPECTED, 0.1).top5 == 0.75


@pytest.mark.parametrize(
    "outputs", [EXPECTED[:2], EXPECTED[:, :3], np.full_like(EXPECTED, np.nan), StageFailed("the engine failed")]
)
def test_what_decides_nothing_fails(outputs: np.ndarray | StageFailed) -> None:
    assert not answered(outputs).passed


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (8, 2, 0.109375), (2, 8, 0.109375), (10, 0, 0.001953125), (6, 6, 1.0)],
)
def test_mcnemars_exact_test(one: int, other: int, p: float) -> None:
    assert mcnemar(one, other) == pytest.approx(p, rel=1e-9)


def test_mcnemar_for_as_many_images_as_imagenet_has() -> None:
    assert 0 < mcnemar(25_000, 24_000) < 1e-4
    assert mcnemar(25_000, 25_000) == 1.0


def test_pairs_are_counted() -> None:
    labels = np.array([0, 1, 2, 3])
    right, wrong = np.eye(4, dtype=np.float32), np.roll(np.eye(4, dtype=np.float32), 1, axis=1)
    ours = np.stack([right[0], wrong[1], wrong[2], wrong[3]])
    theirs = np.stack([wrong[0], right[1], right[2], wrong[3]])
    found = paired(ours, theirs, labels)
    assert (found.torch_only, found.runtime_only, found.p_value) == (2, 1, 1.0)


@pytest.mark.parametrize(
    ("torch_only", "runtime_only", "most", "passed"),
    [
        (0, 0, 0.0, True),
        (3, 0, 0.0, True),
        (12, 0, 0.0, False),
        (12, 0, 5.0, False),
        (12, 0, 6.0, True),
        (0, 12, 0, True),
    ],
)
def test_accuracy_fails_where_it_is_worse_by_more_than_budget_and_chance(
    torch_only: int, runtime_only: int, most: float, passed: bool
) -> None:
    wrong = np.zeros((torch_only + runtime_only, 2), np.float32)
    wrong[:, 0] = 1
    right = wrong[:, ::-1]
    labels = np.ones(len(wrong), np.int64)
    theirs = np.concatenate([right[:torch_only], wrong[torch_only:]])
    ours = np.concatenate([wrong[:torch_only], right[torch_only:]])
    found = paired(ours, theirs, labels)
    check = check_paired(Answers("engine", "int8", {}), found, 200, most)
    assert check.passed == passed
    assert (check.reason is None) == (torch_only + runtime_only == 0)
