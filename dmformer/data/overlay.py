"""Pictures of labelled pixels: each class in its colour over the image, with a legend."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

_LEAST_SIDE = 480  # pixels of the picture's shorter side: a small image is enlarged
OPACITY = 0.55  # of the classes' colours over the image
DIMMED = 0.35  # brightness of what the network did not see
_FONT = 18  # pixels
_MOST_ENTRIES = 24
_LONGEST = 40  # characters of a name


class LegendEntry(NamedTuple):
    """A line of the legend: a class, its name, and its share of the pixels (0 to 1)."""

    number: int
    name: str
    share: float


def class_colours(count: int) -> NDArray[np.uint8]:
    """Return a colour a class, (count, 3): PASCAL VOC's colour map from its second entry on (its first is black).

    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge 2012 Development Kit", VOClabelcolormap:
    the bits of the index are dealt out to red, green and blue in turn, the lowest ones becoming the highest.
    """
    colours = np.zeros((count, 3), np.uint8)
    index = np.arange(1, count + 1)
    for bit in range(7, -1, -1):
        for channel in range(3):
            colours[:, channel] |= ((index >> channel & 1) << bit).astype(np.uint8)
        index >>= 3
    return colours


def overlay(
    image: Image, labels: NDArray[np.integer], box: tuple[float, float, float, float], legend: Sequence[LegendEntry]
) -> Image:
    """Draw an image with its pixels' classes in colour, and a legend beside it.

    Args:
        image: upright, RGB or L.
        labels: (H, W), of the part of the image that the network saw.
        box: that part: left, top, right, bottom in pixels of the image. What is outside is shown dark.
        legend: classes, the largest share first; more than 24 are cut short.
    """
    from PIL import Image as PillowImage

    scale = max(1.0, _LEAST_SIDE / min(image.size))
    width, height = (round(side * scale) for side in image.size)
    picture = image.convert("RGB").resize((width, height), PillowImage.Resampling.BICUBIC)
    left, top, right, bottom = (round(edge * scale) for edge in box)
    seen = picture.crop((left, top, right, bottom))
    colours = class_colours(int(labels.max()) + 1)
    coloured = PillowImage.fromarray(colours[labels]).resize(seen.size, PillowImage.Resampling.NEAREST)
    picture = picture.point([int(value * DIMMED) for value in range(256)] * 3)
    picture.paste(PillowImage.blend(seen, coloured, OPACITY), (left, top))
    key = _legend(list(legend), height)
    page = PillowImage.new("RGB", (width + key.width, max(height, key.height)), "white")
    page.paste(picture, (0, 0))
    page.paste(key, (width, 0))
    return page


def _legend(entries: list[LegendEntry], least_height: int) -> Image:
    from PIL import Image as PillowImage
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    lines = [(entry.number, f"{_name_to_print(entry, font)}  {entry.share:.1%}") for entry in entries[:_MOST_ENTRIES]]
    if len(entries) > _MOST_ENTRIES:
        lines.append((-1, f"and {len(entries) - _MOST_ENTRIES} more"))
    line, swatch = round(1.6 * _FONT), _FONT
    width = swatch + 3 * swatch + max(round(font.getlength(text)) for _, text in lines)
    page = PillowImage.new("RGB", (width, max(least_height, line * len(lines) + swatch)), "white")
    draw = ImageDraw.Draw(page)
    colours = class_colours(max(index for index, _ in lines) + 1)
    for row, (index, text) in enumerate(lines):
        top = swatch // 2 + row * line
        if index >= 0:
            colour = tuple(int(value) for value in colours[index])
            draw.rectangle((swatch, top, 2 * swatch, top + swatch), fill=colour, outline="black")
        draw.text((round(2.5 * swatch), top - 2), text, fill="black", font=font)
    return page


def _name_to_print(entry: LegendEntry, font: FreeTypeFont | ImageFont) -> str:
    """The name in one line that is not too long; the number where the font, which is Pillow's, lacks a letter."""
    name = " ".join(entry.name.split())
    nothing = bytes(font.getmask("\uffff"))  # what is drawn in the place of a letter that is missing
    if any(bytes(font.getmask(letter)) == nothing for letter in name if letter != " "):
        return f"class {entry.number}"
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
