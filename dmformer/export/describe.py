"""The manifest of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmformer import __version__
from dmformer.bundle.manifest import SCHEMA_VERSION, Manifest, Model, Tensor
from dmformer.models.flops import count_macs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from dmformer.bundle.manifest import Artifact, Evidence, FileEntry, Simplification
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.models.dmformer import DMFormerBackbone


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
    given, *outputs = (Tensor(name=name, dtype="float32", shape=shape) for name, shape in checkpoint.shapes.items())
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
