"""The demonstration checkpoint and the recipe that made it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dmformer.assets import CALIBRATION_IMAGES, DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from dmformer.data.images import load_pixels
from dmformer.data.labelled import image_set
from dmformer.models.checkpoint import Checkpoint, load_checkpoint
from dmformer.train.digits import (
    CLASSES,
    PREPROCESSING,
    Digits,
    Recipe,
    _augment,
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
def test_training_repeats_and_never_sees_a_held_out_image(digits: Digits) -> None:
    few = replace(digits, training=digits.training[:150], held_out=digits.held_out[:50])
    spoilt = few.pixels.copy()
    spoilt[digits.held_out] = 0
    recipe = Recipe(epochs=1, batch_size=25)
    (first, reached), (second, blind) = train(recipe, few), train(recipe, replace(few, pixels=spoilt))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not first.training
    inputs, labels = (torch.from_numpy(array[few.held_out]) for array in (few.pixels, few.labels))
    assert reached == accuracy(second, torch.from_numpy(PREPROCESSING.normalize(inputs.numpy())), labels)
    assert blind <= 0.3  # ten equal images of each class cannot be told apart


@pytest.mark.usefixtures("one_thread")
def test_the_optimizer_gets_what_the_recipe_says(digits: Digits) -> None:
    """Each step's learning rate and weight decay, as the optimizer itself saw them."""
    rates: list[float] = []
    decays: list[dict[float, int]] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        rates.append(optimizer.param_groups[0]["lr"])
        decays.append({group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups})

    hook = register_optimizer_step_pre_hook(note)
    few = replace(digits, training=digits.training[:25], held_out=digits.held_out[:1])
    try:
        model, _ = train(Recipe(epochs=5, batch_size=10), few)
    finally:
        hook.remove()
    assert len(rates) == 5 * 3  # the last batch of an epoch is a small one
    assert max(rates) == pytest.approx(Recipe.learning_rate, rel=0.1)
    assert rates.index(max(rates)) in (1, 2)  # warm-up is short
    assert rates[-1] < 1e-3 * Recipe.learning_rate
    matrices = sum(parameter.ndim > 1 for parameter in model.parameters())
    others = sum(parameter.ndim <= 1 for parameter in model.parameters())
    assert all(found == {Recipe.weight_decay: matrices, 0.0: others} for found in decays)


@pytest.mark.usefixtures("one_thread")
def test_every_figure_of_the_recipe_is_used(digits: Digits) -> None:
    """Another value gives other weights after two steps already."""
    few = replace(digits, training=digits.training[:10], held_out=digits.held_out[:1])
    plain = Recipe(epochs=1, batch_size=5)
    others = {name: value / 2 for name, value in vars(plain).items() if isinstance(value, float)}
    assert len(others) == 7
    expected = train(plain, few)[0].head.weight
    for name, value in {**others, "seed": 1, "drop_path": 0.5}.items():
        assert not torch.equal(train(replace(plain, **{name: value}), few)[0].head.weight, expected), name


def spots(inputs: torch.Tensor) -> NDArray[np.complex128]:
    """Where the spot of each image and channel is, as complex numbers: pixels right and down from the middle."""
    masses, axis = inputs.double(), torch.arange(32) - 15.5
    right, down = (masses * axis).sum((2, 3)), (masses * axis[:, None]).sum((2, 3))
    found: NDArray[np.complex128] = (torch.complex(right, down) / masses.sum((2, 3))).numpy()
    return found


@pytest.mark.parametrize("what", ["max_rotation_degrees", "max_zoom", "max_shift"])
def test_augmentation_moves_images_as_far_as_the_recipe_says(what: str) -> None:
    """Each of the three alone: it goes up to its limit and no further, and the other two stay where they are."""
    still = dict.fromkeys(("max_rotation_degrees", "max_zoom", "max_shift"), 0.0)
    axis = torch.arange(32) - 15.5
    centres = (0, 0), (7, 0), (-3, -6)
    image = torch.stack([torch.exp(-((axis - x) ** 2 + (axis[:, None] - y) ** 2) / 4) for x, y in centres])
    images = image.repeat(500, 1, 1, 1)
    torch.manual_seed(0)
    np.testing.assert_allclose(_augment(images, Recipe(**still)), images, atol=1e-5)
    limit = getattr(Recipe, what)
    middle, *others = spots(_augment(images, Recipe(**{**still, what: limit}))).T
    arms = [(spot - middle) / complex(*centre) for spot, centre in zip(others, centres[1:], strict=True)]
    moved = {
        "max_rotation_degrees": [np.degrees(np.angle(arm)) for arm in arms],
        "max_zoom": [1 / np.abs(arm) - 1 for arm in arms],  # the recipe says how much more of the image is seen
        "max_shift": [middle.real / 32, middle.imag / 32],
    }
    for name, found in moved.items():
        for values in found:
            if name == what:
                assert values.min() == pytest.approx(-limit, rel=0.05)
                assert values.max() == pytest.approx(limit, rel=0.05)
            else:
                np.testing.assert_allclose(values, 0, atol=0.05 * getattr(Recipe, name))


def test_the_recipe_is_the_one_that_made_the_shipped_checkpoint(shipped: Checkpoint) -> None:
    assert shipped.training["recipe"] == {"script": "dmformer.train.digits", **vars(Recipe())}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_recipe_learns_and_writes_what_ships(tmp_path: Path, shipped: Checkpoint) -> None:
    """One epoch of the recipe's twelve, which reaches 86 to 90 %.

    Not covered: that all twelve reach the 99.7 % of the shipped checkpoint. ``make digits`` shows that, in minutes.
    """
    recipe = Recipe(epochs=1)
    reached = write(tmp_path, recipe)
    assert reached > 0.75
    written = load_checkpoint(tmp_path / DEMONSTRATION_CHECKPOINT.name)
    assert written.training["held_out_top1"] == pytest.approx(reached, abs=1e-6)
    assert written.training == {
        **shipped.training,
        "held_out_top1": written.training["held_out_top1"],
        "recipe": {"script": "dmformer.train.digits", **vars(recipe)},
    }
    assert (written.config, written.preprocessing) == (shipped.config, shipped.preprocessing)
    digits = load_digits()
    correct = predictions(written, digits.pixels[digits.held_out]) == digits.labels[digits.held_out]
    assert correct.mean() == pytest.approx(reached, abs=0.003)  # of the network as it is in the file
    for sample in sorted(SAMPLE_IMAGES.glob("*.png")):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "digits" / sample.name)), np.asarray(Image.open(sample))
        )
    for shipped_image in sorted(CALIBRATION_IMAGES.rglob("*.png")):
        written_image = tmp_path / "digits-training" / shipped_image.relative_to(CALIBRATION_IMAGES)
        np.testing.assert_array_equal(np.asarray(Image.open(written_image)), np.asarray(Image.open(shipped_image)))
