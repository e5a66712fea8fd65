"""Layouts loaded and asked in NVIDIA's tritonserver, its Python backend: the program itself, on loopback ports."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from dmformer.assets import SAMPLE_IMAGES
from dmformer.bench.load import LoadTarget, ask_alone, put_load
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.errors import StageFailed, UnavailableError
from dmformer.layouts.api import serve_layout
from dmformer.serve.client import ServerClient
from dmformer.serve.predictor import load as load_predictor
from dmformer.verify.server import verify_server
from tests.bundles import adopt
from tests.tritonserver import Triton, triton

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dmformer.export.cached import ExportResult
    from dmformer.verify.report import Check, ParityReport
    from tests.conftest import Run

pytestmark = [
    pytest.mark.serving,
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tritonserver's wheel is for Linux"),
]
FP32, IMAGES = "dmformer_nano_onnx_fp32", "dmformer_nano_onnx_fp32_images"
SCENES = "dmformer_nano_fpn_onnx_fp32"
SWAPPED, RENAMED = "swapped", "dmformer_nano_openvino_fp16"  # at whose name onnx int8 is served
CLAIMED = "dmformer_nano_openvino_int8"  # at whose name onnx fp32 is served


@dataclass
class Served:
    """A server, and the bundles that it serves."""

    triton: Triton
    digits: Bundle
    scenes: Bundle


def swap_classes(bundle: Path) -> None:
    """Exchange classes 3 and 5 in the last layer of the ONNX file, and let the manifest say that this is right."""
    path = bundle / "onnx/fp32/model.onnx"
    model = onnx.load(str(path))
    changed = 0
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        axes = [axis for axis, size in enumerate(array.shape) if size == 10]
        if axes:
            order = [0, 1, 2, 5, 4, 3, 6, 7, 8, 9]
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.take(array, order, axes[0]), tensor.name))
            changed += 1
    assert changed == 2  # weight and bias
    onnx.save(model, str(path))
    adopt(bundle, "onnx/fp32/model.onnx")


def renamed(models: Path, source: str, name: str) -> None:
    """Serve a model under another name."""
    shutil.copytree(models / source, models / name)
    config = models / name / "config.pbtxt"
    config.write_text(config.read_text().replace(f'"{source}"', f'"{name}"', 1))


@pytest.fixture(scope="module")
def served(
    reduced: ExportResult, segmentation: ExportResult, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    models = folder / "models"
    models.mkdir()
    wrong = Path(shutil.copytree(reduced.output, folder / "wrong"))
    swap_classes(wrong)
    digits, scenes = open_bundle(reduced.output), open_bundle(segmentation.output)
    for number, (bundle, options) in enumerate(
        (
            (digits, {"precisions": ["fp32"], "images": True}),
            (digits, {"runtimes": ["ov"], "precisions": ["int8"]}),
            (digits, {"runtimes": ["ort"], "precisions": ["int8"]}),
            (scenes, {"runtimes": ["ort"], "images": True}),
            (open_bundle(wrong), {"runtimes": ["ort"], "precisions": ["fp32"]}),
        )
    ):
        serve_layout("triton", bundle, folder / str(number), backend="python", **options)  # type: ignore[arg-type]
        made = folder / str(number) / "models"
        if bundle.root == wrong:
            renamed(made, FP32, SWAPPED)
            shutil.rmtree(made / FP32)
        for path in made.iterdir():
            shutil.move(path, models / path.name)
    renamed(models, "dmformer_nano_onnx_int8", RENAMED)
    shutil.rmtree(models / CLAIMED)
    renamed(models, FP32, CLAIMED)
    with triton(models, folder / "run", "--model-control-mode=explicit", "--load-model=*") as server:
        yield Served(server, digits, scenes)


def failed(report: ParityReport) -> list[Check]:
    return [check for check in report.checks if not check.passed]


def target_of(served: Served, bundle: Bundle, name: str, rows: Any = None) -> LoadTarget:
    with ServerClient(served.triton.http) as client:
        given = client.model(name).inputs[0]
    rows = bundle.golden().inputs if rows is None else rows
    return LoadTarget(served.triton.http, name, "", given, rows, [one.name for one in bundle.manifest.outputs], 60.0)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_the_demonstrations_hold(served: Served, scheme: str) -> None:
    url = getattr(served.triton, scheme)
    for bundle, names in ((served.digits, (FP32, IMAGES)), (served.scenes, (SCENES, f"{SCENES}_images"))):
        for name in names:
            report = verify_server(bundle, url, model=name)
            assert report.passed, failed(report)
            assert report.server is not None
            assert report.server.name == "triton"
            stages = {check.stage for check in report.checks if check.runtime == "server"}
            expected = {"model", "runtime", "decisions", "rows", "shuffled", "repeated", "batches", "concurrent"}
            assert stages == expected | ({"preprocessing", "classes"} if name.endswith("_images") else set())
    for name in ("dmformer_nano_onnx_int8", "dmformer_nano_openvino_fp32"):
        report = verify_server(served.digits, url, model=name)
        assert report.passed, failed(report)


def test_the_command_names_the_wrong_ones(served: Served, inline: Callable[..., Run]) -> None:
    run = inline("verify", served.digits.root, "--server", served.triton.http)
    assert run.code == 1
    assert "checks failed; first: model in dmformer_nano_openvino_fp16:1 fp16" in run.error_line
    assert inline("verify", served.digits.root, "--server", served.triton.http, "--model", FP32).code == 0
    assert inline("verify", served.digits.root, "--server", served.triton.http, "--model", "none").code == 2


def test_exchanged_classes_are_caught(served: Served) -> None:
    wrong = failed(verify_server(served.digits, served.triton.http, model=SWAPPED, precision="fp32"))
    assert {check.stage for check in wrong} == {"model", "runtime", "decisions"}
    assert "of another bundle" in str(wrong[0].reason)
    assert "classes are exchanged: 5 (5) in the place of 3 (3), 3 (3) in the place of 5 (5)" in str(wrong[1].reason)


def test_another_precision_is_caught(served: Served) -> None:
    wrong = failed(verify_server(served.digits, served.triton.http, model=RENAMED))
    assert "onnx int8 of this bundle; expected" in str(wrong[0].reason)
    assert "runtime" in {check.stage for check in wrong}
    assert any("these are the answers of int8" in str(check.reason) for check in wrong)
    better = failed(verify_server(served.digits, served.triton.http, model=CLAIMED))
    assert [check.stage for check in better] == ["model", "precision"]


def test_files_of_images_get_the_classes_that_the_predictor_gives(served: Served) -> None:
    files = sorted(SAMPLE_IMAGES.glob("*.png"))
    rows = np.array([[path.read_bytes()] for path in files], np.object_)
    with ServerClient(served.triton.http) as client, load_predictor(served.digits.root, "onnxruntime", "fp32") as own:
        given = client.model(IMAGES).inputs[0]
        wanted = ["class_name", "class_index", "probabilities"]
        answers = [client.infer(IMAGES, given, rows[n : n + 1], wanted) for n in range(len(rows))]
        for answer, prediction in zip(answers, own.predict(files, top_k=1), strict=True):
            assert answer["class_name"].reshape(-1)[0].decode() == prediction.classes[0].name
            assert answer["class_index"].reshape(-1)[0] == prediction.classes[0].index
            assert answer["probabilities"].max() == pytest.approx(prediction.classes[0].probability, abs=1e-6)


@pytest.mark.parametrize("name", [FP32, IMAGES])
def test_two_thousand_requests_are_answered_each_its_own(served: Served, name: str) -> None:
    rng = np.random.default_rng(0)
    golden = served.digits.golden().inputs
    rows: Any = np.concatenate([golden, rng.standard_normal((59, *golden.shape[1:])).astype(np.float32)])
    if name == IMAGES:
        from dmformer.data.images import encode_png

        pixels = rng.integers(0, 256, (64, 32, 32, 3), np.uint8)
        rows = np.array([[encode_png(one)] for one in pixels], np.object_)
    target = target_of(served, served.digits, name, rows)
    alone = ask_alone(target)
    samples = put_load(target, 16, requests=2000, alone=alone)
    assert dict(samples.errors) == {}
    assert (len(samples.latencies_ns), samples.mixed_up) == (2000, 0)


def post(served: Served, name: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    address = served.triton.http.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=60)
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    with closing(connection):
        connection.request("POST", f"/v2/models/{name}/infer", body, named)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_malformed_requests_get_an_error_and_others_an_answer(served: Served) -> None:
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": [0.5] * 3072}
    image = {"name": "encoded_image", "datatype": "BYTES", "shape": [1, 1], "data": ["no image"]}
    bad: list[tuple[str, bytes]] = [
        (FP32, b"no JSON"),
        (FP32, b"{}"),
        (FP32, b'{"inputs": []}'),
        (FP32, b"[" * 100_000),
        *(
            (FP32, json.dumps({"inputs": [{**tensor, **change}]}).encode())
            for change in (
                {"name": "other"},
                {"datatype": "INT32"},
                {"datatype": "NONE"},
                {"shape": [1, 3, 31, 32]},
                {"shape": [3, 32, 32]},
                {"shape": [0, 3, 32, 32], "data": []},
                {"shape": [-1, 3, 32, 32]},
                {"shape": [9, 3, 32, 32], "data": [0.5] * 9 * 3072},
                {"data": [0.5] * 5},
                {"data": ["x"] * 3072},
                {"data": [1e999] * 3072},
            )
        ),
        (FP32, json.dumps({"inputs": [tensor], "outputs": [{"name": "none"}]}).encode()),
        *((IMAGES, json.dumps({"inputs": [{**image, **change}]}).encode()) for change in ({}, {"data": [""]})),
    ]
    target = target_of(served, served.digits, FP32)
    alone = ask_alone(target)
    stubs = served.triton.stubs()
    with threading_load(target, alone) as samples:
        for name, body in bad:
            status, said = post(served, name, body)
            assert 400 <= status < 600, (name, body[:100], said)
            assert b"error" in said, (body[:100], said)
        status, said = post(served, FP32, b"\0" * 100, Inference_Header_Content_Length="1000000")
        assert 400 <= status < 600, said
    assert samples[0].latencies_ns
    assert (dict(samples[0].errors), samples[0].mixed_up) == ({}, 0)
    assert served.triton.stubs() == stubs
    status, said = post(served, IMAGES, json.dumps({"inputs": [image]}).encode())
    assert b"no image that is read here; expected one of BMP" in said


class threading_load:  # noqa: N801 - used as a function
    """Put load on a server while the block runs; gives a list with what came of it once the block has ended."""

    def __init__(self, target: LoadTarget, alone: Any, concurrency: int = 4) -> None:
        self._ends = threading.Event()
        self.samples: list[Any] = []

        def run() -> None:
            while not self._ends.is_set():
                self.samples.append(put_load(target, concurrency, requests=200, alone=alone))

        self._thread = threading.Thread(target=run)

    def __enter__(self) -> list[Any]:
        self._thread.start()
        return self.samples

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        for more in self.samples[1:]:
            self.samples[0].latencies_ns += more.latencies_ns
            self.samples[0].errors.update(more.errors)
            self.samples[0].mixed_up += more.mixed_up


def test_a_repository_is_reloaded_under_load(served: Served) -> None:
    import tritonclient.http

    target = target_of(served, served.digits, FP32)
    alone = ask_alone(target)
    before = served.triton.stubs()
    client = tritonclient.http.InferenceServerClient(served.triton.http.removeprefix("http://"), network_timeout=120)
    config = Path(served.triton.repository / FP32 / "config.pbtxt")
    with threading_load(target, alone) as samples:
        time.sleep(1)
        config.write_text(
            config.read_text().replace("max_queue_delay_microseconds: 100", "max_queue_delay_microseconds: 200")
        )
        client.load_model(FP32)
        time.sleep(1)
    assert served.triton.stubs() != before  # another process answers
    assert (dict(samples[0].errors), samples[0].mixed_up) == ({}, 0)
    assert len(samples[0].latencies_ns) >= 200
    assert verify_server(served.digits, served.triton.http, model=FP32).passed


def test_a_killed_stub_is_seen_by_its_answers_and_comes_back_when_it_is_loaded_anew(served: Served) -> None:
    """This release (2.51) starts no other stub, and says that model and server are ready: only requests tell."""
    import tritonclient.http

    target = target_of(served, served.scenes, SCENES)
    before = served.triton.stubs()
    victim = served.triton.stub_of(SCENES)
    os.kill(victim, signal.SIGKILL)
    with target.connect() as client, pytest.raises(StageFailed, match="the server refuses: Stub process"):
        target.ask(client, 0)  # a target's own limit would end it with another message
    wrong = failed(verify_server(served.scenes, served.triton.http, model=SCENES))
    assert "is not healthy" in str(wrong[0].reason)
    assert verify_server(served.digits, served.triton.http, model=FP32).passed
    manager = tritonclient.http.InferenceServerClient(served.triton.http.removeprefix("http://"), network_timeout=120)
    manager.unload_model(SCENES)
    manager.load_model(SCENES)
    after = served.triton.stubs()
    assert victim not in after
    assert len(after) == len(before)
    samples = put_load(target, 4, requests=50, alone=ask_alone(target))
    assert (dict(samples.errors), samples.mixed_up, len(samples.latencies_ns)) == ({}, 0, 50)
    assert verify_server(served.scenes, served.triton.http, model=SCENES).passed


def test_a_model_that_is_not_loaded_is_said(served: Served) -> None:
    import tritonclient.http

    client = tritonclient.http.InferenceServerClient(served.triton.http.removeprefix("http://"), network_timeout=120)
    client.unload_model(SWAPPED)
    try:
        with pytest.raises(UnavailableError, match=r"no model is ready: .*swapped"):
            verify_server(served.digits, served.triton.http, model=SWAPPED, precision="fp32")
    finally:
        client.load_model(SWAPPED)


def test_numpy_2_is_refused_when_the_model_is_loaded(
    exported: ExportResult, tmp_path: Path, inline: Callable[..., Run]
) -> None:
    """With the stub of this release it would send empty answers, and no error."""
    site = Path(np.__file__).parents[1]
    if int(np.__version__.partition(".")[0]) < 2:
        pytest.skip("NumPy 1 is installed here")
    serve_layout("triton", open_bundle(exported.output), tmp_path / "out", backend="python", runtimes=["ort"])
    with triton(tmp_path / "out/models", tmp_path / "run", packages=site, ready=False) as server:
        for _ in range(300):
            log = server.log.read_text()
            if "failed to load" in log:
                break
            time.sleep(0.2)
        assert re.search(rf"NumPy {re.escape(np.__version__)} does not go with this Python backend", log)
        run = inline("verify", exported.output, "--server", server.http)
        assert run.code == 3
        assert "does not go with this Python backend" in run.error_line
