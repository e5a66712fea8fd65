"""From an image to the network's input, the same on the training machine and on the device.

The steps are the usual evaluation transform of ImageNet classifiers (resize the shorter side, crop the centre, scale
to 0..1, normalise per channel); Pillow does the resizing, with its antialiasing filters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from dmformer.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray
    from PIL.Image import Image, Resampling

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["bicubic", "bilinear"]

_LARGEST = 1e30  # float32 holds it, and its inverse
_ORIENTATION = 0x0112  # EXIF's tag
_PILLOW_MODE = {"RGB": "RGB", "BGR": "RGB", "L": "L"}
# 16-bit and floating-point images have no fixed range that would map to 0..255.
_UNSUPPORTED_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


class Preprocessing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to an image before the network sees it.

    Attributes:
        image_size: side of the square input, in pixels.
        crop_fraction: the shorter side is resized to ``image_size / crop_fraction`` pixels before the centre crop.
        interpolation: Pillow's resampling filter.
        channels: order of the channels; ``L`` is one channel of luma.
        mean: subtracted from each channel, on the scale 0..1.
        std: then divides each channel.
    """

    image_size: Annotated[int, Meta(ge=32, le=4096)] = 224
    crop_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.875
    interpolation: Interpolation = "bicubic"
    channels: Literal["RGB", "BGR", "L"] = "RGB"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[Annotated[float, Meta(gt=0)], ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        count = len(self.channels)
        if len(self.mean) != count or len(self.std) != count:
            raise UsageError(
                f"preprocessing: {len(self.mean)} means and {len(self.std)} deviations for channels {self.channels!r}; "
                f"expected {count} each"
            )
        usable = all(abs(m) <= _LARGEST for m in self.mean) and all(1 / _LARGEST <= s <= _LARGEST for s in self.std)
        if not usable:  # NaN compares false
            raise UsageError(f"preprocessing: mean {self.mean}, std {self.std}; expected values on the scale 0..1")

    @classmethod
    def from_dict(cls, values: Any) -> Preprocessing:
        """Make a preprocessing from a dictionary of JSON types.

        Raises:
            UsageError: an unknown field, or a value not of its type or range.
        """
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            expected, _, field = str(error).partition(" - at `$.")
            if not field or (name := field.rstrip("`")) not in values:
                raise UsageError(f"preprocessing: {error}") from error
            raise UsageError(f"preprocessing: {name} is {values[name]!r}; {expected.lower()}") from error

    def with_fields(self, fields: Mapping[str, Any]) -> Preprocessing:
        """Return the same preprocessing with other values of some fields, in JSON types.

        One mean or deviation stands for all channels. Where the order of the channels is exchanged and means or
        deviations are not given, each stays with its colour.

        Raises:
            UsageError: a field is unknown, or a value is not of its type or range.
        """
        values: dict[str, Any] = msgspec.to_builtins(self) | dict(fields)
        exchanged = {self.channels, values["channels"]} == {"RGB", "BGR"}
        for name in ("mean", "std"):
            if name not in fields and exchanged:
                values[name] = values[name][::-1]
            if len(values[name]) == 1:
                values[name] = values[name] * len(values["channels"])
        return Preprocessing.from_dict(values)

    def describe(self, names: Iterable[str]) -> str:
        """Return the values of some fields as one text: ``mean 0.5, 0.5, 0.5; std 0.5, 0.5, 0.5``."""
        values = msgspec.to_builtins(self)
        each = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in values.items()}
        return "; ".join(
            f"{name.replace('_', ' ')} "
            + ", ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in each[name])
            for name in values
            if name in set(names)
        )

    def pixels(self, image: Image) -> NDArray[np.uint8]:
        """Orient by EXIF, convert, resize and crop: a Pillow image -> uint8 (H, W, C), channels in RGB (or L) order.

        Raises:
            UsageError: an image of 16-bit or floating-point samples, one whose colours cannot be read, or
                one so narrow that it cannot be resized.
        """
        cropped = self._fit(self.upright(image), self._resampling())
        return np.asarray(cropped, dtype=np.uint8).reshape(self.image_size, self.image_size, -1)

    def label_pixels(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Labels (H, W) of an image's pixels, resized and cropped as the image is, to the nearest: (size, size).

        Raises:
            UsageError: an image so narrow that it cannot be resized.
        """
        from PIL.Image import Resampling, fromarray

        return np.asarray(self._fit(fromarray(labels), Resampling.NEAREST))

    def uncropped_pixels(self, image: Image, multiple: int) -> NDArray[np.uint8]:
        """All of an image, nothing cropped, for a network of open size: a Pillow image -> uint8 (H, W, C).

        The shorter side becomes ``image_size``, the longer one the nearest multiple of ``multiple``, so that the image
        may be stretched a little.

        Raises:
            UsageError: as :meth:`pixels`.
        """
        upright = _not_empty(self.upright(image))
        scale = self.image_size / min(upright.size)
        width, height = (max(self.image_size, multiple * round(side * scale / multiple)) for side in upright.size)
        resized = self._resize(upright, (width, height), self._resampling())
        return np.asarray(resized, dtype=np.uint8).reshape(height, width, -1)

    def visible_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the part of an image that :meth:`pixels` keeps: left, top, right, bottom in pixels of the image."""
        resized = self._resized(width, height)
        left, top, right, bottom = self._crop_box(resized)
        across, down = width / resized[0], height / resized[1]
        return left * across, top * down, right * across, bottom * down

    def _fit(self, image: Image, resampling: Resampling) -> Image:
        """Resize the shorter side, crop the centre."""
        size = self._resized(*_not_empty(image).size)
        return self._resize(image, size, resampling).crop(self._crop_box(size))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that an image is resized to before the crop."""
        if self.crop_fraction * 64 < 1:
            raise UsageError(f"preprocessing: crop_fraction is {self.crop_fraction}; expected at least 1/64")
        scale = round(self.image_size / self.crop_fraction) / min(width, height)
        return max(self.image_size, round(width * scale)), max(self.image_size, round(height * scale))

    def _crop_box(self, resized: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the centre square in a resized image."""
        left, top = ((side - self.image_size) // 2 for side in resized)
        return left, top, left + self.image_size, top + self.image_size

    def _resize(self, image: Image, size: tuple[int, int], resampling: Resampling) -> Image:
        """Resize across, then down.

        Each step rounds to bytes. Pillow itself takes both in this order up to release 12, but from 13 on in the other
        one where an image loses more than twice as many rows as columns: a device with another release would see other
        pixels than the network was checked with.
        """
        if max(size) > 64 * self.image_size:
            raise UsageError(f"image of {image.width}x{image.height} pixels; expected sides no more than 1:64")
        return image.resize((size[0], image.height), resampling).resize(size, resampling)

    def _resampling(self) -> Resampling:
        from PIL.Image import Resampling

        return Resampling[self.interpolation.upper()]

    def upright(self, image: Image) -> Image:
        """Orient by EXIF and convert to the channels that the network takes.

        Transparency is dropped, as torchvision's loader of training images does; EXIF that cannot be read says nothing.

        Raises:
            UsageError: an image of 16-bit or floating-point samples, or one whose colours cannot be read.
        """
        if image.mode in _UNSUPPORTED_MODES:
            raise UsageError(f"image of mode {image.mode!r}; expected 8 bits a channel: convert it first")
        try:
            upright = _oriented(image)
            if "transparency" in upright.info:  # a colour of the palette; the other ways to drop it warn
                upright = upright.convert("RGBA")
            return upright.convert(_PILLOW_MODE[self.channels])
        except Exception as error:  # damaged palettes and profiles raise whatever their bytes lead to
            raise UsageError(
                f"image of mode {image.mode!r}: its colours cannot be read ({first_line(error)}); convert it first"
            ) from error

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, H, W, C) in RGB (or L) order -> float32 (N, C, H, W) in the network's order."""
        if self.channels == "BGR":
            pixels = pixels[..., ::-1]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)


def _oriented(image: Image) -> Image:
    """Turn an image as its EXIF says; metadata that cannot be read, or says something else, turns nothing."""
    from PIL.Image import Transpose

    try:
        orientation: Any = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - it is parsed by code that raises whatever its bytes lead it to
        return image
    if orientation not in range(2, 9):
        return image
    names = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
    return image.transpose(Transpose[names[int(orientation) - 2]])


def _not_empty(image: Image) -> Image:
    if min(image.size) == 0:
        raise UsageError(f"image of {image.width}x{image.height} pixels; expected at least one")
    return image
