"""Doubles of the processes that ``bench`` starts: scripts that answer at once, and may go wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dmformer.bench import api
from dmformer.process import Child

if TYPE_CHECKING:
    import pytest

# A worker for onnxruntime that goes wrong; any other answers at once.
WORKER = """
import json, os, signal, sys, time
job = json.load(sys.stdin)
if job["configuration"]["runtime"] == "onnxruntime":
    WRONG
answer = {"measurement": {"device": "CPU", "threads": 1, "version": "1", "load_ms": 1, "first_inference_ms": 1,
          "stable": True, "latencies_ns": [1000000] * 30, "wall_ns": 30000000, "peak_rss_mb": 1}}
open(job["answer"], "w").write(json.dumps(answer))
"""
LIMITS = """
import json, sys
order = json.load(sys.stdin)
limits = {"threads": order["threads"], "gflops": 100.0, "gbytes_per_s": 10.0}
open(order["answer"], "w").write(json.dumps({"limits": limits}))
"""

QUICK = WORKER.replace("WRONG", "pass")

Orders = list[dict[str, Any]]
Worker = Callable[..., Orders]


def script_workers(monkeypatch: pytest.MonkeyPatch, script: str) -> Orders:
    """Put a script in the worker's place; gives the list of the jobs that it is given."""
    orders: Orders = []

    class Scripted(Child):
        @staticmethod
        def command(module: str) -> list[str]:
            work = {"dmformer.bench.worker": script, "dmformer.bench.limits": LIMITS}[module]
            return [sys.executable, "-S", "-c", work]

        def work(self, order: bytes, timeout_s: float) -> None:
            if "configuration" in json.loads(order):
                orders.append(json.loads(order))
            super().work(order, timeout_s)

    monkeypatch.setattr(api, "Child", Scripted)
    return orders
