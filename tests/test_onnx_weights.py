"""The graph without its weights: what onnxruntime is given must be the file, weight by weight."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.external_data_helper import load_external_data_for_model

from dmformer.bundle.reader import open_bundle
from dmformer.files import OpenFile
from dmformer.machine import give_memory_back
from dmformer.runtimes.onnx_weights import LEAST_BYTES, bytes_field, fields, number_field, refer_to_weights
from dmformer.runtimes.onnxruntime import OnnxRuntime

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.export.cached import ExportResult


@pytest.fixture
def path(exported: ExportResult, tmp_path: Path) -> Path:
    bundle = open_bundle(exported.output)
    return shutil.copy(bundle.load_path(bundle.artifacts("onnx")[0]), tmp_path / "model.onnx")


@pytest.fixture
def rows(exported: ExportResult) -> NDArray[np.float32]:
    return open_bundle(exported.output).golden().inputs[:2]


def answer(path: Path, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    with OnnxRuntime(path) as runtime:
        return runtime.run({runtime.inputs[0].name: rows})[runtime.outputs[0].name]


def plain(path: Path, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """As onnxruntime answers that reads the file itself."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = OnnxRuntime(path).threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: rows})[0]
    return found


def test_the_graph_with_its_weights_is_the_file(path: Path) -> None:
    expected, data = onnx.load(path), refer_to_weights(OpenFile(path))
    assert data is not None
    large = [tensor for tensor in expected.graph.initializer if len(tensor.raw_data) >= LEAST_BYTES]
    assert large
    assert len(data) == pytest.approx(path.stat().st_size - sum(len(tensor.raw_data) for tensor in large), abs=10_000)
    found = onnx.load_model_from_string(data)
    moved = [tensor.name for tensor in found.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert moved == [tensor.name for tensor in large]
    load_external_data_for_model(found, str(path.parent))
    for tensor in found.graph.initializer:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    for tensor in expected.graph.initializer:
        tensor.ClearField("data_location")
    assert found == expected


def test_answers_are_those_of_the_file_to_the_bit(reduced: ExportResult) -> None:
    bundle = open_bundle(reduced.output)
    artifacts = bundle.artifacts("onnx")
    assert {artifact.precision for artifact in artifacts} == {"fp32", "fp16", "int8"}
    rows = bundle.golden().inputs[:2]
    for artifact in artifacts:
        path = bundle.load_path(artifact)
        assert refer_to_weights(OpenFile(path)) is not None
        np.testing.assert_array_equal(answer(path, rows), plain(path, rows), err_msg=artifact.precision)


def test_the_engine_is_given_the_graph_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    real = onnxruntime.InferenceSession

    def session(model: object, *arguments: object, **named: object) -> object:
        given.append(model)
        return real(model, *arguments, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with OnnxRuntime(path) as runtime:
        assert runtime.inspect().layers()
    assert given == [refer_to_weights(OpenFile(path))] * 2  # to run, and to be profiled


def test_a_file_of_small_tensors_is_taken_as_it_is(
    path: Path, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer(path, rows)
    monkeypatch.setattr("dmformer.runtimes.onnx_weights.LEAST_BYTES", path.stat().st_size)
    assert refer_to_weights(OpenFile(path)) is None
    np.testing.assert_array_equal(answer(path, rows), expected)


def test_through_a_link(path: Path, rows: NDArray[np.float32], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere/another name.onnx"
    link.symlink_to(path)
    np.testing.assert_array_equal(answer(link, rows), answer(path, rows))


def test_weights_that_were_in_another_file_stay_there(path: Path, rows: NDArray[np.float32], tmp_path: Path) -> None:
    apart = tmp_path / "apart/model.onnx"
    apart.parent.mkdir()
    onnx.save_model(onnx.load(path), apart, save_as_external_data=True, location="weights.bin", size_threshold=1 << 17)
    data = refer_to_weights(OpenFile(apart))
    assert data is not None, "some are between the two thresholds"
    locations = {
        entry.value
        for tensor in onnx.load_model_from_string(data).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"model.onnx", "weights.bin"}
    np.testing.assert_array_equal(answer(apart, rows), answer(path, rows))


def test_a_file_that_is_replaced_while_it_runs_changes_nothing(path: Path, rows: NDArray[np.float32]) -> None:
    with OnnxRuntime(path) as runtime:
        name, output = runtime.inputs[0].name, runtime.outputs[0].name
        before = runtime.run({name: rows})[output]
        other = path.with_name("new")
        other.write_bytes(b"\0" * path.stat().st_size)
        other.replace(path)
        np.testing.assert_array_equal(runtime.run({name: rows})[output], before)


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 1 << 20, 1 << 40])
def test_numbers(number: int) -> None:
    tensor = onnx.TensorProto.FromString(bytes_field(8, b"name") + number_field(1, number))
    assert (tensor.name, list(tensor.dims)) == ("name", [number])


@pytest.mark.parametrize("size", [0, 127, 128, 70_000])
def test_bytes(size: int) -> None:
    before, data = number_field(1, 300), bytes_field(9, bytes(size))
    (field,) = fields(before + data, 0, len(before + data))
    assert (field.number, field.tag, field.last - field.first) == (9, len(before), size)


def test_memory_is_given_back_where_the_allocator_can(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(malloc_trim=given.append))
    give_memory_back()
    assert given == [0]
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace())
    give_memory_back()
    assert given == [0]
