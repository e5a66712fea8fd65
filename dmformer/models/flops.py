"""How much arithmetic a network does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from dmformer.models.dmformer import DMFormer


def count_macs(model: DMFormer, image_size: int) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image of ``image_size`` pixels a side."""
    weight = next(model.parameters())
    image = torch.zeros(1, model.config.in_channels, image_size, image_size, dtype=weight.dtype, device=weight.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return int(counter.get_total_flops()) // 2
