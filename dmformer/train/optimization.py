"""The loss, the optimizer and the learning rate of each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from dmformer.data.annotated import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dmformer.train.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices and kernels only: not on biases, norms and scales."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.squeeze().ndim > 1]
    others = [p for p in parameters if p.squeeze().ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def learning_rate(recipe: Recipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """The rate of a step: linear warm-up, then the schedule; a function of the step alone, so that nothing is kept.

    Args:
        recipe: with the rates for ``learning_rate_batch`` images.
        step: from 0.
        steps: of the whole run.
        steps_per_epoch: for a warm-up in epochs.
    """
    scale = recipe.batch_size / recipe.learning_rate_batch
    highest, lowest = recipe.learning_rate * scale, recipe.min_learning_rate * scale
    warmup = recipe.warmup_steps if recipe.warmup_steps is not None else round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    remaining = (
        (1 + math.cos(math.pi * progress)) / 2 if recipe.schedule == "cosine" else (1 - progress) ** recipe.poly_power
    )
    return lowest + (highest - lowest) * remaining


def loss_of(logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """Cross entropy: of rows (N, classes) with targets that sum to 1, or of pixels (N, classes, H, W) with labels."""
    if targets.is_floating_point():
        return F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
    total = F.cross_entropy(
        logits.float(), targets, ignore_index=IGNORED, label_smoothing=recipe.label_smoothing, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp(min=1)  # an image without any label counts for nothing
