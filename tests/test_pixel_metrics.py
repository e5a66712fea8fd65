"""Confusion matrix, mIoU and agreement of labelled pixels, against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from dmformer.errors import UsageError
from dmformer.verify.tasks.segmentation import IGNORED, confusion_matrix, pixel_accuracy, pixel_agreement


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 9),
    used=st.integers(1, 9),
    ignored=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    right=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_they_are_those_of_scikit_learn(seed: int, classes: int, used: int, ignored: float, right: float) -> None:
    """Also with classes that never occur, all pixels right, none, and all of them ignored."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, min(used, classes), (2, 7, 5)).astype(np.uint8)
    predicted = np.where(draw.random(labels.shape) < right, labels, draw.integers(0, classes, labels.shape))
    labels[draw.random(labels.shape) < ignored] = IGNORED
    matrix = sum(confusion_matrix(p, w, classes) for p, w in zip(predicted, labels, strict=True))
    counted = labels != IGNORED
    found = pixel_accuracy(np.asarray(matrix))
    assert found.pixels == counted.sum()
    if not counted.any():
        assert (found.pixel_accuracy, found.miou, found.iou) == (None, None, (None,) * classes)
        return
    expected, answers, names = labels[counted], predicted[counted], list(range(classes))
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(expected, answers, labels=names))
    assert found.pixel_accuracy == pytest.approx(metrics.accuracy_score(expected, answers))
    occurring = sorted({*expected.tolist(), *answers.tolist()})
    iou = metrics.jaccard_score(expected, answers, labels=occurring, average=None, zero_division=0)
    assert [index for index, value in enumerate(found.iou) if value is not None] == occurring
    np.testing.assert_allclose([value for value in found.iou if value is not None], iou)
    assert found.miou == pytest.approx(iou.mean())


def test_rows_are_labels() -> None:
    assert confusion_matrix(np.array([1, 1]), np.array([0, 0]), 2).tolist() == [[0, 2], [0, 0]]


def test_another_label_can_be_the_ignored_one() -> None:
    assert confusion_matrix(np.array([0, 1, 1]), np.array([-1, 1, 0]), 2, ignored=-1).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("predicted", "labels", "words"),
    [
        ([[0, 1]], [0, 1], "expected the same"),
        ([0, 3], [0, 1], "answer 3 is no class; expected 0 to 2"),
        ([0, -1], [0, 1], "answer -1 is no class"),
        ([0, 1], [0, 7], "label 7 is no class"),
        ([0.0, 1.0], [0, 1], "answers of type float64; expected integers"),
    ],
)
def test_what_is_no_class_is_refused(predicted: list[int], labels: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        confusion_matrix(np.array(predicted), np.array(labels), 3)


def test_agreement_counts_pixels_and_the_worst_image() -> None:
    expected = np.zeros((2, 3, 2, 2))
    expected[:, 1] = 1.0
    candidate = expected.copy()
    candidate[1, 2, 0, 0] = 5.0  # class 2 instead of 1, by a margin of 1
    found = pixel_agreement(candidate, expected, limit=0.4)
    assert (found.images, found.pixels, found.flips, found.below_noise) == (2, 8, 1, 0)
    assert (found.agreement, found.lowest) == (7 / 8, 3 / 4)
    assert pixel_agreement(candidate, expected, limit=0.5).below_noise == 1
    assert pixel_agreement(expected, expected).agreement == 1.0


def test_agreement_needs_equal_shapes() -> None:
    with pytest.raises(UsageError, match="expected the same"):
        pixel_agreement(np.zeros((1, 2, 3, 3)), np.zeros((1, 2, 3, 4)))
    with pytest.raises(UsageError, match="N, classes, H, W"):
        pixel_agreement(np.zeros((0, 2, 3, 3)), np.zeros((0, 2, 3, 3)))
