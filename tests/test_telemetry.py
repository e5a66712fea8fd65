"""Engines leave nothing in the home folder and look up no host, and no module imports one past the switch."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dmformer
from dmformer._optional import ALLOW_TELEMETRY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import Made

PACKAGE = Path(dmformer.__file__).parent
ENGINES = {"onnxruntime", "openvino", "onnxsim"}
STRACE = shutil.which("strace")


def ask(made: Made, home: Path, *before: str, command: Sequence[str] = (), runtime: str = "", **given: str) -> None:
    """Let a process with a new home and none of the variables that continuous integration sets carry out a command."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    kept = {name: value for name, value in kept.items() if not name.startswith("XDG_")}
    if not command:
        command = ("predict", str(made.bundle), str(PACKAGE / "assets/digits/7.png"), "--runtime", runtime)
    subprocess.run(
        [*before, sys.executable, "-m", "dmformer", *command],
        env={**kept, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", **given},
        check=True,
        capture_output=True,
        timeout=300,
        cwd=home.parent,
    )


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", pytest.param("torch", marks=pytest.mark.slow)])
def test_an_engine_leaves_nothing_in_a_new_home(made: Made, runtime: str, tmp_path: Path) -> None:
    ask(made, tmp_path / "home", runtime=runtime)
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_it_can_be_allowed(made: Made, tmp_path: Path) -> None:
    allowed = {ALLOW_TELEMETRY: "1", "ORT_DISABLE_TELEMETRY": "0"}
    ask(made, tmp_path / "home", runtime="onnxruntime", **allowed)
    written = {path.name for path in (tmp_path / "home").rglob("*")}
    if "deviceid" not in written:
        pytest.skip("this release of onnxruntime writes nothing")


# What a command may write to beside its own output: systems' files, shared memory and temporary folders.
ANYWHERE = ("/dev/", "/proc/", "/sys/", tempfile.gettempdir())
OPENED = re.compile(r'\b(openat|open|creat|mkdir|mkdirat)\((?:AT_FDCWD, )?"([^"]*)"(.*)')


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize("what", ["onnxruntime", "openvino", "torch", "verify", "bench", "doctor", "export"])
@pytest.mark.slow
def test_a_command_and_its_children_call_nobody_and_write_nowhere_else(made: Made, what: str, tmp_path: Path) -> None:
    assert STRACE is not None
    trace, home = tmp_path / "trace", tmp_path / "home"
    if subprocess.run([STRACE, "-o", trace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    commands = {
        "verify": ("verify", str(made.bundle)),
        "bench": ("bench", str(made.bundle), "--rounds", "1", "--duration", "0.05"),
        "doctor": ("doctor", str(made.bundle)),
        "export": ("export", "--no-cache", "--format", "onnx", "--format", "ov", "--output", "bundle"),
    }
    calls = "trace=socket,connect,sendto,sendmmsg,open,openat,creat,mkdir,mkdirat"
    before = (STRACE, "-f", "-qq", "--seccomp-bpf", "-s", "400", "-e", calls, "-o", str(trace))
    ask(made, home, *before, command=commands.get(what, ()), runtime=what)
    lines = trace.read_text(errors="replace").splitlines()
    assert [line for line in lines if "AF_INET" in line or "sendmmsg" in line] == []
    written = {
        path
        for call, path, rest in (opened.groups() for opened in map(OPENED.search, lines) if opened)
        if (not call.startswith("open") or re.search("O_WRONLY|O_RDWR|O_CREAT", rest)) and " = -1 " not in rest
    }
    assert {path for path in written if path.startswith("/") and not path.startswith(ANYWHERE)} == set()
    at_home = {os.path.relpath(path, home) for path in written if path.startswith(f"{home}/")}
    assert {path for path in at_home if "dmformer" not in path} <= {".local", ".local/state", ".cache"}


def test_no_module_imports_an_engine_past_the_switch() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.partition(".")[0] for name in names} & ENGINES, f"{path}:{getattr(node, 'lineno', 0)}"
