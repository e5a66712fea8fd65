"""Folders of images with labels: which folder is which class, and images in batches."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from dmformer.data.images import ImageSet, image_set
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError
from tests.bundles import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SMALL = Preprocessing(image_size=32, crop_fraction=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
ANIMALS = ("zebra", "ape", "cat")  # in no sorted order


def put(folder: Path, *names: str) -> Path:
    """Grey images below a folder; each has a brightness of its own, by its place in the list."""
    for level, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (level, level, level)).save(path)
    return folder


def found(folder: Path, classes: Sequence[str] = ANIMALS, class_count: int = 3) -> dict[str, int]:
    """Label of each image, by its path in the folder."""
    images = image_set(folder, SMALL, classes, class_count)
    assert images.labels is not None
    assert images.labels.dtype == np.int64
    names = [path.relative_to(folder).as_posix() for path in images.paths]
    return dict(zip(names, images.labels.tolist(), strict=True))


def refused(folder: Path, classes: Sequence[str] = ANIMALS, class_count: int = 3) -> str:
    with pytest.raises(UsageError) as caught:
        image_set(folder, SMALL, classes, class_count)
    return one_line(caught.value)


# --- which folder is which class --------------------------------------------------------------------------------------


def test_folders_named_after_classes(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "zebra/1.png", "ape/1.png", "ape/2.png")
    assert found(tmp_path) == {"ape/1.png": 1, "ape/2.png": 1, "cat/1.png": 2, "zebra/1.png": 0}


def test_not_every_class_needs_a_folder(tmp_path: Path) -> None:
    assert found(put(tmp_path, "cat/1.png")) == {"cat/1.png": 2}


@pytest.mark.parametrize("classes", [ANIMALS, ()])
def test_folders_named_by_index(tmp_path: Path, classes: Sequence[str]) -> None:
    assert found(put(tmp_path, "2/a.png", "0/b.png"), classes) == {"0/b.png": 0, "2/a.png": 2}


def test_an_index_is_a_number_and_not_its_place_among_the_names(tmp_path: Path) -> None:
    put(tmp_path, "2/a.png", "10/a.png", "003/a.png")
    assert found(tmp_path, (), 11) == {"003/a.png": 3, "10/a.png": 10, "2/a.png": 2}


def test_a_class_that_is_called_like_a_number_goes_by_its_name(tmp_path: Path) -> None:
    assert found(put(tmp_path, "0/a.png", "1/a.png"), ("1", "0"), 2) == {"0/a.png": 1, "1/a.png": 0}


def test_without_class_names_as_many_folders_as_classes_are_in_sorted_order(tmp_path: Path) -> None:
    put(tmp_path, "n02/a.png", "n01/b.png", "n01/a.png", "n11/a.png")
    assert found(tmp_path, ()) == {"n01/a.png": 0, "n01/b.png": 0, "n02/a.png": 1, "n11/a.png": 2}


def test_the_folder_next_to_the_root_is_the_class(tmp_path: Path) -> None:
    put(tmp_path, "cat/ape/zebra/1.png", "ape/1.png")
    assert found(tmp_path) == {"ape/1.png": 1, "cat/ape/zebra/1.png": 2}


def test_folders_and_files_without_images_are_nothing(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("none yet")
    (tmp_path / "README.md").write_text("three classes")
    assert found(tmp_path) == {"cat/1.png": 2}


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    put(tmp_path, "cat/1.png")
    monkeypatch.chdir(tmp_path)
    assert found(Path()) == {"cat/1.png": 2}


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    images = image_set(put(tmp_path, "b.png", "a.png"), SMALL, ANIMALS, 3)
    assert images.labels is None
    assert [path.name for path in images.paths] == ["a.png", "b.png"]
    assert images.spread(1).labels is None


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_image_beside_the_class_folders(tmp_path: Path) -> None:
    line = refused(put(tmp_path, "ape/1.png", "stray.png", "zebra/1.png"))
    assert line.startswith(f"{tmp_path / 'stray.png'}: beside the class folders")


def test_a_folder_of_an_unknown_class(tmp_path: Path) -> None:
    line = refused(put(tmp_path, "ape/1.png", "dog/1.png"))
    assert line.startswith(f"{tmp_path / 'dog'}: no class of the network; expected one of zebra, ape, cat, or only ind")
    assert "0 to 2; images without labels lie loose" in line


def test_names_and_indices_mixed(tmp_path: Path) -> None:
    assert str(tmp_path / "1") in refused(put(tmp_path, "ape/1.png", "1/1.png"))


def test_many_class_names_are_not_all_listed(tmp_path: Path) -> None:
    line = refused(put(tmp_path, "dog/1.png"), [f"class{i}" for i in range(1000)], 1000)
    assert "class4, …" in line
    assert "class5" not in line
    assert "0 to 999" in line


@pytest.mark.parametrize("names", [["n1", "n2"], ["n1", "n2", "n3", "n4"]], ids=["too few", "too many"])
def test_without_class_names_another_number_of_folders(tmp_path: Path, names: list[str]) -> None:
    line = refused(put(tmp_path, *(f"{name}/1.png" for name in names)), ())
    assert str(tmp_path / "n1") in line
    assert "0 to 2" in line


@pytest.mark.parametrize("strange", ["3", "-1", "1.0", "²"])
@pytest.mark.parametrize("classes", [ANIMALS, ()])
def test_what_is_no_index(tmp_path: Path, strange: str, classes: Sequence[str]) -> None:
    assert str(tmp_path / strange) in refused(put(tmp_path, f"{strange}/1.png"), classes)


def test_class_names_are_not_replaced_by_sorted_order(tmp_path: Path) -> None:
    put(tmp_path, "apes/1.png", "cats/1.png", "zebras/1.png")  # as many folders as classes
    assert "apes" in refused(tmp_path)


def test_no_image(tmp_path: Path) -> None:
    (tmp_path / "ape").mkdir()
    (tmp_path / "ape" / "notes.txt").write_text("none yet")
    assert re.match(f"no image in '{tmp_path}'; expected files that end in .*png", refused(tmp_path))


def test_no_folder(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    for path in (tmp_path / "missing", tmp_path / "1.png"):
        assert refused(path) == f"no folder '{path}'; expected a folder of images"


@pytest.mark.parametrize(("names", "strange"), [(["0", "1", "cat"], "cat"), (["2", "7"], "7")])
def test_without_class_names_the_strange_folder_is_named(tmp_path: Path, names: list[str], strange: str) -> None:
    assert str(tmp_path / strange) in refused(put(tmp_path, *(f"{name}/1.png" for name in names)), (), 5)


# --- spread -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unlike(tmp_path: Path) -> ImageSet:
    """Three classes of 4, 6 and 10 images."""
    sizes = {"ape": 4, "cat": 6, "zebra": 10}
    put(tmp_path, *(f"{name}/{i:02}.png" for name, size in sizes.items() for i in range(size)))
    return image_set(tmp_path, SMALL, ANIMALS, 3)


@pytest.mark.parametrize("count", [5, 7, 19])
def test_spread_keeps_labels_with_their_images_and_takes_every_class(unlike: ImageSet, count: int) -> None:
    few = unlike.spread(count)
    assert few.labels is not None
    assert len(few) == len(few.labels) == len(set(few.paths)) == count
    assert list(few.paths) == sorted(few.paths)
    assert [ANIMALS[label] for label in few.labels] == [path.parent.name for path in few.paths]
    assert set(few.labels.tolist()) == {0, 1, 2}
    gaps = np.diff([unlike.paths.index(path) for path in few.paths])
    assert gaps.max() - gaps.min() <= 1
    assert few.preprocessing == unlike.preprocessing


@pytest.mark.parametrize("count", [20, 21, 1000])
def test_spread_over_more_than_there_are_is_all_of_them(unlike: ImageSet, count: int) -> None:
    assert unlike.spread(count).paths == unlike.paths


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "sizes"), [(8, [8, 8, 4]), (20, [20]), (7, [7, 7, 6]), (64, [20]), (1, [1] * 20)])
def test_batches_have_every_image_in_order(unlike: ImageSet, size: int, sizes: list[int]) -> None:
    batches = list(unlike.batches(size))
    assert [len(batch) for batch in batches] == sizes
    joined = np.concatenate(batches)
    assert joined.shape == (20, 3, 32, 32)
    assert joined.dtype == np.float32
    np.testing.assert_allclose(joined[:, 0, 0, 0] * 255, np.arange(20), atol=1e-3)


def test_batches_are_preprocessed(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (255, 0, 51)).save(tmp_path / "a.png")
    told = Preprocessing(image_size=32, crop_fraction=1.0, channels="BGR", mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    (batch,) = image_set(tmp_path, told, (), 3).batches(8)
    np.testing.assert_allclose(batch[0, :, 5, 5], [(0.2 - 0.1) / 0.5, (0.0 - 0.2) / 1.0, (1.0 - 0.3) / 2.0], atol=1e-6)


def test_an_image_that_cannot_be_read_is_named_once_it_is_its_turn(unlike: ImageSet) -> None:
    unlike.paths[9].write_bytes(b"no image")
    batches = unlike.batches(8)
    assert len(next(batches)) == 8
    with pytest.raises(UsageError) as caught:
        next(batches)
    assert str(unlike.paths[9]) in one_line(caught.value)
