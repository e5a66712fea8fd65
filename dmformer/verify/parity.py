"""Parity checks: a stage against PyTorch and against the stage before it, a runtime against itself, golden pixels.

Each check is a row: one stage in one runtime at one batch size, compared with one thing, within one limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dmformer.bundle.select import saturation
from dmformer.errors import DMFormerError, StageFailed, UsageError
from dmformer.runtimes import registry
from dmformer.runtimes.inspector import describe_layers, shortfall
from dmformer.task import OUTPUT_NAME
from dmformer.verify.answers import Answers
from dmformer.verify.compare import (
    Comparison,
    Limit,
    Reference,
    compare,
    emulated_limit,
    float32_limit,
    largest_difference,
    reduced_limit,
)
from dmformer.verify.report import PYTORCH, Check, as_check, explained
from dmformer.verify.tasks.classification import decide
from dmformer.verify.tasks.segmentation import PixelAccuracy, pixel_agreement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.manifest import Accuracy, Artifact
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.verify.tasks.classification import Paired


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


_PIXEL_TOLERANCE = 1e-6  # of the largest value, and at least of 1
_EQUAL = {
    "rows": "identical rows of a batch",
    "shuffled": "the same rows in another order",
    "repeated": "the same rows asked twice",
    "batches": "the same rows alone and in a batch",
}


def references(golden: Golden, precision: str, pytorch: Mapping[str, NDArray[Any]] | None = None) -> list[Reference]:
    """What an engine at a precision is compared with: PyTorch, and the ONNX file that it was made from.

    The second is missing before that file has answered.

    Args:
        golden: where the limits come from.
        precision: of the engine.
        pytorch: PyTorch's answers to the golden images, where they were computed anew.

    Raises:
        StageFailed: the golden outputs themselves are not finite, or differ too little to tell anything.
        UsageError: there are no golden outputs at the precision.
    """
    double, pytorch = golden.outputs_float64, golden.outputs if pytorch is None else pytorch
    if precision == "fp32":
        limits = float32_limit(golden.outputs, double)
        found = [Reference(PYTORCH, pytorch, limits)]
        if precision in golden.files:
            found.append(Reference(f"onnx {precision}", golden.files[precision], limits))
        return found
    if precision not in golden.files or precision not in golden.emulated:
        raise UsageError(f"no golden outputs at {precision}; expected a bundle that was exported with it")
    answered = golden.files[precision]
    return [
        Reference(PYTORCH, pytorch, emulated_limit(precision, golden.emulated[precision], double)),
        Reference(f"onnx {precision}", answered, reduced_limit(precision, answered, double)),
    ]


def check_answers(
    stage: str, answers: Answers, compared_with: Sequence[Reference], size: str | None = None
) -> list[Check]:
    """Compare answers with each reference, one check a batch size.

    Args:
        stage: name of the step that is checked.
        answers: of a runtime, to the rows that the references are for.
        compared_with: references.
        size: height and width in pixels, where they are not those of the golden images.
    """
    checks = []
    for reference in compared_with:
        for batch, answer in answers.by_batch.items():
            if isinstance(answer, DMFormerError):
                limit = max(reference.limits.values(), key=lambda limit: limit.max_abs)
                comparison = Comparison(False, reason=str(answer))
            else:
                comparison, limit = _compare_outputs(answer, reference)
            checks.append(
                as_check(
                    stage,
                    answers.runtime,
                    answers.precision,
                    batch,
                    comparison,
                    limit=limit,
                    against=reference.name,
                    size=size,
                )
            )
    return checks


def check_consistency(answers: Answers, compared_with: Sequence[Reference]) -> list[Check]:
    """What must be equal among a runtime's own answers, but for rounding: an engine may split a batch unevenly.

    The limit is the tightest of the references'. Empty where the runtime failed before.
    """
    apart = dict(answers.apart)
    largest, alone = answers.largest, answers.by_batch[min(answers.by_batch)]
    if len(answers.by_batch) > 1 and not isinstance(largest, DMFormerError) and not isinstance(alone, DMFormerError):
        apart["batches"] = max(largest_difference(largest[name], alone[name]) for name in largest)
    limits = [max(one.limits.values(), key=lambda limit: limit.max_abs) for one in compared_with]
    limit = min(limits, key=lambda limit: limit.max_abs)
    checks = []
    for kind, distance in apart.items():
        passed = distance <= limit.max_abs  # not so where it is NaN
        reason = None if passed else f"{_EQUAL[kind]} get answers that are {distance:.3g} apart"
        comparison = Comparison(passed, max_abs=distance if np.isfinite(distance) else None, reason=reason)
        batch = max(answers.by_batch)
        checks.append(as_check(kind, answers.runtime, answers.precision, batch, comparison, limit, "itself"))
    return checks


def check_other_size(stage: str, answers: Answers, golden: Golden) -> list[Check]:
    """Answers at another height and width, where they are open, against PyTorch and the file before.

    Raises:
        UsageError: there are no golden outputs at the precision.
    """
    if golden.other is None:
        return []
    answered = answers.elsewhere if answers.elsewhere is not None else StageFailed("not asked at another size")
    rest = Answers(answers.runtime, answers.precision, {len(golden.other.inputs): answered})
    return check_answers(stage, rest, references(golden.other, answers.precision), golden.other.size)


def check_artifact(
    answers: Answers,
    golden: Golden,
    row: registry.RuntimeEntry,
    artifact: Artifact,
    pytorch: Mapping[str, NDArray[Any]] | None = None,
) -> list[Check]:
    """All that an artifact's answers to the golden images are checked for.

    Args:
        answers: of its runtime.
        golden: the golden images and answers.
        row: of the artifact's format.
        artifact: what it promises, and whether its sums saturate here, which what failed then says.
        pytorch: PyTorch's answers, where they were computed anew.
    """
    excuse = registry.support(row).cannot_compute(answers.precision)
    try:
        compared_with = references(golden, answers.precision, pytorch)
    except UsageError as error:
        nothing = Comparison(False, reason=str(error))
        return [as_check("runtime", answers.runtime, answers.precision, batch, nothing) for batch in answers.by_batch]
    missing = []
    if answers.precision not in golden.files:
        reason = f"no golden outputs of the ONNX file at {answers.precision}; export the bundle again"
        missing.append(as_check("runtime", answers.runtime, answers.precision, 1, Comparison(False, reason=reason)))
    checks = [
        *check_answers("runtime", answers, compared_with),
        *missing,
        *check_consistency(answers, compared_with),
        *check_other_size("runtime", answers, golden),
        *check_decisions(answers, answers.largest, compared_with[0]),
        check_layers(answers, artifact.promised_share, excuse),
    ]
    return explained(checks, saturation(row, artifact.full_range))


def check_preprocessing(preprocessing: Preprocessing, golden: Golden) -> list[Check]:
    """This machine's pixels and tensors against those of the preprocessing that the network was trained with.

    Resized and cropped pixels must be equal to the bit; after normalisation one millionth of the largest value is
    allowed.
    """
    from PIL import Image

    exact = Limit(0.0, "pixels are whole numbers")
    if not golden.sources or golden.source_pixels is None:
        comparison = Comparison(False, reason="the bundle has no golden source images; export it again")
    else:
        try:
            made = np.stack([preprocessing.pixels(Image.fromarray(source)) for source in golden.sources])
            comparison = _compare_pixels(made, golden.source_pixels)
        except (UsageError, ValueError, TypeError) as error:
            comparison = Comparison(False, reason=f"the golden source images cannot be preprocessed: {error}")
    pixels = as_check("pixels", "numpy", "uint8", len(golden.sources), comparison, exact, "training")
    peak = max(1.0, float(np.abs(golden.inputs).max()))
    limit = Limit(_PIXEL_TOLERANCE * peak, f"{_PIXEL_TOLERANCE:g} of the largest input value")
    try:
        comparison = compare(preprocessing.normalize(golden.images), golden.inputs, limit)
    except (ValueError, IndexError) as error:
        comparison = Comparison(False, reason=f"the golden images cannot be normalised: {error}")
    return [pixels, as_check("preprocessing", "numpy", "fp32", len(golden.images), comparison, limit, "training")]


def _compare_pixels(made: NDArray[np.uint8], expected: NDArray[np.uint8]) -> Comparison:
    if made.shape != expected.shape:
        return Comparison(False, reason=f"pixels of shape {made.shape}; expected {expected.shape}")
    apart = np.abs(made.astype(np.int16) - expected)
    count, largest = int((apart > 0).sum()), int(apart.max())
    reason = f"{count} of {apart.size} pixel values differ, by up to {largest} of 255" if count else None
    return Comparison(not count, max_abs=float(largest), reason=reason)


def check_layers(answers: Answers, promised: float, cannot_compute: str | None) -> Check:
    """Whether the compute layers ran in the precision that was promised.

    Args:
        answers: of a runtime.
        promised: least share of the layers, 0..1.
        cannot_compute: why the runtime has no arithmetic of the precision here; the check holds then, and says so.
    """
    missing = shortfall(answers.layers, answers.precision, promised)
    if answers.unread is not None:
        comparison = Comparison(False, reason=str(answers.unread))
    elif cannot_compute is not None and missing is not None:
        comparison = Comparison(bool(answers.layers), reason=f"{cannot_compute} ({describe_layers(answers.layers)})")
    else:
        comparison = Comparison(missing is None, reason=missing)
    return as_check("precision", answers.runtime, answers.precision, 1, comparison, against="promise")


def _compare_outputs(candidate: Mapping[str, NDArray[Any]], reference: Reference) -> tuple[Comparison, Limit]:
    """The first comparison that failed, or the one nearest to its limit."""
    expected, limits = reference.outputs, reference.limits
    if set(candidate) != set(expected):
        reason = f"outputs {sorted(candidate)}; expected {sorted(expected)}"
        return Comparison(False, reason=reason), next(iter(limits.values()))
    found = [(compare(candidate[name], array, limits[name]), limits[name]) for name, array in expected.items()]
    return min(found, key=lambda pair: (pair[0].passed, -(pair[0].max_abs or 0.0) / pair[1].max_abs))
