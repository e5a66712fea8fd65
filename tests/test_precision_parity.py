"""Reduced precisions are proven: layers in their type, answers as a literal execution has them."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import dmformer
from dmformer.assets import DEMONSTRATION_CHECKPOINT
from dmformer.bundle.golden import Golden, load_golden
from dmformer.errors import StageFailed, UsageError
from dmformer.export import steps
from dmformer.export.networks import random_checkpoint
from dmformer.export.precisions.int8 import to_int8
from dmformer.progress import silent
from dmformer.runtimes.onnxruntime import OnnxSupport
from dmformer.runtimes.openvino import OpenVinoInspector
from dmformer.verify.answers import Answers
from dmformer.verify.parity import check_layers, references
from tests.bundles import adopt, one_line, rewrite
from tests.precisions import arrays, failed, simulated, source_of
from tests.tiers import first

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dmformer.export.cached import ExportResult
    from dmformer.export.precisions import Calibration
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.verify.report import ParityReport

CONV = "stages.2.downsample.conv"


def test_the_bundle_passes_with_a_row_for_each_precision(reduced: ExportResult) -> None:
    found = dmformer.verify(reduced.output)
    assert failed(found) == []
    rows = [(check.runtime, check.precision) for check in found.checks if check.stage == "precision"]
    assert rows == [(name, p) for name in ("onnxruntime", "openvino") for p in ("fp32", "fp16", "int8")]


@pytest.mark.slow
def test_a_runtime_that_keeps_less_than_promised_fails(reduced_bundle: Path) -> None:
    rewrite(
        reduced_bundle,
        lambda c: [made.update(promised_share=0.99) for made in c["artifacts"] if made["precision"] == "int8"],
    )
    found = dmformer.verify(reduced_bundle, runtimes=["openvino"])
    assert failed(found) == [("openvino", "int8", "precision")]
    (reason,) = [check.reason for check in found.checks if not check.passed]
    assert reason == "int8 in 54% of 57 compute layers (31 int8, 26 fp32); promised 99%"


@pytest.mark.slow
def test_float32_in_the_place_of_int8_fails(reduced_bundle: Path) -> None:
    for name in ("model.xml", "model.bin"):
        shutil.copy(reduced_bundle / "openvino/fp32" / name, reduced_bundle / "openvino/int8" / name)
        adopt(reduced_bundle, f"openvino/int8/{name}")
    assert failed(dmformer.verify(reduced_bundle, runtimes=["openvino"])) == [("openvino", "int8", "precision")]


def test_a_runtime_without_the_arithmetic_passes_and_says_so(reduced: ExportResult) -> None:
    found = dmformer.verify(reduced.output, runtimes=["onnxruntime"])
    (row,) = [check for check in found.checks if (check.stage, check.precision) == ("precision", "int8")]
    assert row.passed
    assert "computes in float32 (57 fp32)" in (row.reason or "")


@pytest.mark.slow
def test_layers_that_cannot_be_read_are_no_proof(reduced: ExportResult, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: OpenVinoInspector) -> dict[str, int]:
        raise KeyError("runtimePrecision")

    monkeypatch.setattr(OpenVinoInspector, "read_layers", broken)
    found = dmformer.verify(reduced.output, runtimes=["openvino"])
    assert {(check.stage, check.reason) for check in found.checks if not check.passed} == {
        ("precision", "openvino failed while showing the layers of model.xml: 'runtimePrecision'")
    }


def test_on_other_images_reduced_precisions_are_compared_by_their_decisions(
    reduced: ExportResult, few_images: Path
) -> None:
    found = dmformer.verify(reduced.output, runtimes=["ort"], weights=DEMONSTRATION_CHECKPOINT, images=few_images)
    assert found.passed
    assert found.skipped == ()
    others = [(check.precision, check.stage) for check in found.checks if check.batch == 30]
    expected = [("fp32", "images")]
    expected += [(precision, stage) for precision in ("fp32", "fp16", "int8") for stage in ("decisions", "accuracy")]
    assert sorted(others) == sorted(expected)
    for check in found.checks:
        if check.stage == "decisions":
            assert check.decisions is not None
            assert check.decisions.images == check.batch
            assert check.decisions.top1_interval[0] < check.decisions.top1 <= check.decisions.top1_interval[1]


@pytest.mark.parametrize(
    ("layers", "promised", "excuse", "passed", "reason"),
    [
        ({"int8": 3, "fp32": 1}, 0.75, None, True, None),
        ({"int8": 2, "fp32": 2}, 0.75, None, False, "int8 in 50% of 4 compute layers (2 int8, 2 fp32); promised 75%"),
        ({"fp32": 4}, 0.75, "no int8 here", True, "no int8 here (4 fp32)"),
        ({"int8": 4}, 0.75, "no int8 here", True, None),
        ({}, 0.75, None, False, "the engine shows no compute layer"),
        ({}, 0.0, "no int8 here", False, "no int8 here ()"),
        ({"bf16": 4}, 1.0, None, False, "int8 in 0% of 4 compute layers (4 bf16); promised 100%"),
    ],
)
def test_a_promise_holds_or_is_excused_or_fails(
    layers: dict[str, int], promised: float, excuse: str | None, passed: bool, reason: str | None
) -> None:
    check = check_layers(Answers("engine", "int8", {}, layers), promised, excuse)
    assert (check.passed, check.reason) == (passed, reason)


def changed(bundle: Path, name: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Path:
    """Change initializers of an ONNX file of a bundle, whose hash then fits."""
    model = onnx.load(bundle / name)
    values = arrays(model.graph)
    for tensor, array in change(values).items():
        (found,) = [entry for entry in model.graph.initializer if entry.name == tensor]
        found.CopyFrom(numpy_helper.from_array(array.astype(values[tensor].dtype), tensor))
    onnx.save(model, bundle / name)
    adopt(bundle, name)
    return bundle


FAULTS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "a weight's scale": lambda a: {
        "stages.0.downsample.conv1.weight_scale": 1.25 * a["stages.0.downsample.conv1.weight_scale"]
    },
    "the input's scale": lambda a: {"image_scale": 0.5 * a["image_scale"]},
    "a shifted zero point": lambda a: {"image_zero_point": a["image_zero_point"] + 20},
    "two swapped classes": lambda a: {name: a[name][[1, 0, *range(2, 10)]] for name in ("head.weight", "head.bias")},
    "quantised weights of zero": lambda a: {
        "stages.2.downsample.conv.weight_quantized": 0 * a["stages.2.downsample.conv.weight_quantized"]
    },
    "a NaN scale": lambda a: {
        "stages.3.downsample.conv.weight_scale": np.nan * a["stages.3.downsample.conv.weight_scale"]
    },
}


@pytest.mark.parametrize("fault", first(2, FAULTS))
def test_a_fault_in_an_int8_file_is_caught(reduced_bundle: Path, fault: str) -> None:
    changed(reduced_bundle, "onnx/int8/model.onnx", FAULTS[fault])
    found = failed(dmformer.verify(reduced_bundle, runtimes=["ort"]))
    assert ("onnxruntime", "int8", "runtime") in found
    assert {where[:2] for where in found} == {("onnxruntime", "int8")}


@pytest.mark.parametrize("name", ["head.weight", "stages.0.downsample.conv1.weight", "stages.2.downsample.conv.weight"])
def test_one_percent_in_an_fp16_file_is_caught(reduced_bundle: Path, name: str) -> None:
    changed(reduced_bundle, "onnx/fp16/model.onnx", lambda a: {name: 1.01 * a[name]})
    assert failed(dmformer.verify(reduced_bundle, runtimes=["ort"])) == [("onnxruntime", "fp16", "runtime")]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("head.weight", lambda array: 1.05 * array),
        pytest.param(f"{CONV}.weight", np.flip, marks=pytest.mark.slow),
        pytest.param(f"{CONV}.bias", np.zeros_like, marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_an_fp16_file_is_caught_where_sums_are_float16(
    reduced_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Within the limits of a processor that adds up in float16, which are wider."""
    narrow = fp16_limits(dmformer.verify(reduced_bundle, runtimes=["ort"]))
    monkeypatch.setattr(OnnxSupport, "sums_in_float16", lambda _: True)
    right = dmformer.verify(reduced_bundle, runtimes=["ort"])
    assert failed(right) == []
    wide = fp16_limits(right)
    assert all(wide[against] > 2 * narrow[against] for against in ("PyTorch", "onnx fp16"))
    changed(reduced_bundle, "onnx/fp16/model.onnx", lambda a: {name: np.ascontiguousarray(spoil(a[name]))})
    assert ("onnxruntime", "fp16", "runtime") in failed(dmformer.verify(reduced_bundle, runtimes=["ort"]))


def fp16_limits(report: ParityReport) -> dict[str, float]:
    """The limits of answers at fp16, by what these are compared with."""
    rows = [check for check in report.checks if (check.precision, check.stage) == ("fp16", "runtime")]
    return {check.against: check.limit for check in rows if check.limit is not None}


def test_a_bundle_without_float16_sums_keeps_its_limits(reduced_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bundles of versions before that field are."""
    narrow = fp16_limits(dmformer.verify(reduced_bundle, runtimes=["ort"]))
    regolden(reduced_bundle, lambda content: content.pop("float16_sums/logits"))
    monkeypatch.setattr(OnnxSupport, "sums_in_float16", lambda _: True)
    assert fp16_limits(dmformer.verify(reduced_bundle, runtimes=["ort"])) == narrow


@pytest.mark.parametrize("in_float16", [False, True])
def test_a_file_for_another_machine_is_held_to_the_sums_of_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_float16: bool
) -> None:
    """What is built here for another target is asked in onnxruntime here."""
    asked: dict[str, bool] = {}
    monkeypatch.setattr(OnnxSupport, "sums_in_float16", lambda _: in_float16)
    monkeypatch.setattr(steps, "_ask", lambda *_: None)
    for name in ("references", "check_other_size"):
        signature = inspect.signature(getattr(steps, name))

        def note(*given: Any, name: str = name, signature: Any = signature, **named: Any) -> list[Any]:
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            asked[name] = bound.arguments["float16_sums"]
            return []

        monkeypatch.setattr(steps, name, note)
    for name in ("check_answers", "check_consistency"):
        monkeypatch.setattr(steps, name, lambda *_: [])
    file: Any = SimpleNamespace(onnx=tmp_path / "model.onnx", precision="fp16")
    work: Any = SimpleNamespace(stage=silent, golden=None)
    assert steps._check_onnx(work, file) == []
    assert asked == {"references": in_float16, "check_other_size": in_float16}


def test_float16_sums_that_drown_the_signal_are_refused(reduced_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxSupport, "sums_in_float16", lambda _: True)
    for value, message in ((9.0, "fp16 with sums in float16 noise"), (np.inf, "gives NaN or infinity")):
        regolden(reduced_bundle, lambda content, v=value: content["float16_sums/logits"].__setitem__((0, 3), v))
        with pytest.raises(StageFailed, match=message):
            dmformer.verify(reduced_bundle, runtimes=["ort"])


@pytest.mark.slow
def test_another_models_int8_file_is_caught(
    reduced_bundle: Path, checkpoint: Checkpoint, golden: Golden, calibration: Calibration, tmp_path: Path
) -> None:
    options = {"num_classes": 10}
    other = replace(random_checkpoint("dmformer_nano", options, 32, seed=3), preprocessing=checkpoint.preprocessing)
    with simulated([0]):
        made = to_int8(source_of(other, tmp_path / "s", golden.inputs, calibration))
    shutil.copy(made.onnx, reduced_bundle / "onnx/int8/model.onnx")
    adopt(reduced_bundle, "onnx/int8/model.onnx")
    assert ("onnxruntime", "int8", "runtime") in failed(dmformer.verify(reduced_bundle, runtimes=["ort"]))


def regolden(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the arrays of a bundle's golden file, whose hash then fits."""
    path = bundle / "golden.npz"
    with np.load(path) as archive:
        content = {name: archive[name] for name in archive.files}
    change(content)
    np.savez_compressed(path, **content)
    adopt(bundle, "golden.npz")


def test_golden_outputs_that_are_no_numbers_are_refused(reduced_bundle: Path) -> None:
    regolden(reduced_bundle, lambda content: content["outputs_int8/logits"].__setitem__((0, 3), np.nan))
    with pytest.raises(StageFailed, match="at int8 output 'logits' is NaN or infinite"):
        dmformer.verify(reduced_bundle, runtimes=["ort"])


def test_golden_outputs_that_drown_the_signal_are_refused(reduced_bundle: Path) -> None:
    regolden(
        reduced_bundle, lambda content: content.update({"outputs_int8/logits": content["outputs_int8/logits"] * 3})
    )
    with pytest.raises(StageFailed, match="parity cannot be judged"):
        dmformer.verify(reduced_bundle, runtimes=["ort"])


def test_golden_outputs_of_another_precision_are_caught(reduced_bundle: Path) -> None:
    """The limit is the error of the precision: with fp16's answers in its place, int8 must not pass."""
    regolden(reduced_bundle, lambda c: c.update({"outputs_int8/logits": c["outputs_fp16/logits"]}))
    assert failed(dmformer.verify(reduced_bundle, runtimes=["ort"])) == [("onnxruntime", "int8", "runtime")]


def test_reduced_outputs_are_read_back(golden: Golden, tmp_path: Path) -> None:
    logits = golden.outputs["logits"]
    files = {"fp32": {"logits": logits}, "fp16": {"logits": logits + 1}, "int8": {"logits": logits + 2}}
    emulated = {"fp16": {"logits": logits + 3}, "int8": {"logits": logits + 4}}
    wanted = replace(golden, files=files, emulated=emulated, float16_sums={"logits": logits + 5})
    wanted.save(tmp_path / "a.npz")
    wanted.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = load_golden(tmp_path / "a.npz")
    for kind in ("files", "emulated"):
        ours, theirs = getattr(wanted, kind), getattr(found, kind)
        assert ours.keys() == theirs.keys()
        for precision, outputs in ours.items():
            np.testing.assert_array_equal(theirs[precision]["logits"], outputs["logits"])
    assert found.outputs_float64.keys() == {"logits"}
    np.testing.assert_array_equal(found.float16_sums["logits"], logits + 5)
    assert [source.shape for source in found.sources] == [source.shape for source in golden.sources]
    np.testing.assert_array_equal(found.source_pixels, golden.source_pixels)


def test_a_precision_without_golden_outputs_is_one_clear_line(golden: Golden, reduced_bundle: Path) -> None:
    with pytest.raises(UsageError, match="no golden outputs at fp16; expected a bundle that was exported with it"):
        references(golden, "fp16")
    regolden(reduced_bundle, lambda content: content.pop("outputs_int8/logits"))
    found = dmformer.verify(reduced_bundle, runtimes=["ort"])
    assert failed(found) == [("onnxruntime", "int8", "runtime")]
    assert all("no golden outputs at int8" in (check.reason or "") for check in found.checks if not check.passed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.update({"outputs_int8/logits": a["outputs/logits"][:2]}),
            "array 'outputs_int8/logits' is float32",
        ),
        (lambda a: a.update({"outputs_int8/logits": a["outputs/logits"].astype(np.float16)}), "float16"),
        (lambda a: a.update({"outputs_int8/logits": a["outputs/logits"][:, :0]}), r"\(5, 0\)"),
        (lambda a: a.update({"outputs_int8/other": a.pop("outputs_int8/logits")}), "do not match"),
        (lambda a: a.update({"outputs_int8/more": a["outputs/logits"]}), "do not match"),
    ],
)
def test_damaged_reduced_outputs_are_refused(
    reduced: ExportResult, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with np.load(reduced.output / "golden.npz") as archive:
        content = {name: archive[name] for name in archive.files}
    change(content)
    np.savez(tmp_path / "golden.npz", **content)
    with pytest.raises(UsageError, match=message) as error:
        load_golden(tmp_path / "golden.npz")
    one_line(error.value)
