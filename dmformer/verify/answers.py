"""Ask a runtime all that is compared: golden images in several batch sizes, shuffled, repeated, of another size."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dmformer.errors import DMFormerError, UnavailableError
from dmformer.verify.compare import largest_difference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dmformer.bundle.golden import Golden
    from dmformer.runtimes.base import Runtime

# One row alone, an even batch, and one that no power of two divides; for large images the least of those.
_BATCH_SIZES = (1, 2, 5)
_BATCH_SIZES_LARGE = (1, 2, 3)
_MOST_PIXELS = 5 * 384 * 384  # in a batch: five maps of 512 pixels and 150 classes take 3 GB in onnxruntime
Outputs = dict[str, NDArray[Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Answers:
    """What a runtime answered.

    Attributes:
        runtime: its name.
        precision: of the artifact.
        by_batch: for each batch size an array for each output, or why there is none.
        layers: in which precision each compute layer ran, counted; empty where they were not read.
        layers_error: why they could not be read.
        self_differences: the largest difference between answers that must be equal but for rounding, by what was done:
            ``rows`` (identical rows of a batch), ``shuffled`` (the rows in another order), ``repeated`` (asked twice).
            Empty where that was not tried.
        extra: answers to the rows that were given beside the golden ones, where there were some.
        other_size: answers to images of another height and width, or why there are none; ``None`` where that was not
            tried.
    """

    runtime: str
    precision: str
    by_batch: dict[int, Outputs | DMFormerError]
    layers: dict[str, int] = field(default_factory=dict)
    layers_error: DMFormerError | None = None
    self_differences: dict[str, float] = field(default_factory=dict)
    extra: Outputs | None = None
    other_size: Outputs | DMFormerError | None = None

    @property
    def at_largest_batch(self) -> Outputs | DMFormerError:
        """What was answered at the largest batch."""
        return self.by_batch[max(self.by_batch)]


def ask(
    runtime: Runtime,
    inputs: NDArray[np.float32],
    keep: Callable[[Outputs], Outputs],
    *,
    sizes: Sequence[int] | None = None,
    layers: bool = True,
    consistency: bool = True,
    extra: NDArray[np.float32] | None = None,
    other_size: Golden | None = None,
) -> Answers:
    """Load the runtime and run every row at each batch size.

    A failure of the runtime is an answer too; that it cannot run on this machine at all is raised.

    Args:
        runtime: not open yet.
        inputs: (N, C, H, W).
        keep: what of the outputs is compared.
        sizes: of batches, ascending; otherwise smallest, a middle and the largest of the artifact.
        layers: read back in which precision each layer ran.
        consistency: ask again, shuffled, and with equal rows.
        extra: more rows, asked once, at the largest of the batch sizes.
        other_size: images of another height and width, asked as one batch.

    Raises:
        UnavailableError: the runtime cannot run on this machine.
    """
    sizes = sizes or _sizes_for(runtime, inputs)
    by_batch: dict[int, Outputs | DMFormerError] = {}
    counts: dict[str, int] = {}
    differences: dict[str, float] = {}
    layers_error: DMFormerError | None = None
    at_extra: Outputs | None = None
    at_other_size: Outputs | DMFormerError | None = None
    try:
        with runtime:
            (name,) = (spec.name for spec in runtime.inputs)
            if layers:  # some engines load the model once more for it, and have room before the rest
                shown = _result_or_error(runtime.inspect().layers)
                counts, layers_error = ({}, shown) if isinstance(shown, DMFormerError) else (shown, None)
            for batch in reversed(sizes):  # what engines set aside for the largest does for the others
                by_batch[batch] = _result_or_error(functools.partial(runtime.run_rows, {name: inputs}, batch, keep))
            for answer in by_batch.values():
                if isinstance(answer, DMFormerError):
                    raise answer
            if consistency:
                differences = _self_differences(runtime, name, inputs, by_batch, keep)
            if extra is not None:
                at_extra = runtime.run_rows({name: extra}, sizes[-1], keep)
            if other_size is not None:
                run = functools.partial(runtime.run_rows, {name: other_size.inputs}, keep=other_size.thinned)
                at_other_size = _result_or_error(run)
    except UnavailableError:
        raise
    except DMFormerError as error:
        counts, layers_error = {}, error
        by_batch.update({batch: error for batch in sizes if batch not in by_batch})
        at_other_size = at_other_size or (None if other_size is None else error)
    return Answers(
        runtime=runtime.name,
        precision=runtime.precision,
        by_batch={batch: by_batch[batch] for batch in sizes},
        layers=counts,
        layers_error=layers_error,
        self_differences=differences,
        extra=at_extra,
        other_size=at_other_size,
    )


def _result_or_error(run: Callable[[], T]) -> T | DMFormerError:
    """What a call gives, or how it failed; that the runtime cannot run on this machine at all is raised."""
    try:
        return run()
    except UnavailableError:
        raise
    except DMFormerError as error:
        return error


def batch_sizes(inputs: NDArray[np.float32]) -> tuple[int, ...]:
    """Sizes of batches, ascending, that a network is asked with for inputs (N, C, H, W)."""
    pixels = _BATCH_SIZES[-1] * inputs.shape[2] * inputs.shape[3]
    return _BATCH_SIZES if pixels <= _MOST_PIXELS else _BATCH_SIZES_LARGE


def _sizes_for(runtime: Runtime, inputs: NDArray[np.float32]) -> Sequence[int]:
    """Smallest, a middle and the largest; an artifact without bounds gets those of :func:`batch_sizes`."""
    least, most = runtime.batches
    if most is None:
        return sorted({max(least, batch) for batch in batch_sizes(inputs)})
    return sorted({least, (least + most) // 2, most})


def _self_differences(
    runtime: Runtime,
    name: str,
    inputs: NDArray[np.float32],
    by_batch: Mapping[int, Any],
    keep: Callable[[Outputs], Outputs],
) -> dict[str, float]:
    """The largest differences between answers that must be equal; every batch size was asked for all inputs before."""
    sizes = sorted(by_batch)
    largest, middle = sizes[-1], sizes[len(sizes) // 2]
    order = np.roll(np.arange(len(inputs))[::-1], 1)
    shuffled = runtime.run_rows({name: inputs[order]}, largest, keep)
    equal = keep(runtime.run({name: np.repeat(inputs[:1], largest, axis=0)}))
    first = inputs[np.arange(middle) % len(inputs)]
    again = [keep(runtime.run({name: first})) for _ in range(2)]
    return {
        "rows": max(largest_difference(answer, np.broadcast_to(answer[:1], answer.shape)) for answer in equal.values()),
        "shuffled": max(largest_difference(answer, by_batch[largest][key][order]) for key, answer in shuffled.items()),
        "repeated": max(
            largest_difference(answer[: len(inputs)], by_batch[middle][key][:middle])
            for answers in again
            for key, answer in answers.items()
        ),
    }
