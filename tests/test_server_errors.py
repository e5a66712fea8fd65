"""What a client makes of a server's errors and of wrong models: against a double of the protocol, not a server."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dmformer.bench.load import LoadTarget, _sample, ask_alone, nearest, put_load
from dmformer.bench.server import bench_server
from dmformer.bundle.reader import open_bundle
from dmformer.errors import CheckFailed, DMFormerError, UnavailableError, UsageError
from dmformer.serve.client import ServerClient, TensorMetadata
from dmformer.serve.predictor import softmax
from dmformer.serve.served import SHA256
from dmformer.serve.targets import find_models
from dmformer.serve.triton_model import BatchAnswers, TritonPythonModel
from dmformer.verify.server import _exchanged_classes, _wrong_classes, verify_server
from tests.bundles import one_line
from tests.protocol_double import Double, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.reader import Bundle
    from dmformer.export.cached import ExportResult
    from dmformer.verify.report import Check, ParityReport
    from tests.conftest import Run

pytest.importorskip("geventhttpclient", reason="the extra serving is not installed")
NAME = "dmformer_nano_onnx_fp32"
GIVEN = {"name": "image", "datatype": "FP32", "shape": [-1, 3, 32, 32]}
GIVES = [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]


@pytest.fixture(scope="module")
def opened(reduced: ExportResult) -> Bundle:
    return open_bundle(reduced.output)


@pytest.fixture(scope="module")
def golden(opened: Bundle) -> Golden:
    return opened.golden()


def replies(golden: Golden, precision: str) -> Callable[[NDArray[Any]], dict[str, NDArray[Any]]]:
    """The file's golden answers to golden rows, in any order."""

    def answer(rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        places = [int(np.abs(golden.inputs - row).reshape(len(golden.inputs), -1).max(1).argmin()) for row in rows]
        return {"logits": golden.files[precision]["logits"][places]}

    return answer


@pytest.fixture
def double(golden: Golden) -> Iterator[Double]:
    with serving(Double(replies(golden, "fp32"), NAME, dict(GIVEN), [dict(one) for one in GIVES])) as running:
        yield running


def failed(report: ParityReport) -> list[Check]:
    return [check for check in report.checks if not check.passed]


@pytest.mark.parametrize("extensions", [["binary_tensor_data"], []])
def test_right_answers_hold_in_either_form(opened: Bundle, double: Double, extensions: list[str]) -> None:
    double.extensions = extensions
    report = verify_server(opened, double.url)
    assert report.passed, failed(report)
    assert report.server is not None
    assert (report.server.name, report.server.models) == ("double", (f"{NAME}:3",))
    assert {check.stage for check in report.checks} >= {
        "model",
        "runtime",
        "rows",
        "shuffled",
        "repeated",
        "concurrent",
    }
    assert {check.engine for check in report.checks if check.runtime == "server"} == {f"{NAME}:3"}


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("html", "the answer is not of the protocol"),
        ("html 502", "the answer is not of the protocol (status 502, <!DOCTYPE html>"),
        ("list", "the answer is not of the protocol"),
        ("drip", "no answer within 0.5 s"),
    ],
)
def test_what_is_no_server_of_the_protocol_ends_in_one_line(
    opened: Bundle, double: Double, broken: str, says: str
) -> None:
    double.broken = broken
    with pytest.raises(UnavailableError) as caught:
        verify_server(opened, double.url, limit_s=0.5)
    assert says in one_line(caught.value)
    assert double.url in str(caught.value)


def test_a_server_that_is_not_there(opened: Bundle) -> None:
    with pytest.raises(UnavailableError, match="cannot be reached") as caught:
        verify_server(opened, "http://127.0.0.1:9")
    one_line(caught.value)
    with pytest.raises(UnavailableError, match="cannot be reached") as caught:
        verify_server(opened, "http://nowhere.invalid:8000")
    one_line(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://x",
        "http://",
        "http:// a",
        "",
        "http://127.0.0.1:abc",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://[::1",
        "http://:8000",
        "http://a..b",
        "http://a?b=c",
        "grpc://a\x1b:1",
        "http://me:secret@127.0.0.1:8000",
    ],
)
def test_what_is_no_address(opened: Bundle, url: str) -> None:
    with pytest.raises(UsageError, match="expected http://HOST:PORT") as caught:
        verify_server(opened, url)
    assert "secret" not in one_line(caught.value)


def test_a_path_behind_the_address_is_asked(double: Double) -> None:
    with pytest.raises(UnavailableError, match="expected a server of the Open"), ServerClient(f"{double.url}/base/"):
        pass
    assert double.asked == ["/base/v2"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("infer html", "the answer is not of the protocol"),
        ("infer refuses", "the server refuses: the model is out of memory really"),
        ("infer drip", "no answer within 1 s"),
        ("infer 302", "(status 302)"),
        ("infer upstream", "the server refuses: the upstream request timed out (status 503)"),
        ("infer cut", "model dmformer_nano_onnx_fp32"),
        ("infer empty", "output 'logits' is empty"),
        ("infer nothing", "no output 'logits' in the answer"),
    ],
)
def test_a_model_that_does_not_answer_fails_its_checks(opened: Bundle, double: Double, broken: str, says: str) -> None:
    double.broken = broken
    report = verify_server(opened, double.url, limit_s=1.0)
    reasons = [check.reason for check in failed(report) if check.stage == "runtime"]
    assert reasons
    assert all(reason is not None and says in reason and "\n" not in reason for reason in reasons), reasons


def test_wrong_tensors_are_named(opened: Bundle, double: Double) -> None:
    double.given["shape"] = [-1, 3, 64, 64]
    double.gives[0]["name"] = "scores"
    (check,) = failed(verify_server(opened, double.url))
    assert check.stage == "model"
    assert check.reason == (
        "outputs ['scores']; expected ['logits']; 'image' is FP32 [-1, 3, 64, 64]; expected float32 "
        "['batch', 3, 32, 32]"
    )


def test_exchanged_classes_are_named(opened: Bundle, double: Double, golden: Golden) -> None:
    right, order = replies(golden, "fp32"), [0, 1, 2, 5, 4, 3, 6, 7, 8, 9]
    double.answer = lambda rows: {"logits": right(rows)["logits"][:, order]}
    wrong = failed(verify_server(opened, double.url))
    assert {check.stage for check in wrong} == {"runtime", "decisions"}
    assert all("classes are exchanged: 5 (5) in the place of 3 (3)" in str(check.reason) for check in wrong)


@pytest.mark.parametrize("served", ["fp16", "int8"])
def test_another_precision_is_named(opened: Bundle, double: Double, golden: Golden, served: str) -> None:
    double.answer = replies(golden, served)
    wrong = failed(verify_server(opened, double.url))
    assert "runtime" in {check.stage for check in wrong}
    assert any(f"these are the answers of {served}" in str(check.reason) for check in wrong)


@pytest.mark.parametrize("expected", [pytest.param("fp16", marks=pytest.mark.slow), "int8"])
def test_float32_in_the_place_of_a_reduced_precision_is_caught(
    opened: Bundle, double: Double, golden: Golden, expected: str
) -> None:
    double.name = NAME.replace("fp32", expected)
    assert [check.stage for check in failed(verify_server(opened, double.url))] == ["precision"]
    double.answer = replies(golden, expected)
    assert verify_server(opened, double.url).passed


def test_answers_that_are_not_finite_fail(opened: Bundle, double: Double, golden: Golden) -> None:
    right = replies(golden, "fp32")
    double.answer = lambda rows: {"logits": right(rows)["logits"] * np.float32(np.nan)}
    wrong = failed(verify_server(opened, double.url))
    assert {check.stage for check in wrong} >= {"runtime", "decisions", "rows", "concurrent"}


@pytest.mark.slow
def test_an_artifact_that_the_server_itself_names_is_compared(opened: Bundle, double: Double) -> None:
    artifacts = {(one.format, one.precision): one for one in opened.manifest.artifacts}
    double.extensions = ["model_configuration"]
    double.parameters = {SHA256: artifacts["onnx", "int8"].sha256}
    (check,) = failed(verify_server(opened, double.url))
    assert "onnx int8 of this bundle; expected" in str(check.reason)
    double.parameters = {SHA256: "0" * 64}
    (check,) = failed(verify_server(opened, double.url))
    assert "of another bundle" in str(check.reason)
    double.parameters = {SHA256: artifacts["onnx", "fp32"].sha256}
    report = verify_server(opened, double.url)
    assert report.passed
    assert report.artifacts == (artifacts["onnx", "fp32"].sha256,)


def test_a_model_of_another_name_needs_its_precision(opened: Bundle, double: Double) -> None:
    double.name = "digits"
    with pytest.raises(UsageError, match="has no model any of dmformer_nano_onnx_fp32"):
        verify_server(opened, double.url)
    with pytest.raises(
        UsageError, match="says nothing of its precision; expected `precision`, one of fp16, fp32, int8"
    ):
        verify_server(opened, double.url, model="digits")
    assert verify_server(opened, double.url, model="digits", precision="fp32").passed
    with pytest.raises(UnavailableError, match="no model is ready"):
        verify_server(opened, double.url, model="other", precision="fp32")


def test_answers_that_are_mixed_up_are_counted(opened: Bundle, double: Double, golden: Golden) -> None:
    target = LoadTarget(
        double.url, NAME, "", TensorMetadata("image", "FP32", (-1, 3, 32, 32)), golden.inputs, ["logits"]
    )
    alone = ask_alone(target)
    assert [nearest(answer, alone) for answer in alone] == list(range(len(alone)))
    samples = put_load(target, 3, requests=20, alone=alone)
    assert (len(samples.latencies_ns), samples.mixed_up, dict(samples.errors)) == (20, 0, {})
    right = double.answer
    double.answer = lambda rows: {"logits": np.roll(golden.files["fp32"]["logits"], 1, 0)[: len(rows)]}
    assert put_load(target, 3, requests=20, alone=alone).mixed_up == 20 - 20 // len(golden.inputs)
    double.answer = right
    double.broken = "infer refuses"
    samples = put_load(target, 2, requests=10, alone=alone)
    assert samples.latencies_ns == []
    assert sum(samples.errors.values()) == 10


@pytest.mark.slow
def test_a_load_counts_what_failed(opened: Bundle, double: Double) -> None:
    report = bench_server(opened, double.url, concurrency=[1, 3], duration_s=0.3)
    assert [row.concurrency for row in report.rows] == [1, 3]
    assert all(row.answered > 0 and not row.failed and row.client_cpu_ms for row in report.rows)
    report.check_rows()
    asked = len(double.asked)
    right = double.answer

    def now_and_then(rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        if len(double.asked) > asked + 30 and len(double.asked) % 3 == 0:
            return {"scores": right(rows)["logits"]}
        return right(rows)

    double.answer = now_and_then
    report = bench_server(opened, double.url, concurrency=[2], duration_s=0.5)
    (row,) = report.rows
    assert row.failed > 0
    assert row.answered > 0
    assert sum(row.errors.values()) == row.failed
    with pytest.raises(CheckFailed, match="requests failed; first"):
        report.check_rows()


def test_the_commands(opened: Bundle, double: Double, inline: Callable[..., Run], golden: Golden) -> None:
    from jsonschema import Draft202012Validator

    from dmformer.schemas.__main__ import TYPES, schema

    run = inline("verify", opened.root, "--server", double.url, "--json", "report.json")
    assert run.code == 0, run.err
    assert f"asked double 1 at {double.url}" in run.out
    loaded = inline(
        "bench", opened.root, "--server", double.url, "--concurrency", "1,2", "--duration", "0.2", "--json", "-"
    )
    assert loaded.code == 0, loaded.err
    Draft202012Validator(schema(TYPES["load"])).validate(json.loads(loaded.out))
    double.answer = replies(golden, "int8")
    wrong = inline("verify", opened.root, "--server", double.url)
    assert wrong.code == 1
    assert f"first: runtime in {NAME}:3 fp32 at batch 1, against PyTorch: differs by" in wrong.error_line
    double.broken = "html"
    assert inline("verify", opened.root, "--server", double.url).code == 3
    for arguments, says in (
        (["verify", opened.root, "--server", double.url, "--cpu", "cortex-a72"], "one place to ask at a time"),
        (["verify", opened.root, "--server", double.url, "--bisect"], "--server asks for the golden answers"),
        (["verify", opened.root, "--model", "x"], "expected the address of the server"),
        (["bench", opened.root, "--server", double.url, "--batch", "2"], "--server with options of runtimes"),
        (["bench", opened.root, "--concurrency", "2"], "without --server"),
        (["bench", opened.root, "--server", double.url, "--concurrency", "1,x"], "expected numbers"),
        (["bench", opened.root, "--server", double.url, "--concurrency", "0"], "--concurrency"),
    ):
        refused = inline(*arguments)
        assert refused.code == 2, arguments
        assert says in refused.error_line


def test_every_wait_is_bounded_on_a_connection(double: Double) -> None:
    double.broken = "infer drip"
    with ServerClient(double.url, limit_s=0.5) as client, pytest.raises(DMFormerError, match="no answer within"):
        client.infer(
            NAME, TensorMetadata("image", "FP32", (-1, 3, 32, 32)), np.zeros((1, 3, 32, 32), np.float32), ["a"]
        )


def test_a_wait_that_begins_while_connecting_is_bounded_too(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    import gevent
    from geventhttpclient.connectionpool import ConnectionPool

    resolve, connect = ConnectionPool._resolve, ConnectionPool._connect_socket
    tried: list[Any] = []

    def connect_late(pool: Any, sock: Any, address: Any) -> Any:
        tried.append(address)
        if len(tried) == 1:
            gevent.sleep(20)
        return connect(pool, sock, address)

    monkeypatch.setattr(ConnectionPool, "_resolve", lambda pool: 2 * resolve(pool))
    monkeypatch.setattr(ConnectionPool, "_connect_socket", connect_late)
    double.broken = "drip"
    with pytest.raises(UnavailableError, match=r"no answer within 0\.5 s"), ServerClient(double.url, limit_s=0.5):
        pass
    assert len(tried) == 1


def test_what_the_library_refuses_is_not_said_of_the_server(double: Double) -> None:
    with ServerClient(double.url) as client, pytest.raises(DMFormerError, match="NVIDIA's client refuses: got unex"):
        client.infer(NAME, TensorMetadata("image", "FP32", (-1, 3, 32, 32)), np.zeros((1, 3, 32, 32)), ["logits"])
    assert "/infer" not in "".join(double.asked)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_ctrl_c_ends_a_wait_without_lines_of_the_library(double: Double, capfd: pytest.CaptureFixture[str]) -> None:
    double.broken = "infer drip"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    try:
        with ServerClient(double.url) as client, pytest.raises(KeyboardInterrupt):
            timer.start()
            client.infer(NAME, TensorMetadata("image", "FP32", (-1, 3, 32, 32)), golden_row(), ["logits"])
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == ""


def golden_row() -> NDArray[Any]:
    return np.zeros((1, 3, 32, 32), np.float32)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((-1, 3), "output 'logits' is float32 (1, 3); expected FP32 [1, 10]"),
        ((), "output 'logits' is float32 (); expected FP32 [1, 10]"),
        ((1, 1, 10), "output 'logits' is float32 (1, 1, 10); expected FP32 [1, 10]"),
        ((0, 10), "output 'logits' is float64 (0, 10); expected FP32 [1, 10]"),
    ],
)
def test_answers_of_another_shape_fail_their_checks(
    opened: Bundle, double: Double, shape: tuple[int, ...], says: str
) -> None:
    double.answer = lambda rows: {"logits": np.zeros([len(rows) if side < 0 else side for side in shape], np.float32)}
    wrong = failed(verify_server(opened, double.url))
    assert any(says in str(check.reason) for check in wrong if check.batch == 1), wrong
    with pytest.raises(DMFormerError) as caught:
        bench_server(opened, double.url, concurrency=[1], duration_s=0.1)
    assert says in one_line(caught.value)


def test_only_a_model_of_the_bundles_tensors_is_put_under_load(opened: Bundle, double: Double) -> None:
    double.given["name"] = "picture"
    with pytest.raises(CheckFailed, match=r"inputs \['picture'\]; expected \['image'\]"):
        bench_server(opened, double.url, concurrency=[1], duration_s=0.1)


def image_answer(**changed: Any) -> dict[str, NDArray[Any]]:
    logits = np.array([[0.0, 2.0, 1.0]], np.float32)
    right = {
        "logits": logits,
        "class_index": np.array([[1]], np.int32),
        "class_name": np.array([[b"b"]], np.object_),
        "probabilities": softmax(logits).astype(np.float32),
    }
    return {**right, **changed}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, None),
        ({"class_index": np.array([[2]], np.int32)}, "class 2; the logits say 1"),
        ({"class_index": np.empty((0, 1), np.int32)}, "class_index of shape (0, 1); expected (1, 1)"),
        ({"class_name": np.array([[b"c"]], np.object_)}, "class named b'c'; the bundle says b'b'"),
        ({"probabilities": np.full((1, 3), 1 / 3, np.float32)}, "probabilities differ from the softmax of"),
        ({"probabilities": np.full((1, 3), np.nan, np.float32)}, "probabilities differ from the softmax of"),
        ({"probabilities": np.ones((1, 2), np.float32)}, "probabilities of shape (1, 2); expected (1, 3)"),
        ({"class_map": np.ones((1, 2), np.int32)}, "class_map of shape (1, 2); expected (1,)"),
    ],
)
def test_what_a_model_of_images_says_of_classes(changed: dict[str, Any], says: str | None) -> None:
    manifest: Any = SimpleNamespace(model=SimpleNamespace(classes=("a", "b", "c")))
    wrong = _wrong_classes(image_answer(**changed), manifest)
    assert wrong == [] if says is None else says in wrong[0]


def test_models_that_fail_are_not_models_that_are_missing(opened: Bundle, double: Double) -> None:
    double.broken = "models"
    with pytest.raises(UnavailableError, match=r"no model is ready: .*CUDA out of memory") as caught:
        verify_server(opened, double.url)
    one_line(caught.value)


def test_a_list_of_models_that_is_none(opened: Bundle, double: Double) -> None:
    double.extensions = ["model_repository"]
    double.broken = "index"
    with pytest.raises(UnavailableError, match="its models: the answer is not of the protocol"):
        verify_server(opened, double.url)


def test_what_a_server_says_is_cut(opened: Bundle, double: Double) -> None:
    double.extensions = ["model_repository"]
    double.index = [{"name": f"model\n{number}" + "x" * 1000} for number in range(50)]
    with pytest.raises(UsageError, match="… and 40 more") as caught:
        verify_server(opened, double.url)
    assert len(one_line(caught.value)) < 5000
    double.index = [{"name": NAME}]
    double.gives[0] |= {"name": "y" * 10_000, "datatype": "FP\n99" * 1000, "shape": [1] * 1000}
    (check,) = failed(verify_server(opened, double.url))
    assert check.reason is not None
    assert len(check.reason) < 2000
    assert "\n" not in check.reason


def test_each_version_is_asked_what_it_takes(opened: Bundle, double: Double) -> None:
    assert verify_server(opened, double.url).passed
    assert f"/v2/models/{NAME}/versions/3" in double.asked[: double.asked.index(f"/v2/models/{NAME}/versions/3/infer")]
    with ServerClient(double.url) as client:
        double.asked.clear()
        find_models(opened.manifest, client)
    assert double.asked.count(f"/v2/models/{NAME}/versions/3") == 1


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"precision": "fp99"}, "the bundle has nothing for fp99; it has onnx fp32"),
        ({"runtimes": ["ncnn"]}, "the bundle has nothing for ncnn; it has onnx fp32"),
    ],
)
def test_a_choice_that_the_bundle_has_not(opened: Bundle, double: Double, choice: Any, says: str) -> None:
    for ask in (verify_server, bench_server):
        with pytest.raises(UsageError, match=says):
            ask(opened, double.url, **choice)


def test_answers_that_are_not_finite_are_failures_under_load(
    opened: Bundle, double: Double, golden: Golden, inline: Callable[..., Run]
) -> None:
    target = LoadTarget(
        double.url, NAME, "", TensorMetadata("image", "FP32", (-1, 3, 32, 32)), golden.inputs, ["logits"]
    )
    alone = ask_alone(target)
    right = double.answer
    double.answer = lambda rows: {"logits": right(rows)["logits"] * np.float32(np.nan)}
    samples = put_load(target, 2, requests=6, alone=alone)
    assert dict(samples.errors) == {"output 'logits' is NaN or infinite; expected numbers": 6}
    assert (samples.mixed_up, samples.latencies_ns) == (0, [])
    run = inline("bench", opened.root, "--server", double.url, "--concurrency", "1", "--duration", "0.1")
    assert run.code == 1
    assert "output 'logits' is NaN or infinite" in run.error_line


def test_what_is_not_asking_is_not_the_clients_time(double: Double, golden: Golden) -> None:
    target = LoadTarget(
        double.url, NAME, "", TensorMetadata("image", "FP32", (-1, 3, 32, 32)), golden.inputs, ["logits"]
    )

    def burn(_row: int, _answer: Any) -> None:
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            pass

    assert put_load(target, 1, requests=5, seen=burn).cpu_s < 0.9


def test_two_answers_are_compared_in_a_sample() -> None:
    one = np.zeros((1, 8, 300, 300), np.float32)
    other = one + 1
    assert [nearest({"a": array}, [{"a": one}, {"a": other}]) for array in (one, other)] == [0, 1]
    assert _sample(one).size == 4096
    assert _sample(one[:, :, :5, :5]).size == 200


def test_a_client_that_cannot_begin_holds_up_no_other(
    double: Double, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = LoadTarget(
        double.url, NAME, "", TensorMetadata("image", "FP32", (-1, 3, 32, 32)), golden.inputs, ["logits"]
    )
    start, started = threading.Thread.start, list[threading.Thread]()

    def start_two(thread: threading.Thread) -> None:
        if getattr(thread, "_target", None).__class__.__name__ == "method" and "run_client" in str(thread._target):  # type: ignore[attr-defined]
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(UnavailableError, match="`concurrency` 4: can't start new thread"):
        put_load(target, 4, requests=4)
    for thread in started:
        thread.join(20)
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)


def test_classes_exchanged_among_a_thousand_are_named_soon() -> None:
    random = np.random.default_rng(0)
    expected = random.normal(size=(8, 1000)).astype(np.float32)
    found = expected.copy()
    found[:, [7, 900]] = found[:, [900, 7]]
    target: Any = SimpleNamespace(
        spec=SimpleNamespace(
            artifact=SimpleNamespace(precision="fp32"), manifest=SimpleNamespace(model=SimpleNamespace(classes=()))
        )
    )
    golden: Any = SimpleNamespace(files={"fp32": {"logits": expected}}, outputs={})
    said = _exchanged_classes(target, {"logits": found}, golden)
    assert said == "classes are exchanged: 900 in the place of 7, 7 in the place of 900"


def test_options_of_a_server(opened: Bundle, double: Double, inline: Callable[..., Run]) -> None:
    for concurrency, says in (
        ("inf", "whole numbers"),
        ("nan", "whole numbers"),
        ("1.5", "whole numbers"),
        ("257", "256"),
    ):
        run = inline("bench", opened.root, "--server", double.url, "--concurrency", concurrency)
        assert run.code == 2, run.err
        assert says in run.error_line
    run = inline("bench", opened.root, "--server", double.url, "--max-regression", "5")
    assert run.code == 2
    assert "--server with options of runtimes" in run.error_line
    run = inline("verify", opened.root, "--time-limit", "5")
    assert run.code == 2
    assert "--time-limit without --server" in run.error_line
    double.broken = "drip"
    for command in ("verify", "bench"):
        run = inline(command, opened.root, "--server", double.url, "--time-limit", "0.3")
        assert run.code == 3, run.err
        assert "no answer within 0.3 s; --time-limit allows more" in run.error_line
    run = inline("verify", opened.root, "--server", double.url, "--time-limit", "0")
    assert run.code == 2


def test_few_of_many_failures_are_shown(
    opened: Bundle, double: Double, golden: Golden, inline: Callable[..., Run]
) -> None:
    right = double.answer
    numbers = itertools.count()

    def answer(rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        number = next(numbers)
        return right(rows) if number < len(golden.inputs) else {"logits": np.zeros((1, number), np.float32)}

    double.answer = answer
    run = inline("bench", opened.root, "--server", double.url, "--concurrency", "1", "--duration", "1")
    assert run.code == 1, run.err
    assert run.err.count("requests failed: ") == 5
    assert "… and " in run.err


def test_a_request_that_cannot_be_read_fails_alone() -> None:
    class Request:
        def __init__(self, rows: NDArray[Any] | None) -> None:
            self.rows = rows

        def as_numpy(self) -> NDArray[Any]:
            if self.rows is None:
                raise ValueError("no array")
            return self.rows

        def requested_output_names(self) -> list[str]:
            return ["logits"]

    def respond(output_tensors: Any = (), error: Any = None) -> Any:
        return output_tensors, error

    predictor: Any = SimpleNamespace(
        manifest=SimpleNamespace(inputs=[SimpleNamespace(name="image")]), run=lambda rows: {"logits": rows + 1}
    )
    model = TritonPythonModel()
    model._answers = BatchAnswers(predictor, images=False)
    model._triton = SimpleNamespace(  # type: ignore[assignment]
        get_input_tensor_by_name=lambda request, _name: request,
        Tensor=lambda name, array: (name, array),
        TritonError=str,
        InferenceResponse=respond,
    )
    good = np.zeros((1, 2), np.float32)
    (first, _), (_, error), (last, _) = model.execute([Request(good), Request(None), Request(good)])
    assert [name for name, _ in (*first, *last)] == ["logits", "logits"]
    assert error == "ValueError: no array"
