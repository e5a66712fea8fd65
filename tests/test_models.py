"""The network: what each field of its configuration does, its size, and the weights tests use."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmformer.errors import UsageError
from dmformer.export.networks import count_macs, lively_
from dmformer.models.dmformer import (
    DMFormerConfig,
    DropPath,
    LayerScale,
    create_model,
    list_models,
    variant_config,
)
from tests.networks import TINY, answers, image, one_thread, tiny

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_head_is_batch_norm_then_average_then_linear() -> None:
    model = lively_(tiny()).double()
    x = image().double()
    with torch.inference_mode():
        last = model.forward_features(x)[-1].numpy()
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    scale = w["norm.weight"] / np.sqrt(w["norm.running_var"] + 1e-5)
    pooled = (last.mean(axis=(2, 3)) - w["norm.running_mean"]) * scale + w["norm.bias"]
    expected = pooled @ w["head.weight"].T + w["head.bias"]
    np.testing.assert_allclose(answers(model, x).numpy(), expected, rtol=0, atol=1e-10)


# --- Every field of the configuration ---------------------------------------------------------------------------------

ATTENTION = "stages.1.blocks.0.dma"  # width 12


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"expansion": 1},
            {f"{ATTENTION}.expand.weight": (12, 12, 1, 1), f"{ATTENTION}.reduce.weight": (12, 12, 1, 1)},
        ),
        (
            {"expansion": 3},
            {f"{ATTENTION}.expand.weight": (36, 12, 1, 1), f"{ATTENTION}.reduce.weight": (12, 36, 1, 1)},
        ),
        (
            {"kernel_sizes": (3, 9), "dilations": (1, 2)},
            {f"{ATTENTION}.branches.1.weight": (24, 1, 9, 9), f"{ATTENTION}.branches.2.weight": None},
        ),
        (
            {"kernel_sizes": (5,), "dilations": (1,)},
            {f"{ATTENTION}.branches.0.weight": (24, 1, 5, 5), f"{ATTENTION}.branches.1.weight": None},
        ),
        ({"branch_merge": "concat"}, {f"{ATTENTION}.norm.weight": (72,), f"{ATTENTION}.reduce.weight": (12, 72, 1, 1)}),
        ({"gate_reduction": 2}, {f"{ATTENTION}.gate.fc1.weight": (6, 12, 1, 1)}),
        ({"gate_reduction": 1}, {f"{ATTENTION}.gate.fc2.weight": (12, 12, 1, 1)}),
        ({"layer_scale": None}, {"stages.1.blocks.0.scale1.gamma": None, "stages.1.blocks.0.scale2.gamma": None}),
        (
            {"ffn_ratios": (1, 2.5, 3, 4)},
            {
                "stages.0.blocks.0.ffn.fc1.weight": (8, 8, 1, 1),
                "stages.1.blocks.0.ffn.fc2.weight": (12, 30, 1, 1),
                "stages.2.blocks.0.ffn.fc1.bias": (48,),
            },
        ),
        (
            {"stem_width": 6},
            {
                "stages.0.downsample.conv1.weight": (6, 3, 7, 7),
                "stages.0.downsample.conv2.weight": (6, 6, 3, 3),
                "stages.0.downsample.conv3.weight": (8, 6, 2, 2),
            },
        ),
        ({}, {"stages.0.downsample.conv1.weight": (8, 3, 7, 7), "stages.0.downsample.conv2.weight": (8, 8, 3, 3)}),
        ({"in_channels": 1}, {"stages.0.downsample.conv1.weight": (8, 1, 7, 7)}),
        ({"widths": (4, 8, 12, 24)}, {"stages.3.downsample.conv.weight": (24, 12, 2, 2), "head.weight": (5, 24)}),
        (
            {"depths": (1, 2, 1, 3)},
            {"stages.1.blocks.1.norm1.weight": (12,), "stages.1.blocks.2.norm1.weight": None}
            | {"stages.3.blocks.2.norm1.weight": (20,), "stages.3.blocks.3.norm1.weight": None},
        ),
        ({"num_classes": 7}, {"head.weight": (7, 20), "head.bias": (7,)}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_field_shapes_the_weights(options: dict[str, Any], expected: dict[str, tuple[int, ...] | None]) -> None:
    model = tiny(**options)
    built = shapes(model)
    assert {name: built.get(name) for name in expected} == expected
    answer = answers(lively_(model), image(model.config.in_channels))
    assert answer.shape == (2, model.config.num_classes)
    assert answer.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"dilations": (1, 1, 1)},
        {"dilations": (1, 2, 4)},
        {"inner_residual": False},
        {"gate_input": "x_prime"},
        {"batch_norm_eps": 1e-2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_field_without_a_trace_in_the_shapes_changes_the_answer(options: dict[str, Any]) -> None:
    model, other = lively_(tiny()).double(), tiny(**options).double().eval()
    other.load_state_dict(model.state_dict())
    assert (answers(model, image().double()) - answers(other, image().double())).abs().max() > 1e-3


@pytest.mark.parametrize("layer_scale", [1e-2, 0.5, 0.0])
def test_layer_scale_starts_where_it_is_told(layer_scale: float) -> None:
    scales = [module for module in tiny(layer_scale=layer_scale).modules() if isinstance(module, LayerScale)]
    assert len(scales) == 8
    assert all(torch.equal(scale.gamma, torch.full_like(scale.gamma, layer_scale)) for scale in scales)


def test_layer_scale_of_zero_mutes_the_blocks() -> None:
    model = tiny(layer_scale=0.0).eval()
    with torch.inference_mode():
        first = model.stages[0]
        assert torch.equal(first(image()), first.downsample(image()))


def test_batch_norm_eps_reaches_every_batch_norm() -> None:
    norms = [module for module in tiny(batch_norm_eps=0.125).modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 3 + 3 + 4 * 3 + 1  # stem, downsampling, blocks, head
    assert {norm.eps for norm in norms} == {0.125}


def test_drop_path_rates_rise_linearly_over_the_blocks() -> None:
    model = tiny(depths=(1, 2, 1, 1), drop_path=0.4)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 2, 3, 3))
    per_sample = dropped.flatten(1)
    assert torch.equal(per_sample, per_sample[:, :1].expand_as(per_sample))
    assert per_sample.unique().tolist() == pytest.approx([0, 4 / 3])
    assert per_sample.mean().item() == pytest.approx(1, abs=0.05)


def test_drop_path_is_the_identity_in_evaluation() -> None:
    model, other = lively_(tiny()), tiny(drop_path=0.9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(answers(model, image()), answers(other.eval(), image()))
    torch.manual_seed(0)
    first = answers(other.train(), image(count=8))
    assert not torch.equal(first, answers(other, image(count=8)))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160)])
def test_features_have_the_four_strides_and_the_widths(height: int, width: int) -> None:
    with torch.inference_mode():
        maps = tiny().eval().forward_features(image(height=height, width=width))
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, height // stride, width // stride)
        for channels, stride in zip(TINY["widths"], (4, 8, 16, 32), strict=True)
    ]


def test_answer_does_not_depend_on_the_rest_of_the_batch() -> None:
    model = lively_(tiny()).double()
    together = answers(model, image(count=3).double())
    alone = torch.cat([answers(model, one[None]) for one in image(count=3).double()])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


# --- Variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("dmformer_nano", 584_164, 136_456_576),
        ("dmformer_t", 4_780_936, 937_565_696),
        ("dmformer_s", 27_690_648, 5_101_737_984),
        ("dmformer_l", 48_123_672, 9_084_681_216),
    ],
)
def test_variant_has_its_size(name: str, parameters: int, macs: int) -> None:
    with torch.device("meta"):
        model = create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert count_macs(model, 224) == macs


def test_variants_have_the_sizes_that_are_published() -> None:
    """Millions of parameters; Swin-T has 28.3 (Liu et al., arXiv:2103.14030)."""
    with torch.device("meta"):
        millions = {
            name: sum(p.numel() for p in create_model(name).parameters()) / 1e6
            for name in list_models("classification")
        }
        nano = sum(p.numel() for p in create_model("dmformer_nano", num_classes=10).parameters()) / 1e6
    assert [round(value, 1) for value in millions.values()] == [0.6, 4.8, 27.7, 48.1]
    assert round(nano, 2) == 0.46
    assert millions["dmformer_s"] < 28.3


def test_macs_are_those_that_torch_counts() -> None:
    model = tiny().eval()
    with FlopCounterMode(display=False) as counter:
        answers(model, image(count=1))
    assert 2 * count_macs(model, 64) == counter.get_total_flops()


def test_counting_leaves_nothing_behind() -> None:
    model = tiny().eval()
    assert count_macs(model, 64) == count_macs(model, 64) > 0
    assert not any(module._forward_hooks for module in model.modules())


def test_create_model_takes_fields() -> None:
    model = create_model("dmformer_nano", num_classes=3, in_channels=1)
    assert model.config == variant_config("dmformer_nano", num_classes=3, in_channels=1)
    assert model.training
    assert answers(model, image(1)).shape == (2, 3)


@pytest.mark.parametrize("name", ["dmformer", "swin_t", ""])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as failure:
        create_model(name)
    assert str(failure.value) == f"unknown architecture {name!r}; expected one of {', '.join(list_models())}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colour": 1}, ["unknown field colour", "num_classes"]),
        ({"co\nlour": 1}, ["unknown field co\\nlour"]),
        ({"num_classes": 0}, [">= 1", "num_classes"]),
        ({"num_classes": "ten"}, ["int", "str", "num_classes"]),
        ({"in_channels": 4}, ["4", "in_channels"]),
        ({"widths": (8, 16, 32)}, ["length 4", "widths"]),
        ({"depths": (1, 0, 1, 1)}, [">= 1", "depths"]),
        ({"depths": (1, 1025, 1, 1)}, ["<= 1024", "depths"]),
        ({"kernel_sizes": (3, 4, 7)}, ["kernel_sizes", "odd"]),
        ({"kernel_sizes": (3, 5)}, ["2 kernel_sizes but 3 dilations"]),
        ({"kernel_sizes": (), "dilations": ()}, ["length >= 1", "kernel_sizes"]),
        ({"gate_reduction": 3}, ["gate_reduction is 3", "divisor"]),
        ({"gate_reduction": 0}, [">= 1", "gate_reduction"]),
        ({"branch_merge": "max"}, ["max", "branch_merge"]),
        ({"gate_input": "y"}, ["gate_input"]),
        ({"inner_residual": "yes"}, ["bool", "inner_residual"]),
        ({"layer_scale": "off"}, ["layer_scale"]),
        ({"layer_scale": math.nan}, ["layer_scale", "finite"]),
        ({"ffn_ratios": (4, 4, 4, 0)}, ["> 0", "ffn_ratios"]),
        ({"ffn_ratios": (4, 4, 4, math.inf)}, ["ffn_ratios", "finite"]),
        ({"batch_norm_eps": 0}, ["> 0", "batch_norm_eps"]),
        ({"batch_norm_eps": math.nan}, ["batch_norm_eps"]),
        ({"drop_path": 1}, ["< 1", "drop_path"]),
        ({"expansion": 1.5}, ["int", "expansion"]),
        ({"stem_width": 0}, [">= 1", "stem_width"]),
    ],
    ids=lambda value: ascii(value)[1:-1][:40] if isinstance(value, dict) else None,
)
def test_bad_field_is_refused_in_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as failure:
        create_model("dmformer_nano", **options)
    message = str(failure.value)
    assert all(word in message for word in ["model configuration", *words]), message
    assert len(message.splitlines()) == 1
    assert failure.value.exit_code == 2


@st.composite
def configs(draw: st.DrawFn) -> DMFormerConfig:
    reduction = draw(st.integers(1, 8))
    branches = draw(st.integers(1, 4))
    count, positive = st.integers(1, 1024), st.floats(1e-6, 100)
    return DMFormerConfig(
        widths=tuple(reduction * draw(st.integers(1, 200)) for _ in range(4)),
        depths=draw(st.tuples(*[count] * 4)),
        num_classes=draw(count),
        in_channels=draw(st.sampled_from([1, 3])),
        stem_width=draw(st.none() | count),
        expansion=draw(count),
        kernel_sizes=tuple(2 * draw(st.integers(0, 8)) + 1 for _ in range(branches)),
        dilations=tuple(draw(count) for _ in range(branches)),
        branch_merge=draw(st.sampled_from(["sum", "concat"])),
        inner_residual=draw(st.booleans()),
        gate_input=draw(st.sampled_from(["x", "x_prime"])),
        gate_reduction=reduction,
        layer_scale=draw(st.none() | positive),
        ffn_ratios=draw(st.tuples(*[positive] * 4)),
        batch_norm_eps=draw(positive),
        drop_path=draw(st.floats(0, 0.99)),
    )


@given(configs())
@settings(max_examples=60, deadline=None)
def test_config_survives_a_dictionary_of_json_types(config: DMFormerConfig) -> None:
    values = config.to_dict()
    assert not any(isinstance(value, tuple) for value in values.values())
    assert DMFormerConfig.from_dict(values) == config


# --- Weights for tests ------------------------------------------------------------------------------------------------


def test_lively_weights_are_decided_by_the_seed() -> None:
    first, same, other = (lively_(tiny(), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if not name.endswith("num_batches_tracked"))


def test_lively_forgets_the_weights_before() -> None:
    torch.manual_seed(1)
    model = tiny()
    torch.manual_seed(2)
    first, second = lively_(model).state_dict(), lively_(tiny()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lively_model_is_in_evaluation_mode() -> None:
    model = tiny().train()
    assert lively_(model) is model
    assert not any(module.training for module in model.modules())


def float_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


@pytest.mark.slow
def test_one_percent_of_any_tensor_shows_in_the_output() -> None:
    single = lively_(create_model("dmformer_nano", num_classes=10))
    double = copy.deepcopy(single).double()
    x = image(count=1)
    reference = answers(double, x.double())
    noise = (answers(single, x).double() - reference).abs().max()
    unmoved = {}
    for name, tensor in float_tensors(double).items():
        kept = tensor.clone()
        tensor.mul_(1.01)
        moved = (answers(double, x.double()) - reference).abs().max()
        tensor.copy_(kept)
        if moved <= 100 * noise:
            unmoved[name] = float(moved / noise)
    assert not unmoved
    assert torch.equal(answers(double, x.double()), reference)


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(name, {}, marks=[pytest.mark.slow] * (name[-1] in "sl")) for name in list_models("classification")]
    + [
        ("dmformer_nano", options)
        for options in ({"branch_merge": "concat"}, {"layer_scale": None}, {"inner_residual": False})
    ],
)
def test_lively_answers_are_finite_and_close_to_float64(name: str, options: dict[str, Any]) -> None:
    model = lively_(create_model(name, num_classes=10, **options))
    single = answers(model, image(count=1))
    double = answers(model.double(), image(count=1).double())
    assert double.isfinite().all()
    assert 0.1 < double.std() < 100
    assert (single.double() - double).abs().max() < 1e-3 * double.std()
