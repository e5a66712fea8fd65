"""Where sums of int8 weights of 8 bits saturate, whatever runs them says so, and a check that fails names it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import dmformer
from dmformer import machine
from dmformer.bundle import select
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import choose, saturation_risk
from dmformer.errors import CheckFailed
from dmformer.export.precisions import int8
from dmformer.machine import describe_processor
from dmformer.runtimes import registry
from tests.bundles import rewrite
from tests.precisions import SATURATES, unheld

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from dmformer.verify.answers import Answers
    from tests.conftest import Run

OPENVINO = registry.entry("openvino")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has AVX2 and no VNNI."""
    unheld(monkeypatch)
    monkeypatch.setattr(machine, "instructions", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.usefixtures("without")
@pytest.mark.slow
def test_an_export_with_eight_bits_names_the_cause(
    inline: Callable[..., Run], few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    from dmformer.verify import parity

    checked = parity.check_artifact

    def far_off(answers: Answers, *arguments: Any) -> Any:
        wrong = {batch: {"logits": found["logits"] + 1000} for batch, found in answers.by_batch.items()}
        return checked(replace(answers, by_batch=wrong) if answers.precision == "int8" else answers, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(import_module("dmformer.export.steps"), "check_artifact", far_off)
        run = inline(
            "export", "--format", "ov", "--precision", "int8", "--weight-bits", "8",
            "--calibration", few_images, "--max-accuracy-drop", "100", "--output", "b",
        )  # fmt: skip
    assert run.code == 1
    assert f"note: openvino int8: {SATURATES}: this processor has no VNNI" in run.err  # before the work
    assert "there: dmformer build --format openvino" in run.err
    assert SATURATES in run.error_line
    assert "this processor has no VNNI" in run.error_line
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("without")
def test_doctor_says_so_and_auto_takes_another(
    full_range: ExportResult, inline: Callable[..., Run], tmp_path: Path
) -> None:
    run = inline("doctor", full_range.output)
    said = " ".join(run.out.split())
    assert f"runs here; {SATURATES}: this processor has no VNNI" in said
    int8_first = Path(shutil.copytree(full_range.output, tmp_path / "b"))
    rewrite(int8_first, lambda c: c["artifacts"].sort(key=lambda made: made["precision"] != "int8"))
    artifacts = json.loads(inline("doctor", int8_first, "--json").out)["artifacts"]
    taken = [(one["format"], one["precision"]) for one in artifacts if one["chosen"]]
    bundle = open_bundle(int8_first)
    assert bundle.manifest.artifacts[0].full_range
    choice = choose(bundle, None, None)
    assert taken == [(choice.artifact.format, choice.artifact.precision)]
    assert choice.saturation_risk is None
    named = choose(bundle, "openvino", "int8")
    assert named.saturation_risk is not None


@pytest.mark.slow
@pytest.mark.usefixtures("without")
def test_predict_eval_and_bench_say_so(
    full_range: ExportResult, inline: Callable[..., Run], few_images: Path, worker: Any
) -> None:
    worker()
    image = next((few_images / "7").iterdir())
    predicted = inline("predict", full_range.output, image, "--runtime", "ov", "--precision", "int8")
    measured = inline("eval", full_range.output, "--data", few_images, "--runtime", "ov", "--json", "-")
    timed = inline("bench", full_range.output, "--runtime", "ov", "--json", "-")
    assert f"note: openvino int8: {SATURATES}" in " ".join(predicted.err.split())
    assert [note.startswith(f"openvino int8: {SATURATES}") for note in json.loads(measured.out)["notes"]] == [True]
    assert [note.startswith(f"openvino int8: {SATURATES}") for note in json.loads(timed.out)["notes"]] == [True]
    assert json.loads(timed.out)["environment"]["max_isa"] is None


@pytest.mark.usefixtures("without")
def test_python_is_warned(full_range: ExportResult) -> None:
    with pytest.warns(UserWarning, match="openvino int8: its int8 weights use 8 bits"):
        predictor = dmformer.load(full_range.output, runtime="openvino", precision="int8")
    assert SATURATES in predictor.notes[0]
    assert dmformer.load(full_range.output, runtime="openvino").runtime.precision == "fp32"  # int8 comes last there


@pytest.mark.usefixtures("without")
def test_doctor_says_so_beside_what_else_it_says(
    full_range: ExportResult, inline: Callable[..., Run], tmp_path: Path
) -> None:
    older = Path(shutil.copytree(full_range.output, tmp_path / "older"))
    rewrite(older, lambda c: [made["built_with"].update(openvino="2099.1") for made in c["artifacts"]])
    findings = json.loads(inline("doctor", older, "--json").out)["artifacts"]
    (said,) = [one["reason"] for one in findings if (one["format"], one["precision"]) == ("openvino", "int8")]
    assert "made with openvino 2099.1" in said
    assert SATURATES in said


@pytest.mark.usefixtures("without")
def test_doctor_says_so_of_what_can_be_built(
    full_range: ExportResult, inline: Callable[..., Run], tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(full_range.output, tmp_path / "bare"))
    shutil.rmtree(bare / "openvino")
    rewrite(bare, lambda c: c.update(artifacts=[made for made in c["artifacts"] if made["format"] == "onnx"]))
    findings = json.loads(inline("doctor", bare, "--json").out)["artifacts"]
    built = {one["precision"]: one["reason"] for one in findings if one["format"] == "openvino"}
    assert SATURATES in built["int8"]
    assert built["fp32"] is None


@pytest.mark.usefixtures("without")
def test_auto_looks_at_no_engine_that_it_does_not_need(exported: ExportResult, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    tried = select.cannot_run
    monkeypatch.setattr("dmformer.bundle.select.cannot_run", lambda row, a: asked.append(row.name) or tried(row, a))
    choice = choose(open_bundle(exported.output), None, None)
    assert asked == [choice.entry.name]


@pytest.mark.slow
@pytest.mark.usefixtures("without")
def test_a_case_names_the_cause(full_range: ExportResult, tmp_path: Path) -> None:
    """A limit that nothing keeps stands for what saturates."""
    from dmformer.bundle.manifest import file_entry
    from dmformer.verify.localize.case import Case, run_case, save_case

    golden = open_bundle(full_range.output).golden()
    for full in (True, False):
        shutil.copytree(full_range.output / "openvino/int8", tmp_path / f"case-{full}")
        files = tuple(
            file_entry(tmp_path / f"case-{full}", tmp_path / f"case-{full}/model.{kind}") for kind in ("xml", "bin")
        )
        case = Case(
            runtime="openvino", precision="int8", files=files, node="head", limits={"logits": 1e-9}, full_range=full
        )
        save_case(tmp_path / f"case-{full}", case, {"image": golden.inputs}, dict(golden.outputs_float64))
        (check,) = run_case(tmp_path / f"case-{full}").checks
        assert not check.passed
        assert (SATURATES in (check.reason or "")) == full


@pytest.mark.slow
@pytest.mark.usefixtures("without")
def test_only_answers_that_differ_are_explained(full_range: ExportResult, tmp_path: Path) -> None:
    less = Path(shutil.copytree(full_range.output, tmp_path / "less"))
    rewrite(
        less, lambda c: [made.update(promised_share=0.99) for made in c["artifacts"] if made["precision"] == "int8"]
    )
    found = dmformer.verify(less, runtimes=["openvino"])
    (layers,) = [check for check in found.checks if check.stage == "precision" and not check.passed]
    assert "promised 99%" in (layers.reason or "")
    assert SATURATES not in (layers.reason or "")


def test_a_layout_for_a_server_says_so(full_range: ExportResult, inline: Callable[..., Run], tmp_path: Path) -> None:
    run = inline("serve-layout", "ovms", full_range.output, "--output", "served")
    assert run.code == 0, run.err
    said = (tmp_path / "served/README.md").read_text(encoding="utf-8")
    assert (
        said.count("int8 weights of 8 bits, whose sums saturate in OpenVINO on x86 processors without VNNI") == 2
    )  # OVMS runs the ONNX file in OpenVINO, too


def test_a_quantiser_that_leaves_the_range_is_caught(reduced: ExportResult, full_range: ExportResult) -> None:
    seven, eight = (onnx.load(one.output / "onnx/int8/model.onnx") for one in (reduced, full_range))
    int8._check_range(seven, 7)
    int8._check_range(eight, 8)
    with pytest.raises(CheckFailed, match="up to 127; expected 64 at most, 7 bits"):
        int8._check_range(eight, 7)


def test_limits_come_from_the_range_that_is_used(reduced: ExportResult, full_range: ExportResult) -> None:
    """Half the steps, nearly twice the error: with the other's, a limit would be too tight or too wide."""
    errors = []
    for result in (reduced, full_range):
        golden = open_bundle(result.output).golden()
        emulated, truth = golden.emulated["int8"]["logits"], golden.outputs_float64["logits"]
        errors.append(float(np.sqrt(np.mean((emulated - truth) ** 2))))
    assert 1.2 < errors[0] / errors[1] < 3


@pytest.mark.usefixtures("without")
def test_nobody_says_so_of_anything_else(reduced: ExportResult, full_range: ExportResult) -> None:
    for result in (reduced, full_range):
        for artifact in result.manifest.artifacts:
            row = registry.entry_of_format(artifact.format)
            told = saturation_risk(row, artifact.full_range)
            assert (told is not None) == (artifact.full_range and row is OPENVINO)


def test_inspect_says_where_and_which(
    reduced: ExportResult, full_range: ExportResult, inline: Callable[..., Run]
) -> None:
    found = reduced.manifest.evidence.processor
    assert found == describe_processor()
    said = inline("inspect", reduced.output).out
    assert f"checked on    {found.cpu}" in said
    assert "7 bits: no processor saturates" in said
    assert "8 bits: for processors with VNNI" in inline("inspect", full_range.output).out


def test_reports_name_the_processor(reduced: ExportResult) -> None:
    assert dmformer.verify(reduced.output, runtimes=["ort"]).processor == describe_processor()
    written = json.loads((reduced.output / "reports/parity.json").read_bytes())
    assert written["processor"]["architecture"] == describe_processor().architecture
