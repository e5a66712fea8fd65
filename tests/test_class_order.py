"""Labels that are in another order than the network's classes are told, in ``eval`` and in an export."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dmformer.assets import DEMONSTRATIONS
from dmformer.data.images import image_set
from dmformer.data.preprocessing import Preprocessing
from dmformer.models.checkpoint import load_checkpoint, save_checkpoint
from dmformer.verify.evaluate import evaluate
from dmformer.verify.tasks import measure_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Run

DEMONSTRATION = DEMONSTRATIONS["classification"]
ORDERED = np.repeat(np.arange(10), 20)
TEXT_ORDER = sorted(map(str, range(12)))


def doubt(labels: object, answers: object, classes: int = 10, folders: tuple[str, ...] = ()) -> str | None:
    score = measure_of("classification", classes).new_score()
    score.add(np.eye(classes, dtype=np.float32)[np.asarray(answers)], np.asarray(labels), None)
    return score.label_doubt(folders)


@pytest.mark.parametrize(
    ("labels", "answers", "classes", "folders", "words"),
    [
        # Folders 1 to 10 for the classes 0 to 9, sorted as text: 1, 10, 2, …
        (
            ORDERED,
            np.array([0, 9, *range(1, 9)])[ORDERED],
            10,
            tuple(sorted(map(str, range(1, 11)))),
            r"as text): 100% .* folder '10' as class 9, not 1, '2' as class 1, not 2, '3' as class 2, not 3, …; 10% as",
        ),
        (ORDERED[20:], ORDERED[20:] - 1, 10, (), r"counted from 1): 100% .* with folder '1' as class 0, not 1"),
        # A single image of each class is enough for an order that somebody means.
        (range(10), [TEXT_ORDER.index(str(i)) for i in range(10)], 12, (), "as torchvision's ImageFolder does): 100%"),
        (ORDERED, np.where(ORDERED == 3, 5, np.where(ORDERED == 5, 3, ORDERED)), 10, (), r"'3' as class 5, not 3, '5'"),
    ],
)
def test_an_order_that_fits_far_better_is_told(
    labels: object, answers: object, classes: int, folders: tuple[str, ...], words: str
) -> None:
    said = doubt(labels, answers, classes, folders)
    assert said is not None
    assert re.search(words.replace(")", r"\)"), said)


def test_answers_without_an_order_of_their_own_raise_no_doubt() -> None:
    random = np.random.default_rng(0).integers(0, 10, 200)
    noisy = np.where(np.random.default_rng(1).random(200) < 0.5, ORDERED, random)
    assert [doubt(ORDERED, answers) for answers in (ORDERED, random, noisy, np.full(200, 3))] == [None] * 4
    assert doubt([7] * 20, [3] * 20) is None  # one class alone, and a network that answers one thing
    few = np.random.default_rng(2)
    assert [doubt(range(10), few.integers(0, 10, 10)) for _ in range(50)] == [None] * 50


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration without names of its classes."""
    path = tmp_path_factory.mktemp("unnamed") / "weights.safetensors"
    save_checkpoint(path, replace(load_checkpoint(DEMONSTRATION.checkpoint), classes=()))
    return path


@pytest.fixture(scope="module")
def numbered_from_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the demonstration's images, in folders 1 to 10."""
    assert DEMONSTRATION.calibration is not None
    folder = tmp_path_factory.mktemp("numbered")
    for digit in range(10):
        (folder / str(digit + 1)).mkdir()
        for path in sorted((DEMONSTRATION.calibration / str(digit)).iterdir())[:3]:
            shutil.copy(path, folder / str(digit + 1))
    return folder


@pytest.mark.slow
def test_an_export_and_eval_say_so(
    unnamed: Path, numbered_from_1: Path, tmp_path: Path, inline: Callable[..., Run]
) -> None:
    arguments = ("--weights", unnamed, "--precision", "fp16", "--calibration", numbered_from_1, "--output", tmp_path)
    words = "another order of the classes fits the answers far better (numbers from 1 in their order"
    for _ in range(2):  # the second is from the cache
        done = inline("export", *arguments[:-1], tmp_path / "bundle", DMFORMER_CACHE=str(tmp_path / "cache"))
        assert f"note: calibration images: {words}" in done.err
    report = evaluate(tmp_path / "bundle", numbered_from_1, runtimes=["ort"])
    assert report.results[0].top1 == pytest.approx(0.1)
    assert [words in note for note in report.notes if "order" in note] == [True]


def test_folders_are_known_by_the_index_of_their_class(numbered_from_1: Path, tmp_path: Path) -> None:
    preprocessing = Preprocessing(image_size=32)
    shutil.copytree(numbered_from_1, tmp_path / "set")
    images = image_set(tmp_path / "set", preprocessing, (), 10)
    assert images.folders == ("1", "10", *map(str, range(2, 10)))
    shutil.rmtree(tmp_path / "set" / "10")
    assert image_set(tmp_path / "set", preprocessing, (), 10).folders == ("", *map(str, range(1, 10)))
