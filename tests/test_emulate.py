"""Emulations and the interpreter: the measures that limits come from must be right themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
import pytest
import torch

from dmformer.errors import StageFailed
from dmformer.export.networks import random_checkpoint
from dmformer.graph.trace import trace
from dmformer.models.deploy import deploy
from dmformer.runtimes.inspector import module_path
from dmformer.verify.executors import Emulation, by_reference, emulated, exact, input_peaks, quantized, round_layers_
from dmformer.verify.float16_sums import convolve, multiply
from dmformer.verify.inner import ModuleTruth
from dmformer.verify.reference import golden_pixels, make_golden, torch_outputs
from dmformer.verify.report import Check
from tests.fakes import FakeInspector, FakeRuntime

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.models.checkpoint import Checkpoint
    from dmformer.runtimes.inspector import Inspector

CONFIGS: list[dict[str, Any]] = [
    {},
    {"branch_merge": "concat", "gate_input": "x_prime", "layer_scale": None},
    {"inner_residual": False, "in_channels": 1},
]


@pytest.fixture(params=CONFIGS, ids=["default", "concat", "luma"], scope="module")
def other(request: pytest.FixtureRequest) -> Checkpoint:
    return random_checkpoint("dmformer_nano", {"num_classes": 6, **request.param}, 32, seed=4)


@pytest.mark.parametrize("form", [True, False])
def test_the_interpreter_is_the_network(other: Checkpoint, form: bool, tmp_path: Path) -> None:
    model = other.model()
    golden = make_golden(model, other.preprocessing, golden_pixels(other.preprocessing, []))
    trace(other, deploy(model, 32) if form else other.model(), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    values = dict(exact(graph, {"image": golden.inputs}))
    assert set(values) == {name for node in graph.graph.node for name in node.output}
    spread = np.ptp(golden.outputs_float64["logits"])
    # Folded weights are rounded to float32 once more.
    assert np.abs(values["logits"] - golden.outputs_float64["logits"]).max() < 1e-5 * spread
    single = dict(emulated(graph, {"image": golden.inputs}))
    assert single["logits"].dtype == np.float32
    assert 0 < np.abs(single["logits"] - values["logits"]).max() < 1e-4 * spread


def one_node(operator: str, domain: str = "") -> onnx.ModelProto:
    node = onnx.helper.make_node(operator, ["image"], ["logits"], "strange", domain=domain)
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 2]) for n in ("image", "logits")]
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:]))


def test_operators_of_other_networks_are_left_to_onnxs_reference() -> None:
    model, image = one_node("Softmax"), np.array([[1.0, 3.0]], np.float32)
    assert by_reference(model) == ["Softmax"]
    ((_, found),) = exact(model, {"image": image})
    assert found.dtype == np.float64
    expected = np.exp(image.astype(np.float64))
    assert np.allclose(found, expected / expected.sum(), rtol=1e-12)


def test_the_interpreter_refuses_what_nobody_knows() -> None:
    with pytest.raises(StageFailed, match="node 'strange' is Sofa, which ONNX's reference implementation cannot"):
        dict(exact(one_node("Sofa"), {"image": np.zeros((1, 2), np.float32)}))


def test_int8_has_a_symmetric_grid() -> None:
    values = torch.tensor([-2.0, -1.0, -0.004, 0.0, 0.3, 1.0, 2.0])
    found = quantized(values, torch.tensor(1.0))
    steps = found * 127
    assert torch.allclose(steps, steps.round(), atol=1e-5)
    assert found.tolist() == pytest.approx([-128 / 127, -1, -1 / 127, 0, 38 / 127, 1, 1])
    assert quantized(values, torch.tensor(0.0)).isfinite().all()
    assert (64 * quantized(values, torch.tensor(1.0), 7)).tolist() == [-65, -64, 0, 0, 19, 64, 64]


def summed_by_hand(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, step: int, gap: int, groups: int) -> np.ndarray:
    """A convolution without padding by a kernel that has a float16 sum for each value, rounded at each product."""
    rows, columns = ((side - gap * 2 - 1) // step + 1 for side in x.shape[2:])
    found = np.zeros((len(x), len(weight), rows, columns), np.float32)
    share, width = len(weight) // groups, weight.shape[1]
    for image, channel, row, column in np.ndindex(*found.shape):
        total = np.float16(bias[channel])
        for down, right, of_group in np.ndindex(3, 3, width):
            value = x[image, channel // share * width + of_group, row * step + down * gap, column * step + right * gap]
            total = np.float16(np.float32(total) + value * weight[channel, of_group, down, right])
        found[image, channel, row, column] = total
    return found


@pytest.mark.parametrize(("step", "gap", "groups"), [(1, 1, 1), (2, 1, 2), (1, 2, 4)])
def test_float16_sums_are_rounded_at_each_product(step: int, gap: int, groups: int) -> None:
    random = np.random.default_rng(0)
    shapes = ((2, 4, 7, 9), (8, 4 // groups, 3, 3), (8,))
    x, weight, bias = (random.normal(size=shape).astype(np.float16).astype(np.float32) for shape in shapes)
    given = [torch.from_numpy(array) for array in (x, weight, bias)]
    attributes = {"strides": [step] * 2, "dilations": [gap] * 2, "group": groups}
    found = convolve(given, attributes)
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), summed_by_hand(x, weight, bias, step, gap, groups))
    padded = convolve(given, {**attributes, "pads": [1, 2, 3, 4]})
    expected = torch.nn.functional.conv2d(
        torch.nn.functional.pad(given[0], (2, 4, 1, 3)), *given[1:], step, 0, gap, groups
    )
    assert padded is not None
    assert padded.shape == expected.shape
    assert 1e-4 < float((padded - expected).abs().max()) < 0.1


def test_a_float16_sum_stands_still_where_what_is_added_is_less_than_half_its_last_place() -> None:
    ones, small = torch.ones(1, 4096), torch.full((4096, 1), 2.0**-12)
    ones[0, 0] = 2.0**12
    found = multiply([ones, small], {})
    assert found is not None
    assert found.tolist() == [[1.0]]  # in float32, 2


def test_float16_sums_are_further_from_the_truth(checkpoint: Checkpoint, tmp_path: Path) -> None:
    form = deploy(checkpoint.model(), 32)
    trace(checkpoint, form, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    inputs = {"image": checkpoint.preprocessing.normalize(golden_pixels(checkpoint.preprocessing, []))}
    layers = frozenset(node.name for node in graph.graph.node if node.op_type in ("Conv", "Gemm"))
    plain = Emulation("fp16", layers)
    truth = dict(exact(graph, inputs))["logits"]

    def error(emulation: Emulation) -> float:
        return float(np.abs(dict(emulated(graph, inputs, emulation))["logits"] - truth).max())

    once, summed = error(plain), error(replace(plain, float16_sums=True))
    assert 2 * once < summed < 0.1 * np.ptp(truth)
    assert error(replace(plain, float16_sums=True, exact=frozenset(node.name for node in graph.graph.node))) < once


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_emulation_is_near_the_network_and_not_equal(checkpoint: Checkpoint, precision: str) -> None:
    model = checkpoint.model()
    golden = make_golden(model, checkpoint.preprocessing, golden_pixels(checkpoint.preprocessing, []))
    form = deploy(model, 32)
    layers = [name for name, module in form.named_modules() if isinstance(module, torch.nn.Conv2d)]
    exact = golden.outputs_float64["logits"]

    peaks = input_peaks(form, layers, [golden.inputs])

    def error(some: list[str]) -> float:
        rounded = deploy(model, 32)
        nodes = frozenset(f"{name}/Conv" for name in some)
        round_layers_(rounded, Emulation(precision, nodes, peaks=peaks, weight_bits=7))
        return float(np.abs(torch_outputs(rounded, golden.inputs)["logits"] - exact).max())

    found = error(layers)
    noise = float(np.abs(golden.outputs["logits"] - exact).max())
    assert 20 * noise < found < 0.3 * np.ptp(exact)
    if precision == "int8":
        assert error(layers[:3]) < found
        assert error([]) < 20 * noise


def test_modules_that_stay_in_float32_are_not_rounded(checkpoint: Checkpoint) -> None:
    model = checkpoint.model()
    inputs = checkpoint.preprocessing.normalize(golden_pixels(checkpoint.preprocessing, []))
    form = deploy(model, 32)
    every = [name for name, module in form.named_modules() if not list(module.children())]
    round_layers_(form, Emulation("fp16", exact=frozenset(f"{name}/Node" for name in every)))
    untouched, expected = (torch_outputs(one, inputs)["logits"] for one in (form, deploy(model, 32)))
    np.testing.assert_array_equal(untouched, expected)


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("/stages.2/blocks/blocks.4/dma/branches.1/Conv_output_0", "stages.2.blocks.4.dma.branches.1"),
        ("/stages.0/downsample/conv1/Conv_output_0", "stages.0.downsample.conv1"),
        ("/stages.0/downsample/downsample.conv1/Conv_output_0", "stages.0.downsample.downsample.conv1"),
        ("/Flatten_output_0", ""),
        ("logits", ""),
    ],
)
def test_tensors_lead_to_modules(tensor: str, module: str) -> None:
    assert module_path(tensor) == module


class Shown(FakeInspector):
    """Shows the inner tensors that its runtime was given."""

    runtime: Layers

    def inner_tensors(self) -> frozenset[str]:
        return frozenset(self.runtime.values)


class Layers(FakeRuntime):
    """Has inner tensors that it was given, some of them spoilt."""

    inspector: ClassVar[type[Inspector]] = Shown

    def __init__(self, values: dict[str, np.ndarray], taps: tuple[str, ...]) -> None:
        super().__init__()
        self.values, self.taps = values, taps

    def infer(self, inputs: Any) -> Any:
        assert inputs
        return {name: self.values[name] for name in self.taps}


def test_layers_of_an_engine_that_shows_nothing_are_not_compared(checkpoint: Checkpoint) -> None:
    row = checkpoint.preprocessing.normalize(golden_pixels(checkpoint.preprocessing, []))[:2]
    truth = ModuleTruth(deploy(checkpoint.model(), 32), row)
    count = len(truth.truth)
    assert truth.check(lambda taps: Layers({}, taps)) == f"layers in fake: 0 of {count} can be seen"
    one = {"/stages.0/downsample/conv1/Conv_output_0": row}
    assert truth.check(lambda taps: Layers(one, taps)) == f"layers in fake: 1 of {count} can be seen"


def test_an_engine_that_cannot_show_its_layers_fails(checkpoint: Checkpoint) -> None:
    row = checkpoint.preprocessing.normalize(golden_pixels(checkpoint.preprocessing, []))[:2]
    truth = ModuleTruth(deploy(checkpoint.model(), 32), row)

    class Hidden(FakeInspector):
        def inner_tensors(self) -> frozenset[str]:
            raise StageFailed("the engine hides")

    class Broken(Layers):
        inspector = Hidden

    check = truth.check(lambda taps: Broken({}, taps))
    assert isinstance(check, Check)
    assert (check.stage, check.passed, check.reason) == ("layers", False, "the engine hides")
