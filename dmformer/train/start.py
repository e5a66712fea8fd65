"""The network that a run starts from: drawn anew, or from a checkpoint whose head may be another's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from dmformer.data.annotated import IGNORED
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError
from dmformer.models.checkpoint import Checkpoint, default_preprocessing, load_checkpoint
from dmformer.models.dmformer import DMFormerConfig, build_network, variant_config

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from dmformer.models.dmformer import DMFormerBackbone
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


DEFAULT_ARCH = "dmformer_s"


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        config: the network's configuration, but for the number of classes, which the data decide.
        preprocessing: how images become inputs.
        weights: a checkpoint to take tensors from.
    """

    config: DMFormerConfig
    preprocessing: Preprocessing
    weights: Checkpoint | None


def find_start(recipe: Recipe, weights: Path | None) -> Start:
    """The configuration and preprocessing of a run.

    Raises:
        UsageError: the checkpoint cannot be used, or its stages are not those of the architecture asked for.
    """
    options = {**recipe.model, "drop_path": recipe.drop_path}
    checkpoint = None if weights is None else load_checkpoint(weights)
    if checkpoint is None:
        config = variant_config(recipe.arch or DEFAULT_ARCH, **options)
    else:
        config = _config_for(checkpoint, recipe.arch, options)
    if config.task == "features":
        raise UsageError("task features has nothing to train; expected a classifier or a segmentation network")
    usual = default_preprocessing(config)
    if checkpoint is not None and checkpoint.config.task == config.task:
        usual = checkpoint.preprocessing
    preprocessing = recipe.preprocessing or usual
    if len(preprocessing.channels) != config.in_channels:
        raise UsageError(
            f"preprocessing gives channels {preprocessing.channels!r}; "
            f"expected as many as the network's {config.in_channels}"
        )
    if preprocessing.channels == "L" and (recipe.randaugment_operations or recipe.color_jitter):
        raise UsageError("RandAugment and color_jitter need three channels; expected both 0 with channels 'L'")
    return Start(config, preprocessing, checkpoint)


def _config_for(checkpoint: Checkpoint, arch: str | None, options: dict[str, object]) -> DMFormerConfig:
    """The checkpoint's configuration; with an architecture, the head of that one."""
    config = checkpoint.config
    if arch is not None:
        wanted = variant_config(arch)
        if (wanted.widths, wanted.depths) != (config.widths, config.depths):
            raise UsageError(f"--weights holds {checkpoint.arch}; expected the stages of {arch}")
        config = replace(config, **{name: getattr(wanted, name) for name in ("task", "decoder", "decoder_widths")})
    return DMFormerConfig.from_dict({**config.to_dict(), **options})


def build(start: Start, classes: tuple[str, ...], seed: int) -> tuple[DMFormerBackbone, list[str]]:
    """The network with as many outputs as classes, on the CPU, and what was taken from the checkpoint, in sentences.

    Tensors of the stages are taken as they are; those of the head where they are of the same shape, and the last
    layer's where the classes are the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_network(replace(start.config, num_classes=len(classes)))
    if start.weights is None:
        return model, []
    fresh = model.state_dict()
    taken = {
        name: tensor for name, tensor in start.weights.state.items()
        if name in fresh and fresh[name].shape == tensor.shape
    }  # fmt: skip
    known = start.weights.classes
    if known and known != classes:  # as many, but others
        taken = {
            name: tensor for name, tensor in taken.items() if not name.startswith(("head.", "decoder.classifier."))
        }
    drawn = [name for name in fresh if name not in taken and not name.endswith(".num_batches_tracked")]
    if missing := [name for name in drawn if name.startswith("stages.")]:
        raise UsageError(f"--weights does not fit the network's stages: {', '.join(missing[:3])}")
    model.load_state_dict(taken, strict=False)
    if not drawn:
        return model, ["every tensor was taken from --weights"]
    heads = ", ".join(sorted({name.split(".")[0] for name in drawn}))
    note = f"{len(taken)} tensors were taken from --weights; {len(drawn)} of {heads} are drawn anew"
    return model, [f"{note} ({start.weights.config.num_classes} classes there, {len(classes)} here)"]
