"""What ``dmformer bench`` adds to what it times: nothing, if its figures are those of the engines' own ways.

Beside a bare loop over an onnxruntime session, and OpenVINO's ``benchmark_app``, each on the same file with the same
threads, each in processes of its own, in turns. A ratio is the median over the rounds; the noise is that of the other
way against itself in the same rounds.

Usage: python benchmarks/overhead.py [BUNDLE] [ROUNDS]    (without a bundle: the demonstration); exit code 1 where they
differ by more than 2 % beyond the noise
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import dmformer
from dmformer.bundle.reader import open_bundle
from dmformer.machine import cpu_model, usable_cores

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
    told = subprocess.run([*command, "-data_shape", f"[{size}]"], capture_output=True, text=True, check=True).stdout
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


def main() -> None:
    """Measure in turns, print."""
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    threads, differ = usable_cores(), False
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
            found = np.array([[ours(bundle, runtime, threads), other(), other()] for _ in range(rounds)])
            ratio = float(np.median(found[:, 0] / found[:, 1]))
            noise = float(np.median(np.abs(found[:, 2] / found[:, 1] - 1)))
            verdict = "the same within 2 %" if abs(ratio - 1) <= ALLOWED else "within the noise alone"
            if abs(ratio - 1) > ALLOWED + noise:
                verdict, differ = "DIFFERENT", True
            print(
                f"{runtime}: dmformer bench {np.median(found[:, 0]):.3f} ms, {name} {np.median(found[:, 1]):.3f} ms; "
                f"ratio {ratio:.3f}, noise {noise:.3f}: {verdict}"
            )
    sys.exit(differ)


if __name__ == "__main__":
    main()
