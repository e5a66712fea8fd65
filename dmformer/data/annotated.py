"""Images with a class for every pixel, in the folders of ADE20K's scene parsing benchmark (``ADEChallengeData2016``).

Source: Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017. Below one folder::

    images/training/NAME.jpg         annotations/training/NAME.png
    images/validation/NAME.jpg       annotations/validation/NAME.png
    objectInfo150.txt                or classes.txt: one name a line

An annotation has one 8-bit number a pixel: 0 counts for nothing, 1 … are the classes 0 … in the order of the names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dmformer.data.description import plain_name
from dmformer.data.images import ImageSet, find_images, open_image
from dmformer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dmformer.data.preprocessing import Preprocessing

IGNORED = 255  # in the labels that come out; a 0 in the files

Part = Literal["training", "validation"]


@dataclass(frozen=True)
class AnnotatedSet:
    """Image files, the annotation of each, the names of the classes, and sentences about what was passed over."""

    images: tuple[Path, ...]
    annotations: tuple[Path, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


def annotated_set(folder: Path, part: Part) -> AnnotatedSet:
    """Find the images of one part of a data set, and their annotations.

    Raises:
        UsageError: no such folder, no names of classes, no image, or an image without an annotation.
    """
    classes = _class_names(folder)
    files = find_images(folder / "images" / part)
    base = folder / "annotations" / part
    annotations = [(base / path.relative_to(folder / "images" / part)).with_suffix(".png") for path in files.paths]
    if not all(annotation.is_file() for annotation in annotations):
        # Accents may be written in another way in the annotations' names.
        there = {plain_name(str(path)): path for path in base.rglob("*.png")}
        annotations = [there.get(plain_name(str(annotation)), annotation) for annotation in annotations]
    for image, annotation in zip(files.paths, annotations, strict=True):
        if not annotation.is_file():
            raise UsageError(f"{image}: no annotation; expected one at {annotation}")
    return AnnotatedSet(files.paths, tuple(annotations), classes, files.notes)


def annotated_images(
    folder: Path, preprocessing: Preprocessing, classes: Sequence[str], class_count: int, part: Part = "validation"
) -> ImageSet:
    """Return the images of one part of a data set with their annotations, or loose images without.

    Args:
        folder: in ADE20K's layout, or with images and nothing else.
        preprocessing: of the network.
        classes: the network's names of them; empty where it has none.
        class_count: how many it has.
        part: of the data set.

    Raises:
        UsageError: no such folder, no image, an image without an annotation, or classes that are not the network's.
    """
    if not (folder / "images").is_dir():
        files = find_images(folder)
        return ImageSet(files.paths, None, preprocessing, notes=files.notes)
    found = annotated_set(folder, part)
    if len(found.classes) != class_count or (classes and tuple(map(plain_name, classes)) != found.classes):
        raise UsageError(
            f"{folder}: {len(found.classes)} classes, {', '.join(found.classes[:3])}, …; expected the network's "
            f"{class_count}{', ' + ', '.join(classes[:3]) + ', …' if classes else ''}"
        )
    return ImageSet(found.images, None, preprocessing, found.annotations, found.notes)


def label_maps(images: ImageSet, classes: int) -> Iterator[NDArray[np.uint8]]:
    """Give the labels of each image's pixels as the network sees it, (size, size): 0 to ``classes - 1`` or ``IGNORED``.

    Raises:
        UsageError: an annotation cannot be read, or is not of its image's size; the message names it.
    """
    for image, path in zip(images.paths, images.annotations, strict=True):
        labels = load_labels(path, classes)
        size = images.preprocessing.upright(open_image(image)).size
        if labels.shape != size[::-1]:
            height, width = labels.shape
            raise UsageError(f"{path}: annotation of {width}x{height} pixels for an image of {size[0]}x{size[1]}")
        yield images.preprocessing.label_pixels(labels)


def load_labels(path: Path, classes: int) -> NDArray[np.uint8]:
    """Read an annotation file as labels (H, W): 0 to ``classes - 1``, or ``IGNORED``.

    Raises:
        UsageError: no image of one 8-bit number a pixel, or a number beyond the classes; the message names the file.
    """
    image = open_image(path)
    if image.mode not in ("L", "P", "1"):
        raise UsageError(f"{path}: annotation of mode {image.mode!r}; expected one 8-bit number a pixel")
    numbers = np.asarray(image, dtype=np.uint8)
    if numbers.max() > classes:
        raise UsageError(f"{path}: annotation has {numbers.max()}; expected 0 (ignored) to {classes}")
    labels: NDArray[np.uint8] = numbers - np.uint8(1)  # 0 wraps to 255
    return labels


def _class_names(folder: Path) -> tuple[str, ...]:
    plain, table = folder / "classes.txt", folder / "objectInfo150.txt"
    try:
        if plain.is_file():
            names = [line.strip() for line in plain.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        elif table.is_file():  # columns are parted by tabs; the last has the name, after a line of headings
            lines = table.read_text(encoding="utf-8-sig").splitlines()[1:]
            names = [line.rsplit("\t", 1)[-1].strip() for line in lines if line.strip()]
        else:
            raise UsageError(f"{folder}: no classes.txt and no objectInfo150.txt; expected the classes' names in one")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder}: the classes' names cannot be read: {error}") from error
    if not 2 <= len(names) < IGNORED:
        raise UsageError(f"{folder}: {len(names)} names of classes; expected 2 to {IGNORED - 1}")
    return tuple(map(plain_name, names))
