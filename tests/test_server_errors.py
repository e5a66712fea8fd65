"""What a client makes of a server's errors and of wrong models: against a double of the protocol, not a server."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dmformer.bench.load import LoadTarget, ask_alone, nearest, put_load
from dmformer.bench.server import bench_server
from dmformer.bundle.reader import open_bundle
from dmformer.errors import CheckFailed, DMFormerError, UnavailableError, UsageError
from dmformer.serve.client import ServerClient, TensorMetadata
from dmformer.serve.served import SHA256
from dmformer.verify.server import verify_server
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
    begun = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        verify_server(opened, double.url, limit_s=0.5)
    assert says in one_line(caught.value)
    assert double.url in str(caught.value)
    assert time.monotonic() - begun < 30


def test_a_server_that_is_not_there(opened: Bundle) -> None:
    with pytest.raises(UnavailableError, match="cannot be reached") as caught:
        verify_server(opened, "http://127.0.0.1:9")
    one_line(caught.value)
    with pytest.raises(UnavailableError, match="cannot be reached") as caught:
        verify_server(opened, "http://nowhere.invalid:8000")
    one_line(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http:// a", ""])
def test_what_is_no_address(opened: Bundle, url: str) -> None:
    with pytest.raises(UsageError, match="expected http://HOST:PORT"):
        verify_server(opened, url)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("infer html", "the answer is not of the protocol"),
        ("infer refuses", "the server refuses: the model is out of memory really"),
        ("infer drip", "no answer within 1 s"),
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
    begun = time.monotonic()
    with ServerClient(double.url, limit_s=0.5) as client, pytest.raises(DMFormerError, match="no answer within"):
        client.infer(
            NAME, TensorMetadata("image", "FP32", (-1, 3, 32, 32)), np.zeros((1, 3, 32, 32), np.float32), ["a"]
        )
    assert time.monotonic() - begun < 10
