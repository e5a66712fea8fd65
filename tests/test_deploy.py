"""The deploy form computes what the training form computes, and has only what it needs for that."""

from __future__ import annotations

import random
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from dmformer.export import onnx_file
from dmformer.export.source import random_checkpoint
from dmformer.export.torch_onnx import trace
from dmformer.models import deploy as folding
from dmformer.models.deploy import DeployAttention, DeployGate, Filter, deploy
from dmformer.models.dmformer import DMFormer, DynamicMultilevelAttention, LayerScale
from tests.networks import TINY, answers, one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIMIT = 1e-9
SIZES = (32, 33, 47, 64, 97)
KERNELS = (
    {},
    {"kernel_sizes": (3,), "dilations": (1,)},
    {"kernel_sizes": (3, 5), "dilations": (2, 1)},
    {"kernel_sizes": (5, 7, 9), "dilations": (1, 3, 2)},
    {"kernel_sizes": (1, 3, 3, 3), "dilations": (2, 1, 4, 9)},
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "in_channels": (1, 3),
    "stem_width": (None, 5),
    "expansion": (1, 2, 3),
    "branch_merge": ("sum", "concat"),
    "inner_residual": (True, False),
    "gate_input": ("x", "x_prime"),
    "gate_reduction": (1, 2, 4),
    "layer_scale": (None, 1e-2),
    "ffn_ratios": ((4, 4, 4, 4), (1, 2.5, 3, 0.5)),
    "batch_norm_eps": (1e-5, 1e-2),
    "drop_path": (0.0, 0.3),
    "depths": ((1, 1, 1, 1), (1, 2, 1, 3)),
}
SEEDS = range(30)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def options(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    return {name: draw.choice(values) for name, values in CHOICES.items()} | draw.choice(KERNELS)


def lively(seed: int = 0, **changed: Any) -> DMFormer:
    """A tiny network in float64."""
    return random_checkpoint("dmformer_nano", {**TINY, **changed}, None, seed).model().double()


def noise(model: DMFormer, size: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(count, model.config.in_channels, size, size, dtype=torch.float64, generator=generator)


def deviation(model: DMFormer, form: nn.Module, x: torch.Tensor) -> float:
    """Largest difference of a form's answers from the training form's, over the largest of those."""
    expected, found = answers(model, x), answers(form, x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert expected.std() > 0.05
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("seed", SEEDS)
def test_deploy_form_answers_as_the_training_form(seed: int) -> None:
    model, size = lively(seed, **options(seed)), SIZES[seed % len(SIZES)]
    assert deviation(model, deploy(model, size), noise(model, size)) < LIMIT
    of_any_size = deploy(model)
    for other in (size, SIZES[seed % 3 - 2]):
        assert deviation(model, of_any_size, noise(model, other)) < LIMIT


def test_the_configurations_above_have_every_value() -> None:
    drawn = [options(seed) for seed in SEEDS]
    for name, values in CHOICES.items():
        assert {one[name] for one in drawn} == set(values)
    assert {one.get("kernel_sizes") for one in drawn} == {kernels.get("kernel_sizes") for kernels in KERNELS}
    assert len({(one["branch_merge"], one["inner_residual"], one["gate_input"]) for one in drawn}) == 8


@pytest.mark.parametrize("training", [True, False])
def test_the_training_form_is_left_as_it_is(training: bool) -> None:
    model = lively(branch_merge="concat", gate_input="x_prime")
    x = noise(model, 33)
    before, state = answers(model, x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train(training)
    form = deploy(model, 33)
    assert all(module.training is training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in form.modules())
    for tensor in form.state_dict().values():
        tensor.zero_()  # nothing is shared
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert torch.equal(answers(model.eval(), x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_type_of_the_weights_is_kept(dtype: torch.dtype) -> None:
    model = lively().to(dtype)
    assert {tensor.dtype for tensor in deploy(model).state_dict().values()} == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_float32_loses_nothing_but_rounding() -> None:
    model = lively()
    exact, x = answers(model, noise(model, 64)), noise(model, 64).float()
    errors = [float((answers(form, x) - exact).abs().max()) for form in (deploy(model.float()), model)]
    assert errors[0] < max(4 * errors[1], 1e-5)


# --- What it consists of ----------------------------------------------------------------------------------------------


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("changed", [{}, {"branch_merge": "concat", "gate_input": "x_prime"}, {"inner_residual": False}])
def test_no_norm_and_no_layer_scale_is_left(changed: dict[str, Any]) -> None:
    model = lively(**changed)
    form = deploy(model)
    assert count(model, nn.BatchNorm2d) == 3 + 3 + 4 * 3 + 1  # stem, downsampling, blocks, head
    assert count(model, LayerScale) == 4 * 2
    assert not any(count(form, kind) for kind in (nn.BatchNorm2d, LayerScale, nn.Identity, nn.Dropout))
    assert not any(buffer.numel() for buffer in form.buffers())
    assert sum(p.numel() for p in form.parameters()) < sum(p.numel() for p in model.parameters())


def test_modules_keep_their_names() -> None:
    model = lively()
    here, there = ({name for name, _ in form.named_modules()} for form in (deploy(model), model))
    assert {name.rpartition(".")[2] for name in here - there} == {"mix", "skip"}


def test_only_the_gates_multiply_in_onnx_and_no_norm_is_left(tmp_path: Path) -> None:
    import onnxruntime

    checkpoint = random_checkpoint("dmformer_nano", {"num_classes": 10}, 64, 1)
    model = checkpoint.model()
    blocks = sum(model.config.depths)
    counts = {}
    x = noise(model, 64, 3)
    exact = answers(checkpoint.model().double(), x).numpy()
    for name, form in (("training", model), ("deploy", deploy(model, 64))):
        path = tmp_path / f"{name}.onnx"
        trace(checkpoint, form, path)
        found = [node.op_type for node in onnx_file.read(path).graph.node]
        counts[name] = {operator: found.count(operator) for operator in ("BatchNormalization", "Mul")}
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"image": x.float().numpy()})
        np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    assert counts["deploy"] == {"BatchNormalization": 0, "Mul": blocks}
    # The exporter itself folds the norms that follow a convolution: those of the stem.
    assert counts["training"] == {"BatchNormalization": 3 + 3 * blocks + 1, "Mul": 3 * blocks}


# --- Kernels cut to their map -----------------------------------------------------------------------------------------


def sides(model: DMFormer, size: int) -> list[int]:
    """Side of each stage's maps, as PyTorch computes them."""
    with torch.inference_mode():
        return [int(features.shape[-1]) for features in model.forward_features(noise(model, size, 1))]


def branches(form: nn.Module) -> list[list[nn.Conv2d]]:
    """The depth-wise kernels of each stage's first block."""
    kinds = (DeployAttention, DynamicMultilevelAttention)
    found = [module.branches for module in form.modules() if isinstance(module, kinds)]
    return [[conv for conv in each if isinstance(conv, nn.Conv2d)] for each in found]


@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_lose_exactly_the_taps_that_meet_only_padding(size: int, merge: str) -> None:
    model = lively(kernel_sizes=(3, 5, 7, 9), dilations=(1, 2, 3, 1), branch_merge=merge)
    whole, cut = branches(deploy(model)), branches(deploy(model, size))
    removed = kept = 0
    for side, stage, full in zip(sides(model, size), cut, whole, strict=True):
        for conv, before in zip(stage, full, strict=True):
            middle, dilation = before.kernel_size[0] // 2, before.dilation[0]
            met = [tap for tap in range(before.kernel_size[0]) if abs(tap - middle) * dilation < side]
            assert torch.equal(conv.weight, before.weight[:, :, met[0] : met[-1] + 1, met[0] : met[-1] + 1])
            assert conv.dilation == before.dilation
            assert conv.padding == ((len(met) // 2) * dilation,) * 2
            removed += before.kernel_size[0] - len(met)
            kept += len(met) == before.kernel_size[0]
    assert removed
    assert kept


def test_without_a_size_no_kernel_is_cut() -> None:
    model = lively(kernel_sizes=(3, 9), dilations=(1, 5))
    assert {conv.kernel_size for stage in branches(deploy(model)) for conv in stage} == {(3, 3), (9, 9)}


def test_a_form_with_cut_kernels_is_wrong_at_a_larger_size() -> None:
    model = lively()
    form = deploy(model, 32)
    assert deviation(model, form, noise(model, 32)) < LIMIT
    assert deviation(model, form, noise(model, 64)) > 1e-4


def test_a_form_with_whole_kernels_is_right_at_a_larger_size() -> None:
    model = lively(kernel_sizes=(3,), dilations=(1,))
    form = deploy(model, 64)
    assert [stage[0].kernel_size for stage in branches(form)] == [(3, 3)] * 4
    assert deviation(model, form, noise(model, 97)) < LIMIT


# --- No tensor is forgotten, and these tests would see it -------------------------------------------------------------


@pytest.mark.parametrize("inner_residual", [True, False])
@pytest.mark.parametrize("gate_input", ["x", "x_prime"])
@pytest.mark.parametrize("merge", ["sum", "concat"])
def test_one_percent_of_any_tensor_changes_both_forms_alike(merge: str, gate_input: str, inner_residual: bool) -> None:
    model = lively(1, branch_merge=merge, gate_input=gate_input, inner_residual=inner_residual, batch_norm_eps=1e-3)
    x = noise(model, 33)
    before = answers(model, x)
    wrong = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue  # how many batches a norm has seen
        saved = tensor.clone()
        tensor.mul_(1.01)
        moved = float((answers(model, x) - before).abs().max() / before.abs().max())
        error = deviation(model, deploy(model, 33), x)
        tensor.copy_(saved)
        if error > LIMIT or moved < 1000 * LIMIT:
            wrong[name] = (moved, error)
    assert not wrong
    assert torch.equal(answers(model, x), before)


Wrong = dict[str, Any]


def eps_forgotten(norm: nn.BatchNorm2d) -> folding.Affine:
    scale = norm.weight / norm.running_var.sqrt()  # type: ignore[union-attr]
    return folding.Affine(scale, norm.bias - scale * norm.running_mean)  # type: ignore[operator]


def shift_forgotten(inner: Filter, affine: folding.Affine) -> Filter:
    return Filter(inner.weight * affine.scale[:, None, None], inner.bias)


def shift_of_the_first_channel(inner: Filter, affine: folding.Affine) -> Filter:
    added = (inner.weight[:, :1] * affine.shift[:, None, None]).sum((1, 2, 3))
    return Filter(inner.weight * affine.scale[:, None, None], inner.bias + added)


def middle_bias_forgotten(outer: Filter, inner: Filter) -> Filter:
    weight = outer.weight[:, :, 0, 0] @ inner.weight[:, :, 0, 0]
    return Filter(weight[:, :, None, None], outer.bias)


attention_as_it_is, of_x_prime_as_it_is, branches_as_they_are = (
    folding._attention,
    folding._of_x_prime,
    folding._branches,
)


def skip_unscaled(dma: DynamicMultilevelAttention, norm: Any, scale: folding.Affine, side: int | None) -> Any:
    made = attention_as_it_is(dma, norm, scale, side)
    if made.skip is not None:
        made.skip.weight.div_(scale.scale[:, None, None, None])
    return made


def gate_of_x(dma: DynamicMultilevelAttention, norm: folding.Affine) -> DeployGate:
    fc1 = dma.gate.fc1
    return DeployGate(folding._filter(fc1).of(norm).as_conv(fc1), None, dma.gate.fc2)


def gate_of_x_before_the_norm(dma: DynamicMultilevelAttention, norm: folding.Affine) -> DeployGate:
    return DeployGate(dma.gate.fc1, None, dma.gate.fc2)


def residual_before_the_norm(layer: nn.Conv2d, dma: DynamicMultilevelAttention, norm: folding.Affine) -> Any:
    return of_x_prime_as_it_is(layer, dma, folding.Affine(norm.scale**0, norm.shift * 0))


def bias_twice(layer: nn.Conv2d, dma: DynamicMultilevelAttention, norm: folding.Affine) -> Any:
    of_merged, of_x = of_x_prime_as_it_is(layer, dma, norm)
    return Filter(of_merged.weight, of_merged.bias + folding._filter(layer).bias), of_x


def shift_in_every_branch(dma: DynamicMultilevelAttention, side: int | None) -> list[nn.Conv2d]:
    made = branches_as_they_are(dma, side)
    for conv in made[1:]:
        conv.bias = made[0].bias
    return made


def branches_in_another_order(dma: DynamicMultilevelAttention, side: int | None) -> list[nn.Conv2d]:
    return branches_as_they_are(dma, side)[::-1]


def one_tap_too_few(weight: torch.Tensor, dilation: int, side: int) -> torch.Tensor:
    middle = weight.shape[-1] // 2
    reach = min(middle, (side - 2) // dilation)
    return weight[:, :, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]


CONCAT, OF_X_PRIME = {"branch_merge": "concat"}, {"gate_input": "x_prime"}
MISTAKES: list[tuple[Wrong, Callable[..., Any], Wrong]] = [
    ({"_affine": "module"}, eps_forgotten, {}),
    ({"of": "filter"}, shift_forgotten, {}),
    ({"of": "filter"}, shift_of_the_first_channel, {}),
    ({"of_filter": "filter"}, middle_bias_forgotten, {"inner_residual": False}),
    ({"_attention": "module"}, skip_unscaled, {}),
    ({"_gate": "module"}, gate_of_x, OF_X_PRIME),
    ({"_gate": "module"}, gate_of_x_before_the_norm, {}),
    ({"_of_x_prime": "module"}, residual_before_the_norm, {}),
    ({"_of_x_prime": "module"}, bias_twice, OF_X_PRIME),
    ({"_branches": "module"}, shift_in_every_branch, {}),
    ({"_branches": "module"}, branches_in_another_order, CONCAT),
    ({"_reached": "module"}, one_tap_too_few, {}),
]


@pytest.mark.parametrize(("place", "mistake", "changed"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mistake_is_seen(
    place: Wrong, mistake: Callable[..., Any], changed: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((name, where),) = place.items()
    model = lively(**changed)
    assert deviation(model, deploy(model, 64), noise(model, 64)) < LIMIT
    monkeypatch.setattr(Filter if where == "filter" else folding, name, mistake)
    assert deviation(model, deploy(model, 64), noise(model, 64)) > 1000 * LIMIT


