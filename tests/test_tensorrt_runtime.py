"""The protocol of the TensorRT runtime, against a double of the GPU (``tests/gpu_double.py``); no GPU is needed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx
import pytest

from dmformer.assets import SAMPLE_IMAGES
from dmformer.bench.measure import Extent, measure, network_alone
from dmformer.bundle.golden import load_golden
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import choose, select
from dmformer.errors import StageFailed, UnavailableError, UsageError
from dmformer.export.formats.tensorrt import complaints, strongly_typed, with_advice
from dmformer.files import hash_file
from dmformer.runtimes import cuda
from dmformer.runtimes.base import TensorSpec
from dmformer.runtimes.cuda import Gpu
from dmformer.runtimes.target import FLAVOURS, cannot_use_gpu, load_flavour
from dmformer.runtimes.tensorrt import TensorRtRuntime, layers_by_precision, layers_with_nodes
from dmformer.serve.predictor import load
from dmformer.verify.api import verify
from tests import gpu_double
from tests.bundles import one_line, rewrite
from tests.gpu_double import Code, Device

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.export.cached import ExportResult


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return gpu_double.install(monkeypatch)


@pytest.fixture
def onnx_file(exported: ExportResult) -> Path:
    return exported.output / "onnx/fp32/model.onnx"


@pytest.fixture
def rows(exported: ExportResult) -> NDArray[np.float32]:
    return load_golden(exported.output / "golden.npz").inputs


def runtime_of(onnx_file: Path, folder: Path, **fields: Any) -> TensorRtRuntime:
    path, target = gpu_double.plan_of(onnx_file, folder, **fields)
    return TensorRtRuntime(path, target=target)


@pytest.fixture
def runtime(device: Device, onnx_file: Path, tmp_path: Path) -> TensorRtRuntime:
    assert device.count
    return runtime_of(onnx_file, tmp_path)


def answer(runtime: TensorRtRuntime, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return runtime.run({runtime.inputs[0].name: rows})["logits"]


# --- running ----------------------------------------------------------------------------------------------------------


def test_specs_have_an_open_batch(runtime: TensorRtRuntime) -> None:
    with runtime:
        assert runtime.inputs == (TensorSpec("image", "float32", ("batch", 3, 32, 32)),)
        assert runtime.outputs == (TensorSpec("logits", "float32", ("batch", 10)),)
        assert runtime.batches == (1, 8)


def test_a_fixed_shape_is_replayed_as_a_graph(
    runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32]
) -> None:
    with runtime:
        answers = [answer(runtime, rows[:2]) for _ in range(4)]
        assert device.calls.count("execute_async_v3") == 2  # once plainly, once recorded
        assert device.calls.count("cudaGraphLaunch") == 3
        fresh = answer(runtime, rows[2:4])  # the same shape with other values
        assert device.calls.count("execute_async_v3") == 2
    for again in answers[1:]:
        np.testing.assert_array_equal(again, answers[0])
    assert not np.array_equal(fresh, answers[0])


def test_another_shape_gets_a_graph_of_its_own(
    runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32]
) -> None:
    with runtime:
        wide = [answer(runtime, rows[:3]) for _ in range(3)]
        narrow = [answer(runtime, rows[:1]) for _ in range(3)]
        again = answer(runtime, rows[:3])
    assert device.calls.count("cudaGraphInstantiate") == device.calls.count("cudaGraphExecDestroy") == 2
    np.testing.assert_array_equal(again, wide[0])
    np.testing.assert_allclose(narrow[2], wide[2][:1], atol=1e-4)


def test_the_device_is_timed_without_transfers(runtime: TensorRtRuntime, rows: NDArray[np.float32]) -> None:
    with runtime:
        assert runtime.device_ns is None
        answer(runtime, rows[:1])
        assert runtime.device_ns == 250_000  # the double's clock moves by a quarter of a millisecond
    assert runtime.device_ns is None


def test_a_measurement_has_times_of_the_device(runtime: TensorRtRuntime, rows: NDArray[np.float32]) -> None:
    found = measure([(runtime, network_alone(runtime, "image", rows, 1))], Extent(duration_s=0.01, least_calls=8))
    assert found.device_ns == [250_000] * len(found.latencies_ns)


def test_kernels_are_named_after_the_nodes_they_came_from(
    runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32], onnx_file: Path
) -> None:
    nodes = [node.name for node in onnx.load(onnx_file).graph.node]
    with runtime:
        for _ in range(3):
            answer(runtime, rows[:1])  # a graph is recorded, which the profiler must not replay
        launched = device.calls.count("cudaGraphLaunch")
        found = runtime.inspect().kernels([{"image": rows[:1]}] * 3)
        assert device.calls.count("cudaGraphLaunch") == launched
        expected = answer(runtime, rows[:1])
        np.testing.assert_array_equal(answer(runtime, rows[:1]), expected)
        assert device.calls.count("cudaGraphLaunch") == launched + 1  # and later ones are replayed again
    assert [kernel.name for kernel in found] == nodes
    assert all(kernel.ns == (250_000,) * 3 for kernel in found)
    assert {kernel.operator for kernel in found} >= {"Conv", "Relu", "Gemm"}


def test_calls_come_in_the_order_of_the_protocol(
    runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32]
) -> None:
    with runtime:
        device.calls.clear()
        answer(runtime, rows[:1])
        assert [call for call in device.calls if call != "cudaEventElapsedTime"] == [
            "cudaMemcpyAsync",
            "cudaEventRecord",
            "execute_async_v3",
            "cudaEventRecord",
            "cudaMemcpyAsync",
            "cudaStreamSynchronize",
        ]


@pytest.mark.parametrize(("bounds", "batch"), [((1, 1, 4), 5), ((2, 2, 4), 1), ((2, 3, 4), 5)])
def test_a_batch_out_of_bounds(
    device: Device, onnx_file: Path, tmp_path: Path, rows: NDArray[np.float32], bounds: Any, batch: int
) -> None:
    least, opt, most = bounds
    with (
        runtime_of(onnx_file, tmp_path, min_batch=least, opt_batch=opt, max_batch=most) as runtime,
        pytest.raises(UsageError, match=f"batch {batch}; the engine was built for {least} to {most}"),
    ):
        answer(runtime, rows[:batch])


# --- freeing ----------------------------------------------------------------------------------------------------------


def test_all_is_freed(runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32]) -> None:
    with runtime:
        for batch in (1, 1, 1, 2, 2):
            answer(runtime, rows[:batch])
        kinds = sorted(device.alive.values())
        assert kinds == ["device", "device", "event", "event", "graph exec", "host", "host", "stream"]
    assert device.alive == {}


@pytest.mark.parametrize(
    "call",
    [
        "cudaStreamCreate",
        "cudaMalloc",
        "cudaMallocHost",
        "cudaEventCreate",
        "cudaMemcpyAsync",
        "cudaEventRecord",
        "cudaStreamSynchronize",
        "cudaEventElapsedTime",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphLaunch",
    ],
)
def test_all_is_freed_after_a_failure_anywhere(
    runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32], call: str
) -> None:
    device.failing[call] = Code.cudaErrorMemoryAllocation
    with pytest.raises(StageFailed, match=f"CUDA: {call} failed with cudaErrorMemoryAllocation") as caught, runtime:
        for _ in range(3):
            answer(runtime, rows[:1])
    assert one_line(caught.value)
    assert device.alive == {}
    del device.failing[call]
    device.capturing = None
    with runtime:  # and it can be opened again
        answer(runtime, rows[:1])
    assert device.alive == {}


def test_all_is_freed_after_an_interrupt(runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32]) -> None:
    with pytest.raises(KeyboardInterrupt), runtime:
        answer(runtime, rows[:1])
        raise KeyboardInterrupt
    assert device.alive == {}


def test_an_engine_that_does_not_run(
    runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime:
        answer(runtime, rows[:1])
        monkeypatch.setattr(gpu_double.Engine, "refuses", True)
        with pytest.raises(StageFailed, match="the engine did not run"):
            answer(runtime, rows[:2])
    assert device.alive == {}


def test_a_buffer_is_never_read_past_its_end(device: Device) -> None:
    with cuda.Session() as session:
        buffer = cuda.Buffer(session, 16)
        assert buffer.view((2, 2), np.float32).shape == (2, 2)
        with pytest.raises(StageFailed, match="does not fit into a buffer of 16 bytes"):
            buffer.view((5,), np.float32)
        with pytest.raises(StageFailed, match="cudaErrorIllegalAddress"):
            session.copy_in(buffer, 17)
    assert device.alive == {}


# --- what an engine is tied to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"version": "10.3.0.26"}, r"built with TensorRT 10\.3\.0\.26; here is 10\.9\.0\.34: .*dmformer build"),
        ({"platform": "linux-riscv64"}, "built for linux-riscv64; this is "),
        (
            {"compute_capabilities": ("7.5", "8.6")},
            r"built for SM 7\.5, 8\.6; this GPU \(NVIDIA Double\) is SM 8\.9",
        ),
    ],
)
def test_a_difference_is_named_before_anything_is_loaded(
    device: Device, onnx_file: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    runtime = runtime_of(onnx_file, tmp_path, **fields)
    with pytest.raises(UnavailableError, match=said) as caught, runtime:
        pass
    assert caught.value.exit_code == 3
    assert one_line(caught.value)
    assert device.loaded == 0
    assert device.alive == {}


def test_without_a_target_nothing_is_loaded(device: Device, onnx_file: Path, tmp_path: Path) -> None:
    path, _ = gpu_double.plan_of(onnx_file, tmp_path)
    with pytest.raises(UnavailableError, match="does not say what the engine was built for"), TensorRtRuntime(path):
        pass
    assert device.loaded == 0


def test_a_plan_of_another_flavour_is_not_loaded(device: Device, onnx_file: Path, tmp_path: Path) -> None:
    runtime = runtime_of(onnx_file, tmp_path)
    runtime.path.write_bytes(b"vtrt" + bytes(60))
    with pytest.raises(StageFailed, match="expected the plan that the manifest describes"), runtime:
        pass
    assert device.loaded == 0


def test_a_plan_that_the_engine_refuses(device: Device, onnx_file: Path, tmp_path: Path) -> None:
    runtime = runtime_of(onnx_file, tmp_path)
    runtime.path.write_bytes(gpu_double.MAGIC + b"damaged")
    with (
        pytest.raises(StageFailed, match=r"the engine was not loaded: .*version tag does not match") as caught,
        runtime,
    ):
        pass
    assert one_line(caught.value)
    assert device.alive == {}


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_double.install(monkeypatch, count=0)
    status = TensorRtRuntime.support.probe()
    assert not status.available
    assert status.version == gpu_double.VERSION
    assert "no NVIDIA GPU" in (status.reason or "")


# --- a bundle ---------------------------------------------------------------------------------------------------------


def put_engine(bundle: Path, onnx_file: Path, **fields: int) -> None:
    """Add an engine of the double to a bundle."""
    content = json.loads((bundle / "manifest.json").read_bytes())
    folder = bundle / "tensorrt/fp32"
    folder.mkdir(parents=True)
    path, target = gpu_double.plan_of(onnx_file, folder, **fields)
    sha256, size = hash_file(path)
    content["artifacts"].append(
        {
            "format": "tensorrt",
            "precision": "fp32",
            "files": [{"path": "tensorrt/fp32/model.plan", "bytes": size, "sha256": sha256}],
            "built_with": {"tensorrt": target.version},
            "target": msgspec.to_builtins(target),
        }
    )
    (bundle / "manifest.json").write_text(json.dumps(content))


@pytest.fixture
def with_engine(bundle: Path, onnx_file: Path) -> Path:
    """The demonstration bundle, with an engine of the double beside the others."""
    put_engine(bundle, onnx_file)
    return bundle


@pytest.mark.usefixtures("device")
def test_a_bundle_is_verified_on_the_gpu(with_engine: Path) -> None:
    found = verify(with_engine, runtimes=["trt"])
    assert found.passed, found
    assert {check.runtime for check in found.checks} == {"numpy", "tensorrt"}
    assert {"preprocessing", "runtime", "rows", "precision"} < {check.stage for check in found.checks}


def test_where_the_gpu_is_another_one_the_engine_is_left_out_and_why_is_said(
    with_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_double.install(monkeypatch, capability=(7, 5), name="Tesla T4")
    opened = open_bundle(with_engine)
    chosen, skipped = select(opened, [])
    assert "tensorrt" not in [choice.entry.name for choice in chosen]
    (reason,) = skipped
    assert "this GPU (Tesla T4) is SM 7.5" in reason
    with pytest.raises(UnavailableError, match=r"SM 8\.9; this GPU"):
        select(opened, ["trt"])
    first = {"artifacts": lambda found: found.sort(key=lambda item: item["format"] != "tensorrt")}
    rewrite(with_engine, lambda content: [change(content[name]) for name, change in first.items()])
    assert choose(open_bundle(with_engine), None, None).entry.name == "torch"


def test_a_predictor_keeps_to_the_batches_of_its_engine(
    bundle: Path, onnx_file: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.count
    put_engine(bundle, onnx_file, min_batch=2, opt_batch=2, max_batch=4)
    images = sorted(SAMPLE_IMAGES.glob("*.png"))
    with load(bundle, runtime="trt") as predictor:
        for count in (1, 5, 10):
            found = predictor.predict(images[:count], top_k=1)
            assert [item.classes[0].name for item in found] == [path.stem for path in images[:count]]


# --- one path for three flavours --------------------------------------------------------------------------------------


class Typed10:
    """TensorRT 10: a network is strongly typed by a flag, whose number is the module's business."""

    __name__ = "tensorrt"

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 1


class Typed11:
    """TensorRT 11: every network is, and the flag is gone."""

    __name__ = "tensorrt"

    class NetworkDefinitionCreationFlag:
        pass


class TypedRtx(Typed10):
    """TensorRT-RTX: every network is; the flag is still there."""

    __name__ = "tensorrt_rtx"


@pytest.mark.parametrize(("engine", "flags"), [(Typed10(), 2), (Typed11(), 0), (TypedRtx(), 0)])
def test_networks_are_strongly_typed_in_every_flavour(engine: Any, flags: int) -> None:
    assert strongly_typed(engine) == flags


def test_complaints_without_a_node() -> None:
    class Error:
        def node_name(self) -> str:
            return ""

        def node_operator(self) -> str:
            return ""

        def desc(self) -> str:
            return "Failed to parse\n the model."

    class Parser:
        num_errors = 1

        def get_error(self, _index: int) -> Error:
            return Error()

    assert complaints(Parser()) == ["Failed to parse the model."]


def test_what_to_do_is_said_where_it_is_known() -> None:
    assert "`workspace_mb`" in with_advice("Requested amount of GPU memory could not be allocated")
    assert with_advice("something else") == "something else"


def test_layers_are_read_from_the_inspector_of_every_flavour() -> None:
    layers: list[Any] = [
        {"Inputs": [{"Datatype": "Half"}], "Metadata": "[ONNX Layer: x/Conv]\x1f[ONNX Layer: y/Add]"},
        {"Inputs": [{"Format/Datatype": "Int8"}], "Metadata": "[ONNX Layer: head/Gemm]"},
        {"Inputs": [{"Format/Datatype": "Half NHWC8"}], "Metadata": "[ONNX Layer: a/Conv][ONNX Layer: b/Conv]"},
        {"Inputs": [{"Datatype": "Float"}], "Metadata": "[ONNX Layer: x/Relu]"},
        {"Inputs": [], "Metadata": "[ONNX Layer: z/Conv]"},
        "a layer without details",
    ]
    assert layers_by_precision(layers_with_nodes(json.dumps({"Layers": layers}))) == {"fp16": 3, "int8": 1}
    assert layers_by_precision(layers_with_nodes("{}")) == {}


def test_a_gpu_that_does_not_answer_is_none(device: Device) -> None:
    device.failing["cudaGetDeviceProperties"] = Code.cudaErrorNoDevice
    with pytest.raises(UnavailableError, match="cudaGetDeviceProperties failed with cudaErrorNoDevice"):
        cuda.find_gpu()
    assert "does not answer" in (TensorRtRuntime.support.probe().reason or "")


def test_bindings_that_are_newer_than_the_driver_say_so(device: Device) -> None:
    device.count, device.driver = 0, 12060
    with pytest.raises(
        UnavailableError, match=r"driver is for CUDA 12, and cuda-bindings for 13; .*'cuda-bindings<13'"
    ):
        cuda.find_gpu()


def test_raw_control_characters_of_the_inspector() -> None:
    told = '{"Layers": [{"Inputs": [{"Datatype": "Half"}], "Metadata": "[ONNX Layer: x/Conv]\x1e[ONNX Layer: y/Add]"}]}'
    assert layers_by_precision(layers_with_nodes(told)) == {"fp16": 1}


def test_what_failed_first_is_told(runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32]) -> None:
    """After an illegal address every call of CUDA fails, those that free included."""
    with pytest.raises(StageFailed, match="CUDA: cudaStreamSynchronize failed with cudaErrorIllegalAddress"), runtime:
        answer(runtime, rows[:1])
        for call in ("cudaStreamSynchronize", "cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaEventDestroy"):
            device.failing[call] = Code.cudaErrorIllegalAddress
        answer(runtime, rows[:1])


def test_a_capture_that_fails_leaves_no_graph(
    runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime:
        answer(runtime, rows[:1])
        monkeypatch.setattr(gpu_double.Engine, "refuses", True)
        for ends in (False, True):
            if ends:
                device.failing["cudaStreamEndCapture"] = Code.cudaErrorStreamCaptureInvalidated
            with pytest.raises(StageFailed, match="the engine did not run"):
                answer(runtime, rows[:1])
            device.capturing = None
        assert "graph" not in device.alive.values()
    assert device.alive == {}


def test_a_shape_that_has_not_run_is_not_recorded(
    runtime: TensorRtRuntime, device: Device, rows: NDArray[np.float32]
) -> None:
    with runtime:
        device.failing["cudaStreamSynchronize"] = Code.cudaErrorMemoryAllocation
        with pytest.raises(StageFailed):
            answer(runtime, rows[:1])
        device.failing.clear()
        answer(runtime, rows[:1])
        assert "cudaStreamBeginCapture" not in device.calls


@pytest.mark.parametrize(
    ("name", "capability", "refused"),
    [
        ("rtx", "9.0", True),  # as an H100 does
        ("rtx", "8.7", True),
        ("rtx", "8.9", False),
        ("rtx", "12.0", False),
        ("rtx", "13.0", False),  # newer than all that it knows
        ("tensorrt", "9.0", False),
    ],
)
def test_gpus_that_a_flavour_is_not_for(name: str, capability: str, refused: bool) -> None:
    flavour, engine = load_flavour("rtx")
    flavour = next(each for each in FLAVOURS if each.name == name)
    reason = cannot_use_gpu(flavour, engine, Gpu("a GPU", capability))
    assert (reason is not None) == refused
    if reason is not None:
        assert f"does not run on a GPU, which is SM {capability}; it does on SM 7.5, 8.0, 8.6, 8.9, 12.0" in reason
