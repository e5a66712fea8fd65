"""Folders of images with labels: one subfolder a class, as ImageNet and torchvision's ImageFolder have them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dmformer.data.images import list_images, load_pixels
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class ImageSet:
    """Image files, how the network sees them, and what is known of them.

    Attributes:
        paths: of the images.
        labels: the index of each one's class, where the folder tells it.
        preprocessing: of the network.
        annotations: a file with a class for every pixel for each image (:mod:`dmformer.data.annotated`); or none.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64] | None
    preprocessing: Preprocessing
    annotations: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labelled(self) -> bool:
        """Whether the right answers are known."""
        return self.labels is not None or bool(self.annotations)

    def spread(self, count: int) -> ImageSet:
        """At most ``count`` of the images, evenly spread, so that sorted class folders are all represented."""
        if len(self) <= count:
            return self
        chosen = np.arange(count) * len(self) // count
        return replace(
            self,
            paths=tuple(self.paths[i] for i in chosen),
            labels=None if self.labels is None else self.labels[chosen],
            annotations=tuple(self.annotations[i] for i in chosen) if self.annotations else (),
        )

    def batches(self, size: int) -> Iterator[NDArray[np.float32]]:
        """Preprocessed images in order, (size or fewer, C, H, W), decoded as they are asked for.

        Raises:
            UsageError: an image cannot be read; the message names it.
        """
        for start in range(0, len(self), size):
            yield self.preprocessing.normalize(load_pixels(self.paths[start : start + size], self.preprocessing))


def image_set(folder: Path, preprocessing: Preprocessing, classes: Sequence[str], class_count: int) -> ImageSet:
    """The images below a folder, labelled where each lies in a subfolder that is named after its class.

    A class is named by its name, or by its index; where the network has no class names and there are as many
    subfolders as classes, they are taken in sorted order (ImageNet's ``n01440764`` ...).

    Raises:
        UsageError: no such folder, no image, or a subfolder that is no class.
    """
    paths = list_images(folder)
    tops = [path.relative_to(folder).parts[0] if path.parent != folder else None for path in paths]
    names = sorted({top for top in tops if top is not None})
    if not names:
        return ImageSet(tuple(paths), None, preprocessing)
    if None in tops:
        loose = paths[tops.index(None)]
        raise UsageError(f"{loose}: beside the class folders; expected every image in one, or no subfolders at all")
    index = _class_indices(folder, names, classes, class_count)
    return ImageSet(tuple(paths), np.asarray([index[str(top)] for top in tops], np.int64), preprocessing)


def _class_indices(folder: Path, names: list[str], classes: Sequence[str], class_count: int) -> dict[str, int]:
    known = {name: index for index, name in enumerate(classes)}
    if twice := [name for name in names if list(classes).count(name) > 1]:
        raise UsageError(f"{folder / twice[0]}: more than one class has this name; expected folders named by index")
    if all(name in known for name in names):
        return {name: known[name] for name in names}
    if all(name.isdecimal() and int(name) < class_count for name in names):
        return {name: int(name) for name in names}
    if not classes and len(names) == class_count:
        return {name: index for index, name in enumerate(names)}
    strange = next(
        (name for name in names if name not in known and not (name.isdecimal() and int(name) < class_count)), names[0]
    )
    some = f"one of {', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}, or " if classes else ""
    others = "" if classes else f", or {class_count} folders in the order of the classes"
    raise UsageError(
        f"{folder / strange}: no class of the network; expected {some}only indices, 0 to {class_count - 1}{others}; "
        "images without labels lie loose in the folder"
    )
