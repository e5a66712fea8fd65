"""``dmformer build``: a format made from a bundle's ONNX files, verified, and put into the bundle as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dmformer.bundle.reader import open_bundle
from dmformer.errors import CheckFailed, DMFormerError, UnavailableError, UsageError
from dmformer.export.build import build, cannot_build
from dmformer.export.formats import Converted, tensorrt
from dmformer.export.options import EngineOptions
from dmformer.files import hash_file
from dmformer.runtimes import registry
from tests import gpu_double
from tests.bundles import one_line
from tests.test_rooms import python

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from dmformer.export.formats import ConversionSource
    from tests.conftest import Run


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hash_file(path)[0] for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> gpu_double.Device:
    """A GPU of the double, and a builder that makes its plans and keeps a timing cache."""

    def convert(source: ConversionSource, folder: Path) -> Converted:
        cache = folder / tensorrt.TIMING_CACHE
        cache.write_bytes(cache.read_bytes() + b"+" if cache.exists() else b"timings")
        path, target = gpu_double.plan_of(source.onnx, folder)
        return Converted((path, cache), {"tensorrt": target.version}, target)

    device = gpu_double.install(monkeypatch)
    monkeypatch.setattr(tensorrt, "to_tensorrt", convert)
    return device


def test_a_damaged_bundle_is_not_built_upon(bundle: Path) -> None:
    with (bundle / "onnx/fp32/model.onnx").open("ab") as file:
        file.write(b"\0")
    before = content(bundle)
    with pytest.raises(CheckFailed, match=r"onnx/fp32/model\.onnx"):
        build(bundle, "ov")
    assert content(bundle) == before


ARTIFACT_STAGES = {"runtime", "rows", "shuffled", "repeated", "batches", "decisions", "precision"}


def test_what_is_built_takes_the_place_of_what_was_there(reduced_bundle: Path) -> None:
    before = content(reduced_bundle)
    found = build(reduced_bundle, "openvino", precisions=["INT8"])
    assert found.parity.passed
    assert [(item.format, item.precision) for item in found.artifacts] == [("openvino", "int8")]
    opened = open_bundle(reduced_bundle)
    opened.check_all()
    kinds = sorted((item.format, item.precision) for item in opened.manifest.artifacts)
    assert kinds == sorted((f, p) for f in ("onnx", "openvino") for p in ("fp16", "fp32", "int8"))
    after = content(reduced_bundle)
    assert after.pop("reports/build-openvino.json")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"manifest.json"}  # the same files, made again, are the same bytes


def test_a_gpu_builds_verifies_and_keeps_its_timing_cache(bundle: Path, doubled: gpu_double.Device) -> None:
    found = build(bundle, "trt")
    assert found.parity.passed
    assert {check.stage for check in found.parity.checks} == ARTIFACT_STAGES
    assert (bundle / "tensorrt/fp32/timing.cache").read_bytes() == b"timings"
    build(bundle, "trt")
    assert (bundle / "tensorrt/fp32/timing.cache").read_bytes() == b"timings+"
    open_bundle(bundle).check_all()
    (artifact,) = open_bundle(bundle).artifacts("tensorrt")
    assert artifact.layers == {"fp32": sum(artifact.layers.values())}
    assert doubled.alive == {}


def test_an_engine_that_answers_wrongly_changes_nothing(
    bundle: Path, doubled: gpu_double.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tensorrt.to_tensorrt

    def spoilt(source: ConversionSource, folder: Path) -> Converted:
        model = onnx.load(source.onnx)
        (head,) = [tensor for tensor in model.graph.initializer if tensor.name == "head.weight"]
        head.CopyFrom(numpy_helper.from_array(np.flipud(numpy_helper.to_array(head)).copy(), head.name))
        made = whole(source, folder)
        made.files[0].write_bytes(gpu_double.MAGIC + model.SerializeToString())
        return made

    monkeypatch.setattr(tensorrt, "to_tensorrt", spoilt)
    before = content(bundle)
    with pytest.raises(
        CheckFailed, match="nothing was changed: 7 of 12 checks failed; first: runtime in tensorrt fp32"
    ):
        build(bundle, "trt")
    assert content(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    assert doubled.alive == {}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("onnx",), UsageError, "format onnx comes with an export"),
        (("torch",), UsageError, "format torch comes with an export"),
        (("coreml",), UsageError, "unknown format 'coreml'"),
        (("ov", ["fp16"]), UsageError, r"no ONNX file at fp16 to build from \(it has fp32\).*--precision fp16"),
        (("trt", [], EngineOptions("rtx", ["sm90"])), UnavailableError, "compute capability 9.0"),
    ],
)
def test_what_cannot_be_built_changes_nothing(bundle: Path, arguments: Any, kind: Any, message: str) -> None:
    before = content(bundle)
    name, precisions, engine = (*arguments, [], None)[:3] if len(arguments) == 1 else (*arguments, None)[:3]
    with pytest.raises(DMFormerError, match=message) as caught:
        build(bundle, name, precisions=precisions, engine=engine)
    assert type(caught.value) is kind
    assert one_line(caught.value)
    assert content(bundle) == before


def test_an_open_size_is_no_engines(segmentation_open: ExportResult, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(segmentation_open.output, tmp_path / "bundle"))
    before = content(bundle)
    with pytest.raises(UsageError, match="format tensorrt with open height and width") as caught:
        build(bundle, "trt", engine=EngineOptions("rtx", ["sm89"]))
    assert one_line(caught.value)
    assert content(bundle) == before
    opened = open_bundle(bundle)
    assert "open height and width" in (cannot_build(opened, registry.entry("trt"), "fp32") or "")
    assert cannot_build(opened, registry.entry("ov"), "fp32") is None
    found = build(bundle, "ov")
    assert {"runtime", "runtime at 64x96"} <= {check.where for check in found.parity.checks}


def test_a_bundle_without_onnx(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["artifacts"] = [item for item in manifest["artifacts"] if item["format"] != "onnx"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"no ONNX file to build from \(it has none\); run: dmformer export"):
        build(bundle, "ov")


@pytest.mark.slow
def test_a_device_builds_without_torch_and_onnx(bundle: Path) -> None:
    code = """
from dmformer.export.build import build
print(build(sys.argv[1], "openvino").parity.passed, sorted(BLOCKED & set(sys.modules)))
"""
    said = python(code, bundle, blocked=("torch", "onnx", "onnxsim", "safetensors", "onnxruntime"))
    assert said.split("\n")[-2] == "True []"


def test_the_command(cli: Callable[..., Run], inline: Callable[..., Run], bundle: Path) -> None:
    run = cli("build", bundle, "--format", "ov", "--json", "-")
    assert run.code == 0, run.err
    found = msgspec.json.decode(run.out)
    assert found["parity"]["passed"]
    assert found["artifacts"][0]["format"] == "openvino"
    run = inline("build", bundle, "--format", "ov")
    assert "any machine" in run.out
    assert "all 12 checks held" in run.out
    assert inline("build", bundle).code == 2
    assert inline("build", bundle, "--format", "ort").code == 2


def test_the_state_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    from dmformer.machine import gpu_state

    ended = []
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlClocksEventReasonAll=511,
        nvmlClocksEventReasonNone=0,
        nvmlClocksEventReasonSwPowerCap=4,
        nvmlClocksEventReasonHwSlowdown=8,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: ended.append(1),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCurrentClocksEventReasons=lambda _: 4,
        nvmlDeviceGetName=lambda _: "NVIDIA Double",
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetClockInfo=lambda _, kind: 1000 * kind,
        nvmlDeviceGetTemperature=lambda _, __: 61,
        nvmlDeviceGetPowerUsage=lambda _: 71500,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=3 << 20),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert gpu_state() == {
        "name": "NVIDIA Double",
        "driver": "580.1",
        "sm_clock_mhz": 1000,
        "memory_clock_mhz": 2000,
        "temperature_c": 61,
        "memory_used_mb": 3,
        "power_w": 71.5,
        "throttle": ["SwPowerCap"],
    }
    assert ended == [1]

    def unknown(_: object) -> int:
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(fake, "nvmlDeviceGetPowerUsage", unknown)
    state = gpu_state()
    assert state is not None
    assert (state["power_w"], state["temperature_c"]) == (None, 61)  # one question without an answer spoils no other
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_state() is None
