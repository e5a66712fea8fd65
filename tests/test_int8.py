"""int8: what is quantised and how, and the accuracy budget."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import dmformer
from dmformer.assets import DEMONSTRATION_CHECKPOINT
from dmformer.errors import CheckFailed, StageFailed
from dmformer.export.precisions import int8, tensor_peaks
from dmformer.export.precisions.int8 import quantizable, to_int8
from dmformer.graph.onnx_file import typed_share
from dmformer.models.config import DMFormerConfig
from dmformer.runtimes.openvino import OpenVinoRuntime
from dmformer.verify.tasks.classification import Classification
from tests.bundles import one_line
from tests.precisions import arrays, simulated, source_of, types

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dmformer.bundle.golden import Golden
    from dmformer.export.cached import ExportResult
    from dmformer.export.precisions import Calibration, PrecisionSource
    from dmformer.models.checkpoint import Checkpoint
    from tests.conftest import Run


@pytest.fixture(scope="module")
def quantized(reduced: ExportResult) -> onnx.ModelProto:
    return onnx.load(reduced.output / "onnx/int8/model.onnx")


@pytest.fixture(scope="module")
def traced(
    checkpoint: Checkpoint, golden: Golden, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> PrecisionSource:
    return source_of(checkpoint, tmp_path_factory.mktemp("traced"), golden.inputs, calibration)


@pytest.fixture
def source(traced: PrecisionSource, tmp_path: Path) -> PrecisionSource:
    """The demonstration checkpoint, traced once, with a scratch folder for each test."""
    return replace(traced, scratch=tmp_path)


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def quantized_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    made_by = producers(model)
    return [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
        and any(made_by[n].op_type == "DequantizeLinear" for n in node.input if n in made_by)
    ]


def test_int8_is_symmetric_and_signed(quantized: onnx.ModelProto) -> None:
    values = arrays(quantized.graph)
    pairs = [node for node in quantized.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 60
    for node in pairs:
        zero_points = values[node.input[2]]
        assert zero_points.dtype == np.int8
        assert not zero_points.any()
        assert (values[node.input[1]] > 0).all()


def test_int8_weights_have_a_scale_for_each_channel(quantized: onnx.ModelProto) -> None:
    made_by, values = producers(quantized), arrays(quantized.graph)
    layers = quantized_layers(quantized)
    assert len(layers) == 31
    for node in layers:
        taken = made_by[node.input[1]]
        weight, scales = values[taken.input[0]], values[taken.input[1]]
        assert weight.dtype == np.int8
        assert weight.min() >= -127
        assert scales.shape == (len(weight),)
        assert [attribute.i for attribute in taken.attribute if attribute.name == "axis"] == [0]


def test_int8_layers_take_quantised_inputs_and_float_biases(quantized: onnx.ModelProto) -> None:
    made_by, values = producers(quantized), arrays(quantized.graph)
    for node in quantized_layers(quantized):
        taken = made_by[node.input[0]]
        assert taken.op_type == "DequantizeLinear"
        assert made_by[taken.input[0]].op_type == "QuantizeLinear"
        assert values[taken.input[1]].shape == ()
        assert all(values[name].dtype == np.float32 for name in node.input[2:])
    assert not [name for name, array in values.items() if array.dtype == np.int32]


def test_int8_leaves_gates_depth_wise_layers_and_the_classifier(quantized: onnx.ModelProto) -> None:
    names = {node.name for node in quantized_layers(quantized)}
    others = {node.name for node in quantized.graph.node if node.op_type in ("Conv", "Gemm")} - names
    assert not [name for name in names if ".gate." in name or ".branches." in name or "head" in name]
    assert {name.rpartition(".")[2] for name in names} >= {"mix/Conv", "skip/Conv", "expand/Conv", "fc1/Conv"}
    assert all(".gate." in name or ".branches." in name or name.startswith("head/") for name in others), others
    assert types(quantized)["logits"] == TensorProto.FLOAT


def test_int8_runs_in_as_many_layers_as_were_promised(reduced: ExportResult, quantized: onnx.ModelProto) -> None:
    (made,) = [m for m in reduced.manifest.artifacts if (m.format, m.precision) == ("openvino", "int8")]
    with OpenVinoRuntime(reduced.output / made.files[0].path, precision="int8") as runtime:
        layers = runtime.inspect().layers()
    assert layers == made.layers
    assert layers["int8"] / sum(layers.values()) == made.promised_share == typed_share(quantized, "int8") == 31 / 57


def test_int8_has_measured_every_block(reduced: ExportResult, quantized: onnx.ModelProto) -> None:
    (made,) = [m for m in reduced.manifest.artifacts if (m.format, m.precision) == ("onnx", "int8")]
    assert set(made.sensitivity) == set(
        quantizable(onnx.load(reduced.output / "onnx/fp32/model.onnx"), DMFormerConfig().block_of)
    )
    assert len(made.sensitivity) == 9
    assert all(0 < error < 1 for error in made.sensitivity.values())


def test_int8_leaves_weights_that_are_computed(source: PrecisionSource, tmp_path: Path) -> None:
    model = onnx.load(source.onnx)
    blocks = quantizable(model, source.block_of)
    block, (first, *_) = next(iter(blocks.items()))

    def compute_weight(node: onnx.NodeProto) -> None:
        weight, node.input[1] = node.input[1], f"{node.name}/weight"
        model.graph.node.insert(0, onnx.helper.make_node("Abs", [weight], [node.input[1]], f"{node.name}/Abs"))

    convolutions = {node.name: node for node in model.graph.node if node.op_type == "Conv"}
    compute_weight(convolutions[first])
    assert first not in quantizable(model, source.block_of).get(block, [])
    for name in [name for names in quantizable(model, source.block_of).values() for name in names]:
        compute_weight(convolutions[name])
    onnx.save(model, tmp_path / "computed.onnx")
    with pytest.raises(CheckFailed, match="no full convolution with constant weights in any block"):
        to_int8(replace(source, onnx=tmp_path / "computed.onnx"))


@pytest.mark.parametrize(
    ("losses", "kept"),
    [([0.5], 0), ([0.6, 0.5], 1), ([3, 2, 0], 2), ([9, 3, 2, -1], 3), ([9] * 5 + [0.5], 5), ([9] * 8 + [0.1], 8)],
)
def test_int8_keeps_the_most_sensitive_blocks_until_the_budget_holds(
    source: PrecisionSource, losses: list[float], kept: int
) -> None:
    blocks = quantizable(onnx.load(source.onnx), source.block_of)
    with simulated(losses) as said:
        made = to_int8(source)
    assert f"int8 accuracy, {kept} of 9 blocks in fp32" in said
    assert list(made.kept_in_fp32) == list(blocks)[::-1][:kept]
    assert all("the accuracy budget holds" in reason for reason in made.kept_in_fp32.values())
    model = onnx.load(made.onnx)
    assert {node.name for node in quantized_layers(model)} == {
        name for block in blocks if block not in made.kept_in_fp32 for name in blocks[block]
    }
    assert made.promised_share == typed_share(model, "int8")


def test_int8_beyond_any_budget_fails(source: PrecisionSource) -> None:
    with simulated([7.25]) as said, pytest.raises(CheckFailed, match=r"loses 7\.25 points with 1 of 9 blocks") as error:
        to_int8(source)
    assert "`max_accuracy_drop`" in one_line(error.value)
    assert len(said) == 5


@pytest.mark.slow
def test_int8_does_not_depend_on_the_process(few_images: Path, reduced: ExportResult, tmp_path: Path) -> None:
    """Another process, hash seed and folder; fp16 on the way."""
    script = (
        "import sys, dmformer; from dmformer.export import graph, steps;"
        "from tests.conftest import NoSimplifier, timed_as;"
        "steps.time_artifacts, graph.Simplifier = timed_as({}), NoSimplifier;"
        "dmformer.export(precisions=['fp16', 'int8'], calibration=sys.argv[1], max_accuracy_drop=5, output=sys.argv[2])"
    )
    again = tmp_path / "again"
    environment = {**os.environ, "PYTHONHASHSEED": "11"}
    subprocess.run(
        [sys.executable, "-c", script, str(few_images), str(again)], check=True, env=environment, timeout=300
    )
    for precision in ("fp16", "int8"):
        name = f"onnx/{precision}/model.onnx"
        assert (again / name).read_bytes() == (reduced.output / name).read_bytes()
    assert not (again / "onnx/fp32").exists()  # made to compare with, and not asked for


@pytest.mark.usefixtures("quick")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("factor", [pytest.param(0.5, marks=pytest.mark.slow), 0.7])
def test_ranges_that_fall_short_are_caught(
    few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """The quantiser is given them, and its proof: PyTorch's own look at the images parts the two."""
    monkeypatch.setattr(
        int8, "tensor_peaks", lambda *given: {name: factor * peak for name, peak in tensor_peaks(*given).items()}
    )
    with pytest.raises((CheckFailed, StageFailed), match="int8"):
        dmformer.export(precisions=["int8"], calibration=few_images, max_accuracy_drop=100, output=tmp_path / "b")


@pytest.mark.slow
def test_a_budget_that_never_holds_writes_nothing(few_images: Path, tmp_path: Path) -> None:
    with simulated([40]), pytest.raises(CheckFailed, match="precision int8 loses 40") as error:
        dmformer.export(precisions=["int8"], calibration=few_images, output=tmp_path / "b")
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_budget_that_does_not_hold_in_a_runtime_fails_the_export(
    few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classification, "points_lost", lambda *_: 3.5)
    with pytest.raises(CheckFailed, match=r"loses 3\.50 points on 30 images; the accuracy budget is 2"):
        dmformer.export(precisions=["fp16"], calibration=few_images, max_accuracy_drop=2, output=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_without_labels_agreement_is_measured(few_images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in few_images.rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    with simulated([0]):
        result = dmformer.export(precisions=["int8"], calibration=flat, max_accuracy_drop=5, output=tmp_path / "b")
    evidence = result.manifest.evidence.accuracy
    assert evidence is not None
    assert (evidence.images, evidence.labelled, evidence.torch.top1) == (30, False, None)
    (made,) = result.manifest.artifacts
    assert made.accuracy is not None
    assert made.accuracy.top1 is None
    assert made.accuracy.agreement_with_torch is not None
    assert made.points_lost == pytest.approx(100 * (1 - made.accuracy.agreement_with_torch))


def test_labels_measure_accuracy(reduced: ExportResult) -> None:
    evidence = reduced.manifest.evidence.accuracy
    assert evidence is not None
    assert (evidence.images, evidence.labelled, evidence.max_points_lost) == (30, True, 5)
    for made in reduced.manifest.artifacts:
        assert made.accuracy is not None
        assert made.accuracy.top1 is not None
        assert made.points_lost == pytest.approx(100 * ((evidence.torch.top1 or 0) - made.accuracy.top1))
    rows = [(check.runtime, check.precision) for check in reduced.parity.checks if check.stage == "accuracy"]
    assert len(rows) == len(set(rows)) == 6


def test_int8_without_calibration_images_is_refused_before_any_work(tmp_path: Path, inline: Callable[..., Run]) -> None:
    run = inline("export", "--weights", DEMONSTRATION_CHECKPOINT, "--precision", "int8", "--output", "b")
    assert run.code == 2
    assert "expected --calibration, a folder" in run.error_line
    assert run.err == run.error_line + "\n"  # no stage was begun
    assert list(tmp_path.iterdir()) == []
