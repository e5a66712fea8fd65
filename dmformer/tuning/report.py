"""What ``tune`` reports: the candidates, what they take, and which is chosen."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from msgspec import Struct

from dmformer.bench.plan import Configuration
from dmformer.bundle.settings import Settings
from dmformer.errors import CheckFailed, StageFailed

Objective = Literal["latency", "throughput"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class Budget(Struct, frozen=True, kw_only=True):
    """What a configuration may take at most; ``null`` where everything is allowed.

    Attributes:
        latency_ms: of nine calls in ten, in milliseconds; of the median where nine in ten are not known.
        memory_mb: largest resident memory of the whole process, in MiB, as ``bench`` has it.
        accuracy_drop: percentage points of accuracy lost against PyTorch.
    """

    latency_ms: float | None = None
    memory_mb: float | None = None
    accuracy_drop: float | None = None


class Candidate(Configuration, frozen=True, kw_only=True):
    """A configuration, what it takes, and what speaks against it.

    Attributes:
        heats: how many it was timed in; the last is as long as a run of ``bench``.
        final: whether it was timed in that one.
        p50_ms: median of one call, in milliseconds; ``null`` where it failed.
        p90_ms: nine calls in ten take at most that; ``null`` with too few calls.
        images_per_s: rows a second.
        memory_mb: largest resident memory of its process, in MiB.
        energy_mj: of the processor's packages for one call, in millijoules; ``null`` where they do not tell.
        size_bytes: of the artifact's files.
        points_lost: of accuracy against PyTorch, in percentage points; ``null`` where it is not known.
        points_from: what they were measured on.
        over_budget: a sentence for each budget that it exceeds, or of which it is not known.
        on_front: whether no other is better in one of latency, memory, points lost, size and energy, and as good in the
            others; with the objective throughput, the time for one image counts as latency.
        status: ``ok``; ``unstable`` where the warm-up did not settle or the time limit ended it early; ``failed``; or
            ``not run`` where the search was stopped before.
        reason: why it failed, or what is to be known of it.
    """

    heats: int = 0
    final: bool = False
    p50_ms: float | None = None
    p90_ms: float | None = None
    images_per_s: float | None = None
    memory_mb: float | None = None
    energy_mj: float | None = None
    size_bytes: int = 0
    points_lost: float | None = None
    points_from: str | None = None
    over_budget: tuple[str, ...] = ()
    on_front: bool = False
    status: Literal["ok", "unstable", "failed", "not run"] = "not run"
    reason: str | None = None

    @property
    def label(self) -> str:
        """For people: what tells it from the other candidates."""
        return f"{self.title}, {self.threads} {'thread' if self.threads == 1 else 'threads'}"


class TuneReport(Struct, frozen=True, kw_only=True):
    """What ``tune`` found.

    Attributes:
        arch: the network.
        manifest_sha256: of the bundle.
        machine: what the settings are kept by.
        environment: processor, memory, load and versions.
        objective: what the candidates are ranked by.
        budget: what they may take.
        candidates: the best first, then by what they exceed.
        chosen: place of the fastest within the budget among them; ``null`` without one.
        ties: places of those within the budget that are as fast, as far as the noise allows to tell.
        nearest: place of the one that exceeds the budget least, where none is within it.
        noise_floor: of the last heat; smaller differences are ties.
        measured_at: when it began, in UTC, as in RFC 3339.
        partial: whether it was stopped; then nothing is chosen.
        skipped: a sentence for each artifact that no runtime here can run.
        notes: what else is to be known.
    """

    arch: str
    manifest_sha256: str
    machine: str
    environment: dict[str, Any]
    objective: Objective
    budget: Budget
    candidates: tuple[Candidate, ...]
    chosen: int | None
    ties: tuple[int, ...]
    nearest: int | None
    noise_floor: float | None
    measured_at: str
    partial: bool = False
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse a report without a choice.

        Raises:
            CheckFailed: no configuration is within the budget, or the search was stopped.
            StageFailed: every configuration failed.
        """
        if self.chosen is not None:
            return
        if self.partial:
            raise CheckFailed("tuning was stopped before its end; nothing is chosen")
        if all(one.status == "failed" for one in self.candidates):
            first = self.candidates[0]
            raise StageFailed(f"all {len(self.candidates)} configurations failed; first: {first.label}: {first.reason}")
        nearest = self.candidates[cast("int", self.nearest)]
        raise CheckFailed(
            f"none of {len(self.candidates)} configurations is within the budget; the nearest is {nearest.label}: "
            f"{'; '.join(nearest.over_budget)}"
        )

    def settings(self) -> Settings:
        """Return the choice as it is kept.

        Raises:
            CheckFailed: there is none.
            StageFailed: every configuration failed.
        """
        self.check()
        best = self.candidates[cast("int", self.chosen)]
        return Settings(
            runtime=best.runtime,
            precision=best.precision,
            threads=best.threads,
            batch=best.batch,
            streams=best.streams,
            objective=self.objective,
            p50_ms=cast("float", best.p50_ms),
            measured_at=self.measured_at,
        )
