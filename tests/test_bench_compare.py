"""An earlier run against a later one, and what the command line makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from dmformer.bench.limits import Limits
from dmformer.bench.report import Baseline, BenchReport, Result, standings
from dmformer.bench.sentences import comparison, verdicts
from dmformer.errors import CheckFailed, UsageError
from dmformer.machine import cpu_model, describe_machine
from tests.test_bench_figures import row

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Cli, Made
    from tests.workers import Worker


def report_of(*rows: Result, noise: float | None = 0.02, **changed: Any) -> BenchReport:
    fields: dict[str, Any] = {"environment": {"cpu": cpu_model(), "cores": 2, "os": "none"}, "noise_floor": noise}
    return BenchReport(results=rows, standings=standings(rows, noise), **(fields | changed))


def written(report: BenchReport, folder: Path) -> str:
    path = folder / "before.json"
    path.write_bytes(msgspec.json.encode(report))
    return str(path)


def against(before: BenchReport, now: BenchReport, folder: Path, allowed: float = 0.05) -> BenchReport:
    """``now``, compared and judged."""
    baseline = Baseline.read(written(before, folder), allowed)
    compared = msgspec.structs.replace(now, comparison=baseline.compare(now))
    baseline.judge(compared)
    return compared


@pytest.mark.parametrize(
    ("before_ms", "now_ms", "allowed", "verdict"),
    [
        pytest.param(10, 10.1, 0.0, "tie", id="within the noise"),
        pytest.param(10, 5, 0.05, "faster", id="faster"),
        pytest.param(10, 10.9, 0.10, "slower", id="slower, and allowed"),
    ],
)
def test_what_is_no_regression(tmp_path: Path, before_ms: float, now_ms: float, allowed: float, verdict: str) -> None:
    found = against(report_of(row(before_ms)), report_of(row(now_ms)), tmp_path, allowed).comparison
    assert found is not None
    (change,) = found.changes
    assert (change.verdict, change.row, change.same_artifact) == (verdict, 0, True)
    assert change.ratio == pytest.approx(now_ms / before_ms, rel=0.02)
    assert (change.before_ms, change.now_ms) == (pytest.approx(before_ms, rel=0.02), pytest.approx(now_ms, rel=0.02))


def test_a_regression_is_a_failed_check(tmp_path: Path) -> None:
    before = report_of(row(10, runtime="a"), row(20, runtime="b"), row(30, runtime="c"))
    now = report_of(row(10, runtime="a"), row(24, runtime="b"), row(60, runtime="c", artifact_sha256="1"))
    with pytest.raises(CheckFailed, match=r"^2 of 3 rows are slower than .* by more than 5.0%; worst: c fp32 batch 1"):
        against(before, now, tmp_path)


def test_the_larger_noise_counts(tmp_path: Path) -> None:
    noisy = report_of(row(10), noise=0.5)
    assert against(noisy, report_of(row(13)), tmp_path).comparison is not None
    assert against(report_of(row(10)), msgspec.structs.replace(noisy, results=(row(13),)), tmp_path).comparison
    with pytest.raises(CheckFailed, match="slower"):
        against(report_of(row(10)), report_of(row(13)), tmp_path)


def test_without_any_noise_floor_the_interval_judges(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="slower"):
        against(report_of(row(10), noise=None), report_of(row(30), noise=None), tmp_path)


@pytest.mark.parametrize("changed", [{"threads": 2}, {"batch": 2}, {"runtime": "other"}])
def test_a_run_that_shares_no_row_is_no_success(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(CheckFailed, match="which has fake fp32 batch 1, 1 threads"):
        against(report_of(row(10)), report_of(row(10, **changed)), tmp_path)


def test_another_network_is_refused(tmp_path: Path) -> None:
    baseline = Baseline.read(written(report_of(row(10), arch="dmformer_s"), tmp_path), 0.05)
    baseline.check_model("dmformer_s")
    with pytest.raises(UsageError, match="is of dmformer_s; this bundle is of dmformer_l"):
        baseline.check_model("dmformer_l")


def test_rows_are_the_same_with_the_same_settings(tmp_path: Path) -> None:
    before = report_of(row(10), row(10, batch=2), row(10, threads=4), row(10, mode="end-to-end"))
    lost = msgspec.structs.replace(row(1), latency_ms=None, status="failed")
    found = against(before, report_of(row(10, batch=2), row(10, mode="end-to-end"), lost), tmp_path).comparison
    assert found is not None
    assert [change.row for change in found.changes] == [0, 1]
    assert found.missing == ("fake fp32 batch 1", "fake fp32 batch 1")


def test_the_machine_is_compared_too(tmp_path: Path) -> None:
    slow, fast = (Limits(threads=1, gflops=gflops, gbytes_per_s=1) for gflops in (50, 100))
    found = against(report_of(row(10), limits=fast), report_of(row(10), limits=slow), tmp_path)
    assert found.comparison is not None
    assert found.comparison.machine_ratio == 0.5
    lines = comparison(found)
    assert "the machine's sgemm attains 0.50 times as much" in lines[0]
    assert "a tie; the same artifact" in lines[1]


HOLLOW = msgspec.structs.replace(report_of(row(1)), results=(msgspec.structs.replace(row(1), samples_ns=((1,), ())),))


def of_this_processor(**other: object) -> bytes:
    """A baseline of this processor, or of one that has its name."""
    environment = {**describe_machine(), **other}
    return msgspec.json.encode(report_of(row(1), environment=environment))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        (b"", "Input data was truncated"),
        (b"\xff\xfe", "bench --json wrote"),
        (b"[1, 2]", "Expected `object`"),
        (b'{"results": []}', "missing required field"),
        (b"[" * 100_000, "bench --json wrote"),
        (msgspec.json.encode(report_of()), "no row with figures"),
        (msgspec.json.encode(HOLLOW), "without samples"),
        (msgspec.json.encode(report_of(row(1), environment={"cpu": "an abacus"})), "is of a an abacus; this is a"),
        (of_this_processor(instructions=["abacus"]), "they differ in abacus"),
        (of_this_processor(max_isa="SSE41"), "was held to SSE41; ONEDNN_MAX_CPU_ISA is"),
    ],
)
def test_a_baseline_that_cannot_be_used(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "before.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=expected):
        Baseline.read(str(path), 0.05)


@pytest.mark.parametrize("allowed", [-0.01, float("nan"), float("inf")])
def test_an_allowance_that_cannot_be_meant(tmp_path: Path, allowed: float) -> None:
    with pytest.raises(UsageError, match="expected 0 % or more"):
        Baseline.read(written(report_of(row(1)), tmp_path), allowed)


def test_the_verdict_in_words() -> None:
    told = verdicts(report_of(row(10, runtime="a"), row(5, runtime="b"), row(5.05, runtime="c"), row(3, batch=8)))
    assert len(told) == 2
    assert told[0].startswith("The network alone: b fp32 takes 5")
    assert "a fp32 takes 2.00 times as long" in told[0]
    assert "c fp32 ties with it (1.01)" in told[0]
    assert told[1].startswith("The network alone, batch 8: fake fp32 takes 3")


@pytest.mark.slow
def test_the_command_ends_with_1_after_a_regression(inline: Cli, made: Made, tmp_path: Path, worker: Worker) -> None:
    worker()
    options = ["bench", str(made.bundle), "--runtime", "ort"]
    first = inline(*options, "--json", str(tmp_path / "now.json"))
    assert first.code == 0, first.err
    now = msgspec.json.decode((tmp_path / "now.json").read_bytes(), type=BenchReport)
    quicker = [tuple(tuple(ns // 50 for ns in samples) for samples in each.samples_ns) for each in now.results]
    faked = tuple(
        msgspec.structs.replace(each, samples_ns=samples) for each, samples in zip(now.results, quicker, strict=True)
    )
    before = written(msgspec.structs.replace(now, results=faked), tmp_path)
    second = inline(*options, "--compare", before, "--max-regression", "10", "--json", str(tmp_path / "then.json"))
    assert second.code == 1
    assert "1 of 1 rows are slower than" in second.err
    again = msgspec.json.decode((tmp_path / "then.json").read_bytes(), type=BenchReport)
    assert again.comparison is not None  # written all the same
    assert again.command is not None


def test_an_allowance_without_a_baseline_is_wrong_usage(inline: Cli, made: Made) -> None:
    run = inline("bench", str(made.bundle), "--max-regression", "10")
    assert run.code == 2
    assert "expected --compare FILE with it" in run.err
