"""Which precisions an export makes, keeps and leaves out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

import dmformer
from dmformer.assets import SAMPLE_IMAGES
from dmformer.bundle.golden import load_golden
from dmformer.errors import UsageError
from dmformer.export import steps
from dmformer.export.options import ExportOptions
from dmformer.export.run import plan_export
from dmformer.verify.tasks.classification import Classification
from tests.bundles import one_line
from tests.conftest import timed_as
from tests.precisions import simulated

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precisions": ["fp16", "auto"]}, "precision auto with fp16; expected it alone"),
        ({"precisions": ["AUTO", "int8"]}, "precision auto with int8; expected it alone"),
        ({"precisions": ["bf16"]}, "precision 'bf16'; expected one of fp32, fp16, int8, or auto"),
        ({"precisions": ["int8"], "formats": ["torch"]}, "format torch at int8; expected fp32: leave `formats` torch"),
        ({"precisions": ["fp16", "int8"], "formats": ["onnx", "torch"]}, "format torch at fp16, int8"),
        ({"precisions": ["int8"], "arch": "dmformer_nano"}, "expected `calibration`, a folder"),
        ({"calibration": SAMPLE_IMAGES}, "calibration images, and precision fp32 alone.*`precisions` int8"),
        ({"max_accuracy_drop": -0.1}, "`max_accuracy_drop` is -0.1"),
        ({"max_accuracy_drop": 101}, "0 to 100"),
        ({"max_accuracy_drop": float("nan")}, "`max_accuracy_drop` is nan"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        plan_export(ExportOptions(**arguments))
    one_line(error.value)


@pytest.mark.parametrize(
    ("arguments", "artifacts"),
    [
        ({"precisions": ["int8"], "formats": ["all"]}, ["onnx/int8/", "openvino/int8/"]),
        ({"precisions": ["int8", "FP16", "int8"]}, ["onnx/int8/", "onnx/fp16/"]),
        ({"precisions": ["auto"]}, ["onnx/fp32/", "onnx/fp16/", "onnx/int8/"]),
        (
            {"precisions": ["auto"], "formats": ["torch", "ov"]},
            ["torch/fp32/", *(f"openvino/{p}/" for p in ("fp32", "fp16", "int8"))],
        ),
        ({"precisions": ["fp32", "int8"], "formats": ["torch", "onnx"]}, ["torch/fp32/", "onnx/fp32/", "onnx/int8/"]),
    ],
)
def test_a_format_is_made_in_each_precision_that_it_takes(arguments: dict[str, Any], artifacts: list[str]) -> None:
    planned = plan_export(ExportOptions(**arguments)).files
    assert [name for name in planned if name.endswith("/")] == artifacts
    assert planned[-1] == "reports/bench.json"


def test_float32_alone_is_not_timed() -> None:
    assert plan_export(ExportOptions()).files[-1] == "reports/parity.json"


@pytest.mark.slow
def test_auto_keeps_the_fastest_of_each_format(
    few_images: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = {("onnx", "fp16"): 1.4, ("onnx", "int8"): 0.97, ("openvino", "fp16"): 0.9, ("openvino", "int8"): 0.6}
    monkeypatch.setattr(steps, "time_artifacts", timed_as(ratios))
    with simulated([0]):
        result = dmformer.export(
            formats=["onnx", "ov"],
            precisions=["auto"],
            calibration=few_images,
            max_accuracy_drop=5,
            output=tmp_path / "b",
        )
    assert [(made.format, made.precision) for made in result.manifest.artifacts] == [
        ("onnx", "fp32"),
        ("openvino", "int8"),
    ]
    assert sorted(path.parent.name for path in (tmp_path / "b").glob("*/*/model*")) == ["fp32", "int8", "int8"]
    assert (tmp_path / "b/reports/bench.json").is_file()
    assert result.manifest.evidence.latency is not None
    assert result.manifest.evidence.latency.noise_floor == 0.05
    assert dmformer.verify(tmp_path / "b").passed


@pytest.mark.usefixtures("quick")
def test_auto_leaves_out_what_breaks_the_budget(few_images: Path, tmp_path: Path) -> None:
    with simulated([12.5]):
        result = dmformer.export(precisions=["auto"], calibration=few_images, output=tmp_path / "b")
    assert result.parity.passed
    assert [made.precision for made in result.manifest.artifacts] == ["fp32"]
    (reason,) = result.parity.skipped
    assert "precision int8 loses 12.50 points" in reason
    assert load_golden(tmp_path / "b/golden.npz").emulated.keys() == {"fp16"}


@pytest.mark.slow
def test_auto_leaves_out_what_breaks_the_budget_in_its_runtime(
    few_images: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantiser measures in onnxruntime; an engine that computes in int8 may lose more."""
    lost = iter([0, 0, 9.0])
    monkeypatch.setattr(Classification, "points_lost", lambda *_: next(lost))
    monkeypatch.setattr(steps, "time_artifacts", timed_as({("onnx", "fp16"): 0.9, ("onnx", "int8"): 0.5}))
    with simulated([0]):
        result = dmformer.export(precisions=["auto"], calibration=few_images, output=tmp_path / "b")
    assert [made.precision for made in result.manifest.artifacts] == ["fp16"]
    assert any("int8" in reason and "9.00 points" in reason for reason in result.parity.skipped)


@pytest.mark.slow
@pytest.mark.parametrize("auto", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_force_never_writes_a_bundle_without_artifacts(
    tmp_path: Path, few_images: Path, quick: None, monkeypatch: pytest.MonkeyPatch, auto: bool
) -> None:
    """Where float32 fails its checks, nothing is reduced; what is written can still be opened, and says why."""
    from dmformer.verify.compare import Comparison

    monkeypatch.setattr(
        import_module("dmformer.verify.parity"), "compare", lambda *_: Comparison(False, reason="seeded")
    )
    precisions = ["auto" if auto else "fp16"]
    result = dmformer.export(precisions=precisions, calibration=few_images, output=tmp_path / "b", force=True)
    assert not result.parity.passed
    assert any("fp16: float32 failed its checks" in reason for reason in result.parity.skipped)
    assert dmformer.verify(tmp_path / "b").checks


@pytest.mark.slow
def test_a_whole_export_with_the_images_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("dmformer.export.steps"), "TIMED_S", 0.2)
    monkeypatch.setattr(import_module("dmformer.bench.api"), "ROUNDS", 1)
    result = dmformer.export(formats=["openvino"], precisions=["int8"], output=tmp_path / "b")
    assert result.parity.passed
    assert [(made.format, made.precision) for made in result.manifest.artifacts] == [("openvino", "int8")]
    assert all(made.speed is not None for made in result.manifest.artifacts)
    evidence = result.manifest.evidence
    assert evidence.accuracy is not None
    assert evidence.accuracy.labelled
    assert evidence.latency is not None
    assert dmformer.verify(tmp_path / "b").passed
