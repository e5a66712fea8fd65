"""What ``dmformer bench`` adds to what it times: nothing, if its figures are those of the engines' own ways.

Beside a bare loop over an onnxruntime session, and OpenVINO's ``benchmark_app``, each on the same file with the same
threads and the same open or fixed batch, each in processes of its own. Processes of one and the same loop differ by
more than what is looked for (where their memory lies, what else the machine does), and one after another is not like
one before it: so in each round ours and two of the other way come in an order that is drawn. The ratio is the median
over rounds, of ours to the mean of the two, with a bootstrap interval of 95 %; the other way against itself has the
same.

Usage: python benchmarks/overhead.py [BUNDLE] [ROUNDS] [THREADS]    (otherwise the demonstration, 9 rounds, all cores:
with all of them whatever else runs disturbs most); exit code 1 where the interval lies beyond 2 %, 3 where it does not
decide
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import dmformer
from dmformer.bench.statistics import Ratio, paired_ratio
from dmformer.bundle.reader import open_bundle
from dmformer.machine import cpu_model, usable_cores
from dmformer.runtimes.openvino import FIXED_MOST_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 3
ALLOWED = 0.02
BARE_LOOP = """
import sys, time
import numpy as np, onnxruntime
path, threads, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
(entry,) = session.get_inputs()
images = [np.random.default_rng(seed).standard_normal((1, *entry.shape[1:]), np.float32) for seed in range(5)]
def timed(seconds):
    taken, begun = [], time.perf_counter()
    while time.perf_counter() - begun < seconds or len(taken) < 64:
        before = time.perf_counter_ns()
        session.run(None, {entry.name: images[len(taken) % 5]})
        taken.append(time.perf_counter_ns() - before)
    return taken
timed(1.5)
print(float(np.median(timed(seconds))) / 1e6)
"""


def bare_loop(model: Path, threads: int) -> float:
    """The median of a session's calls, milliseconds."""
    command = [sys.executable, "-c", BARE_LOOP, str(model), str(threads), str(SECONDS)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def benchmark_app(model: Path, threads: int) -> float:
    """The median that OpenVINO's own tool tells, milliseconds: one request at a time, tuned for latency."""
    # fmt: off
    command = [  # it takes a number of threads with no hint only; one stream is what the hint "latency" comes to
        "benchmark_app", "-m", str(model), "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1",
        "-nthreads", str(threads), "-infer_precision", "f32", "-t", str(SECONDS),
    ]
    # fmt: on
    rows = open_bundle(model.parents[2]).manifest.inputs[0]
    size = ",".join(str(number) for number in (1, *rows.shape[1:]))  # the batch is dynamic in the file
    fixed = model.with_suffix(".bin").stat().st_size <= FIXED_MOST_BYTES
    shape = ["-shape" if fixed else "-data_shape", f"[{size}]"]
    told = subprocess.run([*command, *shape], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Median:\s+([0-9.]+) (us|ms)", told)
    if found is None:
        raise SystemExit(f"benchmark_app told no median:\n{told}")
    return float(found[1]) / (1000 if found[2] == "us" else 1)


def ours(bundle: Path, runtime: str, threads: int) -> float:
    """The median of ``dmformer bench``, milliseconds."""
    report = dmformer.bench(
        bundle, runtimes=[runtime], precisions=["fp32"], threads=threads, rounds=1, duration_s=SECONDS
    )
    (row,) = report.results
    return float(np.median(row.samples_ns[0])) / 1e6


def compared(ours: Callable[[], float], other: Callable[[], float], rounds: int) -> tuple[Ratio, Ratio, float, float]:
    """Ours to the other way, that to itself, and the medians of both in milliseconds."""
    found = np.empty((rounds, 3))
    rng = np.random.default_rng(0)
    for number in range(rounds):
        for place in rng.permutation(3):
            found[number, place] = other() if place else ours()
    mine, first, again = ([(float(ms),) for ms in column] for column in found.T)
    both = [(float(ms),) for ms in found[:, 1:].mean(axis=1)]
    medians = np.median(found, axis=0)
    return (
        paired_ratio(tuple(mine), tuple(both), None),
        paired_ratio(tuple(again), tuple(first), None),
        float(medians[0]),
        float(medians[1:].mean()),
    )


def judged(ratio: Ratio) -> tuple[str, int]:
    """What the interval says of the 2 %, and the exit code for it."""
    if ratio.low >= 1 - ALLOWED and ratio.high <= 1 + ALLOWED:
        return "the same within 2 %", 0
    if ratio.high < 1 - ALLOWED or ratio.low > 1 + ALLOWED:
        return "DIFFERENT", 1
    return "not decided: more rounds, or a quieter machine", 3


def main() -> None:
    """Measure, print."""
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    threads = int(sys.argv[3]) if len(sys.argv) > 3 else usable_cores()
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "bundle"
        if len(sys.argv) < 2:
            dmformer.export(formats=["onnx", "openvino"], output=bundle)
        ways: dict[str, tuple[str, Callable[[], float]]] = {
            "bare onnxruntime loop": ("onnxruntime", lambda: bare_loop(bundle / "onnx/fp32/model.onnx", threads)),
            "benchmark_app": ("openvino", lambda: benchmark_app(bundle / "openvino/fp32/model.xml", threads)),
        }
        print(f"{cpu_model()}, {threads} threads, {rounds} rounds of {SECONDS} s")
        for name, (runtime, other) in ways.items():
            ratio, itself, mine_ms, other_ms = compared(partial(ours, bundle, runtime, threads), other, rounds)
            said, code = judged(ratio)
            codes.append(code)
            print(
                f"{runtime}: dmformer bench {mine_ms:.3f} ms, {name} {other_ms:.3f} ms; ratio {ratio.ratio:.3f} "
                f"({ratio.low:.3f} to {ratio.high:.3f}), {name} to itself {itself.ratio:.3f} ({itself.low:.3f} to "
                f"{itself.high:.3f}): {said}",
                flush=True,
            )
    sys.exit(1 if 1 in codes else max(codes))


if __name__ == "__main__":
    main()
