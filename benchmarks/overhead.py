"""What ``dmformer bench`` adds to what it times: nothing, if its figures are those of the engines' own ways.

Its calls beside those of a bare loop over an onnxruntime session, and over an OpenVINO request, on the same file with
the same threads and the same open or fixed batch. Processes of one and the same loop differ by more than what is looked
for (where their memory lies), and a machine by more still from one second to the next: so each round starts three, ours
and the bare loop twice, which take turns of a third of a second in an order that is drawn. The ratio is the median over
rounds, of ours to the mean of the two, with a bootstrap interval of 95 %; the bare loop against itself has the same.

OpenVINO's ``benchmark_app`` cannot take turns; it and ``dmformer bench`` run one after the other, in an order that is
drawn. Its median comes from a clock within the engine, which leaves out that Python calls it and gives it an image; its
throughput has both in it, and its own loop. So the time for each inference is what is compared (of ours the mean of the
calls), and its median is told beside it.

Usage: python benchmarks/overhead.py [BUNDLE] [ROUNDS] [THREADS]    (otherwise the demonstration, 9 rounds, all cores:
with all of them whatever else runs disturbs most); exit code 1 where an interval lies above 2 %, 3 where one does not
decide, or where the other way is not as fast as itself within 2 %
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import dmformer
from dmformer.bench.measure import network_alone
from dmformer.bench.plan import WARM_UP
from dmformer.bench.statistics import Ratio, paired_ratio
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import select
from dmformer.machine import cpu_model, usable_cores
from dmformer.runtimes.openvino import FIXED_MOST_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Images = NDArray[np.float32]  # (N, C, H, W)

TURN_S = 0.3
TURNS = 12  # of each process in each round
LEAST_CALLS = 5  # in a turn
ALONE_S = 3
ALLOWED = 0.02


def through_bench(bundle: Path, runtime: str, threads: int, images: Images) -> Callable[[], object]:
    """The call that ``dmformer bench`` times."""
    (choice,), _ = select(open_bundle(bundle), [runtime], ["fp32"])
    opened = choice.runtime(threads).__enter__()
    return network_alone(opened, opened.inputs[0].name, images, 1)


def bare_onnxruntime(bundle: Path, threads: int, images: Images) -> Callable[[], object]:
    """A session's call."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = bundle / "onnx/fp32/model.onnx"
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name, one = session.get_inputs()[0].name, cycle(np.split(images, len(images)))
    return lambda: session.run(None, {name: next(one)})


def bare_openvino(bundle: Path, threads: int, images: Images) -> Callable[[], object]:
    """A request's call as ``benchmark_app`` makes it, and the answer taken."""
    import openvino

    model = openvino.Core().read_model(bundle / "openvino/fp32/model.xml")
    one = np.split(images, len(images))
    if is_fixed(bundle):
        model.reshape(one[0].shape)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    turn = cycle(one)

    def call() -> object:
        request.set_input_tensors([openvino.Tensor(next(turn), shared_memory=True)])
        request.infer()
        return request.get_output_tensor().data.copy()

    return call


BARE = {"onnxruntime": bare_onnxruntime, "openvino": bare_openvino}


def is_fixed(bundle: Path) -> bool:
    """Whether the OpenVINO runtime compiles this network for one batch size."""
    return (bundle / "openvino/fp32/model.bin").stat().st_size <= FIXED_MOST_BYTES


def take_turns(way: str, bundle: Path, runtime: str, threads: int) -> None:
    """What a process does: load, warm up, say so; then a turn for each line that comes, its median in nanoseconds."""
    images = open_bundle(bundle).golden().inputs
    call = through_bench(bundle, runtime, threads, images) if way == "ours" else BARE[runtime](bundle, threads, images)
    list(_timed(call, WARM_UP.least_s))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(np.median(list(_timed(call, TURN_S))), flush=True)


def _timed(call: Callable[[], object], seconds: float) -> Iterator[int]:
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or count < LEAST_CALLS:
        before = time.perf_counter_ns()
        call()
        yield time.perf_counter_ns() - before
        count += 1


def in_turns(bundle: Path, runtime: str, threads: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The medians over turns of one round, in milliseconds: ours, the bare loop, the bare loop again."""
    with ExitStack() as opened:
        processes = {}
        for place in rng.permutation(3):
            way = "bare" if place else "ours"
            command = [sys.executable, __file__, "--turns", way, str(bundle), runtime, str(threads)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes[place] = opened.enter_context(process)
            _line(process)
        taken = np.empty((TURNS, 3))
        for turn in range(TURNS):
            for place in rng.permutation(3):
                process = processes[place]
                assert process.stdin is not None
                print(file=process.stdin, flush=True)
                taken[turn, place] = float(_line(process)) / 1e6
        found: NDArray[np.float64] = np.median(taken, axis=0)
        return found


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    told = process.stdout.readline()
    if not told:
        raise SystemExit("a process that takes turns ended before its time")
    return told


class Alone(NamedTuple):
    """Of a process that cannot take turns, in milliseconds."""

    each: float  # time for each inference
    median: float


def benchmark_app(bundle: Path, threads: int) -> Alone:
    """What OpenVINO's own tool tells: one request at a time, tuned for latency, and given an image for each."""
    # fmt: off
    command = [  # it takes a number of threads with no hint only; one stream is what the hint "latency" comes to
        "benchmark_app", "-m", str(bundle / "openvino/fp32/model.xml"), "-d", "CPU", "-api", "sync", "-hint", "none",
        "-nstreams", "1", "-nthreads", str(threads), "-infer_precision", "f32", "-t", str(ALONE_S),
        "-inference_only", "False",
    ]
    # fmt: on
    rows = open_bundle(bundle).manifest.inputs[0].shape[1:]  # the batch is open in the file
    shape = ["-shape" if is_fixed(bundle) else "-data_shape", f"[1,{','.join(map(str, rows))}]"]
    told = subprocess.run([*command, *shape], capture_output=True, text=True, check=True).stdout
    median, rate = re.search(r"Median:\s+([0-9.]+) (us|ms)", told), re.search(r"Throughput:\s+([0-9.]+) FPS", told)
    if median is None or rate is None:
        raise SystemExit(f"benchmark_app told no median or no throughput:\n{told}")
    return Alone(1000 / float(rate[1]), float(median[1]) / (1000 if median[2] == "us" else 1))


def bench(bundle: Path, threads: int) -> Alone:
    """What ``dmformer bench`` tells."""
    report = dmformer.bench(
        bundle, runtimes=["openvino"], precisions=["fp32"], threads=threads, rounds=1, duration_s=ALONE_S
    )
    taken = np.asarray(report.results[0].samples_ns[0])
    return Alone(float(taken.mean()) / 1e6, float(np.median(taken)) / 1e6)


def one_by_one(bundle: Path, threads: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """One round of ``dmformer bench``, ``benchmark_app``, and that again, in milliseconds: (3, each and median)."""
    found = np.empty((3, 2))
    for place in rng.permutation(3):
        found[place] = benchmark_app(bundle, threads) if place else bench(bundle, threads)
    return found


def told(name: str, found: NDArray[np.float64], *, judge: bool = True) -> int:
    """Print ours beside another way, (rounds, 3) in milliseconds, and what the interval says of the 2 %."""
    mine, first, again = ([(float(ms),) for ms in column] for column in found.T)
    both = [(float(ms),) for ms in found[:, 1:].mean(axis=1)]
    ratio, itself = paired_ratio(tuple(mine), tuple(both), None), paired_ratio(tuple(again), tuple(first), None)
    mine_ms, *other_ms = np.median(found, axis=0)
    said, code = judged(ratio, itself) if judge else ("not judged", 0)
    print(
        f"{name} {np.mean(other_ms):.4f} ms, dmformer bench {mine_ms:.4f} ms; ratio {ratio.ratio:.3f} ({ratio.low:.3f} "
        f"to {ratio.high:.3f}), {itself.ratio:.3f} ({itself.low:.3f} to {itself.high:.3f}) to itself: {said}",
        flush=True,
    )
    return code


def judged(ratio: Ratio, itself: Ratio) -> tuple[str, int]:
    """What the interval says of the 2 %, and the exit code for it; nothing where the other way is not like itself."""
    if itself.low > 1 + ALLOWED or itself.high < 1 - ALLOWED:
        return "not decided: the other way differs from itself", 3
    if ratio.high <= 1 + ALLOWED:
        return "no more than 2 % above", 0
    if ratio.low > 1 + ALLOWED:
        return "SLOWER", 1
    return "not decided: more rounds, or a quieter machine", 3


def main() -> None:
    """Measure, print."""
    if sys.argv[1:2] == ["--turns"]:
        way, bundle_name, runtime, threads_asked = sys.argv[2:]
        return take_turns(way, Path(bundle_name), runtime, int(threads_asked))
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    threads = int(sys.argv[3]) if len(sys.argv) > 3 else usable_cores()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "bundle"
        if len(sys.argv) < 2:
            dmformer.export(formats=["onnx", "openvino"], output=bundle)
        print(f"{cpu_model()}, {threads} threads, {rounds} rounds")
        codes = [
            told(
                f"a bare loop over {runtime}:",
                np.array([in_turns(bundle, runtime, threads, rng) for _ in range(rounds)]),
            )
            for runtime in BARE
        ]
        alone = np.array([one_by_one(bundle, threads, rng) for _ in range(rounds)])
        codes.append(told("benchmark_app, for each inference:", alone[:, :, 0]))
        told("benchmark_app, the median of the clock within the engine:", alone[:, :, 1], judge=False)
    sys.exit(1 if 1 in codes else max(codes))


if __name__ == "__main__":
    main()
