"""The checkpoint that a bundle is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmformer._optional import require
from dmformer.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from dmformer.bundle.reader import Bundle
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.models.dmformer import DMFormerBackbone


def reference_checkpoint(bundle: Bundle, weights: Path | None) -> Checkpoint:
    """A checkpoint file, or the one in the bundle's ``torch`` format.

    Raises:
        CheckFailed: the bundle's file is not what its manifest says.
        UnavailableError: PyTorch is not installed.
        UsageError: the file cannot be used, or there is neither.
    """
    require("torch", extra="export", purpose="comparing with a checkpoint")
    from dmformer.models.checkpoint import load_checkpoint
    from dmformer.models.dmformer import FEATURES_ONLY
    from dmformer.models.infer import UNTOLD

    config = bundle.manifest.model.config
    options = FEATURES_ONLY if bundle.manifest.model.task == "features" else {}
    if weights is not None:
        # What neither names nor shapes nor the file's metadata tell is taken from the bundle: a plain .pth could not
        # be compared otherwise.
        fallback = {name: config[name] for name in UNTOLD if name in config}
        found = load_checkpoint(weights, options=options, fallback=fallback)
        ours = found.config.to_dict()
        for field in ("task", "in_channels", "num_classes"):
            if ours[field] != config.get(field):
                raise UsageError(
                    f"{weights}: {field} is {ours[field]}, in the bundle it is {config.get(field)}; expected the "
                    "checkpoint that the bundle was made from"
                )
        return found
    for artifact in bundle.artifacts("torch"):
        return load_checkpoint(bundle.load_path(artifact))
    raise UsageError("images have no stored answers; give --weights FILE, or export with --format torch as well")


def form_in(bundle: Bundle, model: DMFormerBackbone) -> nn.Module:
    """The form of a network that a bundle's artifacts compute."""
    from dmformer.models.deploy import deploy

    manifest = bundle.manifest
    if not manifest.model.deploy_form:
        return model
    return deploy(model, None if manifest.open_size else manifest.preprocessing.image_size)
