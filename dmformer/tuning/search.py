"""Which candidate is the fastest within a budget, by successive halving (Jamieson and Talwalkar, AISTATS 2016).

Candidates are timed as ``bench`` times its rows: in turns, each in processes of its own. All are timed briefly, the
better half longer, and the last few as ``bench`` does by default. Only these can be chosen; figures of the others are
rough.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import msgspec

from dmformer.bench import DEFAULT_DURATION_S, DEFAULT_ROUNDS
from dmformer.bench.api import run_plan
from dmformer.bench.sentences import digits
from dmformer.bench.statistics import paired_ratio
from dmformer.tuning.report import Candidate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dmformer.bench.plan import BenchPlan, Configuration
    from dmformer.bench.report import BenchReport, Result
    from dmformer.bundle.manifest import Artifact
    from dmformer.progress import Progress
    from dmformer.tuning.report import Budget, Objective

_FINALISTS = 4  # timed as bench does
_BRIEF_S = 0.4  # of steady state, in the first heat; each further one takes twice as long


class Search:
    """Heats of fewer and fewer candidates.

    Args:
        plan: with all candidates as its rows.
        objective: what they are ranked by.
        budget: what they may take.
        measured: points lost, by runtime and precision, where they were measured now.
        stage: told about each heat.
    """

    def __init__(
        self,
        plan: BenchPlan,
        objective: Objective,
        budget: Budget,
        measured: Mapping[tuple[str, str], float],
        stage: Progress,
    ) -> None:
        self.plan, self.objective, self.budget, self.measured, self.stage = plan, objective, budget, measured, stage
        artifacts = {artifact.sha256: artifact for artifact in self.plan.bundle.manifest.artifacts}
        self.candidates = {
            row: self._with_artifact(row, artifacts[row.artifact_sha256]) for row in self.plan.configurations
        }
        self.last: BenchReport | None = None  # of the last heat
        self.partial = False

    def _with_artifact(self, row: Configuration, artifact: Artifact) -> Candidate:
        points, source = self.measured.get((row.runtime, row.precision)), "the images that were given"
        if points is None:
            points, source = artifact.points_lost, "the calibration images of the export"
        if points is None and row.precision == "fp32" and self.plan.bundle.manifest.evidence.parity.passed:
            points, source = 0.0, "parity: its answers are PyTorch's but for rounding"
        return Candidate(
            **msgspec.structs.asdict(row),
            size_bytes=artifact.bytes,
            points_lost=points,
            points_from=None if points is None else source,
        )

    def run(self) -> None:
        """Time all, then the better half of them, until few are left, and these as bench does."""
        left, heat = list(self.candidates), 0
        while len(left) > _FINALISTS and not self.partial:
            plan = replace(
                self.plan, configurations=tuple(left), rounds=1 if heat == 0 else 2, duration_s=_BRIEF_S * 2**heat
            )
            self._time(plan, final=False)
            left = self._better_half(left)
            heat += 1
        # What was within the budget briefly may not be for long: then those come that were given up before.
        while left and not self.partial:
            plan = replace(
                self.plan,
                configurations=tuple(left),
                rounds=DEFAULT_ROUNDS,
                duration_s=DEFAULT_DURATION_S,
                brief=False,
            )
            self.last = self._time(plan, final=True)
            waiting = [row for row, one in self.candidates.items() if not one.final and _is_within(one)]
            left = (
                [] if any(_is_within(self.candidates[row]) for row in left) else self._better_half(waiting)[:_FINALISTS]
            )

    def _time(self, plan: BenchPlan, *, final: bool) -> BenchReport:
        report = run_plan(plan, self.stage)
        for row, result in zip(plan.configurations, report.results, strict=True):
            if result.status != "not run":
                figures = _with_figures(self.candidates[row], result, final and not report.partial)
                self.candidates[row] = self._judged(figures)
        self.partial = report.partial
        return report

    def _judged(self, candidate: Candidate) -> Candidate:
        """Note what a candidate exceeds."""
        if candidate.p50_ms is None:
            return msgspec.structs.replace(candidate, over_budget=())
        over = [
            f"{what} {_more_than(value, allowed)} {unit}; allowed are {allowed:g} {unit}"
            for what, value, allowed, unit in self._compared(candidate)
            if value > allowed
        ]
        if self.budget.accuracy_drop is not None and candidate.points_lost is None:
            over.append("what accuracy it loses is not known; expected labelled images: `data`")
        return msgspec.structs.replace(candidate, over_budget=tuple(over))

    def _compared(self, candidate: Candidate) -> list[tuple[str, float, float, str]]:
        """Return what, how much, what is allowed and the unit, for each budget that a known figure has."""
        known_ms = candidate.p90_ms if candidate.p90_ms is not None else candidate.p50_ms
        figures = (
            ("nine calls in ten take" if candidate.p90_ms is not None else "the median call takes", known_ms, "ms"),
            ("memory", candidate.memory_mb, "MiB"),
            ("accuracy lost", candidate.points_lost, "points"),
        )
        allowed = (self.budget.latency_ms, self.budget.memory_mb, self.budget.accuracy_drop)
        return [
            (what, value, most, unit)
            for (what, value, unit), most in zip(figures, allowed, strict=True)
            if value is not None and most is not None
        ]

    def _excess(self, candidate: Candidate) -> float:
        """Return by which factor a candidate exceeds the budget that it exceeds most."""
        if candidate.p50_ms is None or (self.budget.accuracy_drop is not None and candidate.points_lost is None):
            return math.inf
        shares = [
            1 + value - allowed if unit == "points" else value / allowed if allowed else math.inf
            for _, value, allowed, unit in self._compared(candidate)
        ]
        return max(shares, default=0.0)

    def _cost(self, candidate: Candidate) -> float:
        """Return what is to be small: the time of a call, or of an image."""
        if candidate.p50_ms is None:
            return math.inf
        return candidate.p50_ms if self.objective == "latency" else 1e3 / cast("float", candidate.images_per_s)

    def _rank(self, candidate: Candidate) -> tuple[float, float]:
        """Return what sorts candidates: those within the budget by their cost, then the others by what they exceed."""
        return (0.0 if _is_within(candidate) else self._excess(candidate), self._cost(candidate))

    def _better_half(self, rows: Sequence[Configuration]) -> list[Configuration]:
        timed = [row for row in rows if self.candidates[row].p50_ms is not None]
        ranked = sorted(timed, key=lambda row: self._rank(self.candidates[row]))
        return ranked[: max(_FINALISTS, math.ceil(len(rows) / 2))]

    def outcome(self) -> dict[str, Any]:
        """Return the fields of the report that tell what was found."""
        figures = [self._figures(one) for one in self.candidates.values() if one.p50_ms is not None]
        ranked = sorted(self.candidates.values(), key=lambda one: (not one.final, *self._rank(one)))
        rows = tuple(msgspec.structs.replace(one, on_front=self._is_on_front(one, figures)) for one in ranked)
        within = [place for place, one in enumerate(rows) if one.final and _is_within(one)]
        measured = [place for place, one in enumerate(rows) if one.over_budget]
        chosen = within[0] if within and not self.partial else None
        return {
            "candidates": rows,
            "chosen": chosen,
            "ties": () if chosen is None else self._ties(rows, chosen, within),
            "nearest": (
                None
                if within or self.partial
                else min(measured, key=lambda place: self._excess(rows[place]), default=None)
            ),
            "noise_floor": None if self.last is None else self.last.noise_floor,
            "partial": self.partial,
        }

    def _ties(self, rows: Sequence[Candidate], chosen: int, within: Sequence[int]) -> tuple[int, ...]:
        assert self.last is not None
        taken = {
            (row.runtime, row.precision, row.batch, row.threads, row.streams): (
                _per_row(row) if self.objective == "throughput" else row.call_ns
            )
            for row in self.last.results
            if row.timed
        }

        def calls(place: int) -> tuple[tuple[int, ...], ...]:
            row = rows[place]
            return taken[row.runtime, row.precision, row.batch, row.threads, row.streams]

        noise = self.last.noise_floor
        return tuple(
            place
            for place in within
            if place != chosen and paired_ratio(calls(place), calls(chosen), noise).verdict == "tie"
        )

    def _is_on_front(self, candidate: Candidate, figures: Sequence[tuple[float, ...]]) -> bool:
        if candidate.p50_ms is None:
            return False
        own = self._figures(candidate)
        return not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in figures)

    def _figures(self, candidate: Candidate) -> tuple[float, ...]:
        energy = candidate.energy_mj
        if energy is not None and self.objective == "throughput":
            energy /= candidate.batch
        others = (candidate.memory_mb, candidate.points_lost, energy)
        return (
            self._cost(candidate),
            candidate.size_bytes,
            *(math.inf if figure is None else figure for figure in others),
        )


def _with_figures(candidate: Candidate, result: Result, final: bool) -> Candidate:
    latency = result.latency_ms
    return msgspec.structs.replace(
        candidate,
        heats=candidate.heats + 1,
        final=final,
        p50_ms=latency.middle if latency is not None else None,
        p90_ms=latency.p90 if latency is not None else None,
        images_per_s=result.throughput_ips,
        memory_mb=result.peak_rss_mb,
        energy_mj=result.energy_mj,
        status=result.status,
        reason=result.reason,
    )


def _is_within(candidate: Candidate) -> bool:
    """Whether a candidate was timed and exceeds no budget."""
    return candidate.p50_ms is not None and not candidate.over_budget


def _more_than(value: float, allowed: float) -> str:
    """Return a figure with as many digits as tell it from what it exceeds."""
    texts = (digits(value), *(f"{value:.{places}f}" for places in range(1, 7)))
    return next((text for text in texts if float(text) > allowed), repr(value))


def _per_row(result: Result) -> tuple[tuple[int, ...], ...]:
    """Return nanoseconds for one row of the batch, so that batches of several sizes compare."""
    return tuple(tuple(taken // result.batch for taken in calls) for calls in result.call_ns)
