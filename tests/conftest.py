"""Fixtures shared by the tests: one bundle of the demonstration checkpoint, and the command line as users have it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.pipeline import ExportResult

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: workers whose OpenMP threads outnumber the cores wait for one another at every operator.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """What a command did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The one line that says what is wrong; fails where there is a traceback or not just one line."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Run]:
    """Run ``dmformer`` in a process and a working folder of its own, with a home of its own."""

    def run(*arguments: object, cwd: Path = tmp_path, **environment: str) -> Run:
        inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # xdist sets it
        done = subprocess.run(
            [sys.executable, "-m", "dmformer", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**inherited, "XDG_STATE_HOME": str(tmp_path / "state"), **environment},
            timeout=300,
            check=False,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The demonstration checkpoint exported to every format; shared, so tests must not write into it."""
    import dmformer

    return dmformer.export(formats=["all"], output=tmp_path_factory.mktemp("bundle") / "demo")


@pytest.fixture
def bundle(exported: ExportResult, tmp_path: Path) -> Path:
    """A copy of the demonstration bundle that a test may spoil."""
    return Path(shutil.copytree(exported.output, tmp_path / "bundle"))
