"""Whether ``tune`` finds what an exhaustive run finds: ``python benchmarks/tune.py BUNDLE [throughput]``.

Tunes, then times every candidate as ``bench`` does by default, all in one run, and says how much longer the choice
takes there than the quickest, beside the noise of that run; and how long both searches took.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dmformer.bench import DEFAULT_DURATION_S, DEFAULT_ROUNDS
from dmformer.bench.api import run_plan
from dmformer.bench.statistics import middle_ns
from dmformer.bundle.reader import open_bundle
from dmformer.tuning.api import plan_candidates, tune

if TYPE_CHECKING:
    from dmformer.tuning.report import Objective


def main() -> int:
    """Print what both found; end with 1 where the choice is slower by more than the noise."""
    bundle = open_bundle(Path(sys.argv[1]))
    objective = cast("Objective", sys.argv[2] if len(sys.argv) > 2 else "latency")
    begun = time.perf_counter()
    report = tune(bundle, objective=objective)
    tuned_s = time.perf_counter() - begun
    chosen = report.candidates[cast("int", report.chosen)]
    plan = replace(
        plan_candidates(bundle, objective), rounds=DEFAULT_ROUNDS, duration_s=DEFAULT_DURATION_S, brief=False
    )
    begun = time.perf_counter()
    everything = run_plan(plan)
    exhaustive_s = time.perf_counter() - begun
    cost = {
        f"{row.title}, {row.threads} threads": middle_ns(row.call_ns) / row.batch / 1e6
        for row in everything.results
        if row.timed
    }
    best = min(cost, key=lambda title: cost[title])
    ratio, noise = cost[f"{chosen.title}, {chosen.threads} threads"] / cost[best], everything.noise_floor or 0.0
    print(f"{len(report.candidates)} configurations: tuned in {tuned_s:.0f} s, all timed in {exhaustive_s:.0f} s")
    print(f"chosen: {chosen.label}; quickest of all: {best}, {cost[best]:.3g} ms an image")
    print(f"the choice takes {ratio:.3f} times as long; noise floor {noise:.1%}")
    return 0 if ratio <= 1 + noise else 1


if __name__ == "__main__":
    sys.exit(main())
