"""Seconds and memory of whole exports, each in a fresh process without a cache, imports included.

    demonstration   the demonstration checkpoint
    s               DMFormer-S at 224 pixels
    s-int8          the same at fp32 and int8, with 16 crops of photographs to calibrate on
    fpn             DMFormer-S with a decoder of 150 classes at 512 pixels

each to ONNX and OpenVINO. Memory is that of the largest process. With ``--against``, a checkout of another version
exports in turns with this one, and the ratio is that of the two; absolute figures change with the machine's speed,
which is printed too. ``--warm`` fills a cache, and exports from it.

Usage: python benchmarks/export_cold.py [--against FOLDER] [--warm] [EXPORT...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from dmformer.bench.limits import LimitsOrder, measure_limits
from dmformer.machine import usable_cores

HERE = Path(__file__).parents[1]
EXPORTS = {
    "demonstration": [],
    "s": ["--arch", "dmformer_s"],
    "s-int8": ["--arch", "dmformer_s", "--precision", "fp32", "--precision", "int8", "--max-accuracy-drop", "100"],
    "fpn": ["--arch", "dmformer_s_fpn", "--image-size", "512"],
}
CROPS = 16
SIDE = 224
WARM = 5


class Cost(NamedTuple):
    """Of one export."""

    seconds: float
    gigabytes: float


def main() -> None:
    """Export, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("exports", nargs="*", default=list(EXPORTS), metavar="EXPORT", help=", ".join(EXPORTS))
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--warm", action="store_true", help="from the cache, too")
    options = parser.parse_args()
    if unknown := set(options.exports) - set(EXPORTS):
        parser.error(f"unknown exports {', '.join(sorted(unknown))}; expected some of {', '.join(EXPORTS)}")
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder) / "photographs"
        _write_crops(photographs)
        for name in options.exports:
            arguments = [*EXPORTS[name], "--format", "onnx", "--format", "openvino", "--output", f"{folder}/bundle"]
            if "int8" in arguments:
                arguments += ["--calibration", str(photographs)]
            speed = _gflops()
            ours = _export(HERE, arguments)
            line = f"{name}: {ours.seconds:.1f} s, {ours.gigabytes:.2f} GB"
            if options.against is not None:
                theirs = _export(options.against.absolute(), arguments)
                line += f"; before {theirs.seconds:.1f} s, {theirs.gigabytes:.2f} GB"
                line += f": {ours.seconds / theirs.seconds:.2f} times as long"
            print(f"{line}; sgemm {speed:.0f} to {_gflops():.0f} GFLOP/s", flush=True)
            if options.warm:
                filling = _export(HERE, arguments, f"{folder}/cache")
                warm = [_export(HERE, arguments, f"{folder}/cache").seconds for _ in range(WARM)]
                median = statistics.median(warm)
                print(f"  filling a cache {filling.seconds:.1f} s, from it {min(warm):.2f} to {max(warm):.2f} s")
                print(f"  {ours.seconds / median:.1f} times as fast as without", flush=True)


def _export(root: Path, arguments: list[str], cache: str = "") -> Cost:
    environment = {**os.environ, "DMFORMER_CACHE": cache, "PYTHONPATH": str(root)}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "dmformer", "export", *arguments]
    # In its folder: that of the process comes before PYTHONPATH.
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(said.decode())
    return Cost(time.perf_counter() - begun, usage.ru_maxrss / 1e6)  # KiB, on Linux


def _write_crops(folder: Path) -> None:
    """Crops of the two photographs that come with scikit-learn, side by side in rows."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    places = [(photograph, number) for number in range(CROPS // 2) for photograph in load_sample_images().images]
    for index, (photograph, number) in enumerate(places):
        height, width = (side - SIDE for side in photograph.shape[:2])
        top, left = (number % 2) * height, (number // 2) * width // 3
        Image.fromarray(photograph[top : top + SIDE, left : left + SIDE]).save(folder / f"{index:02}.png")


def _gflops() -> float:
    """What this machine attains just now in a large product of matrices."""
    return measure_limits(LimitsOrder(threads=usable_cores())).gflops


if __name__ == "__main__":
    main()
