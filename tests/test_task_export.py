"""Exports for segmentation and of features: what is in the bundle, at a fixed and an open size, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

import dmformer
from benchmarks.fault_kinds import spoil_weights
from dmformer.assets import DEMONSTRATION_CHECKPOINT, SEGMENTATION_CHECKPOINT
from dmformer.bench.limits import least_work
from dmformer.bundle.golden import Golden, load_golden
from dmformer.bundle.manifest import GOLDEN, decode_manifest
from dmformer.bundle.reader import open_bundle
from dmformer.errors import DMFormerError, StageFailed, UsageError
from dmformer.export.networks import random_checkpoint
from dmformer.files import indented_json
from dmformer.models.checkpoint import load_checkpoint
from dmformer.progress import silent
from dmformer.runtimes import registry
from dmformer.runtimes.onnxruntime import OnnxRuntime
from dmformer.task import FEATURE_NAMES, OUTPUT_NAME, STRIDES
from dmformer.verify import reference as referring
from dmformer.verify.answers import Answers, ask
from dmformer.verify.localize import localize
from dmformer.verify.localize.case import run_case
from dmformer.verify.parity import check_artifact, check_other_size, references
from tests.bundles import adopt, one_line, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from tests.conftest import Run

SCHEMAS = Path(dmformer.__file__).parent / "schemas"
RUNTIME_STAGES = {"runtime", "rows", "shuffled", "repeated", "batches", "precision"}


def valid(name: str, document: Any) -> None:
    Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_bytes())).validate(document)


def stages(result: ExportResult, runtime: str = "onnxruntime", precision: str = "fp32") -> set[str]:
    return {check.where for check in result.parity.checks if (check.runtime, check.precision) == (runtime, precision)}


# --- what is in a bundle ----------------------------------------------------------------------------------------------


def test_a_bundle_for_segmentation(segmentation: ExportResult) -> None:
    manifest = segmentation.manifest
    assert (manifest.model.task, manifest.class_count, manifest.open_size) == ("segmentation", 11, False)
    assert manifest.model.weights == "demonstration"
    assert manifest.model.classes[:2] == ("background", "digit 0")
    assert manifest.inputs[0].shape == ("batch", 3, 64, 64)
    assert [(output.name, output.shape) for output in manifest.outputs] == [(OUTPUT_NAME, ("batch", 11, 64, 64))]
    assert segmentation.parity.passed
    assert RUNTIME_STAGES | {"decisions", "traced", "simplified", "layers"} <= stages(segmentation)
    assert RUNTIME_STAGES | {"decisions"} <= stages(segmentation, "openvino")
    pixels = {check.runtime: check.pixels for check in segmentation.parity.checks if check.stage == "decisions"}
    assert pixels.keys() == {"torch", "onnxruntime", "openvino"}
    for found in pixels.values():
        assert found is not None
        assert found.images == 5
        assert found.flips == found.below_noise
        assert found.miou > 0.999


def test_a_bundle_of_features_at_an_open_size(features_open: ExportResult) -> None:
    manifest = features_open.manifest
    assert (manifest.model.task, manifest.class_count, manifest.open_size) == ("features", 0, True)
    assert manifest.inputs[0].shape == ("batch", 3, "height", "width")
    shapes = {output.name: output.shape for output in manifest.outputs}
    assert tuple(shapes) == FEATURE_NAMES
    assert [shape[:2] for shape in shapes.values()] == [("batch", width) for width in (16, 32, 64, 128)]
    assert all(isinstance(side, str) for shape in shapes.values() for side in shape[2:])
    assert stages(features_open) >= RUNTIME_STAGES | {"runtime at 64x96", "traced at 64x96"}
    assert "decisions" not in stages(features_open)  # there are none


def test_reports_and_manifests_are_valid(
    segmentation: ExportResult, segmentation_open: ExportResult, features_open: ExportResult
) -> None:
    for result in (segmentation, segmentation_open, features_open):
        manifest = json.loads((result.output / "manifest.json").read_bytes())
        valid("manifest", manifest)
        report = json.loads((result.output / "reports/parity.json").read_bytes())
        valid("verify", report)
        assert len(report["checks"]) == len(result.parity.checks)


def test_features_are_what_the_classifiers_stages_give(features_open: ExportResult) -> None:
    """By the classifier itself, at a size that no stride divides."""
    network = load_checkpoint(DEMONSTRATION_CHECKPOINT).model()
    image = np.random.default_rng(1).standard_normal((2, 3, 45, 70)).astype(np.float32)
    with OnnxRuntime(features_open.output / "onnx/fp32/model.onnx") as runtime:
        found = runtime.run_rows({"image": image})
    with torch.inference_mode():
        expected = network.forward_features(torch.from_numpy(image))
    assert tuple(found) == FEATURE_NAMES
    for name, stride, array in zip(FEATURE_NAMES, STRIDES, expected, strict=True):
        assert found[name].shape == tuple(array.shape)
        assert all(abs(side - whole / stride) <= 1 for side, whole in zip(array.shape[2:], (45, 70), strict=True))
        np.testing.assert_allclose(found[name], array.numpy(), atol=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_upernet_at_an_open_size(tmp_path: Path) -> None:
    """What was traced at 64 pixels pools anew at another size, in bins that no side is a multiple of."""
    options = {"num_classes": 5, "decoder_widths": [16], "depths": [1, 1, 1, 1]}
    result = dmformer.export(
        arch="dmformer_nano_upernet", options=options, image_size=64, open_size=True, output=tmp_path / "b"
    )
    assert result.parity.passed
    assert result.manifest.model.weights == "random"
    assert "runtime at 96x128" in stages(result)
    network = random_checkpoint("dmformer_nano_upernet", options, 64, seed=0).model()
    image = np.random.default_rng(2).standard_normal((1, 3, 160, 224)).astype(np.float32)
    with OnnxRuntime(tmp_path / "b/onnx/fp32/model.onnx") as runtime:
        found = runtime.run_rows({"image": image})[OUTPUT_NAME]
    with torch.inference_mode():
        np.testing.assert_allclose(found, network(torch.from_numpy(image)).numpy(), atol=1e-4)


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_upernet_at_an_open_size_in_float16(tmp_path: Path) -> None:
    """Its graph compares and counts as well: truths and positions are tensors too, and one is as long as the batch."""
    options = {"num_classes": 5, "decoder_widths": [16], "depths": [1, 1, 1, 1]}
    result = dmformer.export(
        arch="dmformer_nano_upernet",
        options=options,
        image_size=160,
        open_size=True,
        precisions=["fp16"],
        output=tmp_path / "b",
    )
    assert result.parity.passed
    assert "tensors" in {check.stage for check in result.parity.checks}


# --- golden files -----------------------------------------------------------------------------------------------------


def test_golden_files_keep_every_output_and_another_size(features_open: ExportResult, tmp_path: Path) -> None:
    golden = load_golden(features_open.output / GOLDEN)
    assert tuple(golden.outputs) == tuple(golden.outputs_float64) == tuple(golden.files["fp32"]) == FEATURE_NAMES
    other = golden.other_size
    assert other is not None
    assert (golden.size, other.size) == ("32x32", "64x96")
    assert other.outputs["features_s8"].shape == (2, 32, 8, 12)
    assert other.files["fp32"].keys() == other.outputs.keys()
    golden.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (features_open.output / GOLDEN).read_bytes()


def test_large_maps_are_thinned_to_every_phase(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(SEGMENTATION_CHECKPOINT)
    model = checkpoint.model()
    pixels = referring.golden_pixels(checkpoint.preprocessing, [])[:1]
    whole = referring.make_golden(model, checkpoint.preprocessing, pixels)
    assert whole.strides == {OUTPUT_NAME: 1}
    monkeypatch.setattr(referring, "_MOST_KEPT", 11 * 20 * 20)
    found = referring.make_golden(model, checkpoint.preprocessing, pixels)
    assert found.strides == {OUTPUT_NAME: 5}  # 22 by 22 would be too many, and 4 would miss phases
    for kept, all_of in ((found.outputs, whole.outputs), (found.outputs_float64, whole.outputs_float64)):
        np.testing.assert_array_equal(kept[OUTPUT_NAME], all_of[OUTPUT_NAME][:, :, ::5, ::5])
    rows = np.arange(64)[::5]
    assert set(rows % 4) == set(range(4))
    found.save(tmp_path / GOLDEN)
    loaded = load_golden(tmp_path / GOLDEN)
    assert loaded.strides == found.strides
    thin = loaded.thinned({OUTPUT_NAME: whole.outputs[OUTPUT_NAME], "flat": np.zeros((1, 64))})
    np.testing.assert_array_equal(thin[OUTPUT_NAME], loaded.outputs[OUTPUT_NAME])
    assert thin["flat"].shape == (1, 64)


@pytest.mark.slow
def test_a_thinned_bundle_is_exported_and_verified(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, few_scenes: Path
) -> None:
    monkeypatch.setattr(referring, "_MOST_KEPT", 11 * 12 * 12)
    options = {"image_size": 32, "open_size": True, "output": tmp_path / "b"}
    assert dmformer.export(task="segmentation", **options).parity.passed  # type: ignore[arg-type]
    golden = load_golden(tmp_path / "b" / GOLDEN)
    assert golden.strides == {OUTPUT_NAME: 3}
    assert golden.other_size is not None
    assert golden.other_size.strides == {OUTPUT_NAME: 7}
    found = dmformer.verify(tmp_path / "b", runtimes=["ort"], weights=SEGMENTATION_CHECKPOINT, images=few_scenes)
    assert found.passed, [check.reason for check in found.checks if not check.passed]
    assert "accuracy" in {check.stage for check in found.checks}
    spoil_weights(tmp_path / "b", {"decoder.smooth.1.weight": lambda array: 1.02 * array})
    opened = open_bundle(tmp_path / "b")
    report = dmformer.verify(opened, runtimes=["ort"])
    found = localize(opened, report, weights=SEGMENTATION_CHECKPOINT, folder=tmp_path / "c", stage=silent)
    assert [finding.module for finding in found.findings] == ["decoder.smooth.1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"strides/{OUTPUT_NAME}": np.int64(0)}, "a stride of 0 for .logits.; expected 1 or more"),
        ({f"strides/{OUTPUT_NAME}": np.int64(-1)}, "a stride of -1 for .logits.; expected 1 or more"),
        ({f"strides/{OUTPUT_NAME}": np.arange(3)}, "damaged"),
        ({f"strides/{OUTPUT_NAME}": np.float64("nan")}, "damaged"),
        ({f"strides/{OUTPUT_NAME}": np.float64(2.5)}, "a stride of float64"),
        ({"strides/nothing": np.int64(3)}, "a stride for 'nothing'"),
        ({"other/other/images": np.zeros((1, 32, 32, 3), np.uint8)}, "no array 'i"),
        ({"other/" * 5000 + "images": np.zeros((1, 32, 32, 3), np.uint8)}, "golden file"),
        ({"other/images": np.zeros((1, 32, 32, 3), np.uint8)}, "'other/inputs'|'images'|'inputs'"),
        ({"other/inputs": np.zeros((2, 32), np.float32)}, "inputs"),
        ({"other/outputs/else": np.zeros((2, 3), np.float32)}, "other"),
    ],
)
def test_golden_files_that_cannot_be_are_refused(
    segmentation_open: ExportResult, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with np.load(segmentation_open.output / GOLDEN) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez_compressed(tmp_path / GOLDEN, **(arrays | change))
    with pytest.raises(UsageError, match=words) as caught:
        load_golden(tmp_path / GOLDEN)
    one_line(caught.value)


def test_a_stride_that_is_huge_fails_the_comparison(segmentation_open: ExportResult, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(segmentation_open.output, tmp_path / "bundle"))
    with np.load(bundle / GOLDEN) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez_compressed(bundle / GOLDEN, **arrays, **{f"strides/{OUTPUT_NAME}": np.uint64(2**63)})
    adopt(bundle, GOLDEN)
    found = dmformer.verify(bundle, runtimes=["ort"])
    assert not found.passed
    assert any("shape" in (check.reason or "") for check in found.checks)


# --- the least work ---------------------------------------------------------------------------------------------------


def test_the_least_traffic_counts_every_output_at_the_size_of_the_preprocessing(
    features_open: ExportResult, segmentation: ExportResult
) -> None:
    maps = sum(16 * 2**index * (8 >> index) ** 2 for index in range(4))
    for result, values in ((features_open, 3 * 32 * 32 + maps), (segmentation, (3 + 11) * 64 * 64)):
        (artifact,) = (one for one in result.manifest.artifacts if one.format == "onnx")
        found = [least_work(result.manifest, artifact, batch)[1] for batch in (1, 3)]
        assert found[1] - found[0] == 2 * 4 * values


# --- another size -----------------------------------------------------------------------------------------------------


def asked(result: ExportResult) -> tuple[Answers, Golden]:
    golden = open_bundle(result.output).golden()
    runtime = OnnxRuntime(result.output / "onnx/fp32/model.onnx")
    return ask(runtime, golden.inputs, golden.thinned, other_size=golden.other_size), golden


def test_what_is_wrong_at_another_size_alone_is_seen(segmentation_open: ExportResult) -> None:
    answers, golden = asked(segmentation_open)
    what = registry.entry("onnxruntime"), open_bundle(segmentation_open.output).artifacts("onnx")[0]
    assert all(check.passed for check in check_artifact(answers, golden, *what))
    assert isinstance(answers.other_size, dict)
    for wrong in (
        {OUTPUT_NAME: np.roll(answers.other_size[OUTPUT_NAME], 1, axis=3)},
        {OUTPUT_NAME: answers.other_size[OUTPUT_NAME].transpose(0, 1, 3, 2)},
        StageFailed("out of memory"),
        None,
    ):
        checks = check_artifact(replace(answers, other_size=wrong), golden, *what)
        failed = {(check.where, check.against) for check in checks if not check.passed}
        assert failed == {("runtime at 64x96", "PyTorch"), ("runtime at 64x96", "onnx fp32")}


@pytest.mark.slow
def test_what_is_wrong_at_another_size_alone_is_found_there(segmentation_open: ExportResult, tmp_path: Path) -> None:
    """Taps that meet nothing but padding at 32 pixels, where the last stage has maps of one by one."""

    def without_outer_taps(kernel: Any) -> Any:
        middle = kernel.shape[-1] // 2
        kept = np.zeros_like(kernel)
        kept[..., middle, middle] = kernel[..., middle, middle]
        return kept

    module = "stages.3.blocks.0.dma.branches.1"
    bundle = Path(shutil.copytree(segmentation_open.output, tmp_path / "bundle"))
    spoil_weights(bundle, {f"{module}.weight": without_outer_taps})
    opened = open_bundle(bundle)
    report = dmformer.verify(opened, runtimes=["ort"])
    assert {check.where for check in report.checks if not check.passed} == {"runtime at 64x96"}
    (finding,) = localize(opened, report, weights=None, folder=tmp_path / "cases", stage=silent).findings
    assert (finding.module, finding.at_fault, finding.batch) == (module, "file", 1)
    assert not run_case(tmp_path / "cases/onnxruntime-fp32").passed
    assert finding.size == "64x96"
    # Without a checkpoint the file itself is not trusted, but where what failed is at the other size it would be.
    rewrite(bundle, lambda c: c.update(artifacts=[made for made in c["artifacts"] if made["format"] != "torch"]))
    shutil.rmtree(bundle / "torch")
    opened = open_bundle(bundle)
    found = localize(opened, report, weights=None, folder=tmp_path / "cases", stage=silent)
    assert "the bisection has nothing to trust" in found.skipped[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntime, "infer", elsewhere(lambda array: array, lambda array: 1.5 * array))
        report = dmformer.verify(opened, runtimes=["ort"])
        (finding,) = localize(opened, report, weights=None, folder=tmp_path / "cases", stage=silent).findings
    assert (finding.size, finding.at_fault) == (None, "engine")


def elsewhere(at_another_size: Callable[[Any], Any], usual: Callable[[Any], Any]) -> Callable[..., dict[str, Any]]:
    """An engine that answers otherwise at the size of the golden images, 32, or at another."""
    infer = OnnxRuntime.infer

    def wrong(runtime: OnnxRuntime, inputs: Any) -> dict[str, Any]:
        change = usual if inputs["image"].shape[2] == 32 else at_another_size
        return {name: change(array) for name, array in infer(runtime, inputs).items()}

    return wrong


def refuses(_: Any) -> Any:
    raise StageFailed("no room for such maps")


@pytest.mark.parametrize(
    ("at_another_size", "usual", "said"),
    [
        (lambda x: x if len(x) == 1 else 1.5 * x, lambda x: x, "row by row, and not in batches of 2"),
        (refuses, lambda x: x, "at 64x96 no room for such maps: look at what was traced for one size"),
        pytest.param(lambda x: x[..., :8, :8], lambda x: x, None, marks=pytest.mark.slow),
        # The batching is wrong as well.
        pytest.param(lambda x: 1.5 * x, lambda x: x if len(x) < 5 else 1.5 * x, None, marks=pytest.mark.slow),
    ],
    ids=["in batches alone", "refused", "another shape", "both"],
)
def test_what_an_engine_does_at_another_size_alone(
    segmentation_open: ExportResult,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    at_another_size: Callable[[Any], Any],
    usual: Callable[[Any], Any],
    said: str | None,
) -> None:
    monkeypatch.setattr(OnnxRuntime, "infer", elsewhere(at_another_size, usual))
    opened = open_bundle(segmentation_open.output)
    report = dmformer.verify(opened, runtimes=["ort"])
    assert not report.passed
    found = localize(opened, report, weights=None, folder=tmp_path / "cases", stage=silent)
    assert [finding.size for finding in found.findings] == ([] if said else ["64x96"])
    assert said is None or said in found.skipped[-1]


@pytest.mark.parametrize(
    ("kind", "weights", "module"),
    [
        pytest.param("segmentation_open", SEGMENTATION_CHECKPOINT, "decoder.smooth.1", marks=pytest.mark.slow),
        ("features_open", DEMONSTRATION_CHECKPOINT, "stages.0.blocks.0.ffn.fc1"),
    ],
)
def test_a_fault_is_bisected_at_an_open_size(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, weights: Path, module: str
) -> None:
    bundle = Path(shutil.copytree(request.getfixturevalue(kind).output, tmp_path / "bundle"))
    spoil_weights(bundle, {f"{module}.weight": lambda array: 1.02 * array})
    opened = open_bundle(bundle)
    report = dmformer.verify(opened, runtimes=["ort"])
    assert {"runtime", "runtime at 64x96"} <= {check.where for check in report.checks if not check.passed}
    (finding,) = localize(opened, report, weights=weights, folder=tmp_path / "cases", stage=silent).findings
    assert finding.module == module


def test_a_graph_that_has_baked_its_size_in_is_seen(
    segmentation_open: ExportResult, segmentation: ExportResult
) -> None:
    """At 64 by 64 the fixed graph answers; at 96 by 128 it does not."""
    golden = open_bundle(segmentation.output).golden()
    other = referring.golden_at_other_size(
        load_checkpoint(SEGMENTATION_CHECKPOINT).model(), segmentation.manifest.preprocessing
    )
    golden = replace(golden, other_size=replace(other, files={"fp32": other.outputs}))
    runtime = OnnxRuntime(segmentation.output / "onnx/fp32/model.onnx")
    answers = ask(runtime, golden.inputs, golden.thinned, other_size=golden.other_size, consistency=False)
    assert isinstance(answers.other_size, DMFormerError)
    assert not any(check.passed for check in check_other_size("runtime", answers, golden))
    assert check_other_size("runtime", answers, replace(golden, other_size=None)) == []


def test_an_open_bundle_without_another_size_does_not_pass(segmentation_open: ExportResult, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(segmentation_open.output, tmp_path / "bundle"))
    replace(load_golden(bundle / GOLDEN), other_size=None).save(bundle / GOLDEN)
    adopt(bundle, GOLDEN)
    with pytest.raises(UsageError, match="height and width are open, and the golden file has one size"):
        dmformer.verify(bundle, runtimes=["ort"])


# --- reduced precisions -----------------------------------------------------------------------------------------------


def test_int8_quantises_the_decoder_within_its_budget(segmentation_reduced: ExportResult) -> None:
    import onnx

    made = {artifact.precision: artifact for artifact in segmentation_reduced.manifest.artifacts}
    assert made.keys() == {"fp32", "fp16", "int8"}
    int8 = made["int8"]
    assert int8.accuracy is not None
    assert int8.accuracy.miou is not None
    assert int8.points_lost is not None
    assert int8.points_lost <= 2
    evidence = segmentation_reduced.manifest.evidence.accuracy
    assert evidence is not None
    assert evidence.torch.miou is not None
    assert int8.points_lost == pytest.approx(100 * (evidence.torch.miou - int8.accuracy.miou))
    assert evidence.torch.miou > 0.5
    assert any(name.startswith("decoder.") for name in int8.sensitivity)
    graph = onnx.load(segmentation_reduced.output / "onnx/int8/model.onnx").graph
    quantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    inside = {node.name for node in graph.node if node.op_type == "Conv" and node.input[1] in quantised}
    blocks = {name for name in int8.sensitivity if name not in int8.kept_in_fp32 and name.startswith("decoder.")}
    assert blocks
    for block in blocks:
        assert any(name.startswith(block) for name in inside), block


def test_reduced_precisions_are_proven_pixel_by_pixel(segmentation_reduced: ExportResult) -> None:
    assert segmentation_reduced.parity.passed
    for precision in ("fp16", "int8"):
        assert {"reduced", "tensors", "decisions", "runtime", "accuracy"} <= stages(
            segmentation_reduced, precision=precision
        )
    golden = open_bundle(segmentation_reduced.output).golden()
    for precision in ("fp16", "int8"):
        assert golden.files[precision][OUTPUT_NAME].shape == golden.outputs[OUTPUT_NAME].shape
        assert not np.array_equal(golden.emulated[precision][OUTPUT_NAME], golden.outputs[OUTPUT_NAME])
        assert references(golden, precision)[0].limits[OUTPUT_NAME].max_abs > 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"task": "segmentation", "weights": DEMONSTRATION_CHECKPOINT},
            "which is for classification; expected `task` class",
        ),
        (
            {"task": "classification", "weights": SEGMENTATION_CHECKPOINT},
            "which is for segmentation; expected `task` segm",
        ),
        ({"task": "classification", "arch": "dmformer_nano_fpn"}, "expected `task` segmentation or features"),
        ({"task": "segmentation", "image_size": 80}, "`image_size` 80 for segmentation; expected a multiple of 32"),
        ({"weights": SEGMENTATION_CHECKPOINT, "image_size": 65}, "expected a multiple of 32"),
        ({"task": "features", "precisions": ["int8"]}, "features have no accuracy"),
        ({"task": "features", "precisions": ["AUTO"]}, "features have no accuracy"),
        ({"task": "features", "calibration": SEGMENTATION_CHECKPOINT.parent}, "features have no accuracy"),
        ({"open_size": True, "formats": ["trt"]}, "tensorrt with open height and width, where its files"),
    ],
)
def test_what_cannot_be_exported_is_refused(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        dmformer.export(output=tmp_path / "b", **arguments)
    one_line(caught.value)
    assert not (tmp_path / "b").exists()


def test_all_formats_of_an_open_size_are_those_that_take_it(tmp_path: Path) -> None:
    from dmformer.export.options import ExportOptions
    from dmformer.export.run import plan_export

    plan = plan_export(ExportOptions(task="segmentation", open_size=True, formats=["all"], output=tmp_path / "b"))
    assert set(plan.formats) == {"torch", "onnx", "openvino", "ncnn"}
    assert [reason for reason in plan.not_made if reason.startswith("tensorrt: format tensorrt with open height")]


def test_features_of_any_network_at_any_size(tmp_path: Path) -> None:
    from dmformer.export.options import ExportOptions
    from dmformer.export.run import plan_export

    options = ExportOptions(SEGMENTATION_CHECKPOINT, task="features", image_size=45, output=tmp_path / "b")
    checkpoint = plan_export(options).network.checkpoint
    config = checkpoint.config
    assert (config.task, config.decoder, config.output_names) == ("features", None, FEATURE_NAMES)
    assert not any(name.startswith("decoder") for name in checkpoint.state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"].update(task="features"), "outputs logits; expected features_s4"),
        (lambda c: c["model"].update(task="classification"), "expected 2 dimensions"),
        (lambda c: c["model"].update(task="detection"), "detection"),
        (lambda c: c["outputs"][0].update(shape=["batch", "classes", 64, 64]), "a number of channels"),
        (lambda c: c["outputs"][0].update(shape=["batch", 11]), "expected 4 dimensions"),
        (lambda c: c["outputs"][0].update(shape=["batch", 12, 64, 64]), "11 class names"),
        (lambda c: c["outputs"][0].update(shape=["batch", 11, 64, "w"]), "output 'logits' of shape"),
        (lambda c: c["outputs"][0].update(shape=["batch", 11, -64, 64]), "output 'logits' of shape"),
        (lambda c: c["outputs"][0].update(shape=["batch", 11, 32, 64]), "output 'logits' of shape"),
        (lambda c: c["outputs"].append(c["outputs"][0]), "outputs logits, logits"),
        (lambda c: c.update(outputs=[]), "outputs "),
        (lambda c: c["inputs"][0].update(shape=["batch", 3, 64, "width"]), "an input of shape"),
        (lambda c: c["inputs"][0].update(shape=["batch", 3]), "an input of shape"),
        (lambda c: c["inputs"][0].update(shape=[]), "an input of shape"),
        (lambda c: c["inputs"][0].update(shape=["batch", 3, "height", "width"]), "output 'logits' of shape"),
        (lambda c: c["preprocessing"].update(image_size=80), "an input of shape"),
    ],
)
def test_manifests_that_cannot_be_are_refused(
    segmentation: ExportResult, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    content = json.loads(segmentation.manifest.encode())
    decode_manifest(indented_json(content), "m")
    change(content)
    with pytest.raises(UsageError, match=words) as caught:
        decode_manifest(indented_json(content), "m")
    one_line(caught.value)


def test_the_command(inline: Callable[..., Run], few_scenes: Path) -> None:
    dry = inline("export", "--task", "segmentation", "--dynamic-size", "--dry-run")
    assert dry.code == 0, dry.err
    assert "mIoU" in dry.err
    for arguments, words in (
        (("--task", "depth"), "depth"),
        (("--task", "features", "--calibration", str(few_scenes)), "features have no accuracy"),
        (("--task", "segmentation", "--image-size", "100"), "expected a multiple of 32"),
        (("--task", "segmentation", "--dynamic-size", "--format", "trt"), "expected an export without --dynamic-size"),
        (("--task", "classification", "--weights", str(SEGMENTATION_CHECKPOINT)), "--task segmentation or features"),
    ):
        run = inline("export", *arguments, "--output", "b")
        assert run.code == 2, run.err
        assert words in run.error_line
