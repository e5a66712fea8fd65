"""Every command and every line of Python in the README runs, in the order in which a newcomer would type them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec
import pytest
import torch

from dmformer.assets import DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Run

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands_of(block: str) -> list[list[str]]:
    lines = [line.partition("#")[0].split() for line in block.splitlines()]
    return [line for line in lines if line]


def commands() -> list[list[str]]:
    return [line for block in blocks("sh") for line in commands_of(block)]


@pytest.fixture
def clone(tmp_path: Path, few_images: Path) -> Path:
    """A folder as the README supposes it: the repository's files, a checkpoint and a folder of photos."""
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "dmformer").symlink_to(ROOT / "dmformer")
    (folder / "model.safetensors").symlink_to(DEMONSTRATION_CHECKPOINT)
    (folder / "photos").symlink_to(SAMPLE_IMAGES)
    (folder / "labelled").symlink_to(few_images)
    return folder


# The command line as it is installed, but that each row is timed once and for a moment.
BRIEFLY = """
import sys
import dmformer
sys.modules["dmformer.bench"].DEFAULT_DURATION_S = 0.1  # before anything takes it as a default
from dmformer.bench import api
from dmformer.export import steps
api.ROUNDS, steps.TIMED_S = 1, 0.1
from dmformer.cli import main
main()
"""


def kept(clone: Path) -> dict[str, str]:
    """Where commands keep things between one and the next."""
    return {"XDG_STATE_HOME": str(clone.parent / "state"), "DMFORMER_CACHE": str(clone.parent / "cache")}


def typed_in(clone: Path, line: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BRIEFLY, *line[1:]]
    environment = {**os.environ, **kept(clone)}
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=300, check=False)


DMFORMER = [block for block in blocks("sh") if any(line[0] == "dmformer" for line in commands_of(block))]


@pytest.mark.slow
@pytest.mark.parametrize("block", DMFORMER, ids=lambda block: " ".join(commands_of(block)[0][1:4]))
def test_the_commands_run(block: str, clone: Path, inline: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the block; each block begins with an export, and needs none of the others.

    The first in a process, as it is typed; the others in this one, but for bench, whose duration is a default.
    """
    monkeypatch.setattr(import_module("dmformer.bench.api"), "ROUNDS", 1)
    monkeypatch.setattr(import_module("dmformer.export.steps"), "TIMED_S", 0.1)
    for line in commands_of(block):
        if line[1] == "bench" or line == commands_of(DMFORMER[0])[0]:
            done = typed_in(clone, line)
            assert done.returncode == 0, (line, done.stderr)
        else:
            run = inline(*line[1:], cwd=clone, **kept(clone))
            assert run.code == 0, (line, run.err)
    for report in clone.glob("parity.json"):
        assert msgspec.json.decode(report.read_bytes())["passed"]


def test_the_commands_are_all_there() -> None:
    typed = [line[1] for line in commands() if line[0] == "dmformer"]
    shown = {"export", "build", "verify", "bench", "predict", "inspect", "report", "doctor", "eval"}
    assert set(typed) == shown | {"pack", "check", "serve-layout", "cache", "tune"}
    assert [commands_of(block)[0][1] for block in DMFORMER] == ["export"] * 5
    assert sum("parity.json" in block for block in DMFORMER) == 1


def test_the_python_runs(clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(clone)
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
        assert "name='7'" in capsys.readouterr().out


def test_every_other_command_is_a_target_of_make(tmp_path: Path) -> None:
    others = [line for line in commands() if line[0] != "dmformer"]
    assert others == [["make", "demo"], ["make", "test"]]
    for line in others:
        plan = subprocess.run([*line, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert ("predict" if line[1] == "demo" else "pytest") in plan


def test_the_extras_are_those_of_the_package() -> None:
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = re.findall(r"^(\w+) = \[", table.partition("\n[")[0], flags=re.MULTILINE)
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE) for name in re.findall("`(.*?)`", row)
    }
    assert len(extras) >= 7
    assert set(extras) <= named


def test_the_figures_of_the_networks_are_true() -> None:
    from dmformer.export.networks import count_macs
    from dmformer.models.dmformer import create_model, list_models

    for name in list_models("classification"):
        parameters, gmacs = re.findall(rf"\| `{name}` \|.*?\| ([\d.]+) M \| ([\d.]+) \|", README)[0]
        with torch.device("meta"):
            model = create_model(name).eval()
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == parameters
        assert f"{count_macs(model, 224) / 1e9:.3g}" == f"{float(gmacs):.3g}"


def test_the_pinned_torch_is_the_stated_one() -> None:
    pinned = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert pinned == ["2.13.0"]
    assert "PyTorch at 2.13.0" in README
