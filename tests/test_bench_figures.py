"""What may be said of raw nanoseconds: percentiles, ratios with intervals, ties; and the machine's limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from dmformer.bench.limits import Limits, LimitsOrder, Peak, attainable_ms, environment_for, least_work, measure_limits
from dmformer.bench.measure import Measurement
from dmformer.bench.plan import Configuration
from dmformer.bench.report import Result, median_limits, standings, summarise
from dmformer.bench.statistics import latency, noise_floor, paired_ratio, round_ratios, unpaired_ratio
from dmformer.bundle.reader import open_bundle

if TYPE_CHECKING:
    from dmformer.export.cached import ExportResult


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
        "peak_rss_mb": 1.0, "wall_ns": sum(latencies),
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


def test_a_row_whose_processes_were_throttled_says_so() -> None:
    found = summarise(PLANNED, [measurement([1] * 10, throttled_ms=40.0), measurement([1] * 10, throttled_ms=2.0)])
    assert (found.status, found.throttled_ms) == ("ok", 42.0)
    assert found.reason is not None
    assert found.reason.startswith("throttled: the kernel held it back for 42 ms")
    assert summarise(PLANNED, [measurement([1] * 10)]).reason is None


def test_one_round_that_did_not_settle_makes_the_row_unstable() -> None:
    found = summarise(PLANNED, [measurement([1] * 10), measurement([1] * 10, stable=False)])
    assert found.status == "unstable"
    assert found.reason is not None
    assert found.latency_ms is not None


def test_ratios_are_of_medians_round_by_round() -> None:
    candidate, baseline = [[1, 2, 900], [30], [4, 4]], [[4, 4, 4], [10, 20], [1, 1, 2, 2]]
    assert round_ratios(candidate, baseline) == [0.5, 2.0, pytest.approx(8 / 3)]
    assert round_ratios(candidate, baseline[:2]) == [0.5, 2.0]  # a run that was stopped


# --- ratios with an interval ------------------------------------------------------------------------------------------


def spread(middle: float, *, rounds: int = 3, calls: int = 100, seed: int = 0, between: float = 0.0) -> Any:
    """Rounds of calls: each within 2 % of the round's middle, which is within ``between`` of ``middle``."""
    rng = np.random.default_rng(seed)
    centres = middle * (1 + between * rng.uniform(-1, 1, rounds))
    return tuple(tuple(int(1e6 * value) for value in centre * rng.uniform(0.98, 1.02, calls)) for centre in centres)


@pytest.mark.parametrize("ratio_of", [paired_ratio, unpaired_ratio])
@pytest.mark.parametrize(
    ("times", "noise", "verdict"),
    [(1.5, 0.05, "slower"), (0.6, 0.05, "faster"), (1.03, 0.05, "tie"), (0.96, 0.05, "tie"), (1.5, None, "unknown")],
)
def test_verdicts(ratio_of: Any, times: float, noise: float | None, verdict: str) -> None:
    found = ratio_of(spread(10 * times, seed=1), spread(10, seed=2), noise)
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(times, rel=0.01)
    assert found.low <= found.ratio <= found.high
    assert found.high - found.low < 0.02 * times


def test_an_interval_that_holds_1_is_a_tie_without_any_noise() -> None:
    found = paired_ratio(spread(10.4, between=0.3, seed=5), spread(10, between=0.3, seed=9), noise=0.0)
    assert found.low < 1 < found.high
    assert found.verdict == "tie"


def test_a_slow_minute_that_meets_both_moves_no_paired_ratio() -> None:
    """Both take three times as long in the second round: side by side that is no difference, apart it is."""

    def slowed(rounds: Any) -> Any:
        return tuple(
            tuple(value * factor for value in samples) for samples, factor in zip(rounds, (1, 3, 1), strict=True)
        )

    one, two = slowed(spread(12)), slowed(spread(10))
    paired, unpaired = paired_ratio(one, two, 0.01), unpaired_ratio(one, two, 0.01)
    assert paired.verdict == "slower"
    assert paired.high - paired.low < 0.05
    assert unpaired.verdict == "tie"
    assert unpaired.high > 2


def test_an_interval_covers_what_it_claims() -> None:
    """Of 200 repetitions of one experiment, most intervals hold the true ratio; rounds differ by 10 %."""
    held = 0
    for seed in range(200):
        found = paired_ratio(
            spread(12, rounds=6, calls=20, seed=2 * seed, between=0.1),
            spread(10, rounds=6, calls=20, seed=2 * seed + 1, between=0.1),
            noise=0.0,
        )
        held += found.low <= 1.2 <= found.high
    assert 170 <= held <= 199


def test_the_noise_floor() -> None:
    assert noise_floor([[10], [10], [10]], [[11], [10], [13]]) == pytest.approx(0.1)
    assert noise_floor([], []) is None


def row(milliseconds: float, **changed: Any) -> Result:
    fields: dict[str, Any] = {"runtime": "fake", "precision": "fp32", "batch": 1, "threads": 1, "artifact_sha256": "0"}
    planned = Result(**(fields | {"status": "ok"} | changed))
    return summarise(planned, [measurement(list(samples)) for samples in spread(milliseconds)])


def test_rows_stand_against_the_quickest_of_their_kind() -> None:
    rows = [row(10), row(5), row(7, batch=4), row(20), row(9, mode="end-to-end"), row(8, mode="end-to-end")]
    found = standings(rows, noise=0.02)
    assert [(each.row, each.quickest, round(each.ratio, 1)) for each in found] == [(0, 1, 2), (3, 1, 4), (4, 5, 1.1)]


def test_streams_are_judged_by_the_time_between_answers() -> None:
    """Two streams that take 10 ms each and answer every 5 ms."""
    both = measurement([10_000_000] * 40, wall_ns=200_000_000)
    streams = msgspec.structs.replace(PLANNED, batch=2, mode="throughput", streams=2)
    found = summarise(streams, [both, both])
    assert found.call_ms == pytest.approx(5)
    assert found.throughput_ips == pytest.approx(400)
    assert found.latency_ms is not None
    assert found.latency_ms.p50 == pytest.approx(10)


# --- the machine's limits ---------------------------------------------------------------------------------------------

LIMITS = Limits(threads=2, gflops=100, gbytes_per_s=10, peaks=(Peak(runtime="openvino", precision="int8", gops=300),))


@pytest.mark.parametrize(
    ("runtime", "layers", "work", "expected"),
    [
        ("openvino", {"fp32": 9}, (2e9, 1e6), 20),  # 2e9 operations at 100e9 a second
        ("openvino", {"fp32": 9}, (2e6, 1e9), 100),  # 1e9 bytes at 10e9 a second
        ("openvino", {"int8": 5, "fp32": 4}, (3e9, 0), 10),  # all at the quickest: a limit, whatever the share
        ("onnxruntime", {"int8": 5}, (3e9, 0), None),  # nothing is known of int8 there
        ("onnxruntime", {"fp32": 5, "bf16": 1}, (3e9, 0), None),
        ("onnxruntime", {}, (3e9, 0), None),
    ],
)
def test_attainable(runtime: str, layers: dict[str, int], work: tuple[float, float], expected: float | None) -> None:
    found = attainable_ms(LIMITS, runtime, layers, work)
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_share_is_of_the_limit_in_the_same_round() -> None:
    """The machine is three times as fast in the last two rounds: each call is at half its limit all the same."""
    rounds = [measurement([ns] * 9, layers={"fp32": 1}) for ns in (60_000_000, 20_000_000, 20_000_000)]
    limits = [Limits(threads=1, gflops=gflops, gbytes_per_s=1e9) for gflops in (100, 300, 300)]
    found = summarise(PLANNED, rounds, limits, work=(3e9, 1.0))
    assert found.attainable_ms == pytest.approx(10)
    assert found.share_of_limit == pytest.approx(0.5)
    assert summarise(PLANNED, rounds, [None, None, None], work=(3e9, 1.0)).share_of_limit is None
    assert summarise(PLANNED, rounds, [None, *limits[1:]], work=(3e9, 1.0)).share_of_limit == pytest.approx(0.5)


def test_a_gpu_has_no_limit_of_the_processor() -> None:
    found = summarise(PLANNED, [measurement([1] * 9, device_ns=[1] * 9, layers={"fp32": 1})], [LIMITS], (1e9, 1.0))
    assert found.attainable_ms is None


def test_the_limits_of_a_run_are_medians() -> None:
    slow, fast = (
        LIMITS,
        Limits(threads=2, gflops=300, gbytes_per_s=30, peaks=(Peak(runtime="openvino", precision="int8", gops=500),)),
    )
    found = median_limits([slow, None, fast, fast])
    assert found == fast
    assert median_limits([None]) is None


def test_limits_are_measured() -> None:
    found = measure_limits(LimitsOrder(threads=1, peaks=(("openvino", "int8"), ("onnxruntime", "int8"))))
    assert found.threads == 1
    assert 0.5 < found.gflops < 5_000
    assert 0.1 < found.gbytes_per_s < 2_000
    (peak,) = found.peaks
    assert (peak.runtime, peak.precision) == ("openvino", "int8")
    assert 0.5 < peak.gops < 20_000


def test_the_libraries_are_told_the_number_of_threads() -> None:
    found = environment_for(3)
    assert found["OPENBLAS_NUM_THREADS"] == found["OMP_NUM_THREADS"] == "3"
    assert "PATH" in found


def test_least_work(exported: ExportResult) -> None:
    manifest = open_bundle(exported.output).manifest
    (artifact,) = (artifact for artifact in manifest.artifacts if artifact.format == "openvino")
    operations, least_bytes = least_work(manifest, artifact, batch=3)
    assert operations == 6 * manifest.model.macs
    (weights,) = (file.bytes for file in artifact.files if file.path.endswith(".bin"))
    size = manifest.preprocessing.image_size
    assert least_bytes == weights + 3 * 4 * (3 * size * size + len(manifest.model.classes))
    assert least_bytes > 2 * manifest.model.parameters  # the weights are there


def test_titles() -> None:
    plain = Configuration(runtime="torch", precision="fp32", batch=2, threads=3, artifact_sha256="0")
    assert (plain.title, plain.cores) == ("torch fp32 batch 2", 3)
    busy = Configuration(
        runtime="torch", precision="fp32", batch=2, threads=3, artifact_sha256="0", mode="throughput", streams=4
    )
    assert (busy.title, busy.cores) == ("torch fp32 batch 2, throughput, 4 streams", 12)
