"""What a device has: the base package and one engine, in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dmformer.assets import SAMPLE_IMAGES, SCENES
from tests.conftest import ROOT, made_once

if TYPE_CHECKING:
    from dmformer.export.cached import ExportResult


@dataclass(frozen=True)
class Device:
    """An environment with the base package and onnxruntime."""

    folder: Path

    def run(self, name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        bare = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return subprocess.run(
            [str(self.folder / "bin" / name), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**bare, "XDG_STATE_HOME": str(cwd / "state"), "COLUMNS": "300"},
            timeout=300,
            check=False,
        )


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    def make(folder: Path) -> Device:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=300)
        made = Device(folder / "venv")
        installing = made.run(
            *("python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"),
            f"{ROOT}[onnxruntime]",
            cwd=folder,
        )
        assert installing.returncode == 0, installing.stderr
        return made

    return made_once(tmp_path_factory, "device", make)


@pytest.mark.slow
def test_a_device_needs_the_base_package_and_one_engine(device: Device, exported: ExportResult, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported.output, tmp_path / "bundle")
    for module in ("torch", "onnx", "onnxsim", "openvino", "safetensors"):
        assert "ModuleNotFoundError" in device.run("python", "-c", f"import {module}", cwd=tmp_path).stderr
    where = device.run("python", "-c", "import dmformer; print(dmformer.__file__)", cwd=tmp_path)
    assert str(device.folder) in where.stdout
    said = {}
    for command, *options in (
        ("predict", bundle, SAMPLE_IMAGES / "7.png", "--top-k", "1"),
        ("verify", bundle),
        ("bench", bundle, "--duration", "0.05"),
        ("inspect", bundle),
        ("doctor", bundle),
    ):
        done = device.run("dmformer", command, *options, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        said[command] = " ".join(done.stdout.split())
    assert "7.png 7 " in said["predict"]
    assert "runs here; --runtime auto takes it" in said["doctor"]
    assert "pip install 'dmformer[openvino]'" in said["doctor"]
    built = device.run("dmformer", "build", bundle, "--format", "ov", cwd=tmp_path)
    assert built.returncode == 3
    assert "pip install 'dmformer[openvino]'" in built.stderr
    exporting = device.run("dmformer", "export", cwd=tmp_path)
    assert exporting.returncode == 3
    assert "pip install 'dmformer[export]'" in exporting.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.slow
def test_a_device_labels_pixels(device: Device, segmentation_open: ExportResult, tmp_path: Path) -> None:
    bundle = shutil.copytree(segmentation_open.output, tmp_path / "bundle")
    said = {}
    for command, *options in (("predict", bundle, SCENES / "images/validation/0000.png"), ("verify", bundle)):
        done = device.run("dmformer", command, *options, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        said[command] = " ".join(done.stdout.split())
    assert "0000.png background" in said["predict"]
    assert "runtime at 64x96" in said["verify"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.overlay.png", "bundle"]
