"""The reduced precisions: what is in their files, what is refused, and that a wrong one is caught."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import dmformer
from dmformer.assets import DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from dmformer.bundle.golden import Golden, load_golden
from dmformer.data.images import list_images
from dmformer.data.labelled import image_set
from dmformer.errors import CheckFailed, StageFailed, UsageError
from dmformer.export import fp16, int8, pipeline
from dmformer.export.api import make_request
from dmformer.export.fp16 import LARGEST, tensor_peaks, to_fp16
from dmformer.export.int8 import quantizable, to_int8
from dmformer.export.literal import literal_answers
from dmformer.export.precision import Calibration, PrecisionSource, typed_share
from dmformer.export.source import random_checkpoint
from dmformer.export.torch_onnx import trace
from dmformer.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dmformer.models.deploy import deploy
from dmformer.progress import silent
from dmformer.runtimes.openvino import OpenVinoRuntime
from dmformer.verify.accuracy import score
from dmformer.verify.compare import reduced_limit
from dmformer.verify.parity import Answers, check_layers
from dmformer.verify.reference import golden_pixels, make_golden, torch_logits
from tests.bundles import adopt, one_line, rewrite
from tests.conftest import NoSimplifier, timed_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dmformer.export.pipeline import ExportResult
    from dmformer.verify.parity import ParityReport
    from tests.conftest import Run

ATTENTION = "stages.2.blocks.0.dma"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports without onnxsim and without timing."""
    monkeypatch.setattr(pipeline, "Simplifier", NoSimplifier)
    monkeypatch.setattr(pipeline, "compare_precisions", timed_as({}))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(DEMONSTRATION_CHECKPOINT)


@pytest.fixture(scope="module")
def golden(checkpoint: Checkpoint) -> Golden:
    return golden_of(checkpoint)


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint, few_images: Path) -> Calibration:
    images = image_set(few_images, checkpoint.preprocessing, checkpoint.classes, 10)
    logits = torch_logits(checkpoint.model(), images, lambda: None)
    return Calibration(images, logits, score(logits, images.labels, logits))


def golden_of(checkpoint: Checkpoint) -> Golden:
    pixels = golden_pixels(checkpoint.preprocessing, list_images(SAMPLE_IMAGES))
    return make_golden(checkpoint.model(), checkpoint.preprocessing, pixels)


def source_of(
    checkpoint: Checkpoint, scratch: Path, inputs: np.ndarray, calibration: Calibration | None = None
) -> PrecisionSource:
    """What a precision is made from: the traced deploy form."""
    scratch.mkdir(exist_ok=True)
    size = checkpoint.preprocessing.image_size
    trace(checkpoint, deploy(checkpoint.model(), size), scratch / "traced.onnx")
    return PrecisionSource(
        onnx=scratch / "traced.onnx",
        inputs=inputs,
        calibration=calibration,
        max_points_lost=0.5,
        scratch=scratch,
        stage=silent,
    )


def rescaled(checkpoint: Checkpoint, exponent: int) -> Checkpoint:
    """The same function to the last bit: one linear map times a power of two, the next one divided by it."""
    state = {name: value.clone() for name, value in checkpoint.state.items()}
    for name in ("weight", "bias"):
        state[f"{ATTENTION}.expand.{name}"] *= 2.0**exponent
    for branch in range(3):
        state[f"{ATTENTION}.branches.{branch}.weight"] *= 2.0**-exponent
    return replace(checkpoint, state=state)


def arrays(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


# --- fp16 -------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("exponent", [14, 20, -14])
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
    assert made.promised == pytest.approx(1 - len(made.kept_in_fp32) / 57)
    answers = literal_answers(made.onnx, golden.inputs)
    assert np.isfinite(answers["logits"]).all()
    plain = literal_answers(to_fp16(source_of(checkpoint, tmp_path / "p", golden.inputs)).onnx, golden.inputs)
    (usual,) = reduced_limit("fp16", plain, golden.outputs_float64).values()
    assert np.abs(answers["logits"] - golden.outputs["logits"]).max() < usual.max_abs


def test_fp16_that_overflows_is_refused(
    checkpoint: Checkpoint, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp16, "HEADROOM", 0.0)  # as if nobody had looked at the ranges
    made = to_fp16(source_of(rescaled(checkpoint, 14), tmp_path / "s", golden.inputs))
    assert made.kept_in_fp32 == {}
    answers = literal_answers(made.onnx, golden.inputs)
    with pytest.raises(StageFailed, match="at fp16 output 'logits' is NaN or infinite"):
        reduced_limit("fp16", answers, golden.outputs_float64)


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
    assert np.isinf(literal_answers(path, np.full((1, 1, 1, 1), 300, np.float32))["logits"]).all()


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
    assert tensor_peaks(path, batches, tmp_path)["middle"] == 4.0


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("bad", [0.0, np.nan])
@pytest.mark.parametrize("before", [0, 1])
def test_an_activation_that_is_no_number_is_refused(tmp_path: Path, bad: float, before: int) -> None:
    path = relu_of_reciprocal(tmp_path / "m.onnx")
    batches = [np.ones((1, 3, 2, 2), np.float32), np.full((1, 3, 2, 2), bad, np.float32)][1 - before :]
    with pytest.raises(CheckFailed, match="is NaN or infinite in float32"):
        tensor_peaks(path, batches, tmp_path)


def test_fp16_of_the_same_graph_has_the_same_bytes(checkpoint: Checkpoint, golden: Golden, tmp_path: Path) -> None:
    files = [to_fp16(source_of(checkpoint, tmp_path / name, golden.inputs)).onnx for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert str(tmp_path).encode() not in files[0].read_bytes()


# --- int8 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(reduced: ExportResult) -> onnx.ModelProto:
    return onnx.load(reduced.output / "onnx/int8/model.onnx")


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
        layers = runtime.layers()
    assert layers == made.layers
    assert layers["int8"] / sum(layers.values()) == made.promised_share == typed_share(quantized, "int8") == 31 / 57


def test_int8_has_measured_every_block(reduced: ExportResult, quantized: onnx.ModelProto) -> None:
    (made,) = [m for m in reduced.manifest.artifacts if (m.format, m.precision) == ("onnx", "int8")]
    assert set(made.sensitivity) == set(quantizable(onnx.load(reduced.output / "onnx/fp32/model.onnx")))
    assert len(made.sensitivity) == 9
    assert all(0 < error < 1 for error in made.sensitivity.values())


@contextmanager
def simulated(losses: list[float]) -> Iterator[list[str]]:
    """Blocks as sensitive as their position, and points lost by the number of blocks kept; gives the tries in order."""
    said: list[str] = []

    def points_lost(self: int8._Quantizer, path: Path, what: str) -> float:
        said.append(what)
        kept = int(what.removeprefix("int8 accuracy, ").split()[0])
        return losses[min(kept, len(losses) - 1)]

    def sensitivity(self: int8._Quantizer) -> dict[str, float]:
        return {block: float(index) for index, block in enumerate(self.blocks)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8._Quantizer, "points_lost", points_lost)
        patch.setattr(int8._Quantizer, "sensitivity", sensitivity)
        yield said


@pytest.mark.parametrize(
    ("losses", "kept"),
    [([0.5], 0), ([0.6, 0.5], 1), ([3, 2, 0], 2), ([9, 3, 2, -1], 3), ([9] * 5 + [0.5], 5), ([9] * 8 + [0.1], 8)],
)
def test_int8_keeps_the_most_sensitive_blocks_until_the_budget_holds(
    checkpoint: Checkpoint,
    golden: Golden,
    calibration: Calibration,
    tmp_path: Path,
    losses: list[float],
    kept: int,
) -> None:
    source = source_of(checkpoint, tmp_path / "s", golden.inputs, calibration)
    blocks = quantizable(onnx.load(source.onnx))
    with simulated(losses) as said:
        made = to_int8(source)
    assert f"int8 accuracy, {kept} of 9 blocks in fp32" in said
    assert list(made.kept_in_fp32) == list(blocks)[::-1][:kept]
    assert all("the accuracy budget holds" in reason for reason in made.kept_in_fp32.values())
    model = onnx.load(made.onnx)
    assert {node.name for node in quantized_layers(model)} == {
        name for block in blocks if block not in made.kept_in_fp32 for name in blocks[block]
    }
    assert made.promised == typed_share(model, "int8")


def test_int8_beyond_any_budget_fails(
    checkpoint: Checkpoint, golden: Golden, calibration: Calibration, tmp_path: Path
) -> None:
    source = source_of(checkpoint, tmp_path / "s", golden.inputs, calibration)
    with simulated([7.25]) as said, pytest.raises(CheckFailed, match=r"loses 7\.25 points with 1 of 9 blocks") as error:
        to_int8(source)
    assert "--max-accuracy-drop" in one_line(error.value)
    assert len(said) == 5


def test_int8_does_not_depend_on_the_process(few_images: Path, reduced: ExportResult, tmp_path: Path) -> None:
    """Another process, hash seed and folder; fp16 on the way."""
    script = (
        "import sys, dmformer; from dmformer.export import pipeline; from tests.conftest import NoSimplifier, timed_as;"
        "pipeline.compare_precisions, pipeline.Simplifier = timed_as({}), NoSimplifier;"
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
def test_a_budget_that_never_holds_writes_nothing(few_images: Path, tmp_path: Path) -> None:
    with simulated([40]), pytest.raises(CheckFailed, match="precision int8 loses 40") as error:
        dmformer.export(precisions=["int8"], calibration=few_images, output=tmp_path / "b")
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_budget_that_does_not_hold_in_a_runtime_fails_the_export(
    few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "points_lost", lambda *_: 3.5)
    with pytest.raises(CheckFailed, match=r"loses 3\.50 points on 30 images; the budget is 2"):
        dmformer.export(precisions=["fp16"], calibration=few_images, max_accuracy_drop=2, output=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


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


def test_int8_without_calibration_images_is_refused_before_any_work(tmp_path: Path, cli: Callable[..., Run]) -> None:
    run = cli("export", "--weights", DEMONSTRATION_CHECKPOINT, "--precision", "int8", "--output", "b")
    assert run.code == 2
    assert "--calibration DIR" in run.error_line
    assert run.err == run.error_line + "\n"  # no stage was begun
    assert list(tmp_path.iterdir()) == []


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precisions": ["fp16", "auto"]}, "precision auto with fp16; expected it alone"),
        ({"precisions": ["AUTO", "int8"]}, "precision auto with int8; expected it alone"),
        ({"precisions": ["bf16"]}, "precision 'bf16'; expected one of fp32, fp16, int8, or auto"),
        ({"precisions": ["int8"], "formats": ["torch"]}, "format torch at int8; expected fp32: leave --format torch"),
        ({"precisions": ["fp16", "int8"], "formats": ["onnx", "torch"]}, "format torch at fp16, int8"),
        ({"precisions": ["int8"], "arch": "dmformer_nano"}, "--calibration DIR"),
        ({"max_accuracy_drop": -0.1}, "max_accuracy_drop is -0.1"),
        ({"max_accuracy_drop": 101}, "0 to 100"),
        ({"max_accuracy_drop": float("nan")}, "max_accuracy_drop is nan"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make_request(**arguments)
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
    planned = pipeline.planned_artifacts(make_request(**arguments))
    assert [name for name in planned if name.endswith("/")] == artifacts
    assert planned[-1] == "reports/bench.json"


def test_float32_alone_is_not_timed() -> None:
    assert pipeline.planned_artifacts(make_request())[-1] == "reports/parity.json"


# --- auto -------------------------------------------------------------------------------------------------------------


def test_auto_keeps_the_fastest_of_each_format(
    few_images: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = {("onnx", "fp16"): 1.4, ("onnx", "int8"): 0.97, ("openvino", "fp16"): 0.9, ("openvino", "int8"): 0.6}
    monkeypatch.setattr(pipeline, "compare_precisions", timed_as(ratios))
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
    assert load_golden(tmp_path / "b/golden.npz").reduced.keys() == {"fp16"}


def test_auto_leaves_out_what_breaks_the_budget_in_its_runtime(
    few_images: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantiser measures in onnxruntime; an engine that computes in int8 may lose more."""
    lost = iter([0, 0, 9.0])
    monkeypatch.setattr(pipeline, "points_lost", lambda *_: next(lost))
    monkeypatch.setattr(pipeline, "compare_precisions", timed_as({("onnx", "fp16"): 0.9, ("onnx", "int8"): 0.5}))
    with simulated([0]):
        result = dmformer.export(precisions=["auto"], calibration=few_images, output=tmp_path / "b")
    assert [made.precision for made in result.manifest.artifacts] == ["fp16"]
    assert any("int8" in reason and "9.00 points" in reason for reason in result.parity.skipped)


@pytest.mark.parametrize("auto", [True, False])
def test_force_never_writes_a_bundle_without_artifacts(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, auto: bool
) -> None:
    """Where float32 fails its checks, nothing is reduced; what is written can still be opened, and says why."""
    from dmformer.verify.compare import Comparison

    monkeypatch.setattr("dmformer.verify.parity.compare", lambda *_: Comparison(False, reason="seeded"))
    result = dmformer.export(precisions=["auto" if auto else "fp16"], output=tmp_path / "b", force=True)
    assert not result.parity.passed
    assert any("fp16: float32 failed its checks" in reason for reason in result.parity.skipped)
    assert dmformer.verify(tmp_path / "b").checks


# --- proof ------------------------------------------------------------------------------------------------------------


def failed(report: ParityReport) -> list[tuple[str, str, str]]:
    found = [(check.runtime, check.precision, check.stage) for check in report.checks if not check.passed]
    assert report.passed == (not found)
    return list(dict.fromkeys(found))


def test_the_bundle_passes_with_a_row_for_each_precision(reduced: ExportResult) -> None:
    found = dmformer.verify(reduced.output)
    assert failed(found) == []
    rows = [(check.runtime, check.precision) for check in found.checks if check.stage == "precision"]
    assert rows == [(name, p) for name in ("onnxruntime", "openvino") for p in ("fp32", "fp16", "int8")]


def test_a_runtime_that_keeps_less_than_promised_fails(reduced_bundle: Path) -> None:
    rewrite(
        reduced_bundle,
        lambda c: [made.update(promised_share=0.99) for made in c["artifacts"] if made["precision"] == "int8"],
    )
    found = dmformer.verify(reduced_bundle, runtimes=["openvino"])
    assert failed(found) == [("openvino", "int8", "precision")]
    (reason,) = [check.reason for check in found.checks if not check.passed]
    assert reason == "int8 in 54% of 57 compute layers (31 int8, 26 fp32); promised 99%"


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


# --- parity at reduced precision --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_an_int8_file_is_caught(reduced_bundle: Path, fault: str) -> None:
    changed(reduced_bundle, "onnx/int8/model.onnx", FAULTS[fault])
    assert failed(dmformer.verify(reduced_bundle, runtimes=["ort"])) == [("onnxruntime", "int8", "runtime")]


@pytest.mark.parametrize("name", ["head.weight", "stages.0.downsample.conv1.weight", "stages.2.downsample.conv.weight"])
def test_one_percent_in_an_fp16_file_is_caught(reduced_bundle: Path, name: str) -> None:
    changed(reduced_bundle, "onnx/fp16/model.onnx", lambda a: {name: 1.01 * a[name]})
    assert failed(dmformer.verify(reduced_bundle, runtimes=["ort"])) == [("onnxruntime", "fp16", "runtime")]


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


# --- golden.npz -------------------------------------------------------------------------------------------------------


def test_reduced_outputs_are_read_back(golden: Golden, tmp_path: Path) -> None:
    logits = golden.outputs["logits"]
    wanted = replace(golden, reduced={"fp16": {"logits": logits + 1}, "int8": {"logits": logits + 2}})
    wanted.save(tmp_path / "a.npz")
    wanted.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = load_golden(tmp_path / "a.npz")
    assert found.reduced.keys() == {"fp16", "int8"}
    for precision in ("fp32", "fp16", "int8"):
        np.testing.assert_array_equal(found.expected(precision)["logits"], wanted.expected(precision)["logits"])
    assert found.outputs_float64.keys() == {"logits"}


def test_a_precision_without_golden_outputs_is_one_clear_line(golden: Golden, reduced_bundle: Path) -> None:
    with pytest.raises(UsageError, match="no golden outputs at fp16; expected a bundle that was exported with it"):
        golden.expected("fp16")
    regolden(reduced_bundle, lambda content: content.pop("outputs_int8/logits"))
    with pytest.raises(UsageError, match="no golden outputs at int8") as error:
        dmformer.verify(reduced_bundle, runtimes=["ort"])
    one_line(error.value)


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


# --- everything, timed ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_export_with_the_images_that_ship(tmp_path: Path) -> None:
    result = dmformer.export(formats=["all"], precisions=["fp32", "fp16", "int8"], output=tmp_path / "b")
    assert result.parity.passed
    assert len(result.manifest.artifacts) == 7
    assert all(made.speed is not None for made in result.manifest.artifacts)
    evidence = result.manifest.evidence
    assert evidence.accuracy is not None
    assert evidence.accuracy.labelled
    assert evidence.latency is not None
    assert dmformer.verify(tmp_path / "b").passed
