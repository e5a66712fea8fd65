"""Whether a runtime decides as PyTorch does, and is as accurate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dmformer.errors import DMFormerError
from dmformer.task import OUTPUT_NAME
from dmformer.verify.check import PYTORCH, Check, as_check
from dmformer.verify.compare import Comparison, Limit, Reference
from dmformer.verify.decisions import decide
from dmformer.verify.segmentation import PixelAccuracy, pixel_agreement

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dmformer.bundle.manifest import Accuracy
    from dmformer.verify.accuracy import Paired
    from dmformer.verify.answers import Answers

SIGNIFICANT = 0.01  # McNemar's test below this is no chance


def check_decisions(answers: Answers, outputs: Any, reference: Reference) -> list[Check]:
    """Whether a runtime chooses PyTorch's classes; a flip at a margin that is below the noise is told, and no failure.

    Empty for features, which choose nothing.

    Args:
        answers: of the runtime.
        outputs: its answers to the images of the reference, or why there are none.
        reference: PyTorch's outputs, and the limits at the runtime's precision.
    """
    if OUTPUT_NAME not in reference.outputs:
        return []
    name, expected = OUTPUT_NAME, reference.outputs[OUTPUT_NAME]
    limit = reference.limits[name]
    broken: str | None = None
    if isinstance(outputs, DMFormerError):
        broken = str(outputs)
    elif name not in outputs or outputs[name].shape != expected.shape or not np.isfinite(outputs[name]).all():
        broken = "answers of another shape, or NaN or infinite, decide nothing"
    if broken is not None:
        failed = Comparison(False, reason=broken)
        return [as_check("decisions", answers.runtime, answers.precision, len(expected), failed, limit, PYTORCH)]
    kind = _check_classes if expected.ndim == 2 else _check_pixels
    return [kind(answers, outputs[name], expected, limit)]


def _check_classes(answers: Answers, candidate: NDArray[Any], expected: NDArray[Any], limit: Limit) -> Check:
    """Of images: logits (N, classes)."""
    found = decide(candidate, expected, limit.max_abs)
    grave = [flip for flip in found.flips if not flip.below_noise]
    reason = None
    if found.flips:
        worst = max(found.flips, key=lambda flip: flip.margin)
        reason = (
            f"{len(found.flips)} of {found.images} images get another class; image {worst.image}: class "
            f"{worst.answered} for {worst.expected}, which PyTorch prefers by {worst.margin:.3g}; noise explains "
            f"{2 * limit.max_abs:.3g}"
        )
    comparison = Comparison(not grave, top1_agreement=found.top1, reason=reason)
    check = as_check("decisions", answers.runtime, answers.precision, found.images, comparison, limit, PYTORCH)
    return msgspec.structs.replace(check, decisions=found)


def _check_pixels(answers: Answers, candidate: NDArray[Any], expected: NDArray[Any], limit: Limit) -> Check:
    """Of pixels: logits (N, classes, H, W)."""
    found = pixel_agreement(candidate, expected, limit.max_abs)
    reason = None
    if found.flips:
        reason = (
            f"{found.flips} of {found.pixels} pixels get another class, mIoU {found.miou:.2%} with PyTorch's as "
            f"the truth; it prefers its own by {found.worst_margin:.3g} at most; noise explains {2 * limit.max_abs:.3g}"
        )
    comparison = Comparison(found.flips == found.below_noise, top1_agreement=found.agreement, reason=reason)
    check = as_check("decisions", answers.runtime, answers.precision, found.images, comparison, limit, PYTORCH)
    return msgspec.structs.replace(check, pixels=found)


def check_accuracy(runtime: str, precision: str, accuracy: Accuracy, lost: float, most: float) -> Check:
    """Whether the accuracy budget holds: ``lost`` and ``most`` in percentage points."""
    reason = None
    if lost > most:
        reason = f"loses {lost:.2f} points on {accuracy.images} images; the budget (--max-accuracy-drop) is {most:g}"
    comparison = Comparison(reason is None, reason=reason)
    check = as_check("accuracy", runtime, precision, accuracy.images, comparison, against=PYTORCH)
    return msgspec.structs.replace(check, top1_agreement=accuracy.agreement_with_torch)


def check_paired(answers: Answers, found: Paired, images: int, most: float) -> Check:
    """Whether a runtime is as accurate as PyTorch on labelled images.

    It fails where it is worse by more than the budget, and by more than chance explains.

    Args:
        answers: of the runtime.
        found: the comparison.
        images: how many.
        most: the budget, in percentage points.
    """
    lost = 100 * (found.torch_only - found.runtime_only) / images
    passed = not (lost > most and found.p_value < SIGNIFICANT)
    reason = None
    if found.torch_only or found.runtime_only:
        reason = (
            f"PyTorch alone is right on {found.torch_only} of {images} images, {answers.runtime} alone on "
            f"{found.runtime_only} (McNemar's exact test: p = {found.p_value:.2g})"
        )
    comparison = Comparison(passed, reason=reason)
    return as_check("accuracy", answers.runtime, answers.precision, images, comparison)


def check_labelled_pixels(
    answers: Answers, found: PixelAccuracy, torch: PixelAccuracy, decided: Check, most: float
) -> Check:
    """Whether a runtime labels pixels as well as PyTorch does, by mean intersection over union.

    It fails where it is worse by more than the budget, and by more than pixels explain whose margin is below the
    noise. There is no test of significance: neighbouring pixels are not independent.

    Args:
        answers: of the runtime.
        found: its accuracy.
        torch: PyTorch's, on the same pixels.
        decided: the check of the runtime's classes against PyTorch's on the same images.
        most: the budget, in percentage points.
    """
    reason, passed = None, True
    if found.miou is None or torch.miou is None:
        reason, passed = "no pixel of these images has a class; expected annotations with numbers above 0", False
    elif found != torch:
        lost = 100 * (torch.miou - found.miou)
        passed = decided.passed or lost <= most
        reason = f"mIoU {found.miou:.2%}, PyTorch's {torch.miou:.2%}: {lost:+.3f} points lost"
    comparison = Comparison(passed, reason=reason)
    return as_check("accuracy", answers.runtime, answers.precision, decided.batch, comparison)
