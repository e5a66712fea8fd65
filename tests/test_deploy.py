"""The deploy form computes what the training form computes, and has only what it needs for that."""

from __future__ import annotations

import random
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from dmformer.export.networks import random_checkpoint
from dmformer.graph import onnx_file
from dmformer.graph.trace import trace
from dmformer.models import deploy as folding
from dmformer.models.deploy import Affine, DeployAttention, DeployGate, Filter, deploy
from dmformer.models.dmformer import DMFormer, DynamicMultilevelAttention, LayerScale
from tests.networks import TINY, answers, one_thread
from tests.tiers import first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIMIT = 1e-9
SIZES = (32, 33, 47, 64, 97)
KERNELS: tuple[dict[str, Any], ...] = (
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
    "stem_norms": (("batch", "batch", "batch"), ("layer", None, "batch"), (None, "batch", "layer")),
    "stem_activations": (("relu", "relu", None), ("gelu", None, "relu")),
    "stem_bias": (False, True),
    "downsample_kernel": (2, 3),
    "downsample_norm": ("batch", "layer", None),
    "downsample_norm_last": (False, True),
    "block_norm": ("batch", "layer"),
    "branch_bias": (False, True),
    "attention_norm": ("batch", "layer"),
    "gate_linear": (False, True),
    "layer_scale_dims": (3, 1),
    "ffn_kernel": (None, 3),
    "stage_norm": (None, "batch", "layer"),
    "head_norm": ("batch", "layer", None),
    "head_norm_pooled": (False, True),
    "layer_norm_eps": (1e-5, 1e-2),
}
SEEDS = range(20)


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


@pytest.mark.parametrize("seed", first(8, SEEDS))
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
    exact = lively()
    single = random_checkpoint("dmformer_nano", TINY, None, 0).model()
    x = noise(exact, 64)
    expected = answers(exact, x)
    errors = [float((answers(form, x.float()) - expected).abs().max()) for form in (deploy(single), single)]
    assert 0 < errors[0] < 4 * errors[1] < 1e-4


# --- What it consists of ----------------------------------------------------------------------------------------------


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    "changed", [{}, {"branch_merge": "concat", "gate_input": "x_prime"}, {"inner_residual": False}]
)
def test_no_norm_and_no_layer_scale_is_left(changed: dict[str, Any]) -> None:
    model = lively(**changed)
    form = deploy(model)
    assert count(model, nn.BatchNorm2d) == 3 + 3 + 4 * 3 + 1  # stem, downsampling, blocks, head
    assert count(model, LayerScale) == 4 * 2
    assert not any(count(form, kind) for kind in (nn.BatchNorm2d, LayerScale, nn.Identity, nn.Dropout))
    assert not any(buffer.numel() for buffer in form.buffers())


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


@pytest.mark.parametrize("case", [5, *(pytest.param(case, marks=pytest.mark.slow) for case in (0, 1, 2, 3, 4, 6, 7))])
def test_one_percent_of_any_tensor_changes_both_forms_alike(case: int) -> None:
    """Each tensor of a block in one stage, over all cases in every stage; those outside the blocks in one case."""
    merge, gate_input, residual = list(product(("sum", "concat"), ("x", "x_prime"), (True, False)))[case]
    changed = {"branch_merge": merge, "gate_input": gate_input, "inner_residual": residual}
    model = lively(1, **changed, batch_norm_eps=1e-3, gate_reduction=1)  # no gate of dead ReLUs
    x = noise(model, 33, 1)
    before = answers(model, x)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    of_a_block = [name.partition("blocks.0.")[2] for name in tensors if name.startswith("stages.0.blocks")]
    others = [name for name in tensors if ".blocks." not in name]
    chosen = [f"stages.{(case + index) % 4}.blocks.0.{name}" for index, name in enumerate(of_a_block)]
    assert len(tensors) == len(others) + 4 * len(of_a_block)
    wrong = {}
    for name in chosen + (others if case == 0 else []):
        saved = tensors[name].clone()
        tensors[name].mul_(1.01)
        after, found = answers(model, x), answers(deploy(model, 33), x)
        tensors[name].copy_(saved)
        moved, error = (float((one - after).abs().max() / after.abs().max()) for one in (before, found))
        if error > LIMIT or moved < 1000 * LIMIT:
            wrong[name] = (moved, error)
    assert not wrong
    assert torch.equal(answers(model, x), before)


def eps_forgotten(norm: nn.BatchNorm2d) -> Affine:
    scale = norm.weight / norm.running_var.sqrt()  # type: ignore[union-attr]
    return Affine(scale, norm.bias - scale * norm.running_mean)  # type: ignore[operator]


def shift_forgotten(inner: Filter, affine: Affine) -> Filter:
    return Filter(inner.weight * affine.scale[:, None, None], inner.bias)


def shift_of_the_first_channel(inner: Filter, affine: Affine) -> Filter:
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


def skip_unscaled(dma: DynamicMultilevelAttention, norm: Any, scale: Affine, side: int | None) -> Any:
    made = attention_as_it_is(dma, norm, scale, side)
    if made.skip is not None:
        made.skip.weight.div_(scale.scale[:, None, None, None])
    return made


def gate_of_x(dma: DynamicMultilevelAttention, norm: Affine) -> DeployGate:
    fc1 = dma.gate.fc1
    return DeployGate(folding._filter(fc1).of(norm).as_conv(fc1), None, dma.gate.fc2)


def gate_of_x_before_the_norm(dma: DynamicMultilevelAttention, norm: Affine) -> DeployGate:
    return DeployGate(dma.gate.fc1, None, dma.gate.fc2)


def residual_before_the_norm(layer: nn.Conv2d, dma: DynamicMultilevelAttention, norm: Affine) -> Any:
    return of_x_prime_as_it_is(layer, dma, Affine(norm.scale**0, norm.shift * 0))


def bias_twice(layer: nn.Conv2d, dma: DynamicMultilevelAttention, norm: Affine) -> Any:
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
MISTAKES: list[tuple[object, str, Callable[..., Any], dict[str, Any]]] = [
    (folding, "_affine", eps_forgotten, {}),
    (Filter, "of", shift_forgotten, {}),
    (Filter, "of", shift_of_the_first_channel, {}),
    (Filter, "of_filter", middle_bias_forgotten, {"inner_residual": False}),
    (folding, "_attention", skip_unscaled, {}),
    (folding, "_gate", gate_of_x, OF_X_PRIME),
    (folding, "_gate", gate_of_x_before_the_norm, {}),
    (folding, "_of_x_prime", residual_before_the_norm, {}),
    (folding, "_of_x_prime", bias_twice, OF_X_PRIME),
    (folding, "_branches", shift_in_every_branch, {}),
    (folding, "_branches", branches_in_another_order, CONCAT),
    (folding, "_reached", one_tap_too_few, {}),
]


@pytest.mark.parametrize(
    ("owner", "name", "mistake", "changed"), [pytest.param(*row, id=row[2].__name__) for row in MISTAKES]
)
def test_a_mistake_is_seen(
    owner: object, name: str, mistake: Callable[..., Any], changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(**changed)
    x = noise(model, 64)
    assert deviation(model, deploy(model, 64), x) < LIMIT
    monkeypatch.setattr(owner, name, mistake)
    assert deviation(model, deploy(model, 64), x) > 1000 * LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(("name", "calls"), [("_affine", 3 + 3 + 4 * 3 + 1), ("_layer_scale", 4 * 2)])
def test_each_norm_or_layer_scale_that_is_left_out_is_seen(
    name: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(2)
    x = noise(model, 47)
    as_it_is, called = getattr(folding, name), 0

    def left_out_once(*arguments: Any) -> Affine:
        nonlocal called
        called += 1
        found: Affine = as_it_is(*arguments)
        return Affine(torch.ones_like(found.scale), torch.zeros_like(found.shift)) if called == left_out else found

    monkeypatch.setattr(folding, name, left_out_once)
    for left_out in range(calls + 1):
        called = 0
        error = deviation(model, deploy(model), x)
        assert called == calls
        assert error > 1000 * LIMIT if left_out else error < LIMIT
