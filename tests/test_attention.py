"""The attention and the block around it, against the paper's formulas in NumPy."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dmformer.export.networks import lively_
from dmformer.models.config import DMFormerConfig
from dmformer.models.dmformer import DynamicMultilevelAttention
from tests.networks import answers, one_thread, tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = NDArray[np.float64]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def pointwise(x: Array, weight: Array, bias: Array) -> Array:
    """A 1x1 convolution of one image: (C, H, W) -> (O, H, W)."""
    return np.tensordot(weight[:, :, 0, 0], x, axes=1) + bias[:, None, None]


def depthwise(x: Array, weight: Array, dilation: int) -> Array:
    """One kernel per channel, zeros outside the image, so that the size stays."""
    channels, height, width = x.shape
    side = weight.shape[-1]
    out = np.zeros_like(x)
    for c, row, column in product(range(channels), range(height), range(width)):
        for i, j in product(range(side), range(side)):
            y, z = row + (i - side // 2) * dilation, column + (j - side // 2) * dilation
            if 0 <= y < height and 0 <= z < width:
                out[c, row, column] += weight[c, 0, i, j] * x[c, y, z]
    return out


def attention_of_the_paper(x: Array, w: dict[str, Array], config: DMFormerConfig) -> Array:
    """Output = Attn * Conv1x1(X') with X' = reduce(ReLU(BN(merge(DWConv_k(expand(X)))))) + X."""
    expanded = pointwise(x, w["expand.weight"], w["expand.bias"])
    levels = [depthwise(expanded, w[f"branches.{i}.weight"], d) for i, d in enumerate(config.dilations)]
    merged = np.concatenate(levels) if config.branch_merge == "concat" else np.sum(levels, axis=0)
    scale = w["norm.weight"] / np.sqrt(w["norm.running_var"] + config.batch_norm_eps)
    normed = (merged - w["norm.running_mean"][:, None, None]) * scale[:, None, None] + w["norm.bias"][:, None, None]
    x_prime = pointwise(np.maximum(normed, 0), w["reduce.weight"], w["reduce.bias"])
    if config.inner_residual:
        x_prime = x_prime + x
    pooled = (x if config.gate_input == "x" else x_prime).mean(axis=(1, 2))
    hidden = np.maximum(w["gate.fc1.weight"][:, :, 0, 0] @ pooled + w["gate.fc1.bias"], 0)
    gate = 1 / (1 + np.exp(-(w["gate.fc2.weight"][:, :, 0, 0] @ hidden + w["gate.fc2.bias"])))
    return gate[:, None, None] * pointwise(x_prime, w["project.weight"], w["project.bias"])


@pytest.mark.parametrize("gate_input", ["x", "x_prime"])
@pytest.mark.parametrize("inner_residual", [True, False])
@pytest.mark.parametrize("branch_merge", ["sum", "concat"])
def test_attention_computes_the_formulas_of_the_paper(branch_merge: str, inner_residual: bool, gate_input: str) -> None:
    model = lively_(tiny(branch_merge=branch_merge, inner_residual=inner_residual, gate_input=gate_input)).double()
    attention = model.stages[0].blocks[0].dma
    assert isinstance(attention, DynamicMultilevelAttention)
    weights = {name: tensor.numpy() for name, tensor in attention.state_dict().items()}
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = np.stack([attention_of_the_paper(one, weights, model.config) for one in x.numpy()])
    np.testing.assert_allclose(answers(attention, x).numpy(), expected, rtol=0, atol=1e-10)
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("kernel_sizes", "dilations"),
    [((3,), (1,)), ((1, 3), (1, 2)), ((5, 3, 7), (2, 3, 1)), ((3, 3, 3, 3), (1, 2, 3, 4))],
)
def test_attention_with_other_kernels_computes_the_formulas(
    kernel_sizes: tuple[int, ...], dilations: tuple[int, ...]
) -> None:
    model = lively_(tiny(kernel_sizes=kernel_sizes, dilations=dilations)).double()
    attention = model.stages[0].blocks[0].dma
    weights = {name: tensor.numpy() for name, tensor in attention.state_dict().items()}
    x = torch.randn(1, 8, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = attention_of_the_paper(x[0].numpy(), weights, model.config)
    np.testing.assert_allclose(answers(attention, x)[0].numpy(), expected, rtol=0, atol=1e-10)


def test_block_is_two_scaled_residual_branches() -> None:
    block = lively_(tiny()).double().stages[1].blocks[0]
    x = torch.randn(1, 12, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = {name: tensor.numpy() for name, tensor in block.state_dict().items()}

    def norm(values: Array, name: str) -> Array:
        scale = w[f"{name}.weight"] / np.sqrt(w[f"{name}.running_var"] + 1e-5)
        shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale
        return values * scale[:, None, None] + shift[:, None, None]

    attention = {name.removeprefix("dma."): value for name, value in w.items() if name.startswith("dma.")}
    y = x[0].numpy()
    y = y + w["scale1.gamma"] * attention_of_the_paper(norm(y, "norm1"), attention, DMFormerConfig())
    hidden = pointwise(norm(y, "norm2"), w["ffn.fc1.weight"], w["ffn.fc1.bias"])
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    y = y + w["scale2.gamma"] * pointwise(gelu, w["ffn.fc2.weight"], w["ffn.fc2.bias"])
    np.testing.assert_allclose(answers(block, x)[0].numpy(), y, rtol=0, atol=1e-10)
