"""The demonstration checkpoint and the recipe that made it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from dmformer.assets import CALIBRATION_IMAGES, DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from dmformer.data.images import load_pixels
from dmformer.data.labelled import image_set
from dmformer.models.checkpoint import Checkpoint, load_checkpoint
from dmformer.train.digits import (
    CLASSES,
    PREPROCESSING,
    Digits,
    Recipe,
    accuracy,
    load_digits,
    main,
    train,
    write,
    write_images,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return load_checkpoint(DEMONSTRATION_CHECKPOINT)


def predictions(checkpoint: Checkpoint, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    with torch.inference_mode():
        logits = checkpoint.model()(torch.from_numpy(checkpoint.preprocessing.normalize(pixels)))
    answers: NDArray[np.int64] = logits.argmax(1).numpy()
    return answers


def test_shipped_checkpoint_is_small_and_complete(shipped: Checkpoint) -> None:
    assert DEMONSTRATION_CHECKPOINT.stat().st_size <= 2_500_000
    assert (shipped.arch, shipped.classes, shipped.preprocessing) == ("dmformer_nano", CLASSES, PREPROCESSING)
    assert shipped.notes == ()


def test_shipped_checkpoint_is_as_accurate_as_it_says(shipped: Checkpoint, digits: Digits) -> None:
    correct = predictions(shipped, digits.pixels[digits.held_out]) == digits.labels[digits.held_out]
    assert correct.mean() >= 0.99
    assert correct.mean() == pytest.approx(shipped.training["held_out_top1"], abs=1e-6)
    assert shipped.training["held_out_images"] == len(correct)


@pytest.mark.parametrize("label", range(10))
def test_sample_is_the_last_held_out_image_of_its_label(label: int, shipped: Checkpoint, digits: Digits) -> None:
    path = SAMPLE_IMAGES / f"{label}.png"
    last = [index for index in digits.held_out if digits.labels[index] == label][-1]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), digits.pixels[last])
    pixels = load_pixels([path], shipped.preprocessing)
    np.testing.assert_array_equal(pixels[0], digits.pixels[last])


@pytest.mark.parametrize("label", range(10))
def test_sample_is_classified_right(label: int, shipped: Checkpoint) -> None:
    pixels = load_pixels([SAMPLE_IMAGES / f"{label}.png"], shipped.preprocessing)
    assert predictions(shipped, pixels).tolist() == [label]


def test_split_is_fixed_and_disjoint(digits: Digits) -> None:
    assert digits.pixels.shape == (1797, 32, 32, 3)
    assert not set(digits.held_out) & set(digits.training)
    assert set(digits.held_out) | set(digits.training) == set(range(1797))
    assert (len(digits.held_out), len(digits.training)) == (359, 1438)
    expected = np.sort(np.random.RandomState(0).permutation(1797)[:359])
    np.testing.assert_array_equal(digits.held_out, expected)
    np.testing.assert_array_equal(load_digits().held_out, digits.held_out)


# --- images as files --------------------------------------------------------------------------------------------------


def test_images_survive_the_round_trip(tmp_path: Path, digits: Digits) -> None:
    write_images(tmp_path, digits, digits.held_out)
    images = image_set(tmp_path, PREPROCESSING, CLASSES, 10)
    assert images.labels is not None
    indices = [int(path.stem) for path in images.paths]
    assert sorted(indices) == digits.held_out.tolist()
    np.testing.assert_array_equal(images.labels, digits.labels[indices])
    np.testing.assert_array_equal(load_pixels(images.paths, PREPROCESSING), digits.pixels[indices])


def test_the_first_images_of_each_class_are_written(tmp_path: Path, digits: Digits) -> None:
    write_images(tmp_path, digits, digits.training, 2)
    for label, name in enumerate(CLASSES):
        first = [index for index in digits.training if digits.labels[index] == label][:2]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [f"{index:04}.png" for index in first]


def test_both_parts_of_the_data_set_can_be_had(
    tmp_path: Path, digits: Digits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["digits", "--images", str(tmp_path / "images")])
    main()
    assert capsys.readouterr().out == "359 held-out and 1438 training images\n"
    found = {
        part: sorted(int(path.stem) for path in (tmp_path / "images" / part).rglob("*.png"))
        for part in ("held-out", "training")
    }
    assert found == {"held-out": digits.held_out.tolist(), "training": digits.training.tolist()}


def test_the_images_that_ship_for_calibration_are_training_images(digits: Digits) -> None:
    images = image_set(CALIBRATION_IMAGES, PREPROCESSING, CLASSES, 10)
    assert images.labels is not None
    assert np.bincount(images.labels, minlength=10).tolist() == [20] * 10
    indices = [int(path.stem) for path in images.paths]
    assert set(indices) <= set(digits.training.tolist())
    np.testing.assert_array_equal(images.labels, digits.labels[indices])
    pixels = load_pixels(images.paths, PREPROCESSING)
    np.testing.assert_array_equal(pixels, digits.pixels[indices])
    held_out = {image.tobytes() for image in digits.pixels[digits.held_out]}
    assert not held_out & {image.tobytes() for image in pixels}  # nor a held-out image under another number


def test_the_samples_that_ship_are_not_among_the_images_for_calibration() -> None:
    def contents(folder: Path) -> set[bytes]:
        return {load_pixels([path], PREPROCESSING).tobytes() for path in folder.rglob("*.png")}

    assert len(contents(SAMPLE_IMAGES)) == 10
    assert not contents(SAMPLE_IMAGES) & contents(CALIBRATION_IMAGES)


# --- training ---------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_right_answers() -> None:
    logits = torch.eye(4)
    assert accuracy(torch.nn.Identity(), logits, torch.tensor([0, 1, 2, 0])) == 0.75  # type: ignore[arg-type]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for a busy core cost more than they save on images this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_short_run_learns_and_repeats(digits: Digits) -> None:
    few = replace(digits, training=digits.training[:400], held_out=digits.held_out[:100])
    recipe = Recipe(epochs=2, batch_size=25)
    (first, reached), (second, again) = train(recipe, few), train(recipe, few)
    assert reached > 0.4  # chance is 0.1
    assert reached == again
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not first.training


@pytest.mark.slow
def test_whole_recipe_reaches_the_shipped_accuracy(tmp_path: Path, shipped: Checkpoint) -> None:
    reached = write(tmp_path, Recipe())
    written = load_checkpoint(tmp_path / DEMONSTRATION_CHECKPOINT.name)
    assert reached == pytest.approx(shipped.training["held_out_top1"], abs=0.005)
    assert written.training["held_out_top1"] == pytest.approx(reached, abs=1e-6)
    assert "1438 images" in written.training["data"]
    assert (written.config, written.preprocessing) == (shipped.config, shipped.preprocessing)
    for sample in sorted(SAMPLE_IMAGES.glob("*.png")):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "digits" / sample.name)), np.asarray(Image.open(sample))
        )
    for shipped_image in sorted(CALIBRATION_IMAGES.rglob("*.png")):
        written_image = tmp_path / "digits-training" / shipped_image.relative_to(CALIBRATION_IMAGES)
        np.testing.assert_array_equal(np.asarray(Image.open(written_image)), np.asarray(Image.open(shipped_image)))
