"""Benchmarks: figures from samples, settling, timing one runtime, and processes that fail."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator

import dmformer
from dmformer.bench import api, measure
from dmformer.bench.measure import Measurement, settled
from dmformer.bench.report import Result, latency, round_ratios, summarise
from dmformer.bench.worker import Answer, Job
from dmformer.bench.worker import run as run_job
from dmformer.bundle.manifest import MANIFEST
from dmformer.bundle.reader import open_bundle
from dmformer.child import Child
from dmformer.errors import CheckFailed, StageFailed, UsageError
from dmformer.machine import describe_machine
from dmformer.progress import silent
from dmformer.runtimes.base import Details, TensorSpec
from tests.bundles import rewrite
from tests.fakes import FakeRuntime

if TYPE_CHECKING:
    from dmformer.export.pipeline import ExportResult

SCHEMA = Path(dmformer.__file__).parent / "schemas" / "bench.json"

# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6, 7, 63, 64, 661, 662, 1000])
def test_percentiles_are_numpys_where_there_are_enough_samples(count: int) -> None:
    samples = np.random.default_rng(count).integers(1_000_000, 50_000_000, count)
    found = latency(samples.tolist())
    for name, least in (("p50", 7), ("p90", 64), ("p99", 662)):
        expected = np.percentile(samples, int(name[1:])) / 1e6 if count >= least else None
        assert getattr(found, name) == (None if expected is None else pytest.approx(expected))
    assert found.mean == pytest.approx(samples.mean() / 1e6)
    assert (found.min, found.max) == pytest.approx((samples.min() / 1e6, samples.max() / 1e6))


def test_nothing_is_clipped() -> None:
    found = latency([1_000_000] * 99 + [10_000_000_000])
    assert found.max == 10_000
    assert found.mean == pytest.approx(100.99)
    assert found.p50 == 1


def measurement(latencies: list[int], **changed: Any) -> Measurement:
    told: dict[str, Any] = {
        "device": "CPU", "threads": 1, "version": "1", "load_ms": 1.0, "first_inference_ms": 1.0, "stable": True,
        "peak_rss_mb": 1.0,
    }  # fmt: skip
    return Measurement(latencies_ns=latencies, **(told | changed))


PLANNED = Result(runtime="fake", precision="fp32", batch=4, threads=1, artifact_sha256="0" * 64, status="ok")


def test_rounds_are_pooled() -> None:
    rounds = [
        measurement([1_000_000] * 4, load_ms=1, first_inference_ms=7, peak_rss_mb=5, layers={"fp16": 9, "fp32": 2}),
        measurement([3_000_000] * 4, load_ms=9, first_inference_ms=5, peak_rss_mb=7),
        measurement([2_000_000] * 2, load_ms=2, first_inference_ms=6, peak_rss_mb=6),
    ]
    found = summarise(PLANNED, rounds)
    assert (found.status, found.reason, found.samples) == ("ok", None, 10)
    assert found.latency_ms is not None
    assert found.latency_ms.mean == pytest.approx(2)
    assert found.throughput_ips == pytest.approx(4 * 10 / 0.020)
    assert (found.load_ms, found.first_inference_ms, found.peak_rss_mb) == (2, 6, 7)
    assert found.layers == {"fp16": 9, "fp32": 2}  # only the first round proves them
    assert [len(samples) for samples in found.samples_ns] == [4, 4, 2]


def test_one_round_that_did_not_settle_makes_the_row_unstable() -> None:
    found = summarise(PLANNED, [measurement([1] * 10), measurement([1] * 10, stable=False)])
    assert found.status == "unstable"
    assert found.reason is not None
    assert found.latency_ms is not None


def test_ratios_are_of_medians_round_by_round() -> None:
    candidate, baseline = [[1, 2, 900], [30], [4, 4]], [[4, 4, 4], [10, 20], [1, 1, 2, 2]]
    assert round_ratios(candidate, baseline) == [0.5, 2.0, pytest.approx(8 / 3)]
    with pytest.raises(ValueError, match="zip"):
        round_ratios(candidate, baseline[:2])


# --- settling ---------------------------------------------------------------------------------------------------------


def noisy(spread: float, count: int) -> list[int]:
    values = 1e6 * (1 + spread * np.random.default_rng(0).uniform(-1, 1, count))
    return [int(value) for value in values]


@pytest.mark.parametrize(
    ("latencies", "expected"),
    [
        pytest.param([], False, id="nothing"),
        pytest.param([100] * 14, False, id="too few"),
        pytest.param([100] * 15, True, id="flat"),
        pytest.param([100_000 - 200 * i for i in range(100)], False, id="falling"),
        pytest.param([100_000 + 200 * i for i in range(100)], False, id="rising"),
        pytest.param([9000 - 80 * i for i in range(100)] + [1000] * 60, True, id="falling, then flat"),
        pytest.param([1000] * 60 + [1000 + 50 * i for i in range(60)], False, id="flat, then rising"),
        pytest.param(noisy(0.01, 100), True, id="a little noise"),
        pytest.param(noisy(0.9, 60), False, id="much noise"),
        pytest.param(([100] * 9 + [100_000]) * 10, True, id="lonely spikes"),
        pytest.param([1000] * 10 + [1030] * 5, True, id="within 3 %"),
        pytest.param([1000] * 10 + [1031] * 5, False, id="beyond 3 %"),
        pytest.param([1000] * 80 + [1031] * 10 + [1000] * 10, False, id="window of a tenth"),
        pytest.param([9999] + [1000] * 15, True, id="only the last windows"),
    ],
)
def test_settled(latencies: list[int], expected: bool) -> None:
    assert settled(latencies) is expected


def test_a_warm_up_that_never_settles_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_UP_S", 0.0)
    latencies = iter(range(1_000, 100_000_000, 1_000))
    calls: list[int] = []

    def call() -> int:
        calls.append(next(latencies) ** 2)
        return calls[-1]

    assert measure._warm_up(call) is False
    assert len(calls) == measure.WARM_UP_LIMIT * measure.WARM_UP_CALLS + 1


# --- timing one runtime -----------------------------------------------------------------------------------------------


class Fake(FakeRuntime):
    """Notes what it is called with."""

    precisions = ("fp32", "fp16")
    input_spec = TensorSpec("x", "float32", ("batch", 2))
    output_spec = TensorSpec("y", "float32", ("batch", 2))

    def __init__(self, *, threads_used: int = 1, precision: str = "fp32", layers: dict[str, int] | None = None) -> None:
        super().__init__(precision=precision)
        self.threads_used = threads_used
        self.shown = {"fp32": 9} if layers is None else layers
        self.seen: list[np.ndarray] = []
        self.proofs = 0

    @property
    def details(self) -> Details:
        return Details(device="CPU", threads=self.threads_used, version="1")

    def read_layers(self) -> dict[str, int]:
        self.proofs += 1
        return self.shown

    def infer(self, inputs: Any) -> Any:
        self.seen.append(inputs["x"])
        return {"y": inputs["x"] + 1}


ROWS = np.arange(10, dtype=np.float32).reshape(5, 2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No least time of warm-up, and one that settles at once."""
    monkeypatch.setattr(measure, "WARM_UP_S", 0.0)
    monkeypatch.setattr(measure, "settled", lambda latencies: len(latencies) >= 1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("batch", "least_calls"), [(1, 30), (2, 7), (12, 1)])
def test_calls_are_counted_apart(batch: int, least_calls: int) -> None:
    runtime = Fake()
    found = measure.measure(runtime, ROWS, batch, 0.0, least_calls)
    assert len(found.latencies_ns) == least_calls
    assert len(runtime.seen) == 1 + measure.WARM_UP_CALLS + least_calls
    assert all(len(array) == batch for array in runtime.seen)
    assert all(sample > 0 for sample in found.latencies_ns)
    assert runtime.closed == 1
    assert (found.device, found.threads, found.version, found.stable) == ("CPU", 1, "1", True)
    assert found.load_ms > 0
    assert found.first_inference_ms > 0
    assert found.peak_rss_mb > 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("batch", [1, 2, 5, 12])
def test_inputs_differ_from_call_to_call(batch: int) -> None:
    runtime = Fake()
    measure.measure(runtime, ROWS, batch, 0.0, 5)
    for one, other in zip(runtime.seen, runtime.seen[1:], strict=False):
        assert not np.array_equal(one, other)
    assert {float(array[0, 0]) for array in runtime.seen} == {0, 2, 4, 6, 8}


@pytest.mark.usefixtures("quick")
def test_the_duration_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    found = measure.measure(Fake(), ROWS, 1, 50.0, 3)
    assert 40 <= len(found.latencies_ns) <= 60


def test_other_threads_than_asked_are_not_timed() -> None:
    runtime = Fake(threads_used=2)
    with pytest.raises(StageFailed, match="fake runs on 2 threads; expected 1"):
        measure.measure(runtime, ROWS, 1, 0.0, 1)
    assert not runtime.seen
    assert runtime.closed == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("promised", "proofs"), [(None, 0), (0.0, 1), (1.0, 1)])
def test_the_proof_of_the_precision_is_asked_for_or_left_out(promised: float | None, proofs: int) -> None:
    runtime = Fake(layers={"fp32": 7})
    found = measure.measure(runtime, ROWS, 1, 0.0, 1, promised)
    assert runtime.proofs == proofs
    assert found.layers == ({"fp32": 7} if proofs else {})


@pytest.mark.parametrize(
    ("layers", "promised", "expected"),
    [
        ({"fp16": 8, "fp32": 2}, 0.9, "fp16 in 80% of 10 compute layers .8 fp16, 2 fp32.; promised 90%"),
        ({"fp32": 10}, 1.0, "fp16 in 0%"),
        ({}, 0.5, "no compute layer"),
    ],
)
def test_fewer_layers_than_promised_are_not_timed(layers: dict[str, int], promised: float, expected: str) -> None:
    runtime = Fake(precision="fp16", layers=layers)
    with pytest.raises(StageFailed, match=expected):
        measure.measure(runtime, ROWS, 1, 0.0, 1, promised)
    assert not runtime.seen
    assert runtime.closed == 1


@pytest.mark.usefixtures("quick")
def test_as_many_layers_as_promised_are_timed() -> None:
    found = measure.measure(Fake(precision="fp16", layers={"fp16": 9, "fp32": 1}), ROWS, 1, 0.0, 1, 0.9)
    assert found.layers == {"fp16": 9, "fp32": 1}


@pytest.mark.usefixtures("quick")
def test_a_runtime_that_says_why_it_cannot_compute_a_precision_is_timed() -> None:
    class Frank(Fake):
        @classmethod
        def cannot_compute(cls, precision: str) -> str | None:
            return "no such arithmetic" if precision == "fp16" else None

    found = measure.measure(Frank(precision="fp16", layers={"fp32": 10}), ROWS, 1, 0.0, 1, 1.0)
    assert found.layers == {"fp32": 10}
    with pytest.raises(StageFailed, match="fp32 in 0%"):  # the reason is one of that precision only
        measure.measure(Frank(precision="fp32", layers={"fp16": 10}), ROWS, 1, 0.0, 1, 1.0)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(exported: ExportResult) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "ROUNDS", 2)  # as many as show that rounds are pooled
        return dmformer.bench(exported.output, runtimes=["ort"], duration_s=0.3)


def test_a_real_run_is_valid_against_its_schema(report: Any) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    document = json.loads(msgspec.json.encode(report))
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(document)
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
        ({"runtimes": ["tflite"]}, "unknown runtime"),
        ({"precisions": ["int8"]}, "nothing at int8"),
    ],
)
def test_arguments_that_cannot_be_used(
    exported: ExportResult, arguments: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_run", lambda *_, **__: pytest.fail("the work was begun"))
    with pytest.raises(UsageError, match=expected):
        dmformer.bench(exported.output, **arguments)


def test_a_damaged_file_is_found_before_anything_is_timed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_run", lambda *_, **__: pytest.fail("the work was begun"))
    with (bundle / "onnx/fp32/model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckFailed):
        dmformer.bench(bundle, runtimes=["ov", "ort"])


# A worker for onnxruntime that goes wrong; any other answers at once.
WORKER = """
import json, os, signal, sys, time
job = json.load(sys.stdin)
if job["runtime"] == "onnxruntime":
    WRONG
answer = {"measurement": {"device": "CPU", "threads": 1, "version": "1", "load_ms": 1, "first_inference_ms": 1,
          "stable": True, "latencies_ns": [1000000] * 30, "peak_rss_mb": 1}}
open(job["answer"], "w").write(json.dumps(answer))
"""
WRONGS = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
    "aborted": ("os.abort()", "ended by signal 6"),
    "raises": ("raise RuntimeError('out of luck')", "the process failed: RuntimeError: out of luck"),
    "exits": ("sys.exit(3)", "the process failed: no message"),
    "hangs": ("time.sleep(600)", "did not end within"),
    "says so": ("open(job['answer'], 'w').write('{\"error\": \"no luck\"}'); sys.exit()", "^no luck$"),
    "no answer": ("sys.exit()", "ended without an answer"),
    "half an answer": ("open(job['answer'], 'w').write('{\"measure'); sys.exit()", "ended without an answer"),
}


Orders = list[dict[str, Any]]
Worker = Callable[[str], Orders]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Put a script in the worker's place; returns the list of the jobs that it was given."""

    def replace(script: str) -> Orders:
        orders: Orders = []

        class Scripted(Child):
            @staticmethod
            def command(module: str) -> list[str]:
                assert module == "dmformer.bench.worker"
                return [sys.executable, "-S", "-c", script]

            def work(self, order: bytes, timeout_s: float) -> None:
                orders.append(json.loads(order))
                super().work(order, timeout_s)

        monkeypatch.setattr(api, "Child", Scripted)
        return orders

    return replace


def runtimes_of(orders: Orders) -> list[str]:
    return [order["runtime"] for order in orders]


@pytest.mark.parametrize("kind", WRONGS)
def test_a_process_that_goes_wrong_is_a_failed_row(
    exported: ExportResult, kind: str, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, expected = WRONGS[kind]
    if kind == "hangs":
        monkeypatch.setattr(api, "PROCESS_LIMIT_S", 2)
    orders = worker(WORKER.replace("WRONG", code))
    found = dmformer.bench(exported.output, runtimes=["ort", "ov"], duration_s=0.03)  # it lengthens the time limit
    failed, good = found.results
    assert (failed.runtime, failed.status, failed.samples, failed.latency_ms) == ("onnxruntime", "failed", 0, None)
    assert failed.reason is not None
    assert re.search(expected, failed.reason)
    assert (good.runtime, good.status, good.samples) == ("openvino", "ok", 90)
    # Each run of the first configuration is tried once.
    assert runtimes_of(orders) == ["onnxruntime", "openvino", "onnxruntime", "openvino", "openvino"]
    assert found.noise_floor is None


def test_rounds_are_interleaved(exported: ExportResult, worker: Worker) -> None:
    orders = worker(WORKER.replace("WRONG", "pass"))
    stages: list[str] = []

    def stage(name: str, parts: int | None = None) -> Any:
        stages.append(name)
        return silent(name, parts)

    found = dmformer.bench(exported.output, runtimes=["ov", "ort"], batches=[1, 4, 1], stage=stage)
    once = [("openvino", 1), ("openvino", 4), ("onnxruntime", 1), ("onnxruntime", 4)]
    assert [(row.runtime, row.batch) for row in found.results] == once
    assert [(order["runtime"], order["batch"]) for order in orders] == [*once, once[0]] * api.ROUNDS
    assert len(stages) == 15
    assert stages[0] == stages[4] == f"openvino fp32 batch 1, round 1 of {api.ROUNDS}"


def test_only_the_first_round_proves_the_precision(exported: ExportResult, worker: Worker) -> None:
    orders = worker(WORKER.replace("WRONG", "pass"))
    dmformer.bench(exported.output, runtimes=["ov", "ort"])
    assert [order["prove_precision"] for order in orders] == [True] * 3 + [False] * 6


# --- the noise floor --------------------------------------------------------------------------------------------------


Rounds = Callable[[dict[str, list[Answer]]], None]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    """Answer in the processes' place, for each runtime in the order of its runs."""

    def replace(answers: dict[str, list[Answer]]) -> None:
        left = {runtime: iter(found) for runtime, found in answers.items()}
        monkeypatch.setattr(api, "_run", lambda _, planned, *__, **___: next(left[planned.runtime]))

    return replace


def timed(*medians: int) -> list[Answer]:
    """Answers with these medians; a lonely slow call would move a mean."""
    return [Answer(measurement=measurement([median] * 9 + [50 * median])) for median in medians]


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


LOST = [Answer(error="no luck")]


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        pytest.param([*LOST, *timed(5, 5, 5)], "failed", id="first run, round 1"),
        pytest.param([*timed(5, 5), *LOST, *timed(5, 5)], "failed", id="first run, round 2"),
        pytest.param([*timed(5, 5, 5, 5, 5), *LOST], "ok", id="second run, round 3"),
    ],
)
def test_there_is_no_noise_floor_where_the_first_configuration_failed(
    exported: ExportResult, rounds: Rounds, answers: list[Answer], status: str
) -> None:
    rounds({"onnxruntime": answers, "openvino": timed(4, 4, 4)})
    found = dmformer.bench(exported.output, runtimes=["ort", "ov"])
    assert found.noise_floor is None
    assert [row.status for row in found.results] == [status, "ok"]


def test_another_configuration_that_failed_leaves_the_noise_floor(exported: ExportResult, rounds: Rounds) -> None:
    rounds({"onnxruntime": timed(5, 6, 5, 6, 5, 6), "openvino": LOST})
    assert dmformer.bench(exported.output, runtimes=["ort", "ov"]).noise_floor == pytest.approx(0.2)


# --- bundles that changed ---------------------------------------------------------------------------------------------


def change_artifact(bundle: Path) -> None:
    """Another model under the same name, with a manifest that fits it."""
    content = json.loads((bundle / MANIFEST).read_bytes())
    files = {artifact["format"]: artifact["files"][0] for artifact in content["artifacts"]}
    files["onnx"]["sha256"] = files["torch"]["sha256"]
    (bundle / MANIFEST).write_text(json.dumps(content))


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


def test_the_worker_checks_the_artifact_it_times(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    (artifact,) = opened.artifacts("onnx")
    job = Job(
        bundle=str(bundle), runtime="onnxruntime", precision="fp32", manifest_sha256=opened.manifest_sha256,
        batch=1, threads=1, duration_s=0.0, least_calls=1, prove_precision=True,
        answer="unused",
    )  # fmt: skip
    monkeypatch.setattr(measure, "WARM_UP_S", 0.0)
    proven = run_job(job)
    assert proven.device == "CPUExecutionProvider"
    assert set(proven.layers) == {"fp32"}
    assert run_job(msgspec.structs.replace(job, prove_precision=False)).layers == {}
    with pytest.raises(StageFailed, match="the bundle changed"):
        run_job(msgspec.structs.replace(job, manifest_sha256="0" * 64))
    with (bundle / artifact.files[0].path).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckFailed):
        run_job(job)


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
