"""What raw nanoseconds allow to say: percentiles where there are enough samples, ratios with an interval, ties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from msgspec import Struct

from dmformer.bench.plan import SAMPLES_FOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Rounds = tuple[tuple[int, ...], ...]  # raw latencies, nanoseconds; one tuple a round
Verdict = Literal["faster", "slower", "tie", "unknown"]

_RESAMPLES = 1000
_MOST_SAMPLES = 400  # of a round in a resample: medians of more move less than rounds do
_CONFIDENCE = 0.95


class Latency(Struct, frozen=True, kw_only=True):
    """Milliseconds for one call. A percentile is ``null`` where there are too few samples to know it."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float
    min: float
    max: float

    @property
    def middle(self) -> float:
        """The median, or with too few samples to know it the mean, in milliseconds."""
        return self.p50 if self.p50 is not None else self.mean


class Ratio(Struct, frozen=True, kw_only=True):
    """How long one configuration takes over another, with an interval of 95 % confidence.

    ``verdict`` is ``tie`` where the ratio is within the noise floor or the interval holds 1, ``unknown`` without a
    noise floor.
    """

    ratio: float
    low: float
    high: float
    verdict: Verdict


def latency(samples_ns: Sequence[int]) -> Latency:
    """Return figures in milliseconds from raw nanoseconds; nothing is clipped."""
    values = np.asarray(samples_ns, np.float64) / 1e6

    def percentile(name: str) -> float | None:
        return float(np.percentile(values, int(name[1:]))) if len(values) >= SAMPLES_FOR[name] else None

    return Latency(
        p50=percentile("p50"),
        p90=percentile("p90"),
        p99=percentile("p99"),
        mean=float(values.mean()),
        min=float(values.min()),
        max=float(values.max()),
    )


def round_ratios(candidate: Sequence[Sequence[int]], baseline: Sequence[Sequence[int]]) -> list[float]:
    """Return the ratio of two configurations' medians in each round that both have; rounds are side by side in time."""
    return [float(np.median(a) / np.median(b)) for a, b in zip(candidate, baseline, strict=False)]


def noise_floor(first: Sequence[Sequence[int]], again: Sequence[Sequence[int]]) -> float | None:
    """Return how far the ratio of a configuration to itself is from 1: the median over rounds.

    The median, as for the ratio of two configurations: one disturbed round of three moves neither.
    """
    ratios = round_ratios(again, first)
    return float(np.median([abs(ratio - 1) for ratio in ratios])) if ratios else None


def paired_ratio(candidate: Rounds, baseline: Rounds, noise: float | None) -> Ratio:
    """Compare two configurations of one run: the median over rounds of the ratio of their medians.

    The interval is a bootstrap (Efron, 1979) over rounds, each drawn for both at once, and over the calls in each.
    """
    count = min(len(candidate), len(baseline))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, count, (_RESAMPLES, count))
    above = _resampled_medians(candidate[:count], drawn, rng)
    below = _resampled_medians(baseline[:count], drawn, rng)
    return _judged(float(np.median(round_ratios(candidate, baseline))), np.median(above / below, axis=1), noise)


def unpaired_ratio(candidate: Rounds, baseline: Rounds, noise: float | None) -> Ratio:
    """Compare two runs: the ratio of the medians over rounds of the rounds' medians; each draws its own rounds."""
    rng = np.random.default_rng(0)

    def medians(rounds: Rounds) -> NDArray[np.float64]:
        drawn = rng.integers(0, len(rounds), (_RESAMPLES, len(rounds)))
        return np.median(_resampled_medians(rounds, drawn, rng), axis=1)

    return _judged(middle_ns(candidate) / middle_ns(baseline), medians(candidate) / medians(baseline), noise)


def middle_ns(rounds: Rounds) -> float:
    """Return the median over rounds of the rounds' medians."""
    return float(np.median([np.median(samples) for samples in rounds]))


def _resampled_medians(rounds: Rounds, drawn: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    """(resamples, rounds): the median of a resample of the calls of each round that was drawn."""
    found = np.empty(drawn.shape)
    for number, samples in enumerate(rounds):
        places = drawn == number
        values = np.asarray(samples, np.float64)
        picked = rng.integers(0, len(values), (int(places.sum()), min(len(values), _MOST_SAMPLES)))
        found[places] = np.median(values[picked], axis=1)
    return found


def _judged(ratio: float, resampled: NDArray[np.float64], noise: float | None) -> Ratio:
    tail = (1 - _CONFIDENCE) / 2
    low, high = (float(value) for value in np.quantile(resampled, [tail, 1 - tail]))
    verdict: Verdict = "faster" if ratio < 1 else "slower"
    if noise is None:
        verdict = "unknown"
    elif abs(ratio - 1) <= noise or low <= 1 <= high:
        verdict = "tie"
    return Ratio(ratio=ratio, low=low, high=high, verdict=verdict)
