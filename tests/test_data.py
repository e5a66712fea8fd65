"""From image files to the network's input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from dmformer.data.images import SUFFIXES, list_images, load_pixels, open_image, spread, synthetic_pixels
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SMALL = Preprocessing(image_size=32)
ORIENTATION = 0x0112


def picture(width: int = 90, height: int = 60, mode: str = "RGB") -> Image.Image:
    """Colours that no flip, turn or exchange of channels leaves alone."""
    y, x = np.mgrid[0:height, 0:width]
    red, green, blue = 255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 5 + y / 9)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8)).convert(mode)


def message(failure: pytest.ExceptionInfo[UsageError]) -> str:
    assert failure.value.exit_code == 2
    assert len(str(failure.value).splitlines()) == 1
    return str(failure.value)


@pytest.mark.parametrize(
    ("size", "resized"), [((90, 60), (56, 37)), ((60, 90), (37, 56)), ((50, 50), (37, 37)), ((20, 31), (37, 57))]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_the_centre_of_the_resized_image(
    size: tuple[int, int], resized: tuple[int, int], interpolation: str
) -> None:
    """The shorter side becomes 32 / 0.875 = 37 pixels."""
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    whole = np.asarray(picture(*size).resize(resized, filters[interpolation]))
    top, left = (resized[1] - 32) // 2, (resized[0] - 32) // 2
    pixels = Preprocessing.from_dict({"image_size": 32, "interpolation": interpolation}).pixels(picture(*size))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, whole[top : top + 32, left : left + 32])


def test_crop_fraction_of_one_only_resizes() -> None:
    image = picture(48, 48)
    expected = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(Preprocessing(image_size=40, crop_fraction=1.0).pixels(image), expected)


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
def test_normalize_is_the_formula_in_the_order_of_the_network(channels: str) -> None:
    count = len(channels)
    mean, std = (0.1, 0.2, 0.3)[:count], (0.5, 0.6, 0.7)[:count]
    rows = np.random.default_rng(0).integers(0, 256, (2, 5, 4, count), dtype=np.uint8)
    result = Preprocessing.from_dict({"channels": channels, "mean": mean, "std": std}).normalize(rows)
    assert result.shape == (2, count, 5, 4)
    assert result.dtype == np.float32
    assert result.flags["C_CONTIGUOUS"]
    for c in range(count):
        source = count - 1 - c if channels == "BGR" else c
        np.testing.assert_allclose(result[:, c], (rows[..., source] / 255.0 - mean[c]) / std[c], rtol=0, atol=1e-6)


def test_pixels_stay_rgb_for_a_bgr_network() -> None:
    np.testing.assert_array_equal(
        Preprocessing(image_size=32, channels="BGR").pixels(picture()), SMALL.pixels(picture())
    )


def test_one_channel_is_luma() -> None:
    grey = Preprocessing(image_size=32, channels="L", mean=(0.5,), std=(0.5,))
    expected = SMALL.pixels(picture(mode="L"))  # three equal channels
    assert grey.pixels(picture()).shape == (32, 32, 1)
    np.testing.assert_array_equal(grey.pixels(picture())[..., 0], expected[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_exif_is_followed(orientation: int, tmp_path: Path) -> None:
    undo = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],  # a camera that wrote 6 turned the scene left; viewers turn it right
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = picture()
    for step in undo[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(SMALL.pixels(open_image(tmp_path / "turned.png")), SMALL.pixels(picture()))


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "L", "1", "LA", "YCbCr", "HSV"])
def test_other_modes_are_converted_before_resizing(mode: str) -> None:
    image = picture(mode=mode)
    np.testing.assert_array_equal(SMALL.pixels(image), SMALL.pixels(image.convert("RGB")))
    assert SMALL.pixels(image).shape == (32, 32, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_refused(dtype: Any) -> None:
    with pytest.raises(UsageError) as failure:
        SMALL.pixels(Image.fromarray(np.ones((40, 40), dtype)))
    assert "8 bits" in message(failure)


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (30, 3000)])
def test_too_narrow_images_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError) as failure:
        SMALL.pixels(Image.new("RGB", size))
    assert f"{size[0]}x{size[1]}" in message(failure)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (1000, 20), (20, 1000), (31, 33)])
def test_odd_sizes_give_whole_images(size: tuple[int, int]) -> None:
    pixels = SMALL.pixels(Image.new("RGB", size, (10, 20, 30)))
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8([10, 20, 30]), (32, 32, 3)))


def test_vanishing_crop_is_refused() -> None:
    for crop in (1e-3, 1e-320):
        with pytest.raises(UsageError) as failure:
            Preprocessing(image_size=32, crop_fraction=crop).pixels(picture())
        assert "crop_fraction" in message(failure)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"colour": 1}, ["unknown field", "colour"]),
        ({"image_size": 31}, [">= 32", "image_size"]),
        ({"image_size": 5000}, ["<= 4096", "image_size"]),
        ({"image_size": 64.5}, ["int", "image_size"]),
        ({"crop_fraction": 0}, ["> 0", "crop_fraction"]),
        ({"crop_fraction": 1.5}, ["<= 1", "crop_fraction"]),
        ({"interpolation": "nearest"}, ["nearest", "interpolation"]),
        ({"channels": "RGBA"}, ["RGBA", "channels"]),
        ({"channels": "L"}, ["3 means", "expected 1 each"]),
        ({"mean": [0.5]}, ["1 means", "expected 3 each"]),
        ({"std": [0.5, 0.5, 0]}, ["> 0", "std"]),
        ({"std": [0.5, 0.5, 1e-40]}, ["std", "scale 0..1"]),
        ({"mean": [float("nan"), 0.5, 0.5]}, ["mean", "scale 0..1"]),
        ({"mean": [1e40, 0.5, 0.5]}, ["mean", "scale 0..1"]),
        ([], ["preprocessing", "object"]),
    ],
    ids=str,
)
def test_bad_preprocessing_is_refused(values: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as failure:
        Preprocessing.from_dict(values)
    assert all(word in message(failure) for word in words), message(failure)


def test_another_image_size_changes_the_size_only() -> None:
    before = Preprocessing(crop_fraction=0.9, channels="BGR", mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    after = before.with_fields({"image_size": 96})
    assert after == Preprocessing(image_size=96, crop_fraction=0.9, channels="BGR", mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    with pytest.raises(UsageError, match="image_size"):
        before.with_fields({"image_size": 8})


def test_list_images_finds_every_kind_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "folder.png").mkdir()
    names = [f"image{suffix}" for suffix in SUFFIXES] + ["b/UPPER.JPG", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    assert list_images(tmp_path) == sorted(tmp_path / name for name in names[:-1])


def test_list_images_follows_links_and_not_in_circles(tmp_path: Path) -> None:
    real, folder = tmp_path / "elsewhere", tmp_path / "linked"
    real.mkdir()
    folder.mkdir()
    Image.new("L", (2, 2)).save(real / "1.png")
    (folder / "b").symlink_to(real)
    (folder / "a").symlink_to(real)
    (real / "back").symlink_to(folder)
    (folder / "c").symlink_to(folder)
    found = [path.relative_to(folder).as_posix() for path in list_images(folder)]
    assert found == ["a/1.png", "b/1.png"]


def test_list_images_wants_a_folder_with_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as failure:
        list_images(tmp_path / "none")
    assert str(tmp_path / "none") in message(failure)
    with pytest.raises(UsageError) as failure:
        list_images(tmp_path)
    assert ".png" in message(failure)


def test_open_image_decodes(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(picture()))


def spoil(kind: str, path: Path) -> None:
    if kind == "a folder":
        path.mkdir()
    elif kind == "truncated":
        picture().save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind in ("text", "empty"):
        path.write_text("no image\n" if kind == "text" else "")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tif"])
@pytest.mark.parametrize("kind", ["missing", "a folder", "truncated", "text", "empty"])
def test_unreadable_image_is_named(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"spoilt{suffix}"
    spoil(kind, path)
    with pytest.raises(UsageError) as failure:
        open_image(path)
    assert str(path) in message(failure)


@pytest.mark.parametrize("limit", [1000, 3000])  # of 5400 pixels: an error from twice the limit on, a warning below
def test_decompression_bomb_is_named(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UsageError) as failure:
        open_image(tmp_path / "bomb.png")
    assert str(tmp_path / "bomb.png") in message(failure)
    assert "smaller" in message(failure)


def test_load_pixels_stacks_in_order_and_names_the_bad_one(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture(60, 90).save(tmp_path / "b.png")
    Image.new("RGB", (1, 5000)).save(tmp_path / "narrow.png")
    rows = load_pixels([tmp_path / "b.png", tmp_path / "a.png"], SMALL)
    np.testing.assert_array_equal(rows, np.stack([SMALL.pixels(picture(60, 90)), SMALL.pixels(picture())]))
    with pytest.raises(UsageError) as failure:
        load_pixels([tmp_path / "a.png", tmp_path / "narrow.png"], SMALL)
    assert str(tmp_path / "narrow.png") in message(failure)


@pytest.mark.parametrize(
    ("total", "count", "chosen"), [(3, 5, [0, 1, 2]), (4, 4, [0, 1, 2, 3]), (10, 5, [0, 2, 4, 6, 8]), (7, 2, [0, 3])]
)
def test_spread_is_even(total: int, count: int, chosen: list[int], tmp_path: Path) -> None:
    paths = [tmp_path / str(index) for index in range(total)]
    assert spread(paths, count) == [paths[index] for index in chosen]


def test_spread_of_none_is_none() -> None:
    assert spread([], 4) == []


def test_synthetic_pixels_are_decided_by_the_seed() -> None:
    first = synthetic_pixels(4, 48, 3, seed=1)
    assert first.shape == (4, 48, 48, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, synthetic_pixels(4, 48, 3, seed=1))
    assert (first != synthetic_pixels(4, 48, 3, seed=2)).mean() > 0.9


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_synthetic_channels_and_images_differ() -> None:
    images = synthetic_pixels(4, 64, 3, seed=1).astype(float)
    for image in images:
        assert abs(correlation(image[..., 0], image[..., 2])) < 0.5
    assert abs(correlation(images[0], images[2])) < 0.5
    assert min(image.std() for image in images) > 30


def test_synthetic_images_are_white_and_one_over_f_by_turns() -> None:
    images = synthetic_pixels(4, 64, 1, seed=1).astype(float)[..., 0]
    neighbours = [correlation(image[:, 1:], image[:, :-1]) for image in images]
    assert abs(neighbours[0]) < 0.1
    assert abs(neighbours[2]) < 0.1
    assert min(neighbours[1], neighbours[3]) > 0.5
