"""The fastest configuration within a budget: what is tried, what is given up, what is kept for the machine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator

import dmformer
import dmformer.tuning.api
from dmformer.assets import CALIBRATION_IMAGES, SAMPLE_IMAGES
from dmformer.bench import api as bench_api
from dmformer.bench.limits import Limits
from dmformer.bench.plan import WARM_UP
from dmformer.bundle import settings as settings_module
from dmformer.bundle.manifest import MANIFEST
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.settings import Settings, check_writable, choose_configured, settings_path, write_settings
from dmformer.errors import CheckFailed, StageFailed, UnavailableError, UsageError
from dmformer.layouts.api import serve_layout
from dmformer.procfs import EnergyMeter
from tests.test_bench_figures import measurement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dmformer.bench.plan import TimingOrder
    from dmformer.export.cached import ExportResult
    from dmformer.tuning.report import Candidate, TuneReport
    from tests.conftest import Cli

SCHEMA = json.loads((Path(dmformer.__file__).parent / "schemas" / "tune.json").read_text(encoding="utf-8"))
SETTINGS = Settings(
    runtime="openvino", precision="fp32", threads=1, p50_ms=1.0, measured_at="2026-01-01T00:00:00+00:00"
)


class Machine:
    """Times configurations from a table, in place of processes: milliseconds of a call, MiB, by what is in a title."""

    def __init__(self) -> None:
        self.cores = 4
        self.ms: dict[str, float] = {}
        self.mib: dict[str, float] = {}
        self.failing: set[str] = set()
        self.orders: list[TimingOrder] = []
        self.rng = np.random.default_rng(0)

    def __call__(self, _function: str, order: Any, kind: type, *_: object) -> Any:
        if kind is Limits:
            return Limits(threads=order.threads, gflops=1e6, gbytes_per_s=1e6)
        self.orders.append(order)
        row = order.configuration
        title = f"{row.title} threads {row.threads}"
        if any(part in title for part in self.failing):
            return StageFailed("the engine failed")
        ms = next((ms for part, ms in self.ms.items() if part in title), 10.0)
        latencies = (ms * 1e6 * self.rng.normal(1, 0.002, 40)).astype(int).tolist()
        mib = next((mib for part, mib in self.mib.items() if part in title), 100.0)
        wall = sum(latencies) // row.streams
        return measurement(latencies, threads=row.threads, peak_rss_mb=mib, wall_ns=wall)

    def times(self, part: str) -> int:
        return sum(
            part in f"{order.configuration.title} threads {order.configuration.threads}" for order in self.orders
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine()
    monkeypatch.setattr(bench_api, "call", fake)
    for module in ("dmformer.tuning.api", "dmformer.bench.plan", "dmformer.machine"):
        monkeypatch.setattr(sys.modules[module], "usable_cores", lambda: fake.cores)
    return fake


def best(report: TuneReport) -> Candidate:
    assert report.chosen is not None
    return report.candidates[report.chosen]


def valid(report: TuneReport) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(msgspec.json.encode(report))
    Draft202012Validator(SCHEMA).validate(document)
    return document


def test_the_quickest_is_chosen_and_timed_longest(machine: Machine, reduced: ExportResult) -> None:
    machine.ms = {"openvino int8 batch 1 threads 2": 3.0, "openvino": 12.0, "onnxruntime fp32": 5.0}
    report = dmformer.tune(reduced.output)
    found = best(report)
    assert (found.runtime, found.precision, found.threads) == ("openvino", "int8", 2)
    assert found.p50_ms == pytest.approx(3.0, rel=0.01)
    assert len(report.candidates) == 6 * 3  # two runtimes at three precisions; 1, 2 and 4 threads
    assert machine.times("openvino int8 batch 1 threads 2") > 2 * machine.times("openvino fp32 batch 1 threads 1")
    assert sum(one.final for one in report.candidates) == 4
    assert [one.final for one in report.candidates][:4] == [True] * 4
    assert not report.ties
    valid(report)


def test_what_is_as_fast_is_said(machine: Machine, reduced: ExportResult) -> None:
    machine.ms = {"onnxruntime fp32 batch 1 threads 4": 3.0, "openvino int8 batch 1 threads 4": 3.001}
    report = dmformer.tune(reduced.output)
    assert len(report.ties) == 1
    two = {report.candidates[place].title for place in (report.chosen or 0, *report.ties)}
    assert two == {"onnxruntime fp32 batch 1", "openvino int8 batch 1"}


def test_a_budget_comes_before_speed(machine: Machine, reduced: ExportResult) -> None:
    machine.ms = {"openvino": 2.0, "onnxruntime fp32": 4.0, "onnxruntime": 6.0}
    machine.mib = {"openvino": 300.0}
    report = dmformer.tune(reduced.output, max_memory=200, max_latency=5)
    assert best(report).title == "onnxruntime fp32 batch 1"
    over = next(one for one in report.candidates if one.runtime == "openvino")
    assert over.over_budget == ("memory 300 MiB; allowed are 200 MiB",)


def test_latency_is_that_of_nine_calls_in_ten(machine: Machine, reduced: ExportResult) -> None:
    report = dmformer.tune(reduced.output, runtimes=["ort"], precisions=["fp32"], threads=[1], max_latency=10.0)
    assert report.chosen is None  # the median is 10 ms, nine in ten take a little more
    assert "nine calls in ten take" in report.candidates[0].over_budget[0]


def test_nothing_within_the_budget_names_the_nearest(machine: Machine, reduced: ExportResult) -> None:
    machine.ms = {"onnxruntime fp16": 7.0, "openvino": 9.0, "onnxruntime": 8.0}
    report = dmformer.tune(reduced.output, max_latency=1)
    assert report.chosen is None
    with pytest.raises(CheckFailed, match=r"none of 18 configurations .* nearest is onnxruntime fp16 batch 1, .* 1 ms"):
        report.check()
    with pytest.raises(CheckFailed, match="none of"):
        report.settings()


def test_accuracy_comes_from_the_evidence(machine: Machine, reduced: ExportResult, tmp_path: Path) -> None:
    machine.ms = {"int8": 1.0}
    report = dmformer.tune(reduced.output, max_accuracy_drop=0.5)
    assert best(report).precision == "int8"
    lost = {one.precision: one.points_lost for one in report.candidates if one.runtime == "openvino"}
    held = {one.precision: one.points_lost for one in open_bundle(reduced.output).artifacts("openvino")}
    assert lost == held
    assert best(report).points_from == "the calibration images of the export"


def test_accuracy_that_nobody_measured_is_not_within_a_budget(
    machine: Machine, reduced: ExportResult, tmp_path: Path
) -> None:
    import shutil

    from tests.bundles import rewrite

    copy = Path(shutil.copytree(reduced.output, tmp_path / "b"))

    def forget(manifest: dict[str, Any]) -> None:
        for artifact in manifest["artifacts"]:
            artifact["points_lost"] = None

    rewrite(copy, forget)
    machine.ms = {"int8": 1.0, "fp16": 2.0}
    report = dmformer.tune(copy, max_accuracy_drop=0.5)
    assert best(report).precision == "fp32"
    assert best(report).points_from == "parity: its answers are PyTorch's but for rounding"
    over = next(one for one in report.candidates if one.precision == "int8")
    assert over.over_budget == ("what accuracy it loses is not known; expected labelled images: `data`",)


def test_accuracy_is_measured_on_images_that_are_given(machine: Machine, reduced: ExportResult) -> None:
    report = dmformer.tune(
        reduced.output, runtimes=["ort"], threads=[1], data=CALIBRATION_IMAGES, max_accuracy_drop=100
    )
    assert {one.points_from for one in report.candidates} == {"the images that were given"}
    assert all(one.points_lost is not None and abs(one.points_lost) < 5 for one in report.candidates)
    with pytest.raises(UsageError, match="images without labels, and agreement"):
        dmformer.tune(reduced.output, runtimes=["ort"], data=SAMPLE_IMAGES, max_accuracy_drop=1)


def test_throughput_counts_images(machine: Machine, reduced: ExportResult) -> None:
    machine.ms = {"batch 8": 20.0, "batch 4": 20.0}
    report = dmformer.tune(reduced.output, objective="throughput", runtimes=["ort"], precisions=["fp32"])
    found = best(report)
    assert (found.batch, found.streams, found.threads) == (8, 4, 1)
    assert found.images_per_s == pytest.approx(4 * 8 / 0.020, rel=0.02)
    assert found.p50_ms == pytest.approx(20.0, rel=0.01)
    assert {one.threads * one.streams for one in report.candidates if one.streams > 1} == {4}


def test_the_front_has_what_nothing_beats_in_everything(machine: Machine, reduced: ExportResult) -> None:
    machine.ms, machine.mib = {"openvino": 2.0}, {"openvino": 300.0}
    report = dmformer.tune(reduced.output, threads=[1])
    sizes = {one.title: one.size_bytes for one in report.candidates}
    on_front = {one.title for one in report.candidates if one.on_front}
    assert min(sizes, key=lambda title: sizes[title]) in on_front
    worst = max((one for one in report.candidates if one.runtime == "onnxruntime"), key=lambda one: one.size_bytes)
    quick = [one for one in report.candidates if one.runtime == "openvino" and one.on_front]
    assert quick
    assert worst.title not in on_front or worst.points_lost == 0


def test_a_configuration_that_fails_is_told_and_not_chosen(machine: Machine, reduced: ExportResult) -> None:
    machine.ms, machine.failing = {"openvino int8": 1.0}, {"openvino int8"}
    report = dmformer.tune(reduced.output)
    assert best(report).title != "openvino int8 batch 1"
    failed = [one for one in report.candidates if one.precision == "int8" and one.runtime == "openvino"]
    assert [(one.p50_ms, one.reason) for one in failed] == [(None, "the engine failed")] * 3
    machine.failing = {""}
    with pytest.raises(StageFailed, match=r"^all 18 configurations failed; first: .*: the engine failed$"):
        dmformer.tune(reduced.output).check()


def test_where_the_last_four_do_not_last_the_next_come(
    machine: Machine, reduced: ExportResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that only long runs take; those that were given up before are within the budget."""
    machine.ms = {"onnxruntime": 20.0}

    def call(function: str, order: Any, kind: type, *others: object) -> Any:
        measured = machine(function, order, kind, *others)
        long = kind is not Limits and order.warm_up is WARM_UP and "openvino" in order.configuration.title
        return msgspec.structs.replace(measured, peak_rss_mb=500.0) if long else measured

    monkeypatch.setattr(bench_api, "call", call)
    report = dmformer.tune(reduced.output, max_memory=200)
    assert best(report).runtime == "onnxruntime"
    assert best(report).final
    assert len([one for one in report.candidates if one.final and one.over_budget]) == 9  # every one of openvino


def test_a_stopped_search_chooses_nothing_and_keeps_what_it_has(
    machine: Machine, reduced: ExportResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(function: str, order: Any, kind: type, *others: object) -> Any:
        if kind is not Limits and order.warm_up is WARM_UP and len(machine.orders) > 40:
            raise KeyboardInterrupt
        return machine(function, order, kind, *others)

    monkeypatch.setattr(bench_api, "call", call)
    report = dmformer.tune(reduced.output)
    assert report.partial
    assert (report.chosen, report.nearest) == (None, None)
    assert all(one.p50_ms for one in report.candidates)
    assert not any(one.final for one in report.candidates)
    with pytest.raises(CheckFailed, match="stopped before its end"):
        report.check()


def test_batches_are_as_fast_by_the_image_for_throughput_alone(machine: Machine, reduced: ExportResult) -> None:
    machine.ms = {"batch 1": 10.0, "batch 2": 20.0}
    asked: dict[str, Any] = {"runtimes": ["ort"], "precisions": ["fp32"], "threads": [1], "batches": [1, 2]}
    assert not dmformer.tune(reduced.output, **asked).ties
    assert len(dmformer.tune(reduced.output, objective="throughput", streams=[1], **asked).ties) == 1


def test_figures_tell_themselves_from_what_they_exceed(machine: Machine, reduced: ExportResult) -> None:
    machine.mib = {"": 1234.004}
    report = dmformer.tune(reduced.output, runtimes=["ort"], threads=[1], max_memory=1234)
    assert report.candidates[0].over_budget == ("memory 1234.004 MiB; allowed are 1234 MiB",)


def test_an_emulated_processor_is_refused(
    machine: Machine, reduced: ExportResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["dmformer.tuning.api"], "is_emulated", lambda: True)
    with pytest.raises(UnavailableError, match="emulation"):
        dmformer.tune(reduced.output)
    assert not machine.orders


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "speed"}, "objective 'speed'; expected one of latency, throughput"),
        ({"max_latency": -1.0}, "`max_latency` -1; expected a number from 0"),
        ({"max_memory": float("nan")}, "`max_memory` nan"),
        ({"streams": [2]}, "`streams` for one call at a time"),
        ({"streams": [0], "objective": "throughput"}, "`streams` 0; expected 1 to 4"),
        ({"streams": [5], "objective": "throughput"}, "`streams` 5; expected 1 to 4"),
        ({"threads": [0]}, "threads is 0"),
        ({"batches": [0]}, "batch sizes"),
        ({"runtimes": ["x"]}, "'x'"),
        ({"precisions": ["fp8"]}, "nothing at fp8"),
    ],
)
def test_wrong_usage_is_one_line(machine: Machine, reduced: ExportResult, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        dmformer.tune(reduced.output, **options)
    assert said in str(caught.value)
    assert not machine.orders


# --- what is kept for the machine ------------------------------------------------------------------------------------


def test_the_choice_is_kept_beside_the_bundle_and_taken(
    machine: Machine, inline: Cli, bundle: Path, tmp_path: Path
) -> None:
    machine.ms = {"openvino fp32 batch 1 threads 2": 1.0}
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    run = inline("tune", bundle, "--write", "--json", tmp_path / "t.json")
    assert run.code == 0, run.err
    assert "Best for latency on this machine: openvino fp32 batch 1, 2 threads." in " ".join(run.out.split())
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    Draft202012Validator(SCHEMA).validate(json.loads((tmp_path / "t.json").read_text()))
    asked = inline("predict", bundle, SAMPLE_IMAGES / "7.png", "--json", tmp_path / "p.json")
    assert asked.code == 0
    assert "bundle.settings.json says, tuned for latency" in " ".join(asked.err.split())
    told = json.loads((tmp_path / "p.json").read_text())
    assert (told["runtime"], told["precision"]) == ("openvino", "fp32")
    assert "tuned for latency" in told["notes"][0]
    with dmformer.load(bundle) as predictor:
        assert (predictor.runtime.name, predictor.runtime.threads) == ("openvino", 2)
    with dmformer.load(bundle, threads=1) as predictor:
        assert (predictor.runtime.name, predictor.runtime.threads) == ("openvino", 1)
    with dmformer.load(bundle, runtime="ort") as predictor:
        assert predictor.runtime.name == "onnxruntime"
        assert predictor.notes == ()


def test_without_a_choice_nothing_is_kept(machine: Machine, inline: Cli, bundle: Path) -> None:
    run = inline("tune", bundle, "--max-latency", 0.001, "--write")
    assert run.code == 1
    assert "none of" in run.error_line
    assert not settings_path(open_bundle(bundle)).exists()


def test_other_machines_keep_theirs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    monkeypatch.setattr(settings_module, "machine_key", lambda: "a board")
    write_settings(opened, SETTINGS)
    monkeypatch.undo()
    assert choose_configured(opened, None, None).note is None
    write_settings(opened, msgspec.structs.replace(SETTINGS, threads=2))
    assert choose_configured(opened, None, None).threads == 2
    monkeypatch.setattr(settings_module, "machine_key", lambda: "a board")
    assert choose_configured(opened, None, None).threads == 1


def test_a_server_answers_first_by_what_was_tuned(bundle: Path, tmp_path: Path, inline: Cli) -> None:
    write_settings(open_bundle(bundle), SETTINGS)
    command = ("serve-layout", "triton", bundle, "--backend", "python", "--output")
    run = inline(*command, tmp_path / "tuned")
    assert run.code == 0, run.err
    assert "bundle.settings.json says, tuned for latency" in " ".join(run.err.split())
    (first, *others) = (line.split("/")[-1] for line in run.out.split())
    assert first == "dmformer_nano_openvino_fp32"
    configured = {path.parent.name: path.read_text() for path in (tmp_path / "tuned").rglob("config.pbtxt")}
    assert 'key: "dmformer_threads"\n  value { string_value: "1" }' in configured[first]
    assert others
    assert not any("dmformer_threads" in configured[other] for other in others)
    assert f"--load-model={first}" in (tmp_path / "tuned" / "README.md").read_text()
    asked = inline(*command, tmp_path / "asked", "--runtime", "ort")
    assert "settings.json" not in asked.err
    assert "dmformer_threads" not in next((tmp_path / "asked").rglob("config.pbtxt")).read_text()


def test_a_layout_asks_no_engine(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*_: object) -> Any:
        raise UnavailableError("no runtime of the bundle can run here")

    monkeypatch.setattr(settings_module, "choose", choose)
    opened = open_bundle(bundle)
    without = serve_layout("triton", opened, tmp_path / "0", backend="python")
    assert without.note is None
    write_settings(opened, SETTINGS)
    tuned = serve_layout("triton", opened, tmp_path / "1", backend="python", images=True)
    assert tuned.models[:2] == ("dmformer_nano_openvino_fp32", "dmformer_nano_openvino_fp32_images")
    assert "tuned for latency at 2026-01-01T00:00:00+00:00: openvino fp32, 1 thread" in str(tuned.note)
    for number, other in enumerate(({"runtime": "torch"}, {"precision": "int4"})):
        write_settings(opened, msgspec.structs.replace(SETTINGS, **other))
        unmatched = serve_layout("triton", opened, tmp_path / f"other {number}", backend="python")
        assert (unmatched.models, unmatched.note) == (without.models, None)
    settings_path(opened).write_text("{")
    damaged = serve_layout("triton", opened, tmp_path / "2", backend="python")
    assert "bundle.settings.json is not used: it is damaged" in str(damaged.note)


@pytest.fixture
def kept(bundle: Path) -> Iterator[Path]:
    path = write_settings(open_bundle(bundle), SETTINGS)
    assert choose_configured(open_bundle(bundle), None, None).choice.title == "openvino fp32"
    return path


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_text("{"), "it is damaged"),
        (lambda path: path.write_text("{}"), "it is damaged"),
        (lambda path: path.write_text(path.read_text().replace('"threads": 1', '"threads": 0')), "it is damaged"),
        (lambda path: path.write_text(path.read_text().replace('"threads": 1', '"threads": 4000')), "threads is 4000"),
        (lambda path: path.write_text(path.read_text().replace("openvino", "tensorrt")), "tensorrt"),
        (lambda path: path.write_text(path.read_text().replace("openvino", "no such one")), "it is damaged"),
        (lambda path: path.write_text(path.read_text().replace("fp32", "int4")), "nothing at int4"),
        (lambda path: path.chmod(0o666), "other users can write to it"),
        (lambda path: path.write_bytes(b" " * (2 << 20)), "it cannot be read"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "it cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), "it cannot be read"),
    ],
)
def test_settings_that_cannot_be_used_are_said_and_left(kept: Path, bundle: Path, spoil: Any, said: str) -> None:
    spoil(kept)
    found = choose_configured(open_bundle(bundle), None, None)
    assert found.settings is None
    assert found.choice.title == choose_configured(open_bundle(bundle), "auto", None).choice.title
    assert found.note is not None
    assert found.note.startswith("bundle.settings.json is not used: ")
    assert said in found.note


def test_one_caller_has_the_cores_of_all_streams(bundle: Path) -> None:
    write_settings(open_bundle(bundle), msgspec.structs.replace(SETTINGS, threads=1, streams=2, objective="throughput"))
    assert choose_configured(open_bundle(bundle), None, None).threads == 2


def test_settings_are_written_so_that_they_are_taken(kept: Path, bundle: Path) -> None:
    before = os.umask(0)
    try:
        write_settings(open_bundle(bundle), SETTINGS)
    finally:
        os.umask(before)
    assert choose_configured(open_bundle(bundle), None, None).settings == SETTINGS
    kept.unlink()
    kept.symlink_to(kept.parent / "elsewhere")
    with pytest.raises(UsageError, match="is a link"):
        write_settings(open_bundle(bundle), SETTINGS)
    kept.unlink()
    kept.mkdir()
    with pytest.raises(UsageError, match="is no file"):  # before anything is timed
        check_writable(open_bundle(bundle))


def test_what_others_could_have_written_is_not_kept_on(
    kept: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.chmod(0o666)
    monkeypatch.setattr(settings_module, "machine_key", lambda: "a board")
    write_settings(open_bundle(bundle), SETTINGS)
    assert list(json.loads(kept.read_text())["machines"]) == ["a board"]


def test_a_folder_that_cannot_be_written_is_found_first(
    machine: Machine, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, _mode: Path(path) != bundle.parent)  # root may write everywhere
    with pytest.raises(StageFailed, match="is read-only"):
        dmformer.tune(bundle, write=True)
    assert not machine.orders


def test_settings_of_another_bundle_are_not_taken(kept: Path, bundle: Path) -> None:
    manifest = bundle / MANIFEST
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert "about another bundle" in str(choose_configured(open_bundle(bundle), None, None).note)
    write_settings(open_bundle(bundle), msgspec.structs.replace(SETTINGS, threads=2))
    assert choose_configured(open_bundle(bundle), None, None).threads == 2


def test_energy_is_counted_over_a_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmformer.procfs._POWERCAP", tmp_path)
    assert EnergyMeter().joules() is None
    zones = (
        ("intel-rapl:0", "package-0", 900), ("intel-rapl:1", "package-1", 100), ("intel-rapl:0:0", "core", 5),
        ("intel-rapl:2", "psys", 7),
    )  # fmt: skip
    for zone, name, count in zones:
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text(f"{count}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("999\n")
    meter = EnergyMeter()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50\n")  # 150 further
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("300\n")
    (tmp_path / "intel-rapl:2" / "energy_uj").write_text("500\n")  # holds the packages in it
    assert meter.joules() == pytest.approx(350e-6)
    (tmp_path / "intel-rapl:1" / "energy_uj").chmod(0)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.joules() is None


@pytest.mark.slow
def test_a_real_run(cli: Cli, exported: ExportResult) -> None:
    run = cli("tune", exported.output, "--runtime", "ort", "--threads", 1, "--json", "-")
    assert run.code == 0, run.err
    document = json.loads(run.out)
    Draft202012Validator(SCHEMA).validate(document)
    (found,) = document["candidates"]
    assert document["chosen"] == 0
    assert found["final"]
    assert found["p50_ms"] > 0
    assert found["memory_mb"] > 20
