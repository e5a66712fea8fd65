"""Seconds of a ``dmformer export --format onnx --format openvino`` in a fresh process: cold, and from the cache.

Cold is without any cache, and with an empty one that is filled on the way; the ratio is of the former. Imports are
included. Without ARCH, the demonstration checkpoint.

Usage: python benchmarks/export_cold.py [ARCH]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

WARM = 5


def main() -> None:
    """Print what the command said, and how long it took."""
    arch = ["--arch", sys.argv[1]] if len(sys.argv) > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "dmformer", "export", *arch),
            *("--format", "onnx", "--format", "openvino", "--output", f"{folder}/bundle"),
        ]

        def seconds(cache: str) -> float:
            begun = time.perf_counter()
            subprocess.run(command, check=True, env={**os.environ, "DMFORMER_CACHE": cache})
            return time.perf_counter() - begun

        cold, filling = seconds(""), seconds(f"{folder}/cache")
        warm = [seconds(f"{folder}/cache") for _ in range(WARM)]
    print(f"{' '.join(arch) or 'demonstration'}: export to onnx and openvino")
    print(f"cold {cold:.1f} s; filling the cache {filling:.1f} s ({filling / cold:.2f} times that)")
    print(f"from the cache {min(warm):.2f} to {max(warm):.2f} s: {cold / statistics.median(warm):.1f} times as fast")


if __name__ == "__main__":
    main()
