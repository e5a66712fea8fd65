"""A look at an engine's files instead of its import: what is half installed must not pass for whole."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from dmformer.runtimes import cuda, registry, target
from dmformer.runtimes.support import intact_version
from dmformer.runtimes.tensorrt import TensorRtRuntime
from tests.conftest import ROOT
from tests.test_rooms import python

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Made, Run

PACKAGE = ("hollow", "hollow/_native", "hollow/libs/*plugin*")
LIBRARIES = (f"hollow/_native{EXTENSION_SUFFIXES[0]}", "hollow/libs/libplugin.so.2")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages with one package, as pip leaves it."""
    record = ["hollow/__init__.py,,"]
    (tmp_path / "hollow/libs").mkdir(parents=True)
    (tmp_path / "hollow/__init__.py").touch()
    for name in LIBRARIES:
        shutil.copy(sys.executable, tmp_path / name)
        record.append(f"{name},sha256=x,{(tmp_path / name).stat().st_size}")
    (tmp_path / "hollow-2.5.dist-info").mkdir()
    (tmp_path / "hollow-2.5.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: hollow\nVersion: 2.5\n")
    (tmp_path / "hollow-2.5.dist-info/RECORD").write_text("\n".join(record))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def change(path: Path, offset: int) -> None:
    """Another value of one byte."""
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 0xFF]))


def record_without(site: Path, name: str) -> None:
    path = site / "hollow-2.5.dist-info/RECORD"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith(name)))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no extension module": lambda site: (site / LIBRARIES[0]).unlink(),
    "no library": lambda site: (site / LIBRARIES[1]).unlink(),
    "a library that is cut": lambda site: (site / LIBRARIES[1]).write_bytes(b"\x7fELF" * 8),
    "an empty library": lambda site: (site / LIBRARIES[1]).write_bytes(b""),
    "a library for another processor": lambda site: change(site / LIBRARIES[1], 18),
    "a library of another word size": lambda site: change(site / LIBRARIES[0], 4),
    "a library of another system": lambda site: change(site / LIBRARIES[0], 0),
    "an extension module for another Python": lambda site: (
        (site / LIBRARIES[0]).rename(site / "hollow/_native.cpython-27m.so"),
        (site / "hollow-2.5.dist-info/RECORD").write_text(
            (site / "hollow-2.5.dist-info/RECORD").read_text().replace(EXTENSION_SUFFIXES[0], ".cpython-27m.so")
        ),
    ),
    "a package without the plugin": lambda site: record_without(site, LIBRARIES[1]),
    "a package without metadata": lambda site: shutil.rmtree(site / "hollow-2.5.dist-info"),
    "metadata without a package": lambda site: shutil.rmtree(site / "hollow"),
    "a package without its first file": lambda site: (site / "hollow/__init__.py").unlink(),
    "a package that pip did not install": lambda site: (site / "hollow-2.5.dist-info/RECORD").unlink(),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="some damages are to ELF files")
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_half_installed_is_not_whole(site: Path, damage: str) -> None:
    assert intact_version(*PACKAGE) == "2.5"
    DAMAGES[damage](site)
    importlib.invalidate_caches()
    assert intact_version(*PACKAGE) is None


def test_another_package_of_the_name_is_not_the_one_that_was_installed(
    site: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(site / "hollow", other / "hollow")
    monkeypatch.syspath_prepend(other)
    assert intact_version(*PACKAGE) is None


@pytest.mark.usefixtures("site")
def test_what_is_imported_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hollow", ModuleType("hollow"))
    assert intact_version(*PACKAGE) is None


@pytest.mark.parametrize("row", [row for row in registry.ENTRIES if row.name != "tensorrt"], ids=lambda row: row.name)
def test_a_look_agrees_with_the_import(row: registry.RuntimeEntry) -> None:
    code = """
import sys
from dmformer.runtimes import registry
support = registry.support(registry.entry(sys.argv[1]))
looked = support.quick_probe()
assert support.package[0] not in sys.modules, "imported"
assert looked.untried
probed = support.probe()
assert (looked.available, looked.version) == (probed.available, probed.version), (looked, probed)
"""
    if not registry.support(row).probe().available:
        pytest.skip(f"{row.name} is not installed")
    python(code, row.name)


def test_openvino_knows_of_float16_before_it_is_loaded() -> None:
    pytest.importorskip("openvino")
    code = """
import sys
from dmformer.runtimes.openvino import OpenVinoRuntime
before = OpenVinoRuntime.support.cannot_compute("fp16")
from dmformer.machine import instructions, max_isa
assert "openvino" not in sys.modules or "avx_vnni" in instructions() or not instructions() or max_isa()
import openvino
assert OpenVinoRuntime.support.cannot_compute("fp16") == before
"""
    python(code)


@pytest.mark.parametrize(
    ("sets", "expected"), [({"avx512_fp16", "avx_vnni"}, True), ({"asimdhp"}, True), ({"avx2"}, False)]
)
def test_float16_by_instruction_sets(sets: set[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmformer.runtimes import openvino

    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr(openvino, "instructions", lambda: frozenset(sets))
    monkeypatch.setattr(openvino, "max_isa", lambda: None)
    monkeypatch.setattr(openvino, "_import", lambda: pytest.fail("it was imported"))
    assert (openvino.OpenVinoRuntime.support.cannot_compute("fp16") is None) is expected


def test_without_a_driver_no_engine_for_gpus_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmformer.runtimes.tensorrt.installed_flavour_version", lambda: "10.9")
    monkeypatch.setattr("dmformer.runtimes.tensorrt.driver_missing", lambda: "no driver")
    monkeypatch.setattr(TensorRtRuntime.support, "probe", lambda: pytest.fail("it was imported"))
    found = TensorRtRuntime.support.quick_probe()
    assert (found.available, found.version, found.reason) == (False, "10.9", "no driver")


@pytest.mark.parametrize(("version", "missing"), [("10.9", None), (None, "no driver")])
def test_with_a_driver_or_nothing_installed_the_engine_is_asked(
    version: str | None, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmformer.runtimes.tensorrt.installed_flavour_version", lambda: version)
    monkeypatch.setattr("dmformer.runtimes.tensorrt.driver_missing", lambda: missing)
    asked = object()
    monkeypatch.setattr(TensorRtRuntime.support, "probe", lambda: asked)
    assert TensorRtRuntime.support.quick_probe() is asked


def test_a_driver_is_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert cuda.driver_missing() is None

    def none(name: str) -> None:
        raise OSError(f"{name}: not there")

    monkeypatch.setattr("ctypes.CDLL", none)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cuda.driver_missing() == "no NVIDIA GPU with a driver here (libcuda.so.1: not there)"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cuda.driver_missing() is None


def test_the_installed_flavour_is_known_by_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "find_spec", lambda name: name == "tensorrt_rtx" or None)
    monkeypatch.setattr(target.metadata, "version", {"tensorrt_rtx": "1.7"}.__getitem__)
    assert target.installed_flavour_version() == "1.7"
    monkeypatch.setattr(target, "find_spec", lambda _: None)
    assert target.installed_flavour_version() is None


def test_doctor_says_what_it_has_not_tried(inline: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dmformer.runtimes.support.intact_version", lambda package, *_: "9.9" if package == "torch" else None
    )
    run = inline("doctor", "--json")
    found = {runtime["name"]: runtime for runtime in json.loads(run.out)["runtimes"]}
    assert (found["torch"]["version"], found["torch"]["available"]) == ("9.9", True)
    assert found["torch"]["untried"] == "its libraries are whole; it was not loaded"
    assert found["onnxruntime"]["untried"] is None
    assert "Not loaded: torch; " in inline("doctor").out


def test_doctor_and_an_engine_without_its_libraries(cli: Callable[..., Run], made: Made, tmp_path: Path) -> None:
    installed = metadata.distribution("onnxruntime")
    for file in installed.files or ():
        if (file.suffix == ".py" and file.parts[:2] == ("onnxruntime", "capi")) or "dist-info" in str(file.parent):
            copy = tmp_path / "path" / str(file)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(installed.locate_file(file)), copy)
    shutil.copy(str(installed.locate_file("onnxruntime/__init__.py")), tmp_path / "path/onnxruntime")
    path = f"{tmp_path / 'path'}{os.pathsep}{ROOT}"
    document = json.loads(cli("doctor", made.bundle, "--json", PYTHONPATH=path).out)
    found = {runtime["name"]: runtime for runtime in document["runtimes"]}["onnxruntime"]
    assert (found["available"], found["untried"]) == (False, None)
    assert "onnxruntime" in found["reason"]
    assert {artifact["format"]: artifact["runs"] for artifact in document["artifacts"]}["onnx"] is False
