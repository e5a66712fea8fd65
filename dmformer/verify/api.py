"""``dmformer.verify``: a bundle against its golden outputs, or against a checkpoint and images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import select
from dmformer.data.images import list_images
from dmformer.progress import silent
from dmformer.verify.checkpoint import reference_checkpoint
from dmformer.verify.compare import Comparison, compare, float32_limit
from dmformer.verify.parity import (
    Check,
    ParityReport,
    as_check,
    ask,
    check_answers,
    check_layers,
    check_preprocessing,
    check_rows,
    report,
)

MOST_IMAGES = 64  # of a folder, evenly spread over it

# Fields of the configuration that change nothing in a trained network.
_FOR_TRAINING = ("drop_path", "layer_scale")

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bundle.golden import Golden
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.progress import Stage


def verify(
    bundle: str | Path | Bundle,
    *,
    runtimes: Sequence[str] = (),
    weights: str | Path | None = None,
    images: str | Path | None = None,
    stage: Stage = silent,
) -> ParityReport:
    """Compare what the runtimes of a bundle answer with what PyTorch answers.

    Without ``weights`` and ``images`` the reference is the bundle's golden outputs, and PyTorch is not needed.

    Args:
        bundle: a bundle's folder.
        runtimes: names of runtimes; otherwise every one that can run on this machine.
        weights: a checkpoint to compare with; the golden outputs are compared with it too.
        images: a folder of images to compare on beside the golden ones, at most 64 of them, spread evenly over the
            folder; needs PyTorch, and ``weights`` or a bundle
            with the ``torch`` format.
        stage: told about each step.

    Raises:
        CheckFailed: a file is not what the manifest says, or is not listed in it.
        UnavailableError: a runtime that was named, or every one, cannot run on this machine.
        UsageError: an argument or a file cannot be used.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    chosen, skipped = select(opened, runtimes)
    with stage("integrity"):
        opened.check_all()
    golden = opened.golden()
    with stage("preprocessing"):
        checks: list[Check] = [check_preprocessing(opened.manifest.preprocessing, golden)]
    reference = golden
    reduced = sorted({choice.artifact.precision for choice in chosen} - {"fp32"})
    if images is not None and reduced:
        skipped = [*skipped, f"{', '.join(reduced)} on {images}: only the golden images have answers at them"]
    if weights is not None or images is not None:
        with stage("PyTorch reference"):
            checkpoint = reference_checkpoint(opened, Path(weights) if weights is not None else None)
            reference = _recompute(opened, checkpoint, golden, Path(images) if images is not None else None)
            checks.append(_check_description(opened, checkpoint))
            checks.append(_check_golden(golden, reference))
    for choice in chosen:
        with stage(f"{choice.entry.name} {choice.artifact.precision}"):
            runtime, precision = choice.runtime(), choice.artifact.precision
            # Only the golden images have answers at a reduced precision.
            expected = reference if precision == "fp32" else golden
            answers = ask(runtime, expected)
            checks.extend(check_answers("runtime", answers, expected))
            checks.extend(check_rows(answers, expected))
            checks.append(check_layers(answers, choice.artifact.promised_share, runtime.cannot_compute(precision)))
    return report(checks, skipped)


def _recompute(bundle: Bundle, checkpoint: Checkpoint, golden: Golden, images: Path | None) -> Golden:
    """PyTorch's answers on the golden images, and on the images given."""
    import numpy as np

    from dmformer.data.images import load_pixels, spread
    from dmformer.verify.reference import make_golden

    pixels = golden.images
    if images is not None:
        given = spread(list_images(images), MOST_IMAGES)
        pixels = np.concatenate([pixels, load_pixels(given, bundle.manifest.preprocessing)])
    return make_golden(checkpoint.model(), bundle.manifest.preprocessing, pixels)


def _check_description(bundle: Bundle, checkpoint: Checkpoint) -> Check:
    """What the checkpoint says of itself against the manifest; the input's size is the exporter's to choose."""
    model, differing = bundle.manifest.model, []
    ours = checkpoint.config.to_dict()
    differing += [name for name in ours if name not in _FOR_TRAINING and ours[name] != model.config.get(name)]
    if checkpoint.described:
        size = bundle.manifest.preprocessing.image_size
        if checkpoint.preprocessing.resized_to(size) != bundle.manifest.preprocessing:
            differing.append("preprocessing")
        if checkpoint.classes != model.classes:
            differing.append("classes")
    reason = f"checkpoint and manifest differ in {', '.join(differing)}" if differing else None
    comparison = Comparison(not differing, reason=reason)
    return as_check("description", "torch", "fp32", len(bundle.manifest.inputs), comparison, None)


def _check_golden(golden: Golden, reference: Golden) -> Check:
    """The bundle's stored answers against the checkpoint's: is the bundle made from these weights?"""
    (name,) = golden.outputs
    limit = float32_limit(reference.outputs, reference.outputs_float64)[name]
    rows = len(golden.images)
    comparison = compare(golden.outputs[name], reference.outputs[name][:rows], limit)
    return as_check("golden", "torch", "fp32", rows, comparison, limit)
