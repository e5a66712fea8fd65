"""Run the tests that depend on PyTorch under another version of it, in an environment of its own.

    python benchmarks/other_torch.py 2.14.1

Everything but torch and what it needs is taken from the environment that runs this script. PyPI's Linux wheels of torch
bring CUDA libraries along, several gigabytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Models, their deploy form, checkpoints, networks of one's own, the trace, what is compared with PyTorch, and training.
TESTS = (
    *("models", "segmentation", "deploy", "checkpoint", "foreign_checkpoints", "own", "program", "backbones"),
    *("emulate", "export", "task_export", "parity", "precision_parity", "train", "train_recipe", "weights_key"),
)


def make_environment(folder: Path, version: str) -> Path:
    """Make an environment with this version of torch; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={version}"], check=True)
    # Read after the environment's own packages: these are found there first.
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    (Path(own) / "other.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return python


def main() -> int:
    """Run the tests; returns their exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of torch, as on PyPI")
    parser.add_argument("tests", nargs="*", default=TESTS, help="names of test files, without test_ and .py")
    parser.add_argument("--environment", type=Path, help="use the environment in this folder, or make it there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.environment or Path(scratch) / "environment"
        python = folder / "bin/python" if folder.exists() else make_environment(folder, asked.version)
        found = subprocess.run(
            [python, "-c", "import torch; print(torch.__version__)"], stdout=-1, text=True, check=True
        )
        print(f"torch {found.stdout.strip()}", flush=True)
        files = [str(ROOT / f"tests/test_{name}.py") for name in asked.tests]
        ran = subprocess.run([python, "-m", "pytest", "-q", "-n", "2", "-m", "not slow", *files], cwd=ROOT, check=False)
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
