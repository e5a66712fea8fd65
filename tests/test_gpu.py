"""On a machine with a GPU: build, verify and time with whatever flavour of TensorRT is installed (pytest -m gpu)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import dmformer
from dmformer.assets import DEMONSTRATION_CHECKPOINT
from dmformer.bundle.golden import load_golden
from dmformer.errors import UnavailableError
from dmformer.export.options import EngineOptions
from dmformer.graph.trace import trace
from dmformer.machine import gpu_state
from dmformer.models.checkpoint import load_checkpoint
from dmformer.runtimes import cuda
from dmformer.runtimes.tensorrt import TensorRtRuntime
from dmformer.verify.compare import float32_limit
from tests import gpu_double

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> cuda.Gpu:
    try:
        return cuda.find_gpu()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def engine(gpu: cuda.Gpu) -> EngineOptions:
    """TensorRT proper where it is installed, otherwise TensorRT-RTX."""
    status = TensorRtRuntime.support.probe()
    if not status.available:
        pytest.skip(f"{gpu.name}: {status.reason}")
    return EngineOptions(max_batch=5)


@pytest.mark.usefixtures("gpu")
def test_memory_streams_and_events() -> None:
    with cuda.Session() as session:
        source, target = cuda.Buffer(session, 1 << 20), cuda.Buffer(session, 1 << 20)
        values = np.random.default_rng(0).standard_normal(1 << 18, np.float32)
        np.copyto(source.view(values.shape, np.float32), values)
        before, after = session.event(), session.event()
        session.record(before)
        session.copy_in(source, values.nbytes)
        kind = session.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        session.call("cudaMemcpyAsync", target.device, source.device, values.nbytes, kind, session.stream)
        session.copy_out(target, values.nbytes)
        session.record(after)
        session.wait()
        np.testing.assert_array_equal(target.view(values.shape, np.float32), values)
        assert session.between(before, after) > 0


@pytest.mark.usefixtures("gpu")
def test_all_memory_comes_back() -> None:
    def free() -> int:
        with cuda.Session() as session:
            return int(session.call("cudaMemGetInfo")[0])

    free()  # makes the context
    before = free()
    for _ in range(20):
        with cuda.Session() as session:
            cuda.Buffer(session, 64 << 20)
    assert free() >= before - (8 << 20)


@pytest.mark.usefixtures("gpu")
def test_the_state_is_known() -> None:
    state = gpu_state()
    assert state is not None
    assert state["temperature_c"] > 0


@pytest.mark.usefixtures("gpu")
def test_pytorch_on_cuda_answers_as_on_the_cpu(tmp_path: Path) -> None:
    """Where there is a GPU and no TensorRT the network itself is compared, within the limit of float32."""
    if not torch.cuda.is_available():
        pytest.skip("this build of PyTorch has no CUDA")
    exported = dmformer.export(formats=["onnx"], output=tmp_path / "b")
    golden = load_golden(exported.output / "golden.npz")
    model = load_checkpoint(DEMONSTRATION_CHECKPOINT).model().cuda()
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        answers = model(torch.from_numpy(golden.inputs).cuda()).cpu().numpy()
    limit = float32_limit(golden.outputs, golden.outputs_float64)["logits"]
    assert np.abs(answers - golden.outputs["logits"]).max() <= limit.max_abs


def test_the_runtime_moves_and_replays_what_an_engine_computes(
    gpu: cuda.Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The runtime on the GPU's own memory, stream, events and graphs; the engine's arithmetic alone is a double's."""
    onnx_file = tmp_path / "model.onnx"
    checkpoint = load_checkpoint(DEMONSTRATION_CHECKPOINT)
    trace(checkpoint, checkpoint.model(), onnx_file)
    path, target = gpu_double.plan_of(onnx_file, tmp_path, compute_capabilities=(gpu.compute_capability,), gpu=gpu.name)
    gpu_double.install_on_a_gpu(monkeypatch)
    rows = np.random.default_rng(0).standard_normal((8, 3, 32, 32), np.float32)
    with TensorRtRuntime(path, precision="fp32", target=target) as runtime:
        assert gpu.name in runtime.details.device
        for batch in (1, 8, 3):
            for turn in range(4):  # plainly, recorded, replayed
                given = np.ascontiguousarray(np.roll(rows, turn, axis=0)[:batch])
                answers = runtime.run({"image": given})["logits"]
                np.testing.assert_array_equal(answers, given.reshape(batch, -1)[:, :10])
                assert runtime.device_ns is not None
                assert runtime.device_ns > 0
        assert runtime._captured is not None
        assert runtime._captured.graph is not None


@pytest.mark.slow
def test_build_verify_bench(engine: EngineOptions, few_images: Path, tmp_path: Path) -> None:
    result = dmformer.export(
        formats=["onnx", "trt"],
        precisions=["fp32", "fp16", "int8"],
        calibration=few_images,
        max_accuracy_drop=5,
        engine=engine,
        output=tmp_path / "b",
    )
    assert result.parity.passed
    engines = [item for item in result.manifest.artifacts if item.format == "tensorrt"]
    assert [item.precision for item in engines] == ["fp32", "fp16", "int8"]
    assert all(item.speed is not None and item.layers for item in engines)
    assert dmformer.verify(tmp_path / "b", runtimes=["trt"]).passed
    report = dmformer.bench(tmp_path / "b", runtimes=["trt"], batches=[1, 4], duration_s=1)
    assert all(row.device_latency_ms is not None for row in report.results)
    assert all(row.gpu for row in report.results)
