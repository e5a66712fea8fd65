"""How much arithmetic a network does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from dmformer.models.dmformer import DMFormerBackbone


def count_macs(model: DMFormerBackbone, image_size: int) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image of ``image_size`` pixels a side.

    The network is run once, on the device of its weights; on ``meta`` nothing is computed.
    ``torch.utils.flop_counter`` finds the same, but brings in the compiler, which takes longer to import than the
    network takes to trace.
    """
    total = 0

    def add(layer: nn.Conv2d | nn.Linear, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, model.config.in_channels, image_size, image_size, device=layers[0].weight.device))
    finally:
        for handle in handles:
            handle.remove()
    return total
