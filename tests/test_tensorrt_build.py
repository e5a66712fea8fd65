"""Engines built for real by TensorRT-RTX, without a GPU: what is in them, and what is refused with which words."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import onnx
import pytest

import dmformer
from dmformer.bundle.reader import open_bundle
from dmformer.errors import StageFailed, UnavailableError, UsageError
from dmformer.export.formats import ConversionSource, tensorrt
from dmformer.export.formats.tensorrt import check_buildable, to_tensorrt, use_timing_cache
from dmformer.export.options import EngineOptions
from dmformer.export.precisions import int8
from dmformer.files import hash_file
from dmformer.runtimes import target as plan
from dmformer.runtimes.cuda import Gpu, find_gpu
from dmformer.runtimes.target import compute_capability, this_platform
from tests import gpu_double
from tests.bundles import one_line
from tests.precisions import calibration_of, source_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from dmformer.export.formats import Converted
    from tests.conftest import Run

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

AHEAD = EngineOptions("rtx", ["sm86", "sm89"])


def build(onnx_file: Path, folder: Path, options: EngineOptions = AHEAD, **more: Any) -> Converted:
    folder.mkdir(exist_ok=True)
    return to_tensorrt(ConversionSource(onnx_file, "fp32", engine=options, **more), folder)


@pytest.fixture
def fp32(exported: ExportResult) -> Path:
    return exported.output / "onnx/fp32/model.onnx"


def without_gpu() -> bool:
    try:
        find_gpu()
    except UnavailableError:
        return True
    return False


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_precision_builds_and_the_plan_is_what_the_manifest_says(
    reduced: ExportResult, tmp_path: Path, precision: str
) -> None:
    source = reduced.output / f"onnx/{precision}/model.onnx"
    made = build(source, tmp_path)
    assert [path.name for path in made.files] == ["model.plan"]
    assert made.built_with == {"tensorrt-rtx": rtx.__version__}
    target = made.target
    assert target is not None
    assert (target.flavour, target.version, target.gpu) == ("rtx", rtx.__version__, None)
    assert (target.min_batch, target.opt_batch, target.max_batch) == (1, 1, 8)
    assert target.platform == this_platform()
    assert target.onnx_sha256 == hash_file(source)[0]
    assert target.build_s > 0
    header = plan.read_header(made.files[0].read_bytes())
    assert header is not None
    assert header.bytes == made.files[0].stat().st_size
    assert header.compute_capabilities == target.compute_capabilities == ("8.6", "8.9")
    assert plan.contradiction(made.files[0].read_bytes(), target) is None


@pytest.mark.slow
def test_dmformer_s_builds_and_its_weights_have_their_precision(small: dict[str, Path], tmp_path: Path) -> None:
    sizes = {}
    for precision, source in small.items():
        made = build(source, tmp_path / precision, EngineOptions("rtx", ["sm89"], 1, 4, 8, 512))
        assert made.target is not None
        assert plan.contradiction(made.files[0].read_bytes(), made.target) is None
        assert (made.target.opt_batch, made.target.workspace_mb) == (4, 512)
        sizes[precision] = made.files[0].stat().st_size
    assert sizes["fp16"] < 0.65 * sizes["fp32"], sizes
    assert sizes["int8"] < sizes["fp16"], sizes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, few_images: Path) -> dict[str, Path]:
    """DMFormer-S with lively weights at every precision, as an export makes it.

    To save time at 64 pixels, and with one or two of each stage's blocks: the others have layers of the same shapes.
    """
    from dmformer.data.images import image_set
    from dmformer.export.networks import random_checkpoint
    from dmformer.export.precisions import make

    checkpoint = random_checkpoint("dmformer_s", {"num_classes": 10, "depths": [1, 1, 2, 1]}, 64, seed=1)
    images = image_set(few_images, checkpoint.preprocessing, [], 10).spread(10)
    calibration, inputs = calibration_of(checkpoint, images), next(images.batches(2))
    source = source_of(checkpoint, tmp_path_factory.mktemp("dmformer_s"), inputs, calibration)
    found = {"fp32": source.onnx, "fp16": make("fp16", source).onnx}
    quantizer = int8._Quantizer(source, calibration)  # all blocks: their sensitivity would take a minute
    found["int8"] = quantizer.quantize([name for names in quantizer.blocks.values() for name in names])
    return found


def test_options_reach_the_builder(fp32: Path, tmp_path: Path) -> None:
    small = build(fp32, tmp_path / "a", EngineOptions("auto", ["8.9"], 2, 3, 4, 64)).target
    assert small is not None
    assert (small.min_batch, small.opt_batch, small.max_batch, small.workspace_mb) == (2, 3, 4, 64)
    assert small.compute_capabilities == ("8.9",)
    assert small.flavour == "rtx"  # auto, with a target


def test_progress_is_told_by_the_builder(fp32: Path, tmp_path: Path) -> None:
    from contextlib import contextmanager

    told: list[tuple[str, int | None]] = []
    steps: list[str] = []

    @contextmanager
    def stage(name: str, parts: int | None = None) -> Any:
        told.append((name, parts))
        yield lambda: steps.append(name)

    build(fp32, tmp_path, stage=stage)
    ((name, parts),) = told
    assert name == "tensorrt fp32: building engine"
    assert parts is not None
    assert 0 < len(steps) <= parts


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm90", "10.0", "sm_87", "sm110"])
def test_a_gpu_that_cannot_be_built_for_is_3_and_says_which_can(fp32: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(UnavailableError, match=r"it can for 7\.5, 8\.0, 8\.6, 8\.9.*dmformer build") as caught:
        build(fp32, tmp_path, EngineOptions("rtx", ["sm89", target]))
    assert one_line(caught.value)
    assert compute_capability(target) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_turing_has_no_float32_gemm(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"head/Gemm.*leave `targets` sm75 out, or build it at fp16"):
        build(fp32, tmp_path, EngineOptions("rtx", ["sm75"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not without_gpu(), reason="this machine has a GPU")
def test_no_gpu_and_no_target(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no NVIDIA GPU.*`targets` sm89"):
        build(fp32, tmp_path, EngineOptions("rtx"))


def test_a_flavour_that_is_not_there(fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match=r"TensorRT is not installed: .*`flavour` rtx"):
        build(fp32, tmp_path, EngineOptions("tensorrt"))
    with pytest.raises(UsageError, match="flavour 'lean'; expected auto, tensorrt or rtx"):
        build(fp32, tmp_path, EngineOptions("lean"))


def test_tensorrt_proper_builds_for_its_own_gpu_only(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_double.install(monkeypatch, name="Orin", capability=(8, 7))
    check_buildable(EngineOptions("tensorrt"))
    with pytest.raises(UnavailableError, match="for the GPU of its machine only"):
        build(fp32, tmp_path, EngineOptions("tensorrt", ["sm89"]))


def test_rtx_builds_for_the_gpu_of_the_machine_and_no_other(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: Gpu("GeForce Double", "8.9"))
    target = build(fp32, tmp_path, EngineOptions("rtx")).target
    assert target is not None
    assert (target.compute_capabilities, target.gpu) == (("8.9",), "GeForce Double")
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: Gpu("H100", "9.0"))
    with pytest.raises(UnavailableError, match=r"builds nothing for compute capability 9\.0"):
        build(fp32, tmp_path, EngineOptions("rtx"))


@pytest.mark.parametrize("refuses", ["create", "set"])
def test_a_timing_cache_of_another_gpu_is_replaced(tmp_path: Path, refuses: str) -> None:
    class Config:
        def create_timing_cache(self, content: bytes) -> bytes | None:
            return None if content == b"stale" and refuses == "create" else content + b"."

        def set_timing_cache(self, cache: bytes, *, ignore_mismatch: bool) -> bool:
            return not ignore_mismatch and not cache.startswith(b"stale")

    path = tmp_path / "timing.cache"
    path.write_bytes(b"stale")
    assert use_timing_cache(Config(), path) == b"."
    path.write_bytes(b"good")
    assert use_timing_cache(Config(), path) == b"good."


def test_a_complaint_names_the_node_and_the_module(fp32: Path, tmp_path: Path) -> None:
    model = onnx.load(fp32)
    node = next(node for node in model.graph.node if node.name.startswith("stages.1.") and node.op_type == "Relu")
    node.op_type = "Frobnicate"
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(StageFailed) as caught:
        build(tmp_path / "bad.onnx", tmp_path / "out")
    module = node.name.rpartition("/")[0]
    assert f"ONNX node '{node.name}' (Frobnicate) of torch module '{module}'" in one_line(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x08" * 400])
def test_a_file_that_is_no_onnx(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(StageFailed) as caught:
        build(tmp_path / "bad.onnx", tmp_path / "out")
    assert one_line(caught.value)


def test_a_builder_that_crashes_is_an_error_of_its_stage(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmformer.process import Child

    crash = f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"
    monkeypatch.setattr(Child, "command", staticmethod(lambda *_: [sys.executable, "-c", crash]))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StageFailed, match=r"building a TensorRT engine at fp32: the process was ended by signal 11"):
        build(fp32, tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_batch": 0}, "batches 0, 1, 8"),
        ({"min_batch": 4, "opt_batch": 2}, "batches 4, 2, 8"),
        ({"opt_batch": 9}, "batches 1, 9, 8"),
        ({"max_batch": 99999999999999}, "1 to 4096"),
        ({"workspace_mb": 99999999999999999999}, "expected 1 to 1048576"),
        ({"workspace_mb": 0}, "workspace 0 MiB"),
        ({"targets": ["rtx4090"]}, "target 'rtx4090'; expected a compute capability"),
        ({"targets": ["sm8"]}, "target 'sm8'"),
        ({"targets": [""]}, "target ''"),
    ],
)
def test_options_that_cannot_be_meant(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        EngineOptions(**arguments)
    assert one_line(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"), [("sm89", "8.9"), ("SM_120", "12.0"), ("8.6", "8.6"), ("75", "7.5"), (" sm121 ", "12.1")]
)
def test_compute_capabilities_are_read_as_they_are_written(name: str, expected: str) -> None:
    assert compute_capability(name) == expected


# --- the header -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(exported: ExportResult, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """An engine that is read and not written into."""
    return build(exported.output / "onnx/fp32/model.onnx", tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compute_capabilities": ("8.6",)}, "the manifest says 8.6"),
        ({"version": "1.6.0.1"}, "the manifest says 1.6.0.1"),
        ({"flavour": "tensorrt"}, "the manifest says tensorrt"),
    ],
)
def test_a_plan_that_contradicts_the_manifest(engine: Converted, change: dict[str, Any], said: str) -> None:
    assert engine.target is not None
    wrong = msgspec.structs.replace(engine.target, **change)
    assert said in (plan.contradiction(engine.files[0].read_bytes(), wrong) or "")


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: data[:30]])
def test_a_plan_that_was_damaged(engine: Converted, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    assert engine.target is not None
    assert plan.contradiction(engine.files[0].read_bytes(), engine.target) is None
    spoilt = tmp_path / engine.files[0].name
    spoilt.write_bytes(spoil(engine.files[0].read_bytes()))
    assert plan.contradiction(spoilt.read_bytes(), engine.target)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not without_gpu(), reason="this machine has a GPU")
def test_an_export_without_a_gpu_is_complete_and_says_what_was_not_run(
    inline: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("dmformer.bench.api"), "ROUNDS", 1)  # what can run here is really timed
    monkeypatch.setattr(import_module("dmformer.export.steps"), "TIMED_S", 0.1)
    run = inline("export", "--format", "trt", "--target", "sm89", "--precision", "fp16", "--output", "b")
    assert run.code == 0, run.err
    said = " ".join(run.out.split())
    assert "tensorrt fp16: built and not run, no NVIDIA GPU" in said
    assert "compared in onnxruntime" in said
    manifest = msgspec.json.decode((tmp_path / "b/manifest.json").read_bytes())
    (artifact,) = manifest["artifacts"]
    assert artifact["target"]["compute_capabilities"] == ["8.9"]
    assert artifact["speed"] is artifact["accuracy"] is None
    parity = msgspec.json.decode((tmp_path / "b/reports/parity.json").read_bytes())
    assert ("onnx", "onnxruntime", "fp16") in {
        (check["stage"], check["runtime"], check["precision"]) for check in parity["checks"]
    }
    run = inline("inspect", "b")
    assert "SM 8.9, batch 1 to 8" in " ".join(run.out.split())
    run = inline("doctor", "b")
    assert run.code == 0
    for command in (["bench", "b", "--runtime", "trt"], ["verify", "b"], ["bench", "b"]):
        run = inline(*command)
        assert run.code == 3, command
        assert "no NVIDIA GPU" in run.error_line
    assert "what can run here: torch, onnxruntime, openvino" in inline("bench", "b", "--runtime", "trt").error_line


@pytest.mark.skipif(not without_gpu(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "trt"], 3, "--target sm89"),
        (["--format", "trt", "--target", "sm90"], 3, "8.9"),
        (["--format", "trt", "--target", "sm89", "--flavour", "tensorrt"], 3, "--flavour rtx"),
        (["--format", "trt", "--target", "sm89", "--precision", "auto"], 3, "cannot run on this machine"),
        (["--format", "trt", "--target", "gtx"], 2, "target 'gtx'"),
        (["--format", "onnx", "--target", "sm89"], 2, "--format trt as well"),
        (["--format", "trt", "--target", "sm89", "--min-batch", "3"], 2, "in order"),
        (["--format", "trt", "--target", "sm89", "--flavour", "lean"], 2, "flavour 'lean'"),
    ],
)
def test_what_cannot_be_built_writes_nothing(
    inline: Callable[..., Run], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    run = inline("export", *arguments, "--output", "b")
    assert run.code == code, run.err
    assert message in run.error_line
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(not without_gpu(), reason="this machine has a GPU")
def test_all_leaves_out_what_cannot_be_made_and_says_so(inline: Callable[..., Run]) -> None:
    run = inline("export", "--format", "all", "--output", "b", "--dry-run")
    assert run.code == 0
    assert "openvino/fp32/" in run.out
    assert "tensorrt/fp32/" not in run.out
    assert "tensorrt: TensorRT-RTX builds for the GPU of its machine: no NVIDIA GPU" in " ".join(run.err.split())
    run = inline("export", "--format", "all", "--target", "sm89", "--output", "b", "--dry-run")
    assert "tensorrt/fp32/" in run.out


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_from_python(tmp_path: Path) -> None:
    result = dmformer.export(formats=["onnx", "trt"], engine=EngineOptions(targets=["sm89"]), output=tmp_path / "b")
    assert [artifact.format for artifact in result.manifest.artifacts] == ["onnx", "tensorrt"]
    assert result.parity.passed


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_engine_that_cannot_be_built_takes_nothing_down_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmformer.process import Child

    real = Child.command
    crash = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"]
    monkeypatch.setattr(
        Child, "command", staticmethod(lambda name, *rest: crash if "tensorrt:" in name else real(name, *rest))
    )
    engine = EngineOptions(targets=["sm89"])
    result = dmformer.export(formats=["trt", "onnx"], engine=engine, output=tmp_path / "b")
    assert [artifact.format for artifact in result.manifest.artifacts] == ["onnx"]
    (reason,) = result.broken
    assert "the process was ended by signal 11" in reason
    assert reason in result.parity.skipped
    assert not (tmp_path / "b/tensorrt").exists() or list((tmp_path / "b/tensorrt").iterdir()) == []
    open_bundle(tmp_path / "b").check_all()
    with pytest.raises(StageFailed, match="signal 11"):
        dmformer.export(formats=["trt"], engine=engine, output=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_command_says_so_and_ends_with_1(inline: Callable[..., Run], tmp_path: Path) -> None:
    run = inline("export", "--format", "onnx", "--format", "trt", "--target", "sm75", "--output", "b")
    assert run.code == 1
    assert "head/Gemm" in run.error_line
    assert "the rest was written to b" in run.error_line
    assert (tmp_path / "b/onnx/fp32/model.onnx").is_file()
