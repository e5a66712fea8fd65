"""Is the best artifact worth it: every runtime side by side in one run, against the usual route and the machine's best.

The usual route is ``torch.onnx.export`` of the training form, onnxsim, and onnxruntime in float32, each with its
defaults. The limit is what a large float32 matrix product attains with the same threads. All configurations stay
loaded, each in a process of its own, and take turns; a ratio is the median over the rounds, so that a slow minute of
the machine meets them all. Needs onnxscript beside the ``dev`` extra, for the usual route. Formats whose converter is
not here are left out: LiteRT's is where DMFORMER_LITERT_PYTHON says.

Usage: python benchmarks/precisions.py [ARCH] [ROUNDS] [IMAGE_SIZE]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnxsim
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import dmformer
from dmformer.bundle.reader import open_bundle
from dmformer.errors import UnavailableError
from dmformer.export.formats import check_convertible, is_compiled
from dmformer.export.networks import random_checkpoint
from dmformer.export.options import EngineOptions
from dmformer.machine import cpu_model, usable_cores
from dmformer.models.deploy import deploy
from dmformer.runtimes import registry

USUAL = "usual route: onnxruntime fp32"
SGEMM = 2048
CALIBRATION_IMAGES = 32
TURN_S = 0.4

TAKES_TURNS = """
import sys, time
import numpy as np
kind, path, precision, size, threads = sys.argv[1:]
size, threads = int(size), int(threads)
images = [np.random.default_rng(seed).standard_normal((1, 3, size, size), np.float32) for seed in range(4)]
if kind == "sgemm":
    import torch
    torch.set_num_threads(threads)
    matrix = torch.randn(size, size)
    call = lambda image: matrix @ matrix
elif kind == "usual":
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    call = lambda image: session.run(None, {name: image})
else:
    from pathlib import Path
    from dmformer.runtimes import registry
    runtime = registry.available_adapter(registry.entry(kind))(Path(path), threads=threads, precision=precision)
    runtime.__enter__()
    call = lambda image: runtime.run({"image": image})
begun = time.perf_counter()
while time.perf_counter() - begun < 1.5:
    call(images[0])
print("ready", flush=True)
for line in sys.stdin:
    call(images[0])
    taken, begun = [], time.perf_counter()
    while time.perf_counter() - begun < float(line):
        before = time.perf_counter()
        call(images[len(taken) % 4])
        taken.append(time.perf_counter() - before)
    print(float(np.median(taken)), flush=True)
"""


def main() -> None:
    """Export, time, print."""
    arch = sys.argv[1] if len(sys.argv) > 1 else "dmformer_s"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    size = int(sys.argv[3]) if len(sys.argv) > 3 else 224
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        configurations = {USUAL: ("usual", usual_route(arch, size, made), "fp32", size)}
        for form, precisions, formats in (
            ("training form", ["fp32"], ["onnx", "openvino"]),
            ("deploy form", ["fp32", "fp16", "int8"], formats_here()),
        ):
            output = made / form.replace(" ", "-")
            dmformer.export(
                use_cache=False,
                arch=arch,
                image_size=size,
                formats=formats,
                precisions=precisions,
                deploy_form=form == "deploy form",
                calibration=photographs(made / "photographs", size) if "int8" in precisions else None,
                max_accuracy_drop=100,  # random weights: nothing to lose
                output=output,
            )
            bundle = open_bundle(output)
            for artifact in bundle.manifest.artifacts:
                runtime = registry.entry_of_format(artifact.format).name
                path = bundle.load_path(artifact)
                configurations[f"{runtime} {artifact.precision}, {form}"] = (runtime, path, artifact.precision, size)
        configurations[f"sgemm {SGEMM}"] = ("sgemm", made, "fp32", SGEMM)
        seconds = take_turns(configurations, rounds)
    show(arch, size, seconds)


def formats_here() -> list[str]:
    """Every format that can be made, and run, on this machine's processor."""
    found = []
    for row in registry.ENTRIES:
        try:
            check_convertible(row, EngineOptions())
        except UnavailableError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if not is_compiled(row):
            found.append(row.format)
    return found


def usual_route(arch: str, size: int, folder: Path) -> Path:
    """What most would do today, with every default."""
    model = random_checkpoint(arch, {}, size, seed=0).model()
    path = folder / "usual.onnx"
    torch.onnx.export(model, (torch.zeros(1, 3, size, size),), str(path), external_data=False, verbose=False)
    simplified, _ = onnxsim.simplify(onnx.load(path), check_n=0)
    onnx.save(simplified, path)
    return path


def photographs(folder: Path, size: int) -> Path:
    """Crops of the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(CALIBRATION_IMAGES):
        photograph = load_sample_images().images[index % 2]
        top, left = (int(random.integers(side - size)) for side in photograph.shape[:2])
        Image.fromarray(photograph[top : top + size, left : left + size]).save(folder / f"{index:02}.png")
    return folder


def take_turns(configurations: dict[str, tuple[str, Path, str, int]], rounds: int) -> dict[str, np.ndarray]:
    """Median seconds of each configuration in each round."""
    processes = {}
    for name, (kind, path, precision, size) in configurations.items():
        command = [sys.executable, "-c", TAKES_TURNS, kind, str(path), precision, str(size), str(usable_cores())]
        processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        _line(processes[name].stdout)
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for number in range(rounds):
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr)
        for name, process in processes.items():
            assert process.stdin is not None
            process.stdin.write(f"{TURN_S}\n")
            process.stdin.flush()
            seconds[name].append(float(_line(process.stdout)))
    print(file=sys.stderr)
    for process in processes.values():
        process.kill()
    return {name: np.asarray(taken) for name, taken in seconds.items()}


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    line = stream.readline()
    if not line:
        raise SystemExit("a configuration ended; its message is above")
    return line


def show(arch: str, size: int, seconds: dict[str, np.ndarray]) -> None:
    """A line for each configuration: latency, ratio to the usual route, share of the matrix product's speed."""
    model = deploy(random_checkpoint(arch, {}, size, seed=0).model(), size)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    flops = counter.get_total_flops()
    sgemm = 2 * SGEMM**3 / seconds.pop(f"sgemm {SGEMM}")
    print(f"{arch}, {size} pixels, batch 1, {usable_cores()} threads, {cpu_model()}")
    print(f"deploy form: {flops / 1e9:.2f} GFLOP an image; sgemm of {SGEMM}: {np.median(sgemm) / 1e9:.0f} GFLOP/s")
    print(f"{'':38}{'p50 ms':>8}  {'times as fast as usual (10-90 %)':>34}  {'of sgemm':>8}")
    for name, taken in seconds.items():
        faster = seconds[USUAL] / taken
        low, high = np.quantile(faster, [0.1, 0.9])
        ratio = f"{np.median(faster):.2f} ({low:.2f} to {high:.2f})"
        share = np.median(flops / taken / sgemm)
        print(f"{name:38}{1e3 * np.median(taken):8.1f}  {ratio:>34}  {share:8.0%}")


if __name__ == "__main__":
    main()
