"""Accuracy: intervals, top-1 and top-5, points lost, and a runtime's answers to a folder of images."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmformer.bundle.manifest import Accuracy
from dmformer.data.images import ImageSet, image_set
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import StageFailed, UsageError
from dmformer.models.dmformer import create_model
from dmformer.runtimes.base import TensorSpec
from dmformer.verify.reference import torch_answers
from dmformer.verify.tasks.classification import Classification, points_lost, score, wilson_interval
from tests.fakes import FakeRuntime

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

CLASSES = Classification(2)
BATCH = CLASSES.batch


# --- the interval -----------------------------------------------------------------------------------------------------


def roots(hits: int, count: int) -> list[float]:
    """Wilson's interval by its definition: the shares p at which (hits/count - p)^2 = z^2 p (1 - p) / count."""
    share, z2 = hits / count, 1.9599639845400545**2
    return sorted(np.roots([1 + z2 / count, -(2 * share + z2 / count), share**2]).real.tolist())


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine, 1998, table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(hits: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(hits, count) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (1, 2), (0, 359), (358, 359), (359, 359), (49998, 50000)])
def test_the_interval_solves_wilsons_equation(hits: int, count: int) -> None:
    assert wilson_interval(hits, count) == pytest.approx(roots(hits, count), abs=1e-7)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 359, 50_000])
def test_the_interval_stays_within_0_and_1_and_mirrors(count: int) -> None:
    for hits in {0, 1, count // 3, count // 2, count - 1, count}:
        low, high = wilson_interval(hits, count)
        assert 0 <= low < high <= 1
        assert low <= hits / count + 1e-12
        assert hits / count - 1e-12 <= high
        assert wilson_interval(count - hits, count) == pytest.approx((1 - high, 1 - low))


def test_more_images_make_it_narrower() -> None:
    widths = [np.ptp(wilson_interval(count * 9 // 10, count)) for count in (10, 100, 1000, 10_000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.02


@pytest.mark.parametrize(("count", "share"), [(20, 0.5), (20, 0.9), (100, 0.8), (359, 0.95), (359, 0.5)])
def test_the_interval_covers_the_true_share_as_often_as_it_says(count: int, share: float) -> None:
    covered = 0.0
    for hits in range(count + 1):
        low, high = wilson_interval(hits, count)
        if low <= share <= high:
            log = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
            covered += math.exp(log + hits * math.log(share) + (count - hits) * math.log1p(-share))
    assert 0.92 < covered < 0.98


def test_the_interval_holds_the_share_itself() -> None:
    for count in range(1, 400):
        assert wilson_interval(0, count)[0] == 0
        assert wilson_interval(count, count)[1] == 1


# --- the score --------------------------------------------------------------------------------------------------------


def array(*rows: list[float]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


def labels(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def test_top_1_and_top_5_are_counted() -> None:
    logits = array([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [0, 9, 1, 8, 2, 7, 3], [1, 0, 0, 0, 0, 0, 2])
    found = score(logits, labels(6, 4, 0, 0), None)  # first, fifth, last, second
    assert (found.images, found.top1, found.top5, found.agreement_with_torch) == (4, 0.25, 0.75, None)
    assert found.top1_interval == wilson_interval(1, 4)
    assert found.top5_interval == wilson_interval(3, 4)


def test_the_sixth_is_not_among_the_top_5() -> None:
    logits = array([6, 5, 4, 3, 2, 1, 0])
    assert [score(logits, labels(index), None).top5 for index in range(7)] == [1, 1, 1, 1, 1, 0, 0]


def test_ties_go_to_the_lower_index() -> None:
    logits = array([0, 7, 7, 7, 7, 7, 7])
    assert [score(logits, labels(index), None).top1 for index in range(7)] == [0, 1, 0, 0, 0, 0, 0]
    assert [score(logits, labels(index), None).top5 for index in range(7)] == [0, 1, 1, 1, 1, 1, 0]
    assert score(logits, None, array([0, 7, 0, 0, 0, 0, 0])).agreement_with_torch == 1


def test_a_network_that_answers_the_same_for_every_class_is_no_good() -> None:
    assert score(np.zeros((10, 10), np.float32), np.arange(10), None).top1 == 0.1


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_5_classes_or_fewer_the_top_5_is_every_class(classes: int) -> None:
    logits = np.eye(classes, dtype=np.float32)
    found = score(logits, np.roll(np.arange(classes), 1), None)
    assert found.top5 == 1
    assert found.top1 == 0


def test_one_output_tells_two_classes_of_which_the_top_5_is_both() -> None:
    logits = np.float32([[1], [-1], [1]])
    found = score(logits, np.array([1, 0, 0]), None)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.top5 == 1


def test_without_labels_there_is_agreement_alone() -> None:
    logits = array([1, 2, 3], [3, 2, 1], [1, 3, 2], [9, 1, 1])
    found = score(logits, None, array([0, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 0]))
    assert found == Accuracy(images=4, agreement_with_torch=0.75)
    assert score(logits, None, None) == Accuracy(images=4)


def test_agreement_is_with_pytorch_and_not_with_the_labels() -> None:
    found = score(array([1, 2], [1, 2]), labels(0, 0), array([0, 1], [0, 1]))
    assert (found.top1, found.agreement_with_torch) == (0, 1)


def test_points_lost() -> None:
    def accuracy(top1: float | None, agreement: float | None = None) -> Accuracy:
        interval = None if top1 is None else wilson_interval(round(200 * top1), 200)
        return Accuracy(images=200, top1=top1, top1_interval=interval, agreement_with_torch=agreement)

    assert points_lost(accuracy(0.90, 0.5), accuracy(0.95), 10) == 5
    assert points_lost(accuracy(0.95, 0.5), accuracy(0.90), 10) == -5  # a gain
    assert points_lost(accuracy(0.995), accuracy(1.0), 10) == 0.5  # one image of 200, and not a hair more
    assert points_lost(accuracy(None, 0.98), accuracy(None, 1.0), 10) == 2
    assert points_lost(accuracy(None, 1.0), accuracy(None, 1.0), 10) == 0


def test_where_pytorch_may_be_guessing_agreement_counts() -> None:
    guessing = score(array(*[[1, 0]] * 20), labels(*[0, 1] * 10), None)
    other = score(array(*[[0, 1]] * 20), labels(*[0, 1] * 10), array(*[[1, 0]] * 20))
    assert (guessing.top1, other.top1) == (0.5, 0.5)
    assert points_lost(other, guessing, 2) == 100


# --- a runtime's answers ----------------------------------------------------------------------------------------------


class Fake(FakeRuntime):
    """Answers with each image's first value and its negative; notes the sizes of its batches."""

    input_spec = TensorSpec("picture", "float32", ("batch", 3, 32, 32))
    output_spec = TensorSpec("logits", "float32", ("batch", 2))

    def __init__(self, spoil: Callable[[NDArray[np.float32]], object] = lambda _: None) -> None:
        super().__init__()
        self.spoil = spoil
        self.sizes: list[int] = []

    def infer(self, inputs: Any) -> Any:
        first = inputs["picture"][:, 0, 0, 0]
        self.sizes.append(len(first))
        answer = np.stack([first, -first], 1)
        self.spoil(answer)
        return {"logits": answer}


@pytest.fixture
def grey(tmp_path: Path) -> ImageSet:
    """19 images, each brighter than the one before."""
    (tmp_path / "grey").mkdir()
    for level in range(19):
        Image.new("L", (32, 32), 10 * level).save(tmp_path / "grey" / f"{level:02}.png")
    plain = Preprocessing(image_size=32, crop_fraction=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    return image_set(tmp_path / "grey", plain, (), 2)


def test_answers_are_in_the_order_of_the_images(grey: ImageSet) -> None:
    runtime, advanced = Fake(), []
    found = CLASSES.answers(runtime, grey, lambda: advanced.append(1))
    np.testing.assert_allclose(found[:, 0] * 255, np.arange(0, 190, 10), atol=1e-3)
    np.testing.assert_array_equal(found[:, 1], -found[:, 0])
    assert runtime.sizes == [BATCH, BATCH, 19 - 2 * BATCH]
    assert len(advanced) == CLASSES.parts(grey) == 3
    assert runtime.closed == 1


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (BATCH, 1), (BATCH + 1, 2), (2 * BATCH, 2)])
def test_parts_are_batches(grey: ImageSet, count: int, expected: int) -> None:
    assert CLASSES.parts(replace(grey, paths=grey.paths[:count])) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_answer_that_is_no_number_is_refused(grey: ImageSet, value: float) -> None:
    def spoil(answer: NDArray[np.float32]) -> None:
        if len(answer) < BATCH:  # the last batch alone
            answer[-1, 1] = value

    runtime = Fake(spoil)
    with pytest.raises(StageFailed, match="fake answers with NaN or infinity"):
        CLASSES.answers(runtime, grey, lambda: None)
    assert runtime.closed == 1


def test_a_runtime_is_closed_where_an_image_cannot_be_read(grey: ImageSet) -> None:
    grey.paths[12].write_bytes(b"no image")
    runtime = Fake()
    with pytest.raises(UsageError, match=r"12\.png"):
        CLASSES.answers(runtime, grey, lambda: None)
    assert runtime.closed == 1


def test_pytorchs_own_answers_that_are_no_numbers_are_refused(grey: ImageSet) -> None:
    model = create_model("dmformer_nano", num_classes=2).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    with pytest.raises(StageFailed, match="NaN"):
        torch_answers(model, grey, CLASSES, lambda: None)
