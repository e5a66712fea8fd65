"""Golden inputs and outputs: what lets a device verify itself without PyTorch.

``golden.npz`` holds ``images`` (uint8, N·H·W·C, after resizing and cropping), ``inputs`` (float32, N·C·H·W, after
normalisation), and for each output of the network ``outputs/NAME`` (PyTorch in float32) and ``outputs_float64/NAME``
(the same weights in float64). The distance between the two is the noise of float32, from which limits are made.

For a precision P there is ``outputs_P/NAME``: what the ONNX file at that precision answers, the stage before every
engine (in onnxruntime at fp32, one operator at a time at a reduced precision); and for a reduced one
``emulated_P/NAME``: what the network answers emulated at that precision in PyTorch. Beside fp16 there is
``float16_sums/NAME``: what it answers emulated on processors that add products of float16 numbers up in float16.

Maps (N·C·H·W) with many values are thinned: of an output with a number n in ``strides/NAME`` there is every n-th row
and column. n is odd, so that every phase of an enlargement by 2 or 4 is among them.

Where height and width are open, ``other/…`` has the same arrays for images of another height and width.

``sources/N`` (uint8, H·W·C, of any size) are images before resizing and cropping, and ``source_pixels`` (uint8,
N·H·W·C) what the preprocessing that the network was trained with makes of them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmformer.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# Noise and answers of networks hardly compress; what expands like zeros is no golden file.
_MOST_EXPANDED = 50
_MOST_SMALL = 16 << 20
_OTHER, _FLOAT16_SUMS = "other/", "float16_sums/"
FIRST_AND_LAST = (0, -1)  # rows: a real image where there are some, and noise, in which no two channels are alike


@dataclass(frozen=True)
class Golden:
    """N images, what the network sees of them, and what PyTorch answers; all arrays but the sources have N rows.

    Attributes:
        images: uint8 (N, H, W, C), resized and cropped.
        inputs: (N, C, H, W), normalised.
        outputs: PyTorch's in float32, by name.
        outputs_float64: PyTorch's in float64.
        files: by precision, what the ONNX file at it answers.
        emulated: by reduced precision, what the network emulated at it answers.
        float16_sums: what the network answers at fp16 where sums are rounded to float16 too; empty without fp16, and in
            bundles of versions before this field.
        sources: images before resizing and cropping, (H, W, C) each.
        source_pixels: what is made of them, (sources, H, W, C).
        strides: of the rows and columns that are kept, by output; 1 where it has none.
        other_size: the same for another height and width, where they are open.
    """

    images: NDArray[np.uint8]
    inputs: NDArray[np.float32]
    outputs: dict[str, NDArray[np.float32]]
    outputs_float64: dict[str, NDArray[np.float64]]
    files: dict[str, dict[str, NDArray[np.float32]]] = field(default_factory=dict)
    emulated: dict[str, dict[str, NDArray[np.float32]]] = field(default_factory=dict)
    float16_sums: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    sources: tuple[NDArray[np.uint8], ...] = ()
    source_pixels: NDArray[np.uint8] | None = None
    strides: dict[str, int] = field(default_factory=dict)
    other_size: Golden | None = None

    @property
    def sizes(self) -> dict[str | None, Golden]:
        """This under ``None``, and under its :attr:`size` the same for another height and width."""
        return {None: self} if self.other_size is None else {None: self, self.other_size.size: self.other_size}

    @property
    def size(self) -> str:
        """Height and width in pixels, in words."""
        height, width = self.inputs.shape[2:]
        return f"{height}x{width}"

    def thinned(self, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return outputs at the rows and columns that are kept here."""
        return thinned(outputs, self.strides)

    @property
    def first_and_last(self) -> NDArray[np.float32]:
        """Inputs (2, C, H, W) at :data:`FIRST_AND_LAST`."""
        return self.inputs[list(FIRST_AND_LAST)]

    @property
    def noise(self) -> NDArray[np.float32]:
        """The last of the inputs, (1, C, H, W)."""
        return self.inputs[-1:]

    def worst_row(self, answers: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the input whose answers are furthest from PyTorch's in float64, (1, C, H, W).

        It is the first input where the answers have another shape than PyTorch's.

        Args:
            answers: to all inputs, thinned.
        """
        apart = np.zeros(len(self.inputs))
        for name, exact in self.outputs_float64.items():
            if answers[name].shape != exact.shape:
                return self.inputs[:1]
            with np.errstate(invalid="ignore"):
                distance = np.abs(answers[name] - exact).reshape(len(exact), -1).max(1)
            apart = np.maximum(apart, np.where(np.isfinite(distance), distance, np.inf))
        worst = int(apart.argmax())
        return self.inputs[worst : worst + 1]

    def save(self, path: Path) -> None:
        """Write ``golden.npz``; the same content gives the same bytes."""
        np.savez_compressed(path, **_arrays(self))


def thinned(outputs: Mapping[str, NDArray[Any]], strides: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Return maps (N, C, H, W) at every n-th row and column, by their strides; and what is no map as it is."""
    found = {}
    for name, array in outputs.items():
        stride = strides.get(name, 1)
        fewer = array.ndim == 4 and stride > 1
        found[name] = np.ascontiguousarray(array[:, :, ::stride, ::stride]) if fewer else array
    return found


def _arrays(golden: Golden) -> dict[str, Any]:
    arrays: dict[str, Any] = {"images": golden.images, "inputs": golden.inputs}
    arrays |= {f"outputs/{name}": array for name, array in golden.outputs.items()}
    arrays |= {f"outputs_float64/{name}": array for name, array in golden.outputs_float64.items()}
    for kind, by_precision in (("outputs", golden.files), ("emulated", golden.emulated)):
        for precision, outputs in by_precision.items():
            arrays |= {f"{kind}_{precision}/{name}": array for name, array in outputs.items()}
    arrays |= {f"{_FLOAT16_SUMS}{name}": array for name, array in golden.float16_sums.items()}
    arrays |= {f"sources/{index}": array for index, array in enumerate(golden.sources)}
    if golden.source_pixels is not None:
        arrays["source_pixels"] = golden.source_pixels
    arrays |= {f"strides/{name}": np.asarray(stride) for name, stride in golden.strides.items() if stride > 1}
    if golden.other_size is not None:
        arrays |= {f"{_OTHER}{name}": array for name, array in _arrays(golden.other_size).items()}
    return arrays


def load_golden(path: Path) -> Golden:
    """Read ``golden.npz``.

    Raises:
        UsageError: it cannot be read, is damaged or lacks an array.
    """
    try:
        return parse_golden(path.read_bytes(), path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; expected the golden file of a bundle") from error


def parse_golden(data: bytes, path: Path) -> Golden:
    """Parse the content of ``golden.npz``.

    Args:
        data: the file's bytes.
        path: of the file, for messages.

    Raises:
        UsageError: it is damaged or lacks an array.
    """
    try:
        golden = _golden(read_arrays(data))
    except KeyError as error:
        raise UsageError(f"{path}: no array {error}; expected the golden file of a bundle") from error
    except Exception as error:  # zipfile, zlib and NumPy each have their own kinds
        raise UsageError(f"{path}: damaged: {first_line(error)}; expected the golden file of a bundle") from error
    for part in (golden, golden.other_size):  # before any is asked for its size
        if part is not None:
            _check_part(part, path)
    return golden


def read_arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """Return the arrays of a ``.npz`` file by name, none of them of Python's objects.

    Raises:
        Exception: zipfile, zlib and NumPy each have their own kinds of damage.
        UsageError: the data expand to far more than they are, or an array is there twice.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        _check_expansion(sum(member.file_size for member in archive.zip.infolist()), len(data))
        if len(set(archive.files)) < len(archive.files):
            raise UsageError("an array is there twice")
        return {name: archive[name] for name in archive.files}


def _golden(arrays: dict[str, NDArray[Any]]) -> Golden:
    others = _group(arrays, _OTHER)
    arrays = {name: array for name, array in arrays.items() if not name.startswith(_OTHER)}
    return Golden(
        images=arrays["images"],
        inputs=arrays["inputs"],
        outputs=_group(arrays, "outputs/"),
        outputs_float64=_group(arrays, "outputs_float64/"),
        files={name: _group(arrays, f"outputs_{name}/") for name in _precisions(arrays, "outputs_")},
        emulated={name: _group(arrays, f"emulated_{name}/") for name in _precisions(arrays, "emulated_")},
        float16_sums=_group(arrays, _FLOAT16_SUMS),
        sources=tuple(_group(arrays, "sources/").values()),
        source_pixels=arrays.get("source_pixels"),
        strides={name: _read_stride(name, stride) for name, stride in _group(arrays, "strides/").items()},
        other_size=_golden(others) if others else None,
    )


def _read_stride(name: str, stride: NDArray[Any]) -> int:
    if stride.dtype.kind not in "iu" or stride.shape:
        raise UsageError(f"a stride of {stride.dtype} {stride.shape} for {name!r}; expected one whole number")
    return int(stride)


def _check_part(golden: Golden, path: Path) -> None:
    _check_arrays(golden, path)
    for name, stride in golden.strides.items():
        if name not in golden.outputs:
            raise UsageError(f"{path}: a stride for {name!r}; expected one of {', '.join(golden.outputs)}")
        if stride < 1:
            raise UsageError(f"{path}: a stride of {stride} for {name!r}; expected 1 or more")
    if golden.other_size is not None and (
        golden.other_size.other_size is not None or set(golden.other_size.outputs) != set(golden.outputs)
    ):
        raise UsageError(f"{path}: the arrays of another height and width have other outputs; expected the same")
    others: list[dict[str, NDArray[Any]]] = [golden.outputs_float64, *golden.files.values(), *golden.emulated.values()]
    others += [golden.float16_sums] if golden.float16_sums else []
    for other in others:
        if not golden.outputs or set(golden.outputs) != set(other):
            raise UsageError(f"{path}: outputs {sorted(golden.outputs)} and {sorted(other)} do not match")
        for name, array in golden.outputs.items():
            if other[name].shape != array.shape:
                raise UsageError(f"{path}: output {name!r} of shape {array.shape} and {other[name].shape}")


def _check_expansion(expanded: int, size: int) -> None:
    if expanded > _MOST_EXPANDED * size + _MOST_SMALL:
        raise UsageError(f"{size} bytes that expand to {expanded}")


def _check_arrays(golden: Golden, path: Path) -> None:
    rows = len(golden.images) if golden.images.ndim else 0
    for name, array in _arrays(golden).items():
        if name.startswith((_OTHER, "source", "strides/")):
            continue
        dtype = {"images": np.uint8, "outputs_float64": np.float64}.get(name.partition("/")[0], np.float32)
        rank = 4 if name in ("images", "inputs") else array.ndim
        if (array.dtype, array.ndim, array.shape[:1]) != (dtype, rank, (rows,)) or 0 in array.shape:
            raise UsageError(
                f"{path}: array {name!r} is {array.dtype} {array.shape}; "
                f"expected {np.dtype(dtype)} with a row for each image"
            )
    for source in golden.sources:
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise UsageError(f"{path}: a source image is {source.dtype} {source.shape}; expected uint8 (H, W, 3)")
    pixels = golden.source_pixels
    if pixels is not None and (pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != len(golden.sources)):
        raise UsageError(
            f"{path}: array 'source_pixels' is {pixels.dtype} {pixels.shape}; expected uint8 for each source"
        )


def _precisions(arrays: dict[str, NDArray[Any]], kind: str) -> list[str]:
    groups = {name.partition("/")[0] for name in arrays if name.startswith(kind)}
    return sorted(group.removeprefix(kind) for group in groups if group != "outputs_float64")


def _group(arrays: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
