"""``verify --images`` for networks that label pixels, and for features."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import dmformer
from dmformer.assets import SEGMENTATION_CHECKPOINT
from dmformer.bundle.reader import open_bundle
from dmformer.runtimes.onnxruntime import OnnxRuntime
from dmformer.verify import api as verifying
from tests.bundles import rewrite

if TYPE_CHECKING:
    from dmformer.export.cached import ExportResult
    from dmformer.verify.report import Check, ParityReport


def by_stage(report: ParityReport, precision: str = "fp32") -> dict[str, Check]:
    return {check.stage: check for check in report.checks if check.precision == precision}


def test_verify_compares_labelled_pixels(segmentation: ExportResult, few_scenes: Path) -> None:
    report = dmformer.verify(segmentation.output, runtimes=["ort"], images=few_scenes)
    assert report.passed
    found = by_stage(report)
    assert found["accuracy"].batch == 3
    assert found["images"].batch == 3
    decided = [check.pixels for check in report.checks if check.stage == "decisions"]
    assert [pixels.images for pixels in decided if pixels] == [5, 3]


def test_verify_sees_a_runtime_that_labels_pixels_worse(
    segmentation: ExportResult, few_scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer = OnnxRuntime.infer

    def wrong(runtime: OnnxRuntime, inputs: Any) -> dict[str, Any]:
        found = infer(runtime, inputs)
        return found | {"logits": found["logits"][:, [1, 0, *range(2, 11)]]}

    monkeypatch.setattr(OnnxRuntime, "infer", wrong)
    report = dmformer.verify(segmentation.output, runtimes=["ort"], images=few_scenes)
    found = by_stage(report)
    for stage in ("accuracy", "decisions", "images"):
        assert not found[stage].passed
    assert "points lost" in (found["accuracy"].reason or "")


@pytest.mark.slow
def test_verify_at_a_reduced_precision_holds_the_budget_of_the_bundle(
    segmentation_reduced: ExportResult, few_scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = segmentation_reduced.output
    given: list[float] = []
    check = verifying.check_labelled_pixels
    monkeypatch.setattr(
        verifying, "check_labelled_pixels", lambda *arguments: (given.append(arguments[-1]), check(*arguments))[1]
    )
    report = dmformer.verify(bundle, runtimes=["ort"], weights=SEGMENTATION_CHECKPOINT, images=few_scenes)
    assert given == [2.0] * 3
    assert {check.precision for check in report.checks if check.stage == "accuracy"} == {"fp32", "fp16", "int8"}
    assert by_stage(report)["accuracy"].passed


@pytest.mark.slow
def test_verify_on_images_that_do_not_fit_says_so_and_compares_all_the_same(
    segmentation: ExportResult, few_scenes: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(few_scenes, tmp_path / "data"))
    (data / "classes.txt").write_text("a\nb\n")
    report = dmformer.verify(segmentation.output, runtimes=["ort"], images=data)
    assert report.passed
    assert any("2 classes, a, b" in reason for reason in report.skipped)
    assert "accuracy" not in by_stage(report)


def test_verify_of_features_on_images(features_open: ExportResult, few_scenes: Path) -> None:
    data = few_scenes / "images/validation"
    report = dmformer.verify(features_open.output, runtimes=["ort"], images=data)
    assert report.passed
    assert by_stage(report)["images"].batch == 3
    assert "accuracy" not in by_stage(report)


def test_another_networks_bundle_is_not_that_of_the_checkpoint(segmentation_bundle: Path) -> None:
    rewrite(segmentation_bundle, lambda content: content["model"]["config"].update(decoder_widths=[64, 33]))
    report = dmformer.verify(open_bundle(segmentation_bundle), runtimes=["ort"], weights=SEGMENTATION_CHECKPOINT)
    assert "decoder_widths" in (by_stage(report)["description"].reason or "")
