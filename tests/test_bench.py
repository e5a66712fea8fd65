"""Rounds of processes: what is started, what goes wrong in them, and what the report makes of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

import dmformer
from dmformer import process
from dmformer.bench import api
from dmformer.bench.measure import measure_configuration
from dmformer.bench.plan import BRIEF_WARM_UP, WARM_UP, BenchRequest, Configuration, TimingOrder, plan_bench
from dmformer.bundle.manifest import MANIFEST
from dmformer.bundle.reader import open_bundle
from dmformer.errors import CheckFailed, StageFailed, UsageError
from dmformer.machine import describe_machine
from dmformer.progress import silent
from tests import workers
from tests.bundles import rewrite
from tests.test_bench_figures import measurement
from tests.workers import WORKER, Orders, Worker

if TYPE_CHECKING:
    from dmformer.bundle.manifest import Artifact
    from dmformer.export.cached import ExportResult

SCHEMA = Path(dmformer.__file__).parent / "schemas" / "bench.json"


@pytest.fixture(scope="module")
def report(exported: ExportResult) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "ROUNDS", 2)  # as many as show that rounds are pooled
        return dmformer.bench(exported.output, runtimes=["ort"], duration_s=0.3)


def assert_valid(report: Any) -> Any:
    document = json.loads(msgspec.json.encode(report))
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(document)
    return document


def test_a_real_run_is_valid_against_its_schema(report: Any) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    document = assert_valid(report)
    Draft202012Validator.check_schema(schema)
    document["results"][0].pop("status")
    assert not Draft202012Validator(schema).is_valid(document)


def test_a_real_run_says_what_was_timed(report: Any, exported: ExportResult) -> None:
    (row,) = report.results
    (artifact,) = open_bundle(exported.output).artifacts("onnx")
    assert row.status in ("ok", "unstable")
    assert (row.runtime, row.precision, row.batch, row.device) == ("onnxruntime", "fp32", 1, "CPUExecutionProvider")
    assert row.artifact_sha256 == artifact.sha256
    assert row.threads == report.environment["cores"]
    assert len(row.samples_ns) == 2
    assert row.samples == sum(len(samples) for samples in row.samples_ns) >= 64
    assert row.latency_ms.min <= row.latency_ms.p50 <= row.latency_ms.p90 <= row.latency_ms.max
    assert sum(map(sum, row.samples_ns)) > 0.1e9
    assert row.layers["fp32"] > 50
    assert len(row.layers) == 1
    assert min(row.load_ms, row.first_inference_ms, row.throughput_ips, row.peak_rss_mb) > 0
    assert min(row.share_of_limit, row.attainable_ms) > 0  # test_bench_figures.py says how they are made
    assert (report.arch, report.rounds, report.limits.threads) == ("dmformer_nano", 2, row.threads)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"batches": []}, "batch sizes"),
        ({"batches": [1, 0]}, "batch sizes"),
        ({"duration_s": 0}, "duration"),
        ({"duration_s": -1}, "duration"),
        ({"duration_s": math.nan}, "duration"),
        ({"duration_s": math.inf}, "duration"),
        ({"threads": 0}, "threads"),
        ({"rounds": 0}, "0 rounds"),
        ({"limit_s": 0}, "time limit"),
        ({"limit_s": math.nan}, "time limit"),
        ({"modes": ["fast"]}, "mode 'fast'; expected one of compute, end-to-end, throughput"),
        ({"modes": ["compute"], "streams": [2]}, "2 streams for mode compute"),
        ({"modes": ["throughput"], "streams": [0]}, "0 streams"),
        ({"streams": [100_000]}, "100000 streams"),
        ({"streams": [2], "threads": 1}, "2 streams; expected 1 to 1"),
        ({"modes": ["end-to-end"], "profile": True}, "a profile of mode end-to-end"),
        ({"images": "no-such-folder"}, "no-such-folder"),
        ({"runtimes": ["coreml"]}, "unknown runtime"),
        ({"precisions": ["int8"]}, "nothing at int8"),
    ],
)
def test_arguments_that_cannot_be_used(
    exported: ExportResult, arguments: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "run_plan", lambda *_, **__: pytest.fail("the work was begun"))
    with pytest.raises(UsageError, match=expected):
        dmformer.bench(exported.output, **arguments)


def test_a_damaged_file_is_found_before_anything_is_timed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "run_plan", lambda *_, **__: pytest.fail("the work was begun"))
    with (bundle / "onnx/fp32/model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckFailed):
        dmformer.bench(bundle, runtimes=["ov", "ort"])


WRONGS = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
    "aborted": ("os.abort()", "ended by signal 6"),
    "raises": ("raise RuntimeError('out of luck')", "the process failed: RuntimeError: out of luck"),
    "exits": ("sys.exit(3)", "the process failed: no message"),
    "hangs": ("time.sleep(600)", "did not end within"),
    "says so": ("open(result, 'w').write('[\"UsageError\", \"no luck\"]'); sys.exit()", "^no luck$"),
    "no answer": ("sys.exit()", "ended without an answer"),
    "half an answer": ("open(result, 'w').write('[\"\", {'); sys.exit()", "ended without an answer"),
}


def runtimes_of(orders: Orders) -> list[str]:
    return [order["configuration"]["runtime"] for order in orders]


@pytest.mark.parametrize("kind", WRONGS)
def test_a_process_that_goes_wrong_is_a_failed_row(
    exported: ExportResult, kind: str, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, expected = WRONGS[kind]
    options = {"duration_s": 0.03}
    if kind == "hangs":
        options["limit_s"] = 2
    orders = worker(WORKER.replace("WRONG", code))
    found = dmformer.bench(exported.output, runtimes=["ort", "ov"], **options)
    failed, good = found.results
    assert (failed.runtime, failed.status, failed.samples, failed.latency_ms) == ("onnxruntime", "failed", 0, None)
    assert failed.reason is not None
    assert re.search(expected, failed.reason)
    assert (good.runtime, good.status, good.samples) == ("openvino", "ok", 90)
    assert sorted(runtimes_of(orders)) == ["onnxruntime"] + ["openvino"] * 3  # what failed is not tried again
    assert found.noise_floor is None


def test_rounds_are_interleaved(exported: ExportResult, worker: Worker) -> None:
    orders = worker()
    stages: list[Any] = []

    def stage(name: str, parts: int | None = None) -> Any:
        stages.append((name, parts))
        return silent(name, parts)

    found = dmformer.bench(exported.output, runtimes=["ov", "ort"], batches=[1, 4, 1], stage=stage)
    once = [("openvino", 1), ("openvino", 4), ("onnxruntime", 1), ("onnxruntime", 4)]
    assert [(row.runtime, row.batch) for row in found.results] == once
    asked = [(order["configuration"]["runtime"], order["configuration"]["batch"]) for order in orders]
    runs = [*once[:3], once[0], once[3]]  # the first one twice, not side by side
    assert asked == [*runs, *runs[1:], *runs[:1], *runs[3:], *runs[:3]]  # each round begins elsewhere
    # Three rounds of five, and of the machine's limits.
    assert stages == [("timing, 18 processes", 18)]


def test_only_the_first_round_proves_the_precision(exported: ExportResult, worker: Worker) -> None:
    orders = worker()
    dmformer.bench(exported.output, runtimes=["ov", "ort"])
    assert [order["prove_precision"] for order in orders] == [True] * 3 + [False] * 6


def stopping(orders: Orders, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the process after so many is at work."""
    scripted = process.Child

    class Stopped(scripted):  # type: ignore[misc,valid-type]
        def call(self, order: Any, result: Any, timeout_s: float) -> Any:
            if len(orders) == after and isinstance(order, TimingOrder):
                raise KeyboardInterrupt
            return super().call(order, result, timeout_s)

    monkeypatch.setattr(process, "Child", Stopped)


@pytest.mark.parametrize(
    ("after", "samples"),
    [(0, [0, 0]), (1, [30, 0]), (2, [30, 30]), (4, [30, 60]), (8, [90, 60])],
)
def test_ctrl_c_leaves_the_rounds_that_finished(
    exported: ExportResult, worker: Worker, monkeypatch: pytest.MonkeyPatch, after: int, samples: list[int]
) -> None:
    stopping(worker(), after, monkeypatch)
    found = dmformer.bench(exported.output, runtimes=["ov", "ort"])
    assert found.partial
    assert [row.samples for row in found.results] == samples
    assert [row.status for row in found.results] == ["ok" if count else "not run" for count in samples]
    assert_valid(found)


def test_a_run_to_the_end_is_not_partial(report: Any) -> None:
    assert not report.partial


def test_limits_that_cannot_be_measured_are_told(
    exported: ExportResult, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker()
    monkeypatch.setattr(workers, "LIMITS", "import os; os.abort()")
    found = dmformer.bench(exported.output, runtimes=["ov"])
    (row,) = found.results
    assert (row.status, row.share_of_limit, found.limits) == ("ok", None, None)
    assert found.notes == ("the machine's limits were not measured: the process was ended by signal 6 (SIGABRT)",)


def test_a_plan_announces_what_it_takes(exported: ExportResult) -> None:
    plan = plan_bench(exported.output, BenchRequest(runtimes=["ov", "ort"], rounds=4, limit_s=50, profile=True))
    assert plan.processes == 4 * (2 + 1 + 1) + 2
    assert plan.longest_s == 50 * plan.processes
    assert 10 < plan.expected_s < 60
    assert plan_bench(exported.output, BenchRequest(batches=[1 << 16])).expected_s > 2 * plan.expected_s


def test_medians_alone_take_few_calls_and_no_limits(exported: ExportResult, worker: Worker) -> None:
    usual, brief = (plan_bench(exported.output, BenchRequest(brief=brief)) for brief in (False, True))
    assert (usual.least_calls, brief.least_calls) == (22, 3)
    assert usual.processes - brief.processes == usual.rounds
    assert brief.expected_s < usual.expected_s
    orders = worker()
    stages: list[Any] = []

    def stage(name: str, parts: int | None = None) -> Any:
        stages.append((name, parts))
        return silent(name, parts)

    found = dmformer.bench(exported.output, runtimes=["ov", "ort"], brief=True, stage=stage)
    assert all(order["warm_up"] == msgspec.structs.asdict(BRIEF_WARM_UP) for order in orders)
    assert stages == [("timing, 9 processes", 9)]  # three rounds of two rows, and of one of them once more
    assert (found.limits, found.results[0].share_of_limit, found.notes) == (None, None, ())


def test_the_demonstration_is_expected_to_take_less_than_a_minute(exported: ExportResult) -> None:
    assert plan_bench(exported.output, BenchRequest()).expected_s < 60


# --- the noise floor --------------------------------------------------------------------------------------------------


Rounds = Callable[[dict[str, list[api.RoundResult]]], None]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    """Answer in the processes' place, for each runtime in the order of its runs."""

    def replace(answers: dict[str, list[api.RoundResult]]) -> None:
        left = {runtime: iter(found) for runtime, found in answers.items()}

        def answer(_function: str, order: Any, *_: object) -> Any:
            found = next(left[order.configuration.runtime]) if isinstance(order, TimingOrder) else LOST
            if isinstance(found, StageFailed):
                raise found
            return found

        monkeypatch.setattr(api, "call", answer)

    return replace


LOST = StageFailed("no luck")


def timed(*medians: int) -> list[api.RoundResult]:
    """Measurements with these medians; a lonely slow call would move a mean."""
    return [measurement([median] * 9 + [50 * median]) for median in medians]


def test_the_noise_floor_is_the_median_over_rounds_of_the_distance_from_1(
    exported: ExportResult, rounds: Rounds
) -> None:
    # The first configuration and itself again, by turns: ratios 1.1, 0.8 and 1.03.
    rounds({"onnxruntime": timed(100, 110, 100, 80, 1000, 1030), "openvino": timed(1, 7, 3)})
    found = dmformer.bench(exported.output, runtimes=["ort", "ov"])
    assert found.noise_floor == pytest.approx(0.1)
    assert [row.samples for row in found.results] == [30, 30]
    assert [min(samples) for samples in found.results[0].samples_ns] == [100, 100, 1000]  # the second run is no row


def test_a_machine_without_noise_has_a_floor_of_0(exported: ExportResult, rounds: Rounds) -> None:
    rounds({"onnxruntime": timed(5, 5, 6, 6, 7, 7)})
    assert dmformer.bench(exported.output, runtimes=["ort"]).noise_floor == 0


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        pytest.param([LOST, *timed(5, 5, 5)], "failed", id="first run, round 1"),
        pytest.param([*timed(5, 5), LOST, *timed(5, 5)], "failed", id="first run, round 2"),
        pytest.param([*timed(5, 5, 5, 5, 5), LOST], "ok", id="second run, round 3"),
    ],
)
def test_there_is_no_noise_floor_where_the_first_configuration_failed(
    exported: ExportResult, rounds: Rounds, answers: list[api.RoundResult], status: str
) -> None:
    rounds({"onnxruntime": answers, "openvino": timed(4, 4, 4)})
    found = dmformer.bench(exported.output, runtimes=["ort", "ov"])
    assert found.noise_floor is None
    assert [row.status for row in found.results] == [status, "ok"]


def test_another_configuration_that_failed_leaves_the_noise_floor(exported: ExportResult, rounds: Rounds) -> None:
    rounds({"onnxruntime": timed(5, 6, 5, 6, 5, 6), "openvino": [LOST]})
    assert dmformer.bench(exported.output, runtimes=["ort", "ov"]).noise_floor == pytest.approx(0.2)


# --- bundles that changed ---------------------------------------------------------------------------------------------


def change_artifact(bundle: Path) -> None:
    """Another model under the same name, with a manifest that fits it."""
    content = json.loads((bundle / MANIFEST).read_bytes())
    files = {artifact["format"]: artifact["files"][0] for artifact in content["artifacts"]}
    files["onnx"]["sha256"] = files["torch"]["sha256"]
    (bundle / MANIFEST).write_text(json.dumps(content))


@pytest.mark.slow
def test_a_bundle_that_changed_after_planning_is_a_failed_row(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)

    def change() -> Any:
        change_artifact(bundle)
        return describe_machine()

    monkeypatch.setattr(api, "describe_machine", change)
    (row,) = dmformer.bench(opened, runtimes=["ort"], duration_s=0.03).results
    assert row.status == "failed"
    assert row.reason is not None
    assert "the bundle changed" in row.reason


def asked_of(artifact: Artifact, **changed: Any) -> Configuration:
    fields = {"runtime": "onnxruntime", "precision": "fp32", "batch": 1, "threads": 1}
    return Configuration(**(fields | {"artifact_sha256": artifact.sha256} | changed))


def test_the_process_checks_the_artifact_it_times(bundle: Path) -> None:
    opened = open_bundle(bundle)
    (artifact,) = opened.artifacts("onnx")
    order = TimingOrder(
        bundle=str(bundle), manifest_sha256=opened.manifest_sha256, configuration=asked_of(artifact), images=(),
        duration_s=0.0, least_calls=1, limit_s=60,
        prove_precision=True, warm_up=msgspec.structs.replace(WARM_UP, least_s=0.0),
    )  # fmt: skip
    proven = measure_configuration(order)
    assert proven.device == "CPUExecutionProvider"
    assert set(proven.layers) == {"fp32"}
    unproven = measure_configuration(msgspec.structs.replace(order, prove_precision=False))
    assert unproven.layers == {}
    with pytest.raises(StageFailed, match="the bundle changed"):
        measure_configuration(msgspec.structs.replace(order, manifest_sha256="0" * 64))
    with (bundle / artifact.files[0].path).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckFailed):
        measure_configuration(order)


@pytest.mark.slow
def test_a_promise_that_is_not_kept_is_a_failed_row(bundle: Path) -> None:
    """The float32 graph under the name of int8."""

    def rename(content: dict[str, Any]) -> None:
        (artifact,) = (artifact for artifact in content["artifacts"] if artifact["format"] == "openvino")
        artifact.update(precision="int8")

    rewrite(bundle, rename)
    found = dmformer.bench(bundle, runtimes=["ov"], duration_s=0.03)
    (row,) = found.results
    assert (row.status, row.precision, row.samples, found.noise_floor) == ("failed", "int8", 0, None)
    assert row.reason is not None
    assert re.match("openvino runs int8 in 0% of [0-9]+ compute layers .*; promised 100%", row.reason)
