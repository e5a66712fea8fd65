"""Compare two sets of outputs, with limits that come from a measurement.

The limit on the largest absolute difference is the noise of float32 itself: the distance between PyTorch in float32
and the same weights in float64 on the same inputs, times :data:`NOISE_FACTOR`. Another correct implementation differs
from PyTorch by one to three such noises, for it adds in another order; an error in a weight or an operator differs by
hundreds (``benchmarks/parity_noise.py`` measures both).

A reduced precision changes the answers by design, so the measure there is the error of the precision itself. Two are
used, and neither is made from what it judges. Against PyTorch: the distance between the network emulated at that
precision in PyTorch (:mod:`dmformer.verify.executors`) and PyTorch in float64, times :data:`EMULATED_FACTOR`. An engine
against a literal execution of its graph, operator by operator: the distance of that execution from PyTorch in float64,
times :data:`REDUCED_FACTOR`. A single inner tensor has a limit of its own, times :data:`TENSOR_FACTORS`.

Where an engine adds products of float16 numbers up in float16, as on Arm with that arithmetic, its error is several
times that of float16 results alone. The measure there is the error of the network emulated with such sums
(:mod:`dmformer.verify.float16_sums`), times :data:`EMULATED_FACTOR`, against PyTorch and against the file alike: the
literal execution adds up in float32, and how far an engine is from it is how far it is from the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmformer.errors import StageFailed
from dmformer.task import class_logits

NOISE_FACTOR = 16.0
# Engines round in other places: up to 0.7 times the error was seen between them and the literal execution.
REDUCED_FACTOR = 2.0
# An emulation rounds the layers, not what is between them: up to 2.4 times its error was seen in graphs and engines.
EMULATED_FACTOR = 4.0
# For a single inner tensor, by precision: its error in an execution of the graph that emulates the precision, times
# this. A small tensor has few values, and an error that is small by luck: up to 5.4 times was seen at fp16, 4.3 at
# int8.
TENSOR_FACTORS = {"fp32": NOISE_FACTOR, "fp16": 12.0, "int8": 9.0}
# A limit may be no more than this share of what the outputs differ by between images.
_LARGEST_NOISE_SHARE = 0.01
_LARGEST_REDUCED_SHARE = 0.5
# The noise of a tensor is taken to be no less than the last place of this share of the largest value in the network.
_LEAST_PEAK = 1e-4
_PIECE = 1 << 17  # values that are compared at once


@dataclass(frozen=True)
class Limit:
    """Largest absolute difference allowed, and where the figure comes from."""

    max_abs: float
    source: str


@dataclass(frozen=True)
class Reference:
    """What answers are compared with: its name, an array for each output, and the limit for each."""

    name: str
    outputs: Mapping[str, NDArray[Any]]
    limits: Mapping[str, Limit]


@dataclass(frozen=True)
class Comparison:
    """How far a candidate is from the reference; figures are ``None`` where values are not finite.

    Attributes:
        passed: whether every value is finite and within the limit.
        max_abs: largest absolute difference.
        max_rel: largest difference relative to the reference's value, where that is above the limit; for information.
        cosine: smallest cosine similarity between two rows.
        top1_agreement: share of rows (or of pixels) with the same largest value of all channels (0..1).
        reason: what failed; ``None`` where nothing did.
    """

    passed: bool
    max_abs: float | None = None
    max_rel: float | None = None
    cosine: float | None = None
    top1_agreement: float | None = None
    reason: str | None = None


def float32_limit(float32: Mapping[str, NDArray[Any]], float64: Mapping[str, NDArray[Any]]) -> dict[str, Limit]:
    """A limit for each output, from PyTorch's float32 and float64 outputs on the same inputs.

    The noise of few images may be small by luck, so it is never taken to be less than one unit in the last place of
    the largest output.

    Raises:
        StageFailed: the reference is not finite, or so noisy or constant that a comparison with it means nothing.
    """
    limits = {}
    for name, single in float32.items():
        double = float64[name]
        if not (np.isfinite(single).all() and np.isfinite(double).all()):
            raise StageFailed(
                f"PyTorch's own output {name!r} is NaN or infinite; expected a network that gives numbers"
            )
        noise = float(np.abs(single - double).max())
        floor = float(np.finfo(np.float32).eps) * float(np.abs(double).max())
        source = (
            f"PyTorch float32 against float64 differs by {noise:.2g} on the same {len(single)} images"
            if noise >= floor
            else f"the last place of the largest output, {floor:.2g}, as float32 differs from float64 by less"
        )
        limit = NOISE_FACTOR * max(noise, floor)
        _check_signal(name, double, limit, _LARGEST_NOISE_SHARE, "float32")
        limits[name] = Limit(limit, f"{NOISE_FACTOR:g} x float32 noise: {source}")
    return limits


def reduced_limit(
    precision: str, reduced: Mapping[str, NDArray[Any]], float64: Mapping[str, NDArray[Any]]
) -> dict[str, Limit]:
    """A limit for each output at a reduced precision, from its literal answers and PyTorch's in float64.

    Raises:
        StageFailed: the answers are not finite, or the precision drowns what outputs differ by between images.
    """
    limits = {}
    for name, literal in reduced.items():
        double = float64[name]
        if not np.isfinite(literal).all():
            raise StageFailed(f"at {precision} output {name!r} is NaN or infinite; expected numbers")
        error = float(np.abs(literal - double).max())
        limit = REDUCED_FACTOR * max(error, float(np.finfo(np.float32).eps) * float(np.abs(double).max()))
        _check_signal(name, double, limit, _LARGEST_REDUCED_SHARE, precision)
        source = f"its literal execution differs from float64 by {error:.2g} on the same {len(literal)} images"
        limits[name] = Limit(limit, f"{REDUCED_FACTOR:g} x the error of the {precision} file: {source}")
    return limits


def emulated_limit(
    precision: str, emulated: Mapping[str, NDArray[Any]], float64: Mapping[str, NDArray[Any]]
) -> dict[str, Limit]:
    """A limit for each output at a reduced precision against PyTorch, from its emulation there.

    Raises:
        StageFailed: the emulation is not finite.
    """
    limits = {}
    for name, answers in emulated.items():
        double = float64[name]
        if not np.isfinite(answers).all():
            raise StageFailed(f"{precision} emulated in PyTorch gives NaN or infinity in output {name!r}; use fp32")
        error = float(np.abs(answers - double).max())
        limit = EMULATED_FACTOR * max(error, float(np.finfo(np.float32).eps) * float(np.abs(double).max()))
        source = f"{precision} emulated in PyTorch differs from float64 by {error:.2g} on the same {len(double)} images"
        limits[name] = Limit(limit, f"{EMULATED_FACTOR:g} x the error of {precision}: {source}")
    return limits


def widened_for_float16_sums(
    limits: Mapping[str, Limit],
    summed: Mapping[str, NDArray[Any]],
    float64: Mapping[str, NDArray[Any]],
) -> dict[str, Limit]:
    """Return limits for an engine that adds up in float16: never less than those of one that does so in float32.

    Args:
        limits: by output, where sums are float32.
        summed: what the network answers emulated with sums in float16.
        float64: what PyTorch answers in float64.

    Raises:
        StageFailed: the emulation is not finite, or its error drowns what outputs differ by between images.
    """
    found = {}
    for name, limit in limits.items():
        double = float64[name]
        if not np.isfinite(summed[name]).all():
            raise StageFailed(f"fp16 with sums in float16 gives NaN or infinity in output {name!r}; use fp32")
        error = float(np.abs(summed[name] - double).max())
        largest = EMULATED_FACTOR * error
        _check_signal(name, double, largest, _LARGEST_REDUCED_SHARE, "fp16 with sums in float16")
        source = f"emulated in PyTorch it differs from float64 by {error:.2g} on the same {len(double)} images"
        wider = Limit(largest, f"{EMULATED_FACTOR:g} x the error of fp16 with sums in float16: {source}")
        found[name] = max(limit, wider, key=lambda one: one.max_abs)
    return found


def tensor_limits(
    truth: Mapping[str, NDArray[Any]], emulated: Mapping[str, NDArray[Any]], factor: float
) -> dict[str, float]:
    """The largest difference allowed in each inner tensor, from its error in an emulation.

    Args:
        truth: the tensors in float64.
        emulated: the tensors at the candidate's precision.
        factor: how many times the emulation's error is allowed.

    Raises:
        StageFailed: the truth itself is not finite.
    """
    peaks = {name: largest_value(exact) for name, exact in truth.items()}
    errors = {name: largest_difference(emulated[name], exact) for name, exact in truth.items()}
    return limits_from_errors(peaks, errors, factor)


def limits_from_errors(peaks: Mapping[str, float], errors: Mapping[str, float], factor: float) -> dict[str, float]:
    """The largest difference allowed in each inner tensor, from the largest value of each and the largest error in it.

    Raises:
        StageFailed: a tensor is not finite.
    """
    limits = {}
    least = _LEAST_PEAK * max((peak for peak in peaks.values() if np.isfinite(peak)), default=0.0)
    for name, peak in peaks.items():
        if not np.isfinite(peak):
            raise StageFailed(f"tensor {name!r} is NaN or infinite in PyTorch itself; expected numbers")
        floor = float(np.finfo(np.float32).eps) * max(peak, least)
        limits[name] = factor * max(errors[name] if np.isfinite(errors[name]) else 0.0, floor)
    return limits


def _check_signal(name: str, double: NDArray[Any], limit: float, largest_share: float, precision: str) -> None:
    """Refuse a reference whose answers hardly depend on the image: within its noise, a wrong network would pass."""
    signal = float(np.ptp(double, axis=0).max())
    if not limit <= largest_share * signal:
        raise StageFailed(
            f"parity cannot be judged: PyTorch's output {name!r} differs between images by {signal:.2g} at most, and "
            f"{precision} noise allows a limit of {limit:.2g}; expected no more than {largest_share:.0%} of that: "
            "are the weights trained, and is the scale of the outputs sane?"
        )


def compare(candidate: NDArray[Any], reference: NDArray[Any], limit: Limit) -> Comparison:
    """Compare outputs of the same shape, rows first; anything that is not finite fails before a number is looked at."""
    if candidate.shape != reference.shape:
        return Comparison(False, reason=f"output of shape {candidate.shape}; expected {reference.shape}")
    if candidate.dtype != reference.dtype:
        return Comparison(False, reason=f"output of type {candidate.dtype}; expected {reference.dtype}")
    broken = int(candidate.size - np.isfinite(candidate).sum())
    if broken:
        return Comparison(False, reason=f"{broken} of {candidate.size} output values are NaN or infinite")
    rows, expected = _rows(candidate), _rows(reference)
    difference = np.abs(rows - expected)
    max_abs = float(difference.max())
    passed = max_abs <= limit.max_abs
    reason = None if passed else f"differs by {max_abs:.3g}, limit {limit.max_abs:.3g}"
    return Comparison(
        passed=passed,
        max_abs=max_abs,
        max_rel=float((difference / np.maximum(np.abs(expected), limit.max_abs)).max()),
        cosine=_smallest_cosine(rows, expected),
        top1_agreement=_agreement(candidate, reference) if reference.ndim > 1 else None,
        reason=reason,
    )


def _agreement(candidate: NDArray[Any], reference: NDArray[Any]) -> float:
    return float((class_logits(candidate).argmax(1) == class_logits(reference).argmax(1)).mean())


def largest_difference(shown: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest absolute difference; infinite where shapes differ or are empty, NaN or infinite where a value is.

    It is found in pieces that stay in a processor's cache: for maps of many pixels that takes a quarter of the time.
    """
    if shown.shape != expected.shape or not shown.size:
        return float("inf")
    largest, one, other = 0.0, shown.reshape(-1), expected.reshape(-1)
    with np.errstate(invalid="ignore"):
        for start in range(0, one.size, _PIECE):
            piece = np.subtract(one[start : start + _PIECE], other[start : start + _PIECE], dtype=np.float64)
            distance = float(np.abs(piece, out=piece).max())
            if math.isnan(distance):
                return distance
            largest = max(largest, distance)
    return largest


def largest_value(array: NDArray[Any]) -> float:
    """The largest absolute value; NaN or infinite where a value is."""
    return max(float(array.max()), -float(array.min()))


def _rows(array: NDArray[Any]) -> NDArray[np.float64]:
    return array.reshape(len(array), -1).astype(np.float64)


def _smallest_cosine(rows: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((rows * expected).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)).min())
