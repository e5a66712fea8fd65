"""How much arithmetic a network does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from dmformer.models.dmformer import DMFormer

if TYPE_CHECKING:
    from dmformer.models.dmformer import DMFormerConfig


def count_macs(config: DMFormerConfig, image_size: int) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image of ``image_size`` pixels a side.

    They are counted on shapes alone; nothing is computed.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        DMFormer(config).eval()(torch.zeros(1, config.in_channels, image_size, image_size))
    return int(counter.get_total_flops()) // 2
