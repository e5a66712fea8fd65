"""Run this package with the oldest releases that pyproject.toml admits: ``python benchmarks/oldest.py BUNDLE``.

Makes an environment with exactly the minimum of each requirement of the extras, and in it checks, verifies, predicts,
times, signs, packs and serves a bundle that was exported with today's, and exports one of its own at every precision;
then the tests of these run there. A minimum that fails is to be raised. With ``--keep DIR`` the environment stays, and
is taken again. ``tensorrt`` is left out, which needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("export", "litert", "ncnn", "onnxruntime", "openvino", "report", "signing", "train")
TESTS = ("fuzz", "export", "checkpoint", "int8", "fp16", "task_export", "parity", "own", "program", "train")
OURS = ("pytest>=8.3", "hypothesis>=6.100", "pytest-xdist>=3.6", "jsonschema>=4.20")


def minimums() -> list[str]:
    """Return the oldest release that each requirement admits, as pip takes it."""
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    lines = re.findall(r'"([^"]+)"', listed[1])
    for extra in EXTRAS:
        found = re.search(rf"^{extra} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        assert found is not None
        lines += re.findall(r'"([^"]+)"', found[1])
    pinned = []
    for line in map(Requirement, lines):
        if line.marker is not None and not line.marker.evaluate():
            continue
        least = next(one.version for one in line.specifier if one.operator == ">=")
        # The first release of a series may be 4.0 or 4.0.0.
        pinned.append(f"{line.name}=={least}")
    return pinned


def run(*command: object, environment: dict[str, str]) -> bool:
    """Run a command and say how it ended."""
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    said = (done.stderr or done.stdout).strip().splitlines()[-1:]
    print(f"{'ok    ' if done.returncode == 0 else 'FAILED'} {' '.join(map(str, command[1:]))[:90]}", *said)
    return done.returncode == 0


def main() -> None:
    """Install, and run everything; end with 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dmformer-oldest-") as scratch:
        home, work = asked.keep or Path(scratch) / "venv", Path(scratch)
        python = home / "bin/python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *minimums(), *OURS], check=True)
        print(*minimums())
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DMFORMER_CACHE": "", "HOME": str(work)}
        bundle, dmformer = asked.bundle.resolve(), (python, "-m", "dmformer")
        held = [
            run(*dmformer, "check", bundle, environment=environment),
            run(*dmformer, "inspect", bundle, environment=environment),
            run(*dmformer, "verify", bundle, "--runtime", "ort", "--runtime", "ov", environment=environment),
            run(*dmformer, "predict", bundle, ROOT / "dmformer/assets/digits/7.png", environment=environment),
            run(*dmformer, "bench", bundle, "--duration", "0.2", "--html", work / "b.html", environment=environment),
            run(*dmformer, "pack", bundle, "--output", work / "b.dmf", environment=environment),
            run(*dmformer, "unpack", work / "b.dmf", environment=environment),
            run(*dmformer, "sign", "--generate-key", work / "k.pem", environment=environment),
            run(*dmformer, "sign", work / "b", "--key", work / "k.pem", environment=environment),
            run(*dmformer, "serve-layout", "triton", work / "b", "--output", work / "s", environment=environment),
            run(
                *dmformer, "export", "--format", "onnx", "--format", "openvino", "--precision", "fp32",
                "--precision", "fp16", "--precision", "int8", "--output", work / "own", environment=environment,
            ),
            run(
                # Older releases deprecate what newer ones of others still call: that is no error of ours.
                python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-n", "2", "-m", "not slow",
                "--rootdir", ROOT, *(ROOT / f"tests/test_{name}.py" for name in TESTS), environment=environment,
            ),
        ]  # fmt: skip
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
