"""Whether a reduced precision earns its place: from reports of a bench that was not run."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from msgspec.structs import replace

from dmformer.bench.report import BenchReport, Latency, Result
from dmformer.bundle.manifest import Artifact, FileEntry, Speed
from dmformer.bundle.reader import own_bundle
from dmformer.errors import StageFailed
from dmformer.export import steps
from dmformer.export.steps import TimedArtifacts, fastest, time_artifacts
from dmformer.progress import silent

if TYPE_CHECKING:
    from dmformer.export.cached import ExportResult

PRECISIONS = ("fp32", "fp16", "int8")
# Latencies in ns by round of three; the second round was slow for everyone.
ROUNDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "fp32": ((100, 100, 400), (200, 200, 200), (100, 100, 100)),
    "fp16": ((99, 99, 99), (196, 196, 196), (97, 97, 97)),
    "int8": ((50, 50, 900), (100, 100, 100), (80, 80, 80)),
}


def artifact(precision: str, format_name: str = "onnx") -> Artifact:
    digest = f"{PRECISIONS.index(precision)}{'onnx openvino'.index(format_name)}".ljust(64, "0")
    file = FileEntry(path=f"{format_name}/{precision}/model", bytes=1, sha256=digest)
    return Artifact(format=format_name, precision=precision, files=(file,), built_with={})


def result(made: Artifact, rounds: tuple[tuple[int, ...], ...], **others: Any) -> Result:
    half = rounds[0][0] / 1e6
    found = Result(
        runtime=made.format,
        precision=made.precision,
        batch=1,
        threads=1,
        artifact_sha256=made.sha256,
        status="ok",
        latency_ms=Latency(p50=half, p90=half, p99=None, mean=2 * half, min=half, max=half),
        samples_ns=rounds,
    )
    return replace(found, **others)


def timed(
    monkeypatch: pytest.MonkeyPatch,
    artifacts: list[Artifact],
    results: list[Result],
    noise: float | None = 0.05,
) -> TimedArtifacts:
    """What is made of a bench report; the report's rows stand in the opposite order of the bundle's artifacts."""
    report = BenchReport(environment={"cpu": "an abacus"}, results=tuple(reversed(results)), noise_floor=noise)
    monkeypatch.setattr(steps, "bench", lambda *_, **__: report)
    bundle = SimpleNamespace(manifest=SimpleNamespace(artifacts=tuple(artifacts)))
    return time_artifacts(cast("Any", bundle), silent)


def speeds(found: TimedArtifacts) -> dict[str, Speed]:
    return {made.precision: made.speed for made in found.artifacts if made.speed is not None}


def test_the_ratio_is_the_median_over_rounds_of_the_ratio_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = [artifact(precision) for precision in PRECISIONS]
    results = [result(made, ROUNDS[made.precision]) for made in artifacts]
    found = speeds(timed(monkeypatch, artifacts, results))
    assert {precision: round(speed.ratio, 6) for precision, speed in found.items()} == {
        "fp32": 1.0,
        "fp16": 0.98,
        "int8": 0.5,
    }
    assert (found["int8"].p50_ms, found["int8"].fp32_p50_ms) == (50 / 1e6, 100 / 1e6)
    assert {speed.cpu for speed in found.values()} == {"an abacus"}
    assert {speed.noise_floor for speed in found.values()} == {0.05}


@pytest.mark.parametrize(
    ("noise", "faster"),
    [
        (0.05, {"fp32": False, "fp16": False, "int8": True}),
        (0.01, {"fp32": False, "fp16": False, "int8": True}),  # a round of fp16 was slower
        (0.6, {"fp32": False, "fp16": False, "int8": False}),
        (None, {"fp32": False, "fp16": False, "int8": False}),
    ],
)
def test_faster_is_only_what_is_beyond_the_noise(
    monkeypatch: pytest.MonkeyPatch, noise: float | None, faster: dict[str, bool]
) -> None:
    artifacts = [artifact(precision) for precision in PRECISIONS]
    results = [result(made, ROUNDS[made.precision]) for made in artifacts]
    found = speeds(timed(monkeypatch, artifacts, results, noise))
    assert {precision: speed.faster for precision, speed in found.items()} == faster


def test_each_format_is_compared_with_its_own_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = [artifact(precision, name) for name in ("onnx", "openvino") for precision in ("fp32", "int8")]
    figures = {("onnx", "fp32"): 100, ("onnx", "int8"): 200, ("openvino", "fp32"): 400, ("openvino", "int8"): 100}
    results = [result(made, ((figures[made.format, made.precision],),) * 3) for made in artifacts]
    found = timed(monkeypatch, artifacts, results)
    assert [(made.format, made.precision) for made in found.artifacts] == list(figures)
    assert [made.speed.ratio for made in found.artifacts if made.speed] == [1.0, 2.0, 1.0, 0.25]
    assert [(made.format, made.precision) for made in fastest(found.artifacts)] == [
        ("onnx", "fp32"),
        ("openvino", "int8"),
    ]


def test_files_of_equal_content_at_two_precisions_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    same = artifact("fp32")
    artifacts = [same, replace(same, precision="fp16")]
    results = [result(made, ROUNDS[made.precision]) for made in artifacts]
    found = speeds(timed(monkeypatch, artifacts, results))
    assert round(found["fp16"].ratio, 6) == 0.98


def test_what_cannot_be_timed_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = [artifact("fp32"), artifact("int8")]
    results = [
        result(artifacts[0], ROUNDS["fp32"]),
        result(artifacts[1], ROUNDS["int8"], status="failed", reason="out of memory", latency_ms=None),
    ]
    with pytest.raises(StageFailed, match="timing onnx int8: out of memory"):
        timed(monkeypatch, artifacts, results)


def test_an_unstable_run_still_counts_and_few_samples_give_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = [artifact("fp32"), artifact("int8")]
    few = Latency(p50=None, p90=None, p99=None, mean=7.0, min=1.0, max=9.0)
    results = [result(made, ROUNDS[made.precision], status="unstable", latency_ms=few) for made in artifacts]
    found = speeds(timed(monkeypatch, artifacts, results))
    assert (found["int8"].p50_ms, found["int8"].ratio, found["int8"].faster) == (7.0, 0.5, True)


def with_speed(precision: str, ratio: float, *, faster: bool, format_name: str = "onnx") -> Artifact:
    figures = Speed(p50_ms=ratio, fp32_p50_ms=1.0, ratio=ratio, noise_floor=0.05, faster=faster, cpu="an abacus")
    return replace(artifact(precision, format_name), speed=figures)


@pytest.mark.parametrize(
    ("fp16", "int8", "kept"),
    [
        ((0.9, True), (0.5, True), "int8"),
        ((0.5, True), (0.9, True), "fp16"),
        ((0.97, False), (0.96, False), "fp32"),
        ((0.97, False), (0.9, True), "int8"),
        ((1.5, False), (2.0, False), "fp32"),
    ],
)
@pytest.mark.parametrize("order", [PRECISIONS, PRECISIONS[::-1]])
def test_the_fastest_is_kept_and_float32_where_nothing_is_faster(
    fp16: tuple[float, bool], int8: tuple[float, bool], kept: str, order: tuple[str, ...]
) -> None:
    figures = {"fp32": (1.0, False), "fp16": fp16, "int8": int8}
    artifacts = [with_speed(name, figures[name][0], faster=figures[name][1]) for name in order]
    assert [made.precision for made in fastest(artifacts)] == [kept]


def test_what_was_not_timed_is_not_kept_instead_of_float32() -> None:
    assert [made.precision for made in fastest([artifact("fp32"), artifact("fp16")])] == ["fp32"]


@pytest.mark.slow
def test_a_real_comparison_times_every_artifact(reduced: ExportResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TIMED_S", 0.3)
    monkeypatch.setattr(import_module("dmformer.bench.api"), "ROUNDS", 1)
    two = tuple(made for made in reduced.manifest.artifacts if made.precision != "fp16")  # of each format
    found = time_artifacts(
        dataclasses.replace(own_bundle(reduced.output), manifest=replace(reduced.manifest, artifacts=two)), silent
    )
    assert len(found.report.results) == len(found.artifacts) == 4
    for made in found.artifacts:
        assert made.speed is not None
        assert made.speed.ratio > 0
        if made.precision == "fp32":
            assert (made.speed.ratio, made.speed.faster) == (1.0, False)
