"""An earlier run against this one: what became slower or faster, beyond the noise of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dmformer.bench import words
from dmformer.bench.report import BenchReport, Change, Comparison
from dmformer.bench.statistics import unpaired_ratio
from dmformer.errors import CheckFailed, UsageError
from dmformer.machine import describe_machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dmformer.bench.report import Result

DEFAULT_REGRESSION = 0.05


@dataclass(frozen=True)
class Baseline:
    """An earlier run, and by what share (0.05 is 5 %) a row may be slower than in it."""

    path: str
    report: BenchReport
    allowed: float

    @staticmethod
    def read(path: str, allowed: float) -> Baseline:
        """Read the report of an earlier run.

        Raises:
            UsageError: it cannot be read, is no report of ``bench --json``, or is of another processor: what differs
                then is not the software.
        """
        if not 0 <= allowed < math.inf:
            raise UsageError(f"a regression of {allowed:.1%} is allowed; expected 0 % or more")
        expected = "expected what bench --json wrote"
        try:
            report = msgspec.json.decode(Path(path).read_bytes(), type=BenchReport)
        except OSError as error:
            raise UsageError(f"baseline {path!r}: {error.strerror}; {expected}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"baseline {path!r}: {error}; {expected}") from error
        if not any(row.timed for row in report.results):
            raise UsageError(f"baseline {path!r} has no row with figures; expected at least one")
        if any(row.timed and not all(row.samples_ns or [()]) for row in report.results):
            raise UsageError(f"baseline {path!r} has a row without samples; {expected}")
        there, here = report.environment, describe_machine()
        if there.get("cpu") != here["cpu"]:
            told = f"is of a {there.get('cpu')}; this is a {here['cpu']}"
            raise UsageError(f"baseline {path!r} {told}: make a baseline on this machine")
        if there.get("max_isa") != here["max_isa"]:
            told = (
                f"was held to {there.get('max_isa') or 'nothing'}; ONEDNN_MAX_CPU_ISA is {here['max_isa'] or 'not set'}"
            )
            raise UsageError(f"baseline {path!r} {told}: compare under the same")
        # Virtual machines give processors of several generations one name.
        if differing := set(there.get("instructions", here["instructions"])) ^ set(here["instructions"]):
            told = f"is of another {here['cpu']}: they differ in {', '.join(sorted(differing))}"
            raise UsageError(f"baseline {path!r} {told}: make a baseline on this machine")
        return Baseline(path, report, allowed)

    def check_model(self, arch: str) -> None:
        """Refuse to compare two networks.

        Raises:
            UsageError: the earlier run was of another one.
        """
        if self.report.arch != arch:
            raise UsageError(f"baseline {self.path!r} is of {self.report.arch}; this bundle is of {arch}")

    def compare(self, now: BenchReport) -> Comparison:
        """This run against it."""
        return compare(now, self.report, self.path)

    def judge(self, now: BenchReport) -> None:
        """Refuse what became slower.

        Raises:
            CheckFailed: a row is slower by more than is allowed, beyond the noise; or no row is in both runs.
        """
        changes = now.comparison.changes if now.comparison is not None else ()
        if not changes:
            had = ", ".join(f"{row.title}, {row.threads} threads" for row in self.report.results if row.timed)
            raise CheckFailed(f"no row of this run is in {self.path} as well, which has {had}; expected one at least")
        slower = [change for change in changes if change.verdict == "slower" and change.ratio > 1 + self.allowed]
        if slower:
            worst = max(slower, key=lambda change: change.ratio)
            raise CheckFailed(
                f"{len(slower)} of {len(changes)} rows are slower than {self.path} by more than {self.allowed:.1%}; "
                f"worst: {words.change(now, worst)}"
            )


def compare(now: BenchReport, baseline: BenchReport, name: str) -> Comparison:
    """Row by row; a row is the same with the same runtime, precision, batch, threads, mode and streams.

    Differences within the larger noise floor of the two runs, or whose interval of 95 % holds no change, are ties.
    """
    noise = max(now.noise_floor or 0.0, baseline.noise_floor or 0.0)
    rows = {_key(row): place for place, row in enumerate(now.results) if row.timed}

    def changes() -> Iterator[Change]:
        for before in baseline.results:
            place = rows.get(_key(before))
            if place is None or not before.timed:
                continue
            row = now.results[place]
            ratio = unpaired_ratio(row.call_ns, before.call_ns, noise)
            yield Change(
                row=place,
                before_ms=before.call_ms or 0.0,
                now_ms=row.call_ms or 0.0,
                same_artifact=row.artifact_sha256 == before.artifact_sha256,
                **msgspec.structs.asdict(ratio),
            )

    both = (now.limits, baseline.limits)
    return Comparison(
        baseline=name,
        changes=tuple(changes()),
        missing=tuple(row.title for row in baseline.results if row.timed and _key(row) not in rows),
        machine_ratio=both[0].gflops / both[1].gflops if both[0] and both[1] else None,
    )


def _key(row: Result) -> tuple[object, ...]:
    return row.runtime, row.precision, row.batch, row.threads, row.mode, row.streams
