"""Image files of every kind that a device may be given: the right pixels, or one line that says why not."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from dmformer.data.images import FORMATS, load_pixels, open_image
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.conftest import Run

SMALL = Preprocessing(image_size=32, crop_fraction=1.0)
GREY = Preprocessing(image_size=32, crop_fraction=1.0, channels="L", mean=(0.5,), std=(0.5,))
ORIENTATION = 0x0112


def scene(size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A different, far-off colour in each quarter."""
    image = Image.new("RGB", size, (250, 10, 10))
    width, height = size[0] // 2, size[1] // 2
    image.paste((10, 250, 10), (width, 0, size[0], height))
    image.paste((10, 10, 250), (0, height, width, size[1]))
    image.paste((250, 250, 250), (width, height, size[0], size[1]))
    return image


def quarters(pixels: NDArray[np.uint8]) -> list[list[int]]:
    """The middle of each quarter, as rows of colours."""
    return [pixels[y, x].tolist() for y in (8, 24) for x in (8, 24)]


SCENE = [[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 250]]


def saved(path: Path, image: Image.Image, **settings: object) -> Path:
    image.save(path, **settings)
    return path


def seen(path: Path) -> NDArray[np.uint8]:
    (pixels,) = load_pixels([path], SMALL)
    return pixels


def refusal(path: Path, preprocessing: Preprocessing = SMALL) -> str:
    with pytest.raises(UsageError) as caught:
        load_pixels([path], preprocessing)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert str(path) in message
    assert "\n" not in message
    return message


# --- colours ----------------------------------------------------------------------------------------------------------


def test_eight_bit_images_are_seen_as_they_are(tmp_path: Path) -> None:
    for suffix in ("png", "bmp", "tif", "ppm"):
        assert quarters(seen(saved(tmp_path / f"a.{suffix}", scene()))) == SCENE
    assert quarters(seen(saved(tmp_path / "a.webp", scene(), lossless=True))) == SCENE


def test_palettes(tmp_path: Path) -> None:
    palette = scene().quantize(4)
    for suffix in ("png", "gif", "bmp", "tif"):
        assert quarters(seen(saved(tmp_path / f"a.{suffix}", palette))) == SCENE


@pytest.mark.parametrize("transparency", [0, bytes([0, 255, 0, 128])], ids=["one colour", "each colour"])
def test_palettes_with_transparent_colours_keep_their_colours(tmp_path: Path, transparency: int | bytes) -> None:
    path = saved(tmp_path / "a.png", scene().quantize(4), transparency=transparency)
    with Image.open(path) as stored:
        assert stored.mode == "P"
        assert "transparency" in stored.info
    assert quarters(seen(path)) == SCENE


@pytest.mark.parametrize(("mode", "key"), [("RGB", (250, 10, 10)), ("L", 77), ("1", 0)])
def test_a_colour_that_stands_for_transparency_is_kept(tmp_path: Path, mode: str, key: object) -> None:
    image = scene().convert(mode)
    path = saved(tmp_path / "a.png", image, transparency=key)
    with Image.open(path) as stored:
        assert "transparency" in stored.info
    assert quarters(seen(path)) == quarters(np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparency_is_dropped(tmp_path: Path, alpha: int) -> None:
    image = scene()
    image.putalpha(alpha)
    assert quarters(seen(saved(tmp_path / "a.png", image))) == SCENE
    grey = Image.new("LA", (32, 32), (77, alpha))
    assert quarters(seen(saved(tmp_path / "g.png", grey))) == [[77] * 3] * 4


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (32, 32))
    image.paste(1, (16, 0, 32, 32))
    for suffix in ("png", "bmp", "tif"):
        assert quarters(seen(saved(tmp_path / f"a.{suffix}", image))) == [[0] * 3, [255] * 3] * 2


def test_cmyk(tmp_path: Path) -> None:
    """Red, green, blue, white in inks; JPEG's own losses are within a few levels."""
    for name in ("a.tif", "a.jpg"):
        pixels = seen(saved(tmp_path / name, scene().convert("CMYK"), quality=100))
        assert np.abs(np.subtract(quarters(pixels), SCENE)).max() < 8


def test_grey_networks_see_luma(tmp_path: Path) -> None:
    (pixels,) = load_pixels([saved(tmp_path / "a.png", scene())], GREY)
    assert pixels.shape == (32, 32, 1)
    luma = [round(0.299 * red + 0.587 * green + 0.114 * blue) for red, green, blue in SCENE]
    assert np.abs(np.subtract(quarters(pixels[..., 0]), luma)).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif"), (np.float32, "tif")]
)
def test_deeper_greys_are_refused(tmp_path: Path, dtype: type, suffix: str) -> None:
    path = saved(tmp_path / f"deep.{suffix}", Image.fromarray(np.ones((40, 40), dtype)))
    assert "expected 8 bits a channel" in refusal(path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file (ISO/IEC 15948) out of its parts, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_sixteen_bit_colours_are_seen_by_their_high_bytes(tmp_path: Path) -> None:
    pixel = struct.pack(">HHH", 0x12FF, 0x8000, 0xFE01)
    (tmp_path / "a.png").write_bytes(png(32, 32, 16, 2, (b"\0" + pixel * 32) * 32))
    assert quarters(seen(tmp_path / "a.png")) == [[0x12, 0x80, 0xFE]] * 4


def test_what_cannot_be_converted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: object) -> None:
        raise ValueError("conversion not supported")

    path = saved(tmp_path / "a.png", scene())
    monkeypatch.setattr(Image.Image, "convert", convert)
    assert "conversion not supported" in refusal(path)


# --- orientation, frames ----------------------------------------------------------------------------------------------

UNDO = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", UNDO)
def test_orientation_in_every_format_that_has_it(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    step = UNDO[orientation]
    stored = scene() if step is None else scene().transpose(step)
    pixels = seen(saved(tmp_path / f"a.{suffix}", stored, exif=exif, quality=100))
    assert np.abs(np.subtract(quarters(pixels), SCENE)).max() < 8


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert quarters(seen(saved(tmp_path / "a.png", scene(), exif=exif))) == SCENE


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_seen(tmp_path: Path, suffix: str) -> None:
    others = [Image.new("RGB", (32, 32), (index, 0, 0)) for index in (100, 200)]
    settings = {"lossless": True} if suffix == "webp" else {}
    first = scene().quantize(4) if suffix == "gif" else scene()
    path = saved(tmp_path / f"a.{suffix}", first, save_all=True, append_images=others, **settings)
    with Image.open(path) as stored:
        assert stored.n_frames == 3
    assert quarters(seen(path)) == SCENE


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 by 30,000 pixels in a few kilobytes: 2.7 GB."""
    rows = zlib.compressobj()
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000, 8, 2, b"") + rows.flush())
    monkeypatch.setattr(Image.Image, "copy", lambda _: pytest.fail("decoded"))
    assert "decompression bomb" in refusal(tmp_path / "bomb.png")


def test_a_bomb_is_refused_where_warnings_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its limit to twice that, Pillow only warns."""
    path = saved(tmp_path / "a.png", scene())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "decompression bomb" in refusal(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)
    assert quarters(seen(path)) == SCENE


def test_a_bomb_of_text_is_refused(tmp_path: Path) -> None:
    data = png(40, 40, 8, 0, (b"\0" + bytes(40)) * 40)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20), 9))
    (tmp_path / "bomb.png").write_bytes(data[:33] + text + data[33:])
    assert "too large" in refusal(tmp_path / "bomb.png")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, inline: Callable[..., Run], bundle: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert "no file" in refusal(path)
    run = inline("predict", bundle, path)
    assert run.code == 2
    assert str(path) in run.error_line


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", scene())

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", denied)
    assert "Permission denied" in refusal(path)


@pytest.mark.parametrize("size", [(0, 40), (40, 0), (0, 0)])
def test_images_without_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    bitmap = io.BytesIO()
    scene().save(bitmap, "BMP")
    data = bytearray(bitmap.getvalue())
    data[18:26] = struct.pack("<ii", *size)  # BITMAPINFOHEADER: width, height
    (tmp_path / "a.bmp").write_bytes(data)
    (tmp_path / "a.png").write_bytes(png(*size, 8, 2, b""))
    (tmp_path / "a.ppm").write_bytes(b"P6 %d %d 255\n" % size)
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + struct.pack("<HH", *size) + b"\0\0\0;")
    for name in ("a.bmp", "a.png", "a.ppm", "a.gif"):
        refusal(tmp_path / name)
    with pytest.raises(UsageError):
        SMALL.pixels(Image.new("RGB", size))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp", "ppm"])
def test_files_cut_off_anywhere(tmp_path: Path, suffix: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    path = saved(tmp_path / f"a.{suffix}", noise)
    data = path.read_bytes()
    for share in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        refusal(path)


@pytest.mark.parametrize("data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1", b"<svg/>"])
def test_formats_that_are_not_decoded(tmp_path: Path, data: bytes) -> None:
    """Whatever the name says: Pillow would start Ghostscript for the first."""
    (tmp_path / "a.png").write_bytes(data)
    assert ", ".join(FORMATS) in refusal(tmp_path / "a.png")


def test_mutated_images(tmp_path: Path) -> None:
    """One hundred and fifty of each format: pixels, or one line."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F] = 6, "maker"
    generator = random.Random(0)
    path = tmp_path / "mutated"
    for kind in FORMATS:
        stored = io.BytesIO()
        scene((60, 40)).save(stored, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
        data = stored.getvalue()
        read = 0
        for number in range(150):
            changed = bytearray(data)
            for _ in range(generator.choice((1, 1, 3, 10))):
                changed[generator.randrange(min(len(data), generator.choice((60, 400, len(data)))))] ^= 1 << number % 8
            path.write_bytes(changed[: generator.randrange(len(data)) if number % 5 == 0 else len(data)])
            try:
                assert SMALL.pixels(open_image(path)).shape == (32, 32, 3)
                read += 1
            except UsageError as error:
                assert "\n" not in str(error)  # noqa: PT017 - refused or read, both are right
        assert 0 < read < 150


@pytest.mark.parametrize(
    ("interpolation", "digest"),
    [("bicubic", "5a6e5e06cded6962"), ("bilinear", "c8dc7276e94fa156")],
)
def test_tall_images_are_resized_alike_by_every_pillow(interpolation: str, digest: str) -> None:
    """Across and then down, as Pillow 10.3 did, which these digests are from; 13 takes the other order by itself."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 300, 3), np.uint8)
    pixels = Preprocessing(image_size=64, crop_fraction=0.8, interpolation=interpolation).pixels(Image.fromarray(noise))
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == digest
