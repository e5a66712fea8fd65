"""What Triton's Python backend calls, without Triton: batches, and requests that cannot be answered."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dmformer.bundle import settings as settings_module
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import choose
from dmformer.bundle.settings import Settings, write_settings
from dmformer.data.images import encode_png
from dmformer.errors import CheckFailed, DMFormerError, StageFailed, UnavailableError
from dmformer.layouts import triton_config
from dmformer.layouts.api import serve_layout
from dmformer.serve import triton_model
from dmformer.serve.predictor import Predictor, softmax
from dmformer.serve.triton_model import BatchAnswers, TritonPythonModel, check_numpy
from tests.conftest import ROOT
from tests.tritonserver import environment, install

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dmformer.export.cached import ExportResult


class Tensor:
    """As ``pb_utils.Tensor``, of what is used of it."""

    def __init__(self, name: str, array: Any) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> Any:
        return self.array

    def to_dlpack(self) -> Any:
        return self.array

    @staticmethod
    def from_dlpack(name: str, array: Any) -> Tensor:
        return Tensor(name, array)


def backend() -> Any:
    """A double of ``triton_python_backend_utils``."""
    return SimpleNamespace(
        Tensor=Tensor,
        TritonError=str,
        InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(tensors=output_tensors, error=error),
        get_input_tensor_by_name=lambda request, name: Tensor(name, request.inputs[name]),
    )


def request(outputs: list[str], **inputs: Any) -> Any:
    return SimpleNamespace(inputs=inputs, requested_output_names=lambda: outputs)


@pytest.fixture(scope="module")
def predictor(exported: ExportResult) -> Iterator[Predictor]:
    with Predictor(choose(open_bundle(exported.output), "onnxruntime", None)) as opened:
        yield opened


def test_each_request_gets_the_rows_that_are_its_own(predictor: Predictor) -> None:
    inputs = predictor.bundle.golden().inputs
    alone = predictor.run(inputs)["logits"]
    answers = BatchAnswers(predictor, images=False).answer([inputs[:2], inputs[2:3], inputs[3:]])
    for answer, rows in zip(answers, (slice(0, 2), slice(2, 3), slice(3, None)), strict=True):
        assert isinstance(answer, dict)
        np.testing.assert_allclose(answer["logits"], alone[rows], atol=1e-5)


def test_a_bad_request_fails_alone(predictor: Predictor) -> None:
    inputs = predictor.bundle.golden().inputs
    broken = np.full((1, 3, 32, 32), np.nan, np.float32)
    small = np.zeros((1, 3, 16, 16), np.float32)
    good, bad, wrong, none, last = BatchAnswers(predictor, images=False).answer(
        [inputs[:1], broken, small, inputs[:0], inputs[1:2]]
    )
    for answer, row in ((good, 0), (last, 1)):
        assert isinstance(answer, dict)
        np.testing.assert_allclose(answer["logits"], predictor.run(inputs[row : row + 1])["logits"], atol=1e-5)
    assert isinstance(bad, StageFailed)
    assert "NaN or infinite" in str(bad)
    assert isinstance(wrong, DMFormerError)
    assert "(1, 3, 16, 16); expected float32" in str(wrong)
    assert "no rows" in str(none)


def test_images_get_classes_and_the_tensor(predictor: Predictor) -> None:
    golden = predictor.bundle.golden()
    files = np.array([[encode_png(pixels)] for pixels in golden.images], np.object_)
    text = np.array([[b"no image"]], np.object_)
    first, bad, rest = BatchAnswers(predictor, images=True).answer([files[:1], text, files[1:]])
    assert "no image that is read here" in str(bad)
    assert isinstance(first, dict)
    assert isinstance(rest, dict)
    logits = np.concatenate([first["logits"], rest["logits"]])
    np.testing.assert_allclose(logits, golden.outputs["logits"], atol=1e-4)
    np.testing.assert_allclose(np.concatenate([first["image"], rest["image"]]), golden.inputs, atol=1e-6)
    np.testing.assert_allclose(rest["probabilities"], softmax(rest["logits"]), atol=1e-6)
    assert rest["class_index"].tolist() == rest["logits"].argmax(1)[:, None].tolist()
    assert [name.decode() for name in rest["class_name"].reshape(-1)] == [str(one) for one in rest["class_index"][:, 0]]


def test_pixels_get_a_map_of_classes_at_any_size(segmentation_open: ExportResult) -> None:
    rng = np.random.default_rng(0)
    with Predictor(choose(open_bundle(segmentation_open.output), "onnxruntime", None)) as predictor:
        files = [encode_png(rng.integers(0, 256, (height, 64, 3), np.uint8)) for height in (64, 128, 64)]
        requests = [np.array([[one]], np.object_) for one in files]
        both = np.array([[files[0]], [files[1]]], np.object_)
        *answers, mixed = BatchAnswers(predictor, images=True).answer([*requests, both])
    assert "several sizes in one request" in str(mixed)
    for answer, height in zip(answers, (32, 64, 32), strict=True):
        assert isinstance(answer, dict)
        assert (answer["class_map"].shape, answer["class_map"].dtype) == ((1, height, 32), np.int32)
        assert (answer["class_map"] == answer["logits"].argmax(1)).all()


def test_an_engine_that_fails_is_an_error_of_each_request(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr(predictor, "run", fail)
    inputs = predictor.bundle.golden().inputs
    answers = BatchAnswers(predictor, images=False).answer([inputs[:1], inputs[1:2]])
    assert [str(answer) for answer in answers] == ["MemoryError: none left"] * 2


def initialized(folder: Path, name: str, **changes: str) -> TritonPythonModel:
    """A model as Triton starts it, with its configuration as Triton hands it over."""
    root = folder / "models" / name
    text = (root / "config.pbtxt").read_text()
    parameters = {}
    for key, value in ((block.split('"')[1], block.split('"')[3]) for block in text.split("parameters {")[1:]):
        parameters[key] = {"string_value": changes.get(key, value)}
    model = TritonPythonModel()
    config = {"parameters": parameters, "instance_group": [{"count": 2}]}
    model.initialize({"model_config": json.dumps(config), "model_repository": str(root), "model_version": "1"})
    return model


def test_the_class_that_triton_calls(exported: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend())
    bundle = open_bundle(exported.output)
    serve_layout("triton", bundle, tmp_path / "out", backend="python", runtimes=["ort"], images=True)
    model = initialized(tmp_path / "out", "dmformer_nano_onnx_fp32")
    inputs = bundle.golden().inputs
    good, bad = model.execute([request(["logits"], image=inputs[:2]), request(["logits"], image=inputs[:, :, :5])])
    assert [tensor.name for tensor in good.tensors] == ["logits"]
    np.testing.assert_allclose(good.tensors[0].array, bundle.golden().outputs["logits"][:2], atol=1e-4)
    assert "expected float32" in bad.error
    model.finalize()
    model = initialized(tmp_path / "out", "dmformer_nano_onnx_fp32_images")
    file = np.array([[encode_png(bundle.golden().images[0])]], np.object_)
    (answer,) = model.execute([request(["class_name", "probabilities"], encoded_image=file)])
    assert {tensor.name for tensor in answer.tensors} == {"class_name", "probabilities"}
    model.finalize()
    with pytest.raises(CheckFailed, match="the configuration says 000000000000"):
        initialized(tmp_path / "out", "dmformer_nano_onnx_fp32", dmformer_sha256="0" * 64)
    (tmp_path / "out/models/dmformer_nano_onnx_fp32/1/bundle/onnx/fp32/model.onnx").write_bytes(b"other")
    with pytest.raises(CheckFailed, match=r"model\.onnx"):
        initialized(tmp_path / "out", "dmformer_nano_onnx_fp32")


def test_threads_count_where_they_were_tuned(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend())
    processor = 'Some "Processor" 3'
    for module in (settings_module, triton_config, triton_model):
        monkeypatch.setattr(module, "machine_key", lambda: processor)
    monkeypatch.setattr(triton_model, "usable_cores", lambda: 4)
    fields = {"runtime": "onnxruntime", "precision": "fp32", "p50_ms": 1.0, "measured_at": "2026-01-01T00:00:00+00:00"}
    write_settings(open_bundle(bundle), Settings(threads=1, **fields))
    serve_layout("triton", open_bundle(bundle), tmp_path / "out", backend="python")
    name = "dmformer_nano_onnx_fp32"
    written = (tmp_path / "out/models" / name / "config.pbtxt").read_text()
    assert 'key: "dmformer_machine"\n  value { string_value: "Some \\042Processor\\042 3" }' in written
    for key, threads in ((processor, 1), ("another", 2)):  # four cores of two instances
        model = initialized(tmp_path / "out", name, dmformer_machine=key)
        assert model._predictor.runtime.threads == threads
        model.finalize()


def test_a_stub_that_loses_what_is_in_a_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_numpy(backend())
    monkeypatch.setattr(Tensor, "to_dlpack", lambda self: np.zeros_like(self.array))
    with pytest.raises(UnavailableError, match="whose answers would be empty; expected NumPy 1"):
        check_numpy(backend())


def test_a_named_folder_that_is_no_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "mine" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years of work")
    monkeypatch.setenv("DMFORMER_SERVING_ENVIRONMENT", str(kept.parent))
    with pytest.raises(RuntimeError, match="neither empty nor such an environment"):
        environment()
    assert kept.read_text() == "years of work"


def test_without_an_index_the_server_is_skipped_but_where_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "bin/pip"
    pip.parent.mkdir()
    pip.write_text("#!/bin/sh\necho 'WARNING: Retrying (Retry(total=4)) after connection broken' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.delenv("DMFORMER_REQUIRE_SERVING", raising=False)
    with pytest.raises(pytest.skip.Exception, match="index cannot be reached"):
        install(tmp_path, ["a-package"])
    monkeypatch.setenv("DMFORMER_REQUIRE_SERVING", "1")
    with pytest.raises(RuntimeError, match="Retrying"):
        install(tmp_path, ["a-package"])
    monkeypatch.delenv("DMFORMER_REQUIRE_SERVING")
    pip.write_text("#!/bin/sh\necho 'ERROR: No matching distribution' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="No matching distribution"):
        install(tmp_path, ["a-package"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_server_ends_with_tests_that_are_killed() -> None:
    program = (
        "import os, subprocess; from tests.tritonserver import end_with_the_tests\n"
        "with subprocess.Popen(['sleep', '600'], preexec_fn=end_with_the_tests()) as child:\n"
        "    print(child.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    # The pipe ends when the last process that has it does: the child too.
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, timeout=120, check=False)
    assert (done.returncode, int(done.stdout) > 0) == (-9, True)
