"""Which compiled model answers a batch size in OpenVINO: its own for the first few, an open one for the rest."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dmformer.bundle.reader import open_bundle
from dmformer.errors import StageFailed
from dmformer.runtimes.openvino import OpenVinoRuntime

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.export.cached import ExportResult

ov = pytest.importorskip("openvino")


@pytest.fixture
def path(exported: ExportResult) -> Path:
    bundle = open_bundle(exported.output)
    return bundle.load_path(bundle.artifacts("openvino")[0])


@pytest.fixture
def rows(exported: ExportResult) -> NDArray[np.float32]:
    return np.resize(exported_inputs := open_bundle(exported.output).golden().inputs, (7, *exported_inputs.shape[1:]))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The batch of each model that is compiled; ``None`` is an open one."""
    found: list[int | None] = []
    real = ov.Core.compile_model

    def compile_model(core: Any, model: Any, *arguments: Any) -> Any:
        size = model.inputs[0].get_partial_shape()[0]
        found.append(size.get_length() if size.is_static else None)
        return real(core, model, *arguments)

    monkeypatch.setattr(ov.Core, "compile_model", compile_model)
    return found


@pytest.mark.slow
def test_the_first_sizes_have_models_of_their_own(
    path: Path, rows: NDArray[np.float32], compiled: list[int | None]
) -> None:
    answers = {}
    with OpenVinoRuntime(path) as runtime:
        name, output = runtime.inputs[0].name, runtime.outputs[0].name
        assert compiled == [1]
        assert runtime.inputs[0].shape[0] == "batch"
        for batch in (2, 1, 2, 5, 3, 3, 7, 6, 7, 1, 5):
            answers[batch] = runtime.run({name: rows[:batch]})[output]
            assert answers[batch].shape[0] == batch
        assert compiled == [1, 2, 5, 3, None]
    for batch, answer in answers.items():
        np.testing.assert_allclose(answer, answers[7][:batch], rtol=0, atol=1e-5)
    with runtime:  # nothing is left of the block before
        assert compiled == [1, 2, 5, 3, None, 1]


def test_a_large_network_has_one_model_with_an_open_batch(
    path: Path, rows: NDArray[np.float32], compiled: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmformer.runtimes.openvino.FIXED_MOST_BYTES", path.with_suffix(".bin").stat().st_size - 1)
    with OpenVinoRuntime(path) as runtime:
        for batch in (1, 2, 5, 1):
            runtime.run({runtime.inputs[0].name: rows[:batch]})
        assert compiled == [None]
        assert runtime.inspect().layers() == {"fp32": sum(runtime.inspect().layers().values())}


@pytest.mark.parametrize(("batches", "expected"), [((1, 1), 1), ((2, 2, 2), 2), ((1, 2), None)])
def test_what_is_profiled_is_what_runs(
    path: Path, rows: NDArray[np.float32], compiled: list[int | None], batches: tuple[int, ...], expected: int | None
) -> None:
    with OpenVinoRuntime(path) as runtime:
        name = runtime.inputs[0].name
        kernels = runtime.inspect().kernels([{name: rows[:batch]} for batch in batches])
        assert compiled == [1, expected]
        assert all(len(kernel.ns) == len(batches) for kernel in kernels)


def test_a_kernel_that_is_too_quick_to_be_counted_took_no_time(
    path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO says of what took less than a microsecond that it was not run."""

    def told(name: str, microseconds: int) -> Any:
        status = SimpleNamespace(EXECUTED="executed")
        executed = "executed" if microseconds else "not run"
        taken = timedelta(microseconds=microseconds)
        return SimpleNamespace(node_name=name, node_type="Relu", real_time=taken, status=executed, Status=status)

    counted = iter([[told("slow", 5), told("quick", 0)], [told("slow", 4), told("quick", 1)]])
    monkeypatch.setattr("dmformer.runtimes.openvino._Request.profiling_info", property(lambda _: next(counted)))
    with OpenVinoRuntime(path) as runtime:
        kernels = runtime.inspect().kernels([{runtime.inputs[0].name: rows[:1]}] * 2)
    assert {kernel.name: kernel.ns for kernel in kernels} == {"slow": (5000, 4000), "quick": (0, 1000)}


def test_layers_are_the_same_for_every_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenVinoRuntime(path) as runtime:
        fixed = runtime.inspect().layers()
    monkeypatch.setattr("dmformer.runtimes.openvino.FIXED_MOST_BYTES", 0)
    with OpenVinoRuntime(path) as runtime:
        assert runtime.inspect().layers() == fixed


def test_each_model_is_checked(path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenVinoRuntime(path) as runtime:
        read_back = ov.CompiledModel.get_property

        def changed(model: Any, asked: str) -> Any:
            return ["GPU.0"] if asked == "EXECUTION_DEVICES" else read_back(model, asked)

        monkeypatch.setattr(ov.CompiledModel, "get_property", changed)
        runtime.run({runtime.inputs[0].name: rows[:1]})
        with pytest.raises(StageFailed, match=r"compiled for GPU\.0 at f32; expected CPU at f32"):
            runtime.run({runtime.inputs[0].name: rows[:2]})


def test_taps_are_shown_at_every_batch(path: Path, rows: NDArray[np.float32]) -> None:
    with OpenVinoRuntime(path) as runtime:
        tap = min(runtime.inspect().inner_tensors() - {runtime.inputs[0].name, runtime.outputs[0].name})
    with OpenVinoRuntime(path, taps=[tap]) as runtime:
        for batch in (1, 3):
            assert tap in runtime.run({runtime.inputs[0].name: rows[:batch]})


def test_inputs_of_unlike_batches_are_refused(tmp_path: Path) -> None:
    """NumPy would write a single row into each of the buffer's."""
    onnx = pytest.importorskip("onnx")
    values = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 3]) for name in ("a", "b", "sum")]
    node = onnx.helper.make_node("Add", ["a", "b"], ["sum"])
    graph = onnx.helper.make_graph([node], "sum", values[:2], values[2:])
    opset = onnx.helper.make_opsetid("", 20)
    (tmp_path / "sum.onnx").write_bytes(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
    )
    two = np.ones((2, 3), np.float32)
    with OpenVinoRuntime(tmp_path / "sum.onnx") as runtime:
        assert (runtime.run({"a": two, "b": two})["sum"] == 2).all()
        with pytest.raises(StageFailed, match=r"input 'b' of shape \(1, 3\); expected \(2, 3\)"):
            runtime.run({"a": two, "b": two[:1]})
