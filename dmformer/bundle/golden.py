"""Golden inputs and outputs: what lets a device verify itself without PyTorch.

``golden.npz`` holds ``images`` (uint8, N·H·W·C, after resizing and cropping), ``inputs`` (float32, N·C·H·W, after
normalisation), and for each output of the network ``outputs/NAME`` (PyTorch in float32) and ``outputs_float64/NAME``
(the same weights in float64). The distance between the two is the noise of float32, from which limits are made. For a
reduced precision P there is ``outputs_P/NAME``: what a literal execution of that precision's graph answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmformer.errors import UsageError, first_line

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Golden:
    """N images, what the network sees of them, and what PyTorch answers; all arrays have N rows."""

    images: NDArray[np.uint8]
    inputs: NDArray[np.float32]
    outputs: dict[str, NDArray[np.float32]]
    outputs_float64: dict[str, NDArray[np.float64]]
    reduced: dict[str, dict[str, NDArray[np.float32]]] = field(default_factory=dict)

    def expected(self, precision: str) -> dict[str, NDArray[np.float32]]:
        """What an artifact of a precision should answer.

        Raises:
            UsageError: there are no answers at this precision.
        """
        if precision == "fp32":
            return self.outputs
        if precision not in self.reduced:
            raise UsageError(f"no golden outputs at {precision}; expected a bundle that was exported with it")
        return self.reduced[precision]

    def save(self, path: Path) -> None:
        """Write ``golden.npz``; the same content gives the same bytes."""
        arrays: dict[str, Any] = {"images": self.images, "inputs": self.inputs}
        arrays |= {f"outputs/{name}": array for name, array in self.outputs.items()}
        arrays |= {f"outputs_float64/{name}": array for name, array in self.outputs_float64.items()}
        for precision, outputs in self.reduced.items():
            arrays |= {f"outputs_{precision}/{name}": array for name, array in outputs.items()}
        np.savez_compressed(path, **arrays)


def load_golden(path: Path) -> Golden:
    """Read ``golden.npz``.

    Raises:
        UsageError: it is damaged or lacks an array.
    """
    try:
        # NumPy leaves a file that it opened itself open where the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        golden = Golden(
            images=arrays["images"],
            inputs=arrays["inputs"],
            outputs=_group(arrays, "outputs/"),
            outputs_float64=_group(arrays, "outputs_float64/"),
            reduced={name: _group(arrays, f"outputs_{name}/") for name in _reduced(arrays)},
        )
    except KeyError as error:
        raise UsageError(f"{path}: no array {error}; expected the golden file of a bundle") from error
    except Exception as error:  # zipfile, zlib and NumPy each have their own kinds
        raise UsageError(f"{path}: damaged: {first_line(error)}; expected the golden file of a bundle") from error
    _check_arrays(golden, path)
    others: list[dict[str, NDArray[Any]]] = [golden.outputs_float64, *golden.reduced.values()]
    for other in others:
        if not golden.outputs or set(golden.outputs) != set(other):
            raise UsageError(f"{path}: outputs {sorted(golden.outputs)} and {sorted(other)} do not match")
        for name, array in golden.outputs.items():
            if other[name].shape != array.shape:
                raise UsageError(f"{path}: output {name!r} of shape {array.shape} and {other[name].shape}")
    return golden


def _check_arrays(golden: Golden, path: Path) -> None:
    rows = len(golden.images) if golden.images.ndim else 0
    expected: list[tuple[str, NDArray[Any], Any, int | None]]
    expected = [("images", golden.images, np.uint8, 4), ("inputs", golden.inputs, np.float32, 4)]
    expected += [(f"outputs/{name}", array, np.float32, None) for name, array in golden.outputs.items()]
    expected += [(f"outputs_float64/{name}", array, np.float64, None) for name, array in golden.outputs_float64.items()]
    for precision, outputs in golden.reduced.items():
        expected += [(f"outputs_{precision}/{name}", array, np.float32, None) for name, array in outputs.items()]
    for name, array, dtype, rank in expected:
        fits = array.dtype == dtype and array.ndim == (rank or array.ndim) and array.shape[:1] == (rows,)
        if not fits or 0 in array.shape:
            raise UsageError(
                f"{path}: array {name!r} is {array.dtype} {array.shape}; "
                f"expected {np.dtype(dtype)} with a row for each image"
            )


def _reduced(arrays: dict[str, NDArray[Any]]) -> list[str]:
    groups = {name.partition("/")[0] for name in arrays if name.startswith("outputs_")}
    return sorted(group.removeprefix("outputs_") for group in groups if group != "outputs_float64")


def _group(arrays: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
