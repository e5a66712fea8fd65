"""Small networks and inputs for the tests of the model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dmformer.models.config import DMFormerConfig
from dmformer.models.dmformer import DMFormer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

TINY = {"widths": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "num_classes": 5}


@contextmanager
def one_thread() -> Iterator[None]:
    """Small maps gain nothing from threads, and threads that wait for a busy core cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**options: Any) -> DMFormer:
    return DMFormer(DMFormerConfig.from_dict({**TINY, **options}))


def image(channels: int = 3, height: int = 64, width: int = 64, count: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(7))


def answers(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(x)
    return result
