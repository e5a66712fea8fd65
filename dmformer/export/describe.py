"""The manifest of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dmformer import __version__
from dmformer.bundle import manifest as written
from dmformer.bundle.manifest import SCHEMA_VERSION, Manifest, Model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from torch import Tensor

    from dmformer.bundle.manifest import Artifact, Evidence, FileEntry, Simplification
    from dmformer.models.checkpoint import Checkpoint
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


def describe_export(
    checkpoint: Checkpoint,
    *,
    model: DMFormerBackbone,
    weights: Literal["checkpoint", "demonstration", "random"],
    seed: int | None,
    deploy_form: bool,
    simplification: Simplification,
    artifacts: Sequence[Artifact],
    files: Sequence[FileEntry],
    evidence: Evidence,
) -> Manifest:
    """What is in the bundle, where its weights came from, and what was found on the way."""
    size = checkpoint.preprocessing.image_size
    given, *outputs = (
        written.Tensor(name=name, dtype="float32", shape=shape) for name, shape in checkpoint.shapes.items()
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        tool_version=__version__,
        model=Model(
            arch=checkpoint.arch,
            config=checkpoint.config.to_dict(),
            task=checkpoint.config.task,
            classes=checkpoint.classes,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            macs=count_macs(model, size),
            weights=weights,
            deploy_form=deploy_form,
            seed=seed,
            checkpoint_sha256=checkpoint.sha256,
            notes=checkpoint.notes,
            training=dict(checkpoint.training),
        ),
        preprocessing=checkpoint.preprocessing,
        inputs=(given,),
        outputs=tuple(outputs),
        simplification=simplification,
        artifacts=tuple(artifacts),
        files=tuple(files),
        evidence=evidence,
    )
