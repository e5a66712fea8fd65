"""Engines leave nothing in the home folder and look up no host, and no module imports one past the switch."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dmformer
from dmformer._optional import ALLOW_TELEMETRY

if TYPE_CHECKING:
    from tests.conftest import Made

PACKAGE = Path(dmformer.__file__).parent
ENGINES = {"onnxruntime", "openvino", "onnxsim"}
STRACE = shutil.which("strace")


def ask(made: Made, runtime: str, home: Path, *before: str, **environment: str) -> None:
    """Let a process with a new home and none of the variables that continuous integration sets predict one image."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    kept = {name: value for name, value in kept.items() if not name.startswith("XDG_")}
    image = PACKAGE / "assets/digits/7.png"
    subprocess.run(
        [*before, sys.executable, "-m", "dmformer", "predict", made.bundle, image, "--runtime", runtime],
        env={**kept, "HOME": str(home), **environment},
        check=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_an_engine_leaves_nothing_in_a_new_home(made: Made, runtime: str, tmp_path: Path) -> None:
    ask(made, runtime, tmp_path / "home")
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_it_can_be_allowed(made: Made, tmp_path: Path) -> None:
    ask(made, "onnxruntime", tmp_path / "home", **{ALLOW_TELEMETRY: "1", "ORT_DISABLE_TELEMETRY": "0"})
    written = {path.name for path in (tmp_path / "home").rglob("*")}
    if "deviceid" not in written:
        pytest.skip("this release of onnxruntime writes nothing")


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_engine_connects_to_nothing(made: Made, runtime: str, tmp_path: Path) -> None:
    assert STRACE is not None
    trace = tmp_path / "trace"
    if subprocess.run([STRACE, "-o", trace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    ask(made, runtime, tmp_path / "home", STRACE, "-f", "-qq", "-e", "trace=connect,sendto,sendmmsg", "-o", str(trace))
    assert [line for line in trace.read_text().splitlines() if "AF_INET" in line or "sendmmsg" in line] == []


def test_no_module_imports_an_engine_past_the_switch() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.partition(".")[0] for name in names} & ENGINES, f"{path}:{getattr(node, 'lineno', 0)}"
