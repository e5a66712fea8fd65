"""fp16: what is typed so, what stays in float32, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import dmformer
from dmformer.assets import SAMPLE_IMAGES
from dmformer.errors import CheckFailed, StageFailed
from dmformer.export.precisions import fp16, tensor_peaks, verify_reduced
from dmformer.export.precisions.fp16 import LARGEST, to_fp16
from dmformer.graph.onnx_file import typed_share
from dmformer.models.checkpoint import Checkpoint, save_checkpoint
from dmformer.models.deploy import deploy
from dmformer.verify.compare import reduced_limit
from dmformer.verify.executors import graph_outputs, input_name, literal
from tests.precisions import ATTENTION, rescaled, source_of, types

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.bundle.golden import Golden
    from dmformer.export.cached import ExportResult


def literal_outputs(path: Path, inputs: np.ndarray) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return graph_outputs(model, literal(model, {input_name(model): inputs}))


@pytest.fixture(scope="module")
def half(reduced: ExportResult) -> onnx.ModelProto:
    return onnx.load(reduced.output / "onnx/fp16/model.onnx")


def test_fp16_is_float16_inside_and_float32_at_both_ends(half: onnx.ModelProto) -> None:
    found = types(half)
    assert [found[value.name] for value in (*half.graph.input, *half.graph.output)] == [TensorProto.FLOAT] * 2
    assert {tensor.data_type for tensor in half.graph.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    computing = [node for node in half.graph.node if node.op_type in ("Conv", "Gemm", "Gelu", "Relu", "Add", "Mul")]
    assert len(computing) > 100
    assert {found[name] for node in computing for name in node.output if name != "logits"} == {TensorProto.FLOAT16}


def test_fp16_adds_up_in_float32(half: onnx.ModelProto) -> None:
    found = types(half)
    pools = [node for node in half.graph.node if node.op_type == "GlobalAveragePool"]
    assert len(pools) == 6
    assert {found[name] for node in pools for name in (*node.input, *node.output)} == {TensorProto.FLOAT}


def test_fp16_of_a_tame_network_promises_everything(reduced: ExportResult, half: onnx.ModelProto) -> None:
    made = [artifact for artifact in reduced.manifest.artifacts if artifact.precision == "fp16"]
    assert [(artifact.promised_share, artifact.kept_in_fp32) for artifact in made] == [(1.0, {}), (1.0, {})]
    assert typed_share(half, "fp16") == 1.0


def test_the_share_is_that_of_the_layers_typed_so(half: onnx.ModelProto) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(half)
    weights = {node.input[1] for node in half.graph.node if node.op_type in ("Conv", "Gemm")}
    for tensor in changed.graph.initializer:
        if tensor.name in weights and ".ffn." in tensor.name:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    layers = [node.name for node in half.graph.node if node.op_type in ("Conv", "Gemm")]
    left = [name for name in layers if ".ffn." not in name]
    assert 0 < len(left) < len(layers)
    assert typed_share(changed, "fp16") == len(left) / len(layers)


@pytest.mark.parametrize("exponent", [14, *(pytest.param(other, marks=pytest.mark.slow) for other in (20, -14))])
def test_fp16_keeps_in_float32_what_float16_cannot_hold(
    checkpoint: Checkpoint, golden: Golden, tmp_path: Path, exponent: int
) -> None:
    """Activations beyond 65504 (14, 20), and weights near it (-14): the function, and so the answers, are the same."""
    source = source_of(rescaled(checkpoint, exponent), tmp_path / "s", golden.inputs)
    made = to_fp16(source)
    branches = {f"{ATTENTION}.branches.{branch}/Conv" for branch in range(3)}
    assert set(made.kept_in_fp32) == (branches | {f"{ATTENTION}.expand/Conv"} if exponent > 0 else branches)
    peaks = [float(reason.split()[1].rstrip(",")) for reason in made.kept_in_fp32.values()]
    assert all(peak > LARGEST / 8 for peak in peaks)
    assert all(f"float16 ends at {LARGEST:g}" in reason for reason in made.kept_in_fp32.values())
    assert made.promised_share == pytest.approx(1 - len(made.kept_in_fp32) / 57)
    answers = literal_outputs(made.onnx, golden.inputs)
    assert np.isfinite(answers["logits"]).all()
    plain = literal_outputs(to_fp16(source_of(checkpoint, tmp_path / "p", golden.inputs)).onnx, golden.inputs)
    (usual,) = reduced_limit("fp16", plain, golden.outputs_float64).values()
    assert np.abs(answers["logits"] - golden.outputs["logits"]).max() < usual.max_abs


def test_fp16_that_overflows_is_refused(
    checkpoint: Checkpoint, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp16, "HEADROOM", 0.0)  # as if nobody had looked at the ranges
    made = to_fp16(source_of(rescaled(checkpoint, 14), tmp_path / "s", golden.inputs))
    assert made.kept_in_fp32 == {}
    answers = literal_outputs(made.onnx, golden.inputs)
    with pytest.raises(StageFailed, match="at fp16 output 'logits' is NaN or infinite"):
        reduced_limit("fp16", answers, golden.outputs_float64)


@pytest.mark.slow
def test_an_overflow_that_nobody_foresaw_becomes_an_island(
    checkpoint: Checkpoint, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp16, "HEADROOM", 0.0)
    loud = rescaled(checkpoint, 14)
    source = source_of(loud, tmp_path / "s", golden.inputs)
    answered = replace(golden, files={"fp32": golden.outputs})
    found = verify_reduced(to_fp16(source), source, lambda: deploy(loud.model(), 32), answered)
    made, completed, checks = found.file, found.golden, found.checks
    assert all(check.passed for check in checks), checks
    assert set(made.kept_in_fp32) == {
        f"{ATTENTION}.expand/Conv",
        *(f"{ATTENTION}.branches.{branch}/Conv" for branch in range(3)),
    }
    assert set(made.kept_in_fp32.values()) == {"beyond the error of float16 there"}
    assert made.promised_share == pytest.approx(1 - len(made.kept_in_fp32) / 57)
    assert np.isfinite(completed.files["fp16"]["logits"]).all()


def test_the_literal_execution_overflows_where_float16_does(tmp_path: Path) -> None:
    """300 x 300 x 0.01: between the two convolutions stands 90000."""
    weights = [numpy_helper.from_array(np.full((1, 1, 1, 1), value, np.float16), str(value)) for value in (300, 0.01)]
    nodes = [
        onnx.helper.make_node("Cast", ["image"], ["half"], "first", to=TensorProto.FLOAT16),
        onnx.helper.make_node("Conv", ["half", "300"], ["large"], "second"),
        onnx.helper.make_node("Conv", ["large", "0.01"], ["small"], "third"),
        onnx.helper.make_node("Cast", ["small"], ["logits"], "fourth", to=TensorProto.FLOAT),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1] * 4) for name in ("image", "logits")]
    graph = onnx.helper.make_graph(nodes, "test", ends[:1], ends[1:], weights)
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    assert np.isinf(literal_outputs(path, np.full((1, 1, 1, 1), 300, np.float32))["logits"]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_manifest_says_which_nodes_stay_in_float32(checkpoint: Checkpoint, tmp_path: Path) -> None:
    loud = rescaled(checkpoint, 14)
    save_checkpoint(tmp_path / "loud.safetensors", loud)
    result = dmformer.export(
        tmp_path / "loud.safetensors",
        formats=["onnx", "openvino"],
        precisions=["fp16"],
        images=SAMPLE_IMAGES,
        output=tmp_path / "b",
    )
    assert result.parity.passed
    assert [(made.format, made.precision) for made in result.manifest.artifacts] == [
        ("onnx", "fp16"),
        ("openvino", "fp16"),
    ]
    for made in result.manifest.artifacts:
        assert len(made.kept_in_fp32) == 4
        assert "float16 ends at 65504" in made.kept_in_fp32[f"{ATTENTION}.expand/Conv"]
    assert dmformer.verify(tmp_path / "b").passed


def test_fp16_out_of_range_everywhere_fails(
    checkpoint: Checkpoint, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp16, "HEADROOM", 1e9)
    with pytest.raises(CheckFailed, match="export fp32"):
        to_fp16(source_of(checkpoint, tmp_path / "s", golden.inputs))


def relu_of_reciprocal(path: Path) -> Path:
    """A graph whose middle is infinite, and its end 0, where the input is 0; NaN where that is NaN."""
    nodes = [
        onnx.helper.make_node("Reciprocal", ["image"], ["middle"], "first"),
        onnx.helper.make_node("Neg", ["middle"], ["negative"], "second"),
        onnx.helper.make_node("Relu", ["negative"], ["logits"], "third"),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 2, 2]) for name in ("image", "logits")
    ]
    graph = onnx.helper.make_graph(nodes, "test", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_ranges_are_the_largest_over_all_batches(tmp_path: Path) -> None:
    path = relu_of_reciprocal(tmp_path / "m.onnx")
    batches = [np.full((1, 3, 2, 2), value, np.float32) for value in (0.5, -0.25, 1.0)]
    assert tensor_peaks(path, ["middle"], batches)["middle"] == 4.0


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("bad", [0.0, np.nan])
@pytest.mark.parametrize("before", [0, 1])
def test_an_activation_that_is_no_number_is_refused(tmp_path: Path, bad: float, before: int) -> None:
    path = relu_of_reciprocal(tmp_path / "m.onnx")
    batches = [np.ones((1, 3, 2, 2), np.float32), np.full((1, 3, 2, 2), bad, np.float32)][1 - before :]
    with pytest.raises(CheckFailed, match="is NaN or infinite in float32"):
        tensor_peaks(path, ["middle"], batches)


def test_fp16_of_the_same_graph_has_the_same_bytes(checkpoint: Checkpoint, golden: Golden, tmp_path: Path) -> None:
    files = [to_fp16(source_of(checkpoint, tmp_path / name, golden.inputs)).onnx for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert str(tmp_path).encode() not in files[0].read_bytes()
