"""Random weights that hide nothing.

A freshly initialised network mutes its blocks (layer scale starts at 0.01, BatchNorm is the identity, gates sit at one
half), so a comparison of outputs would pass with whole branches broken. These weights keep every part loud enough for
an error in it to reach the output, and no part so loud that rounding errors grow from block to block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmformer.models.dmformer import DMFormerBackbone, Gate, LayerScale


def lively_(model: DMFormerBackbone, seed: int = 0) -> DMFormerBackbone:
    """Overwrite all weights and statistics in place; returns the model in evaluation mode.

    BatchNorm statistics are measured on seeded noise, then moved away from it. They are kept to the precision of
    float16 (values, not type), so that the order in which a machine adds does not show in them.
    """
    draw = _Draw(seed)
    with torch.no_grad():
        for module in model.modules():
            _overwrite(module, draw)
        for gate in (module for module in model.modules() if isinstance(module, Gate)):
            assert gate.fc1.bias is not None
            gate.fc1.bias.abs_().add_(0.3)  # no gate of dead ReLUs: a narrow one has few
        model.train()(draw.normal(torch.Size((8, model.config.in_channels, 64, 64)), 1.0))
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            _unsettle(norm, draw)
    return model.eval()


class _Draw:
    """Seeded random tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, shape: torch.Size, low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def normal(self, shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std


def _overwrite(module: nn.Module, draw: _Draw) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        # Variance is kept through a layer that follows a ReLU (He et al., arXiv:1502.01852).
        module.weight.copy_(draw.normal(module.weight.shape, (2.0 / module.weight[0].numel()) ** 0.5))
        if module.bias is not None:
            module.bias.copy_(draw.normal(module.bias.shape, 0.3))
    elif isinstance(module, nn.BatchNorm2d):
        module.weight.copy_(draw.uniform(module.weight.shape, 0.6, 1.4))
        module.bias.copy_(draw.normal(module.bias.shape, 0.3))
        module.reset_running_stats()
        module.momentum = None  # plain averages, not exponential ones
    elif isinstance(module, LayerScale):
        module.gamma.copy_(draw.uniform(module.gamma.shape, 0.2, 0.6))


def _unsettle(norm: nn.BatchNorm2d, draw: _Draw) -> None:
    """Move measured statistics away from what was measured, as training leaves them."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    deviation = norm.running_var.sqrt()
    norm.running_mean += deviation * draw.normal(deviation.shape, 0.2)
    norm.running_var *= draw.uniform(deviation.shape, 0.7, 1.4)
    for statistic in (norm.running_mean, norm.running_var):
        statistic.copy_(_keep_bits(statistic, 11))
    norm.momentum = 0.1


def _keep_bits(values: Tensor, bits: int) -> Tensor:
    """The values rounded to so many significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)
