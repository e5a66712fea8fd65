"""Image files, folders of them, and sets of images whose classes the folders tell."""

from __future__ import annotations

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from dmformer.data.description import plain_name
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError, first_line
from dmformer.machine import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL.Image import Image

T = TypeVar("T")

# What is decoded, whatever the file is called. Pillow knows dozens more, some of which start other programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jfif", ".jpe", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# What systems and file servers leave in folders, beside names that begin with a dot.
_LEFT_BY_SYSTEMS = frozenset(
    (
        *("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "__pycache__", "lost+found"),
        *("desktop.ini", "ehthumbs.db", "icon\r", "system volume information", "thumbs.db"),
    )
)
_SLICE = 1024  # images that are read ahead


@dataclass(frozen=True)
class ImageFiles:
    """The image files below a folder, sorted by path, and sentences about what was passed over."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set: hidden, or left by a system."""
    return name.startswith(".") or name.casefold() in _LEFT_BY_SYSTEMS


def find_images(folder: Path) -> ImageFiles:
    """Find the image files below a folder; hidden files and folders, and files of other kinds, are passed over.

    Raises:
        UsageError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder {str(folder)!r}; expected a folder of images")
    paths: list[Path] = []
    passed_over: Counter[str] = Counter()
    for path in _entries(folder):
        suffix = path.suffix.lower()
        if is_hidden(path.name):
            passed_over["hidden"] += 1
        elif suffix in SUFFIXES and path.is_file():
            paths.append(path)
        else:
            passed_over[suffix or "without a suffix"] += 1
    if not paths:
        raise UsageError(f"no image in {str(folder)!r}; expected files that end in {', '.join(SUFFIXES)}")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
    return ImageFiles(tuple(sorted(paths)), (f"{folder}: passed over what is no image: {counts}",) if counts else ())


def list_images(folder: Path) -> list[Path]:
    """List the image files below a folder, sorted by path.

    Raises:
        UsageError: there is no such folder, or no image in it.
    """
    return list(find_images(folder).paths)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, each once and sorted, as names of classes."""
    return sorted({plain_name(path.name) for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)})


def _entries(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Walk all files below a folder, through links to folders too: data sets are often linked together.

    Of a hidden folder the folder itself is given, and nothing in it.
    """
    here = folder.resolve()
    if here in above:  # a link back
        return
    for path in folder.iterdir():
        if path.is_dir() and not is_hidden(path.name):
            yield from _entries(path, above | {here})
        else:
            yield path


def unreadable(
    rows: Sequence[int], read: Callable[[int], object], advance: Callable[[], object]
) -> dict[int, UsageError]:
    """Read images side by side, and return why each of those cannot be used that cannot.

    Args:
        rows: numbers of the images.
        read: reads the image of a number; raises or returns a :class:`UsageError` where it cannot be used.
        advance: told after each.
    """

    def attempt(row: int) -> UsageError | None:
        try:
            answer = read(row)
        except UsageError as error:
            return error
        return answer if isinstance(answer, UsageError) else None

    found = {}
    with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow decodes without Python's lock
        for start in range(0, len(rows), _SLICE):
            ahead = rows[start : start + _SLICE]
            for row, error in zip(ahead, pool.map(attempt, ahead), strict=True):
                if error is not None:
                    found[row] = error
                advance()
    return found


def open_image(path: Path) -> Image:
    """Decode an image file; of an animation the first frame.

    Raises:
        UsageError: it is missing, no file, no image of :data:`FORMATS`, truncated, or so large that it looks
            like a decompression bomb.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: no file; expected an image")  # opening a pipe would wait for its other end
    return _decode(path, str(path))


def decode_image(data: bytes) -> Image:
    """Decode the bytes of an image file; of an animation the first frame.

    Raises:
        UsageError: as :func:`open_image`.
    """
    return _decode(io.BytesIO(data), f"image of {len(data)} bytes")


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels (H, W, C) of one or three channels as the bytes of a PNG file."""
    from PIL import Image as PillowImage

    file = io.BytesIO()
    PillowImage.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _decode(source: Path | io.BytesIO, title: str) -> Image:
    """Decode an image; the title names it in messages."""
    from PIL import Image as PillowImage
    from PIL import UnidentifiedImageError

    try:
        with PillowImage.open(source, formats=FORMATS) as image:
            _check_size(image)
            image.load()
            copied: Image = image.copy()
            return copied
    except FileNotFoundError as error:
        raise UsageError(f"{title}: no such file; expected an image") from error
    except UnidentifiedImageError as error:
        raise UsageError(f"{title}: no image that is read here; expected one of {', '.join(FORMATS)}") from error
    except (PillowImage.DecompressionBombWarning, PillowImage.DecompressionBombError) as error:
        raise UsageError(f"{title}: {first_line(error)}; expected a smaller image") from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise UsageError(f"{title}: cannot be read as an image: {first_line(error)}") from error


def _check_size(image: Image) -> None:
    """Pillow warns from its limit on, and refuses from twice that; here it is the limit."""
    from PIL import Image as PillowImage

    most = PillowImage.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise PillowImage.DecompressionBombError(
            f"image of {image.width}x{image.height} pixels, more than {most}: could be a decompression bomb"
        )


def load_pixels(paths: Sequence[Path], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode, resize and crop image files: uint8 (N, H, W, C).

    Raises:
        UsageError: one of them cannot be used; the message names it.
    """
    return np.stack([_read_with(path, preprocessing.pixels) for path in paths])


def load_uncropped(path: Path, preprocessing: Preprocessing, multiple: int) -> NDArray[np.uint8]:
    """Decode and resize an image file, nothing cropped: uint8 (1, H, W, C), H and W multiples of ``multiple``.

    Raises:
        UsageError: it cannot be used; the message names it.
    """
    return _read_with(path, lambda image: preprocessing.uncropped_pixels(image, multiple))[None]


def _read_with(path: Path, read: Callable[[Image], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    try:
        return read(open_image(path))
    except UsageError as error:
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise UsageError(message) from error


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` items, evenly spread, so that sorted class folders are all represented."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def synthetic_pixels(count: int, size: int, channels: int, seed: int) -> NDArray[np.uint8]:
    """Make coloured noise images, uint8 (N, size, size, channels): white and 1/f by turns.

    1/f noise has the power spectrum of natural images (Field, "Relations between the statistics of natural images and
    the response properties of cortical cells", 1987), so that it reaches the deeper stages; white noise exercises the
    borders and the highest frequencies. Both differ between channels, so that an exchanged channel order shows.
    """
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    falloff = 1.0 / np.maximum(frequency, 1.0 / size)
    images = np.empty((count, size, size, channels), np.uint8)
    for index in range(count):
        noise = generator.standard_normal((channels, size, size))
        if index % 2:
            noise = np.fft.irfft2(np.fft.rfft2(noise) * falloff, s=(size, size))
            noise /= noise.std()
        images[index] = (
            np.clip(127.5 + 64 * noise, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        )  # (C, H, W) -> (H, W, C)
    return images


@dataclass(frozen=True)
class ImageSet:
    """Image files, how the network sees them, and their right answers where these are known.

    Attributes:
        paths: of the images.
        labels: the index of each one's class, where the folder tells it.
        preprocessing: of the network.
        annotations: a file with a class for every pixel for each image (:mod:`dmformer.data.annotated`); or none.
        notes: sentences about files that were passed over.
        folders: the name of each class's folder, by the index of the class; empty where there are none.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64] | None
    preprocessing: Preprocessing
    annotations: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labelled(self) -> bool:
        """Whether the right answers are known."""
        return self.labels is not None or bool(self.annotations)

    def spread(self, count: int) -> ImageSet:
        """Return at most ``count`` of the images, spread as :func:`spread` does."""
        return self.rows(spread(range(len(self)), count))

    def rows(self, chosen: Sequence[int]) -> ImageSet:
        """Return the images of some numbers, in their order."""
        return replace(
            self,
            paths=tuple(self.paths[i] for i in chosen),
            labels=None if self.labels is None else self.labels[list(chosen)],
            annotations=tuple(self.annotations[i] for i in chosen) if self.annotations else (),
        )

    def batches(self, size: int) -> Iterator[NDArray[np.float32]]:
        """Give the preprocessed images in order, (size or fewer, C, H, W), decoded as they are asked for.

        Raises:
            UsageError: an image cannot be read; the message names it.
        """
        for start in range(0, len(self), size):
            yield self.preprocessing.normalize(load_pixels(self.paths[start : start + size], self.preprocessing))


def image_set(folder: Path, preprocessing: Preprocessing, classes: Sequence[str], class_count: int) -> ImageSet:
    """Return the images below a folder, labelled where each lies in a subfolder that is named after its class.

    A class is named by its name, or by its index; where the network has no class names and there are as many
    subfolders as classes, they are taken in sorted order (ImageNet's ``n01440764`` ...). Names that differ only in how
    Unicode writes accents are one name.

    Raises:
        UsageError: no such folder, no image, or a subfolder that is no class.
    """
    files = find_images(folder)
    paths = files.paths
    tops = [plain_name(path.relative_to(folder).parts[0]) if path.parent != folder else None for path in paths]
    names = sorted({top for top in tops if top is not None})
    if not names:
        return ImageSet(paths, None, preprocessing, notes=files.notes)
    if None in tops:
        loose = paths[tops.index(None)]
        raise UsageError(f"{loose}: beside the class folders; expected every image in one, or no subfolders at all")
    index = _class_indices(folder, names, [plain_name(name) for name in classes], class_count)
    labels = np.asarray([index[str(top)] for top in tops], np.int64)
    by_index = {label: name for name, label in index.items()}
    folders = tuple(by_index.get(label, "") for label in range(class_count))
    return ImageSet(paths, labels, preprocessing, notes=files.notes, folders=folders)


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
