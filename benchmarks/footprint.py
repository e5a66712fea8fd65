"""What a device has to hold: the installed size of the base package with onnxruntime, and the peak memory of predict.

Both in an environment that is made for it with pip, from this clone and constraints.txt. The peak is that of the whole
process (``ru_maxrss``), beside the weights + 150 MB that it is to stay below.

Usage: python benchmarks/footprint.py [ARCH]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "dmformer/assets/digits/7.png"
ALLOWANCE_MB = 150


def installed_mb(folder: Path) -> dict[str, float]:
    """MB (10^6 bytes) of each top-level entry of an environment's site-packages."""
    (packages,) = folder.glob("lib/python*/site-packages")
    return {
        entry.name: sum(path.stat().st_size for path in (entry, *entry.rglob("*")) if path.is_file()) / 1e6
        for entry in packages.iterdir()
    }


def peak_mb(command: list[str]) -> float:
    """Largest resident size of a process in MB (10^6 bytes)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: exit code {process.returncode}")
    return used.ru_maxrss * 1024 / 1e6  # Linux counts in KiB


def main() -> None:
    """Print both."""
    arch = sys.argv[1] if len(sys.argv) > 1 else "dmformer_s"
    with tempfile.TemporaryDirectory() as scratch:
        device, bundle = Path(scratch) / "venv", Path(scratch) / "bundle"
        subprocess.run([sys.executable, "-m", "venv", device], check=True)
        pip = [device / "bin/python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, f"{ROOT}[onnxruntime]"], check=True)
        subprocess.run([device / "bin/python", "-m", "pip", "uninstall", "--quiet", "-y", "setuptools"], check=True)
        sizes = {name: size for name, size in installed_mb(device).items() if not name.startswith("pip")}
        print(f"site-packages without pip: {sum(sizes.values()):.0f} MB")
        for name, size in sorted(sizes.items(), key=lambda pair: -pair[1])[:8]:
            print(f"  {size:6.1f} MB  {name}")
        subprocess.run([sys.executable, "-m", "dmformer", "export", "--arch", arch, "--output", bundle], check=True)
        weights = (bundle / "onnx/fp32/model.onnx").stat().st_size / 1e6
        peak = peak_mb([str(device / "bin/dmformer"), "predict", str(bundle), str(IMAGE)])
        print(f"predict {arch} in onnxruntime: peak {peak:.0f} MB; weights {weights:.0f} MB + {ALLOWANCE_MB} MB are "
              f"{weights + ALLOWANCE_MB:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
