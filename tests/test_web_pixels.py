"""The page's scripts beside Python's preprocessing, pixel by pixel, in headless Chromium."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from dmformer.data.images import open_image
from dmformer.data.preprocessing import Preprocessing
from tests.png import SAMPLES, chunk, png
from tests.tiers import first
from tests.web import Opened, served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

RNG = np.random.default_rng(22)


@pytest.fixture(scope="module")
def scripts(browser: Any, web_page: Path) -> Iterator[Opened]:
    """The page, for its scripts."""
    with served(web_page) as address:
        yield Opened(browser, address).ready()


def same_pixels(scripts: Opened, data: bytes, preprocessing: Preprocessing, tmp_path: Path, multiple: int = 0) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    image = open_image(path)
    expected = preprocessing.uncropped_pixels(image, multiple) if multiple else preprocessing.pixels(image)
    np.testing.assert_array_equal(scripts.pixels(data, preprocessing, multiple), expected)


def noise(height: int, width: int, colour: int, bits: int, most: int | None = None) -> NDArray[Any]:
    return RNG.integers(0, most or 1 << bits, (height, width, SAMPLES[colour]), np.uint16)


RGB = Preprocessing(image_size=48, crop_fraction=0.875)
LUMA = Preprocessing(image_size=32, crop_fraction=1, channels="L", mean=(0.5,), std=(0.5,), interpolation="bilinear")
PALETTE = RNG.integers(0, 256, 768, np.uint8).tobytes()
KINDS = [
    *((bits, 0) for bits in (1, 2, 4, 8)), *((bits, colour) for colour in (2, 4, 6) for bits in (8, 16)),
    *((bits, 3) for bits in (1, 2, 4, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "colour"), KINDS)
@pytest.mark.parametrize("preprocessing", [RGB, LUMA], ids=["RGB", "L"])
def test_every_kind_of_png_to_the_bit(
    scripts: Opened, bits: int, colour: int, preprocessing: Preprocessing, tmp_path: Path
) -> None:
    extra = chunk(b"PLTE", PALETTE[: 3 << bits]) if colour == 3 else b""
    transparent = {0: b"\0\1", 2: b"\0\1\0\2\0\3", 3: b"\0\x80"}.get(colour)
    for interlaced, more in ((False, b""), (True, chunk(b"tRNS", transparent) if transparent else b"")):
        data = png(noise(61, 83, colour, bits), bits, colour, interlaced=interlaced, extra=extra + more)
        same_pixels(scripts, data, preprocessing, tmp_path)


@pytest.mark.parametrize(
    "size", [(1, 1), (48, 48), (48, 64), (7, 5), (500, 60), (131, 257), (64, 63), (32, 35), (900, 1200)]
)
@pytest.mark.parametrize(
    "preprocessing", first(1, [RGB, replace(RGB, interpolation="bilinear"), replace(RGB, crop_fraction=1.0), LUMA]),
    ids=["bicubic", "bilinear", "uncropped", "L"],
)  # fmt: skip
def test_every_size_to_the_bit(
    scripts: Opened, size: tuple[int, int], preprocessing: Preprocessing, tmp_path: Path
) -> None:
    same_pixels(scripts, png(noise(*size, 2, 8), 8, 2), preprocessing, tmp_path)


@pytest.mark.parametrize("size", [(64, 64), (90, 200), (33, 47)])
def test_open_size_to_the_bit(scripts: Opened, size: tuple[int, int], tmp_path: Path) -> None:
    same_pixels(scripts, png(noise(*size, 2, 8), 8, 2), replace(RGB, image_size=64), tmp_path, 32)


def test_a_short_palette_and_a_frame_of_two(scripts: Opened, tmp_path: Path) -> None:
    data = png(noise(40, 40, 3, 8), 8, 3, extra=chunk(b"PLTE", PALETTE[:30]))
    same_pixels(scripts, data, RGB, tmp_path)
    buffer = io.BytesIO()
    first, second = (Image.fromarray(noise(40, 40, 2, 8).astype(np.uint8)) for _ in range(2))
    first.save(buffer, "PNG", save_all=True, append_images=[second])
    same_pixels(scripts, buffer.getvalue(), RGB, tmp_path)


def smooth(height: int, width: int) -> Image.Image:
    small = RNG.integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_orientation(scripts: Opened, orientation: int, tmp_path: Path) -> None:
    """To the bit in PNG; in JPEG up to what the decoders differ by."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, allowed in (("PNG", 0), ("JPEG", 2)):
        buffer = io.BytesIO()
        smooth(60, 90).save(buffer, kind, exif=exif)
        path = tmp_path / "image"
        path.write_bytes(buffer.getvalue())
        expected = RGB.pixels(open_image(path)).astype(int)
        assert np.abs(scripts.pixels(buffer.getvalue(), RGB) - expected).max() <= allowed


def test_orientation_in_xmp_and_odd_exif(scripts: Opened, tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    pixels = noise(40, 60, 2, 8)
    for extra in (
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\2\0\0\0\6\0\6\0\0\0\0\0"),  # two numbers
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\4\0\0\0\1\0\0\0\x08\0\0\0\0"),  # of 32 bits
        chunk(b"eXIf", b"II*\0\xff\xff"),
    ):
        same_pixels(scripts, png(pixels, 8, 2, extra=extra), RGB, tmp_path)


@pytest.mark.parametrize(("kind", "options"), [
    ("JPEG", {"quality": 90}), ("JPEG", {"quality": 60, "subsampling": 0, "progressive": True}),
    ("GIF", {}), ("BMP", {}), ("WEBP", {"lossless": True}),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_the_browser_decodes(
    scripts: Opened, kind: str, options: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    smooth(71, 101).convert(mode).save(buffer, kind, **options)
    path = tmp_path / "image"
    path.write_bytes(buffer.getvalue())
    expected = RGB.pixels(open_image(path)).astype(int)
    largest = np.abs(scripts.pixels(buffer.getvalue(), RGB) - expected).max()
    assert largest <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
def test_tensors_to_the_bit(scripts: Opened, channels: str) -> None:
    count = len(channels)
    preprocessing = Preprocessing(
        image_size=32, channels=channels, mean=(0.485, 0.456, 0.406)[:count], std=(0.229, 0.224, 0.225)[:count]
    )
    pixels = RNG.integers(0, 256, (2, 32, 32, count), np.uint8)
    found = scripts.page.evaluate(
        """async ([pixels, shape, preprocessing]) => {
          const { normalise } = await import(new URL('images.js', location.href).href);
          return [...normalise(Uint8Array.from(pixels), shape, preprocessing)];
        }""",
        [pixels.reshape(-1).tolist(), list(pixels.shape), msgspec.to_builtins(preprocessing)],
    )
    np.testing.assert_array_equal(np.float32(found).reshape(2, count, 32, 32), preprocessing.normalize(pixels))
