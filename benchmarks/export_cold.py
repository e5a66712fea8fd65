"""Seconds of a cold ``dmformer export --format onnx --format openvino``, in a fresh process, imports included.

Usage: python benchmarks/export_cold.py [ARCH]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time


def main() -> None:
    """Print what the command said, and how long it took."""
    arch = sys.argv[1] if len(sys.argv) > 1 else "dmformer_s"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "dmformer", "export", "--arch", arch),
            *("--format", "onnx", "--format", "openvino", "--output", f"{folder}/bundle"),
        ]
        begun = time.perf_counter()
        subprocess.run(command, check=True)
        print(f"{arch}: cold export to onnx and openvino: {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
