"""What training sees: random views and their seeds, labels that move with their pixels, annotated folders, scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmformer.data.annotated import IGNORED, annotated_set, load_labels
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError
from dmformer.train.augment import Augmentation, BatchAugmentation, seed_of
from dmformer.train.datasets import SCENE_CLASSES, compose_scene, load_digits, load_photographs, write_scenes
from dmformer.train.recipe import make_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SIZE = Preprocessing(image_size=48, crop_fraction=1.0)
STILL = {"horizontal_flip": 0, "randaugment_operations": 0, "erasing": 0, "mixup": 0, "cutmix": 0}


def augmentation(**values: Any) -> Augmentation:
    return Augmentation(make_recipe({**STILL, **values}), SIZE)


def noise(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


# --- Views of images --------------------------------------------------------------------------------------------------


def test_a_view_follows_from_its_seed_alone_and_leaves_the_generators() -> None:
    augment = augmentation(randaugment_operations=2, horizontal_flip=0.5, rotation_degrees=10, color_jitter=0.2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    views = [augment.classification(noise(), seed) for seed in (1, 2, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(views[0], views[2])
    assert not np.array_equal(views[0], views[1])
    assert views[0].shape == (48, 48, 3)
    assert views[0].dtype == np.uint8


def test_without_augmentation_a_view_is_what_deployment_sees() -> None:
    view = augmentation(crop_scale=[1, 1]).classification(noise(), 0)
    np.testing.assert_array_equal(view, SIZE.pixels(noise()))
    flipped = augmentation(crop_scale=[1, 1], horizontal_flip=1).classification(noise(), 0)
    np.testing.assert_array_equal(flipped, view[:, ::-1])


def test_crops_cover_as_much_as_the_recipe_says() -> None:
    """A ramp in both directions tells where a crop was taken."""
    rows, columns = np.mgrid[0:240, 0:240].astype(np.uint8)
    ramp = Image.fromarray(np.stack([rows, columns, rows], 2))
    augment = augmentation(crop_scale=[0.2, 0.6], crop_ratio=[0.5, 2.0])
    areas, ratios = [], []
    for seed in range(200):
        view = augment.classification(ramp, seed).astype(float)
        down, across = (np.ptp(view[..., channel]) * 48 / 47 for channel in (0, 1))
        areas.append(down * across / 240**2)
        ratios.append(across / down)
    assert 0.19 < min(areas) < 0.25
    assert 0.52 < max(areas) < 0.63
    assert 0.47 < min(ratios) < 0.6
    assert 1.7 < max(ratios) < 2.15


@pytest.mark.parametrize(
    "changed",
    [{"rotation_degrees": 30}, {"shift": 0.3}, {"zoom": 0.3}, {"color_jitter": 0.4}, {"randaugment_operations": 1}],
)
def test_each_kind_of_change_changes_pixels(changed: dict[str, Any]) -> None:
    plain = augmentation(crop_scale=[1, 1]).classification(noise(), 3)
    assert not np.array_equal(augmentation(crop_scale=[1, 1], **changed).classification(noise(), 3), plain)


def test_seeds_are_well_mixed() -> None:
    assert len({seed_of(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def coloured(labels: NDArray[np.uint8]) -> Image.Image:
    """An image whose red channel is its label times ten; ignored pixels are white."""
    red = np.where(labels == IGNORED, 255, labels * 10).astype(np.uint8)
    return Image.fromarray(np.stack([red] * 3, 2))


@pytest.mark.parametrize("shape", [(60, 90), (200, 50)])
def test_labels_move_with_their_pixels(shape: tuple[int, int]) -> None:
    labels = (
        np.random.default_rng(0).integers(0, 20, (shape[0] // 10, shape[1] // 10), np.uint8).repeat(10, 0).repeat(10, 1)
    )
    augment = augmentation(horizontal_flip=0.5, resize_range=[1.0, 2.0], largest_class=1.0)
    for seed in range(10):
        pixels, found = augment.segmentation(coloured(labels), labels, seed)
        assert pixels.shape == (48, 48, 3)
        assert found.shape == (48, 48)
        right = np.abs(pixels[..., 0].astype(int) - found * 10) < 3
        assert right.mean() > 0.5  # but for the pixels that bicubic resizing mixes
        assert (np.abs(pixels[:, ::-1, 0].astype(int) - found * 10) < 3).mean() < 0.4


def test_an_image_that_became_too_small_is_filled_with_ignored_pixels() -> None:
    labels = np.zeros((60, 60), np.uint8)
    _, found = augmentation(resize_range=[0.5, 0.5], largest_class=1.0).segmentation(coloured(labels), labels, 0)
    assert (found == 0).sum() == 24 * 24
    assert (found == IGNORED).sum() == 48 * 48 - 24 * 24


def test_crops_of_one_class_are_drawn_again() -> None:
    labels = np.zeros((100, 100), np.uint8)
    labels[:, 80:] = 1

    def shares(largest: float) -> list[float]:
        augment = augmentation(resize_range=[1.5, 1.5], largest_class=largest)
        return [float((augment.segmentation(coloured(labels), labels, seed)[1] == 0).mean()) for seed in range(20)]

    assert sum(share == 1 for share in shares(1.0)) > 3
    assert sum(share > 0.9 for share in shares(0.9)) <= 1


# --- Whole batches ----------------------------------------------------------------------------------------------------


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(1.0, 5.0)[:, None, None, None].expand(4, 3, 32, 32).clone(), torch.tensor([0, 1, 2, 0])


def test_mixup_mixes_images_and_targets_alike() -> None:
    inputs, labels = batch()
    mix = BatchAugmentation(make_recipe({**STILL, "mixup": 0.8}), 3)
    shares = set()
    for seed in range(8):
        mixed, targets = mix(inputs, labels, seed)
        share = float((4 - mixed[0, 0, 0, 0]) / 3)  # of the first image, beside the last
        torch.testing.assert_close(mixed, share * inputs + (1 - share) * inputs.flip(0))
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        torch.testing.assert_close(targets[1], torch.tensor([0.0, share, 1 - share]))
        shares.add(round(share, 3))
    assert len(shares) == 8


def test_cutmix_gives_targets_by_area() -> None:
    inputs, labels = batch()
    cut = BatchAugmentation(make_recipe({**STILL, "cutmix": 1.0}), 3)
    for seed in range(8):
        mixed, targets = cut(inputs, labels, seed)
        other = (mixed[1, 0] == 3).float().mean()  # of the third image
        assert set(mixed[1].unique().tolist()) <= {2.0, 3.0}
        torch.testing.assert_close(targets[1], torch.tensor([0.0, 1 - float(other), float(other)]))
    assert torch.equal(inputs, batch()[0])


def test_erasing_and_no_mixing() -> None:
    inputs, labels = batch()
    erased, targets = BatchAugmentation(make_recipe({**STILL, "erasing": 1.0}), 3)(inputs, labels, 0)
    assert targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    shares = (erased[:, 0] == 0).double().mean((1, 2))
    assert ((shares > 0) & (shares < 0.5)).all()
    whole, _ = BatchAugmentation(make_recipe(STILL), 3)(inputs, labels, 0)
    assert torch.equal(whole, inputs)


# --- Annotated folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    """Two images in the benchmark's layout, with its table of names."""
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        for name in ("a", "b"):
            path = tmp_path / kind / "training" / f"ADE_train_{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((40, 50), np.uint8)
            pixels[10:] = 150
            Image.fromarray(pixels).save(path)
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0.1\t5\t5\t0\tthing {i}, kind" for i in range(1, 151))]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_ade20k_is_read(ade20k: Path) -> None:
    found = annotated_set(ade20k, "training")
    assert [path.name for path in found.annotations] == ["ADE_train_a.png", "ADE_train_b.png"]
    assert len(found.classes) == 150
    assert found.classes[0] == "thing 1, kind"
    labels = load_labels(found.annotations[0], 150)
    assert (labels[:10] == IGNORED).all()
    assert (labels[10:] == 149).all()


def test_annotations_that_cannot_be_are_refused(ade20k: Path) -> None:
    annotation = ade20k / "annotations" / "training" / "ADE_train_b.png"
    with pytest.raises(UsageError, match=r"ADE_train_b.png: annotation has 150; expected 0 .ignored. to 149"):
        load_labels(annotation, 149)
    Image.new("RGB", (50, 40)).save(annotation)
    with pytest.raises(UsageError, match="annotation of mode 'RGB'; expected one 8-bit number a pixel"):
        load_labels(annotation, 150)
    annotation.unlink()
    with pytest.raises(UsageError, match=r"ADE_train_b.jpg: no annotation; expected one at .*ADE_train_b.png"):
        annotated_set(ade20k, "training")
    with pytest.raises(UsageError, match="no folder"):
        annotated_set(ade20k, "validation")
    (ade20k / "objectInfo150.txt").unlink()
    with pytest.raises(UsageError, match=r"no classes.txt and no objectInfo150.txt"):
        annotated_set(ade20k, "training")
    (ade20k / "classes.txt").write_text("one\n")
    with pytest.raises(UsageError, match="1 names of classes; expected 2 to 254"):
        annotated_set(ade20k, "training")


def test_labels_are_cropped_as_images_are() -> None:
    labels = np.random.default_rng(0).integers(0, 20, (6, 9), np.uint8).repeat(10, 0).repeat(10, 1)
    preprocessing = Preprocessing(image_size=48, crop_fraction=0.8)
    found, pixels = preprocessing.label_pixels(labels), preprocessing.pixels(coloured(labels))
    assert (np.abs(pixels[..., 0].astype(int) - found * 10) < 3).mean() > 0.5
    assert found.shape == (48, 48)
    assert set(np.unique(found)) <= set(np.unique(labels))


# --- Scenes -----------------------------------------------------------------------------------------------------------


def test_scenes_are_digits_on_photographs_and_repeat(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_scenes(tmp_path / name, 3, 2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 10
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    training, validation = (annotated_set(tmp_path / "a", part) for part in ("training", "validation"))
    assert (len(training), len(validation), training.classes) == (3, 2, SCENE_CLASSES)
    for path in (*training.annotations, *validation.annotations):
        labels = load_labels(path, len(SCENE_CLASSES))
        assert IGNORED not in labels
        assert 0.5 < (labels == 0).mean() < 0.99  # background


def test_a_digit_is_annotated_with_its_class_where_its_ink_is() -> None:
    digits, black = load_digits(), [np.zeros((100, 100, 3), np.uint8)]
    for label in (0, 7):
        chosen = digits.pixels[digits.labels == label][:5]
        scene, annotation = compose_scene(black, chosen, np.full(5, label), 0)
        assert set(np.unique(annotation)) == {1, 2 + label}
        bright = scene.max(2) > 100
        assert (bright == (annotation == 2 + label)).mean() > 0.97


def test_held_out_digits_and_backgrounds_are_never_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[set[bytes], set[int]]] = []

    def note(photographs: Any, digits: Any, labels: Any, seed: int) -> Any:
        seen.append(({digit.tobytes() for digit in digits}, {photo.shape[1] for photo in photographs}))
        return compose_scene(photographs, digits, labels, seed)

    monkeypatch.setattr("dmformer.train.datasets.compose_scene", note)
    write_scenes(tmp_path, 1, 1)
    (trained, width), (held_out, rest) = seen
    assert not trained & held_out
    assert (width, rest) == ({480}, {160})
    assert load_photographs()[0].shape == (427, 640, 3)
