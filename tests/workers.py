"""Doubles of the processes that ``bench`` starts: scripts that answer at once, and may go wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from dmformer import process
from dmformer.process import Child

if TYPE_CHECKING:
    import pytest

# A worker for onnxruntime that goes wrong; any other answers at once.
WORKER = """
import json, os, signal, sys, time
order, result = json.load(sys.stdin), sys.argv[-1]
if order["configuration"]["runtime"] == "onnxruntime":
    WRONG
measurement = {"device": "CPU", "threads": 1, "version": "1", "load_ms": 1, "first_inference_ms": 1,
               "stable": True, "latencies_ns": [1000000] * 30, "wall_ns": 30000000, "peak_rss_mb": 1}
open(result, "w").write(json.dumps(["", measurement]))
"""
LIMITS = """
import json, sys
order = json.load(sys.stdin)
limits = {"threads": order["threads"], "gflops": 100.0, "gbytes_per_s": 10.0}
open(sys.argv[-1], "w").write(json.dumps(["", limits]))
"""

QUICK = WORKER.replace("WRONG", "pass")

T = TypeVar("T")
Orders = list[dict[str, Any]]
Worker = Callable[..., Orders]


def script_workers(monkeypatch: pytest.MonkeyPatch, script: str) -> Orders:
    """Put a script in the worker's place; gives the list of the orders that it is given."""
    orders: Orders = []

    class Scripted(Child):
        @staticmethod
        def command(function: str, *arguments: str) -> list[str]:
            work = LIMITS if function.endswith("measure_limits") else script
            return [sys.executable, "-S", "-c", work, *arguments]

        def call(self, order: Any, result: type[T], timeout_s: float) -> T:
            content = json.loads(msgspec.json.encode(order))
            if "configuration" in content:
                orders.append(content)
            return super().call(order, result, timeout_s)

    monkeypatch.setattr(process, "Child", Scripted)
    return orders
