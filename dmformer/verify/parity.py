"""Parity checks: a stage against PyTorch and against the stage before it, a runtime against itself, golden pixels.

Each check is a row: one stage in one runtime at one batch size, compared with one thing, within one limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.bundle.select import saturation_risk
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
    widened_for_float16_sums,
)
from dmformer.verify.report import PYTORCH, Check, add_cause
from dmformer.verify.tasks.classification import decide
from dmformer.verify.tasks.segmentation import PixelAccuracy, pixel_agreement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.manifest import Accuracy, Artifact
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.verify.tasks.classification import Paired


SIGNIFICANT = 0.01  # a p-value of McNemar's test below this is no chance
_PIXEL_TOLERANCE = 1e-6  # of the largest input value, which counts as 1 where it is smaller
# What must be equal, by what was done (:attr:`dmformer.verify.answers.Answers.self_differences`).
_EQUAL = {
    "rows": "identical rows of a batch",
    "shuffled": "the same rows in another order",
    "repeated": "the same rows asked twice",
    "batches": "the same rows alone and in a batch",
    "concurrent": "the same rows asked alone and by several clients at once",
}


def references(
    golden: Golden,
    precision: str,
    pytorch: Mapping[str, NDArray[Any]] | None = None,
    float16_sums: bool = False,
) -> list[Reference]:
    """What an engine at a precision is compared with: PyTorch, and the ONNX file that it was made from.

    The second is missing before that file has answered.

    Args:
        golden: where the limits come from.
        precision: of the engine.
        pytorch: PyTorch's answers to the golden images, where they were computed anew.
        float16_sums: whether the engine adds products of float16 numbers up in float16 on this machine.

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
    against_pytorch = emulated_limit(precision, golden.emulated[precision], double)
    against_file = reduced_limit(precision, answered, double)
    if precision == "fp16" and float16_sums and golden.float16_sums:
        against_pytorch = widened_for_float16_sums(against_pytorch, golden.float16_sums, double)
        against_file = widened_for_float16_sums(against_file, golden.float16_sums, double)
    return [
        Reference(PYTORCH, pytorch, against_pytorch),
        Reference(f"onnx {precision}", answered, against_file),
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
            row = (stage, answers.runtime, answers.precision, batch)
            checks.append(Check.of(*row, comparison, limit, reference.name, size=size))
    return checks


def _compare_outputs(candidate: Mapping[str, NDArray[Any]], reference: Reference) -> tuple[Comparison, Limit]:
    """The first comparison that failed, or the one nearest to its limit."""
    expected, limits = reference.outputs, reference.limits
    if set(candidate) != set(expected):
        reason = f"outputs {sorted(candidate)}; expected {sorted(expected)}"
        return Comparison(False, reason=reason), next(iter(limits.values()))
    compared = [(compare(candidate[name], array, limits[name]), limits[name]) for name, array in expected.items()]
    return min(compared, key=lambda pair: (pair[0].passed, -(pair[0].max_abs or 0.0) / pair[1].max_abs))


def check_consistency(answers: Answers, compared_with: Sequence[Reference]) -> list[Check]:
    """What must be equal among a runtime's own answers, but for rounding: an engine may split a batch unevenly.

    The limit is the tightest of the references'. Empty where the runtime failed before.
    """
    differences = dict(answers.self_differences)
    largest, alone = answers.at_largest_batch, answers.by_batch[min(answers.by_batch)]
    if len(answers.by_batch) > 1 and not isinstance(largest, DMFormerError) and not isinstance(alone, DMFormerError):
        differences["batches"] = max(largest_difference(largest[name], alone[name]) for name in largest)
    limits = [max(one.limits.values(), key=lambda limit: limit.max_abs) for one in compared_with]
    limit = min(limits, key=lambda limit: limit.max_abs)
    checks = []
    for kind, distance in differences.items():
        passed = distance <= limit.max_abs  # not so where it is NaN
        reason = None if passed else f"{_EQUAL[kind]} get answers that are {distance:.3g} apart"
        comparison = Comparison(passed, max_abs=distance if np.isfinite(distance) else None, reason=reason)
        batch = max(answers.by_batch)
        checks.append(Check.of(kind, answers.runtime, answers.precision, batch, comparison, limit, "itself"))
    return checks


def check_other_size(stage: str, answers: Answers, golden: Golden, float16_sums: bool = False) -> list[Check]:
    """Answers at another height and width, where they are open, against PyTorch and the file before.

    Arguments as for :func:`check_answers` and :func:`references`.

    Raises:
        UsageError: there are no golden outputs at the precision.
    """
    part = golden.other_size
    if part is None:
        return []
    answered = answers.other_size if answers.other_size is not None else StageFailed("not asked at another size")
    answers_there = Answers(answers.runtime, answers.precision, {len(part.inputs): answered})
    return check_answers(stage, answers_there, references(part, answers.precision, None, float16_sums), part.size)


def check_artifact(
    answers: Answers,
    golden: Golden,
    row: registry.RuntimeEntry,
    artifact: Artifact,
    pytorch: Mapping[str, NDArray[Any]] | None = None,
) -> list[Check]:
    """Make every check of an artifact's answers to the golden images, and of the precision that it ran in.

    Args:
        answers: of its runtime.
        golden: the golden images and answers.
        row: of the artifact's format.
        artifact: what it promises, and whether its sums saturate here, which what failed then says.
        pytorch: PyTorch's answers, where they were computed anew.
    """
    checks = check_golden_answers(answers, golden, pytorch, registry.support(row).sums_in_float16())
    if any(check.limit for check in checks):  # else there was nothing to compare with
        promise = registry.support(row).cannot_compute(answers.precision)
        checks.append(check_layers(answers, artifact.promised_share, promise))
    return add_cause(checks, saturation_risk(row, artifact.full_range))


def check_golden_answers(
    answers: Answers,
    golden: Golden,
    pytorch: Mapping[str, NDArray[Any]] | None = None,
    float16_sums: bool = False,
) -> list[Check]:
    """Compare answers to the golden images with PyTorch's and the ONNX file's, with themselves, and by their classes.

    Args:
        answers: of an artifact.
        golden: the golden images and answers.
        pytorch: PyTorch's answers, where they were computed anew.
        float16_sums: whether what answered adds up in float16 at that precision.
    """
    try:
        compared_with = references(golden, answers.precision, pytorch, float16_sums)
    except UsageError as error:
        nothing = Comparison(False, reason=str(error))
        return [Check.of("runtime", answers.runtime, answers.precision, batch, nothing) for batch in answers.by_batch]
    missing = []
    if answers.precision not in golden.files:
        reason = f"no golden outputs of the ONNX file at {answers.precision}; export the bundle again"
        missing.append(Check.of("runtime", answers.runtime, answers.precision, 1, Comparison(False, reason=reason)))
    return [
        *check_answers("runtime", answers, compared_with),
        *missing,
        *check_consistency(answers, compared_with),
        *check_other_size("runtime", answers, golden, float16_sums),
        *check_decisions(answers, answers.at_largest_batch, compared_with[0]),
    ]


def check_preprocessing(preprocessing: Preprocessing, golden: Golden) -> list[Check]:
    """Compare this machine's pixels and tensors with those of the preprocessing that the network was trained with.

    Resized and cropped pixels must be equal to the bit; after normalisation one millionth of the largest value is
    allowed.
    """
    from PIL import Image

    exact = Limit(0.0, "pixels are whole numbers")
    if not golden.sources or golden.source_pixels is None:
        comparison = Comparison(False, reason="the bundle has no golden source images; export it again")
    else:
        try:
            pixels = np.stack([preprocessing.pixels(Image.fromarray(source)) for source in golden.sources])
            comparison = _compare_pixels(pixels, golden.source_pixels)
        except (UsageError, ValueError, TypeError) as error:
            comparison = Comparison(False, reason=f"the golden source images cannot be preprocessed: {error}")
    pixel_check = Check.of("pixels", "numpy", "uint8", len(golden.sources), comparison, exact, "training")
    limit = tensor_limit(golden.inputs)
    try:
        comparison = compare(preprocessing.normalize(golden.images), golden.inputs, limit)
    except (ValueError, IndexError) as error:
        comparison = Comparison(False, reason=f"the golden images cannot be normalised: {error}")
    return [pixel_check, Check.of("preprocessing", "numpy", "fp32", len(golden.images), comparison, limit, "training")]


def tensor_limit(expected: NDArray[np.float32]) -> Limit:
    """Return how far a preprocessed image may be from the expected tensor."""
    peak = max(1.0, float(np.abs(expected).max()))
    return Limit(_PIXEL_TOLERANCE * peak, f"{_PIXEL_TOLERANCE:g} of the largest input value")


def _compare_pixels(candidate: NDArray[np.uint8], expected: NDArray[np.uint8]) -> Comparison:
    if candidate.shape != expected.shape:
        return Comparison(False, reason=f"pixels of shape {candidate.shape}; expected {expected.shape}")
    differences = np.abs(candidate.astype(np.int16) - expected)
    count, largest = int((differences > 0).sum()), int(differences.max())
    reason = f"{count} of {differences.size} pixel values differ, by up to {largest} of 255" if count else None
    return Comparison(not count, max_abs=float(largest), reason=reason)


def check_layers(answers: Answers, promised: float, cannot_compute: str | None) -> Check:
    """Check that the compute layers ran in the precision that was promised.

    Args:
        answers: of a runtime.
        promised: least share of the layers, 0..1.
        cannot_compute: why the runtime has no arithmetic of the precision here; the check holds then, and says so.
    """
    missing = shortfall(answers.layers, answers.precision, promised)
    if answers.layers_error is not None:
        comparison = Comparison(False, reason=str(answers.layers_error))
    elif cannot_compute is not None and missing is not None:
        comparison = Comparison(bool(answers.layers), reason=f"{cannot_compute} ({describe_layers(answers.layers)})")
    else:
        comparison = Comparison(missing is None, reason=missing)
    return Check.of("precision", answers.runtime, answers.precision, 1, comparison, against="promise")


def check_decisions(answers: Answers, outputs: Any, reference: Reference) -> list[Check]:
    """Check that a runtime chooses PyTorch's classes; a flip at a margin below the noise is mentioned, and no failure.

    There is no check of features, which choose nothing.

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
        return [Check.of("decisions", answers.runtime, answers.precision, len(expected), failed, limit, PYTORCH)]
    check = _check_classes if expected.ndim == 2 else _check_pixels
    return [check(answers, outputs[name], expected, limit)]


def _check_classes(answers: Answers, candidate: NDArray[Any], expected: NDArray[Any], limit: Limit) -> Check:
    """Compare the classes that logits (N, classes) choose for images."""
    decisions = decide(candidate, expected, limit.max_abs)
    count, reason = decisions.images, None
    if decisions.flips:
        worst = max(decisions.flips, key=lambda flip: flip.margin)
        reason = (
            f"{len(decisions.flips)} of {count} images get another class; image {worst.image}: class {worst.answered} "
            f"for {worst.expected}, which PyTorch prefers by {worst.margin:.3g}; noise explains {2 * limit.max_abs:.3g}"
        )
    passed = all(flip.below_noise for flip in decisions.flips)
    comparison = Comparison(passed, top1_agreement=decisions.top1, reason=reason)
    return Check.of(
        "decisions", answers.runtime, answers.precision, count, comparison, limit, PYTORCH, decisions=decisions
    )


def _check_pixels(answers: Answers, candidate: NDArray[Any], expected: NDArray[Any], limit: Limit) -> Check:
    """Compare the classes that logits (N, classes, H, W) choose for pixels."""
    pixels, reason = pixel_agreement(candidate, expected, limit.max_abs), None
    if pixels.flips:
        reason = (
            f"{pixels.flips} of {pixels.pixels} pixels get another class, mIoU {pixels.miou:.2%} with PyTorch's as the "
            f"truth; it prefers its own by {pixels.worst_margin:.3g} at most; noise explains {2 * limit.max_abs:.3g}"
        )
    comparison = Comparison(pixels.flips == pixels.below_noise, top1_agreement=pixels.agreement, reason=reason)
    return Check.of(
        "decisions", answers.runtime, answers.precision, pixels.images, comparison, limit, PYTORCH, pixels=pixels
    )


def check_accuracy(runtime: str, precision: str, accuracy: Accuracy, lost: float, budget: float) -> Check:
    """Check that the accuracy budget holds: ``lost`` and ``budget`` in percentage points."""
    reason = None
    if lost > budget:
        reason = f"loses {lost:.2f} points on {accuracy.images} images; the accuracy budget is {budget:g}"
    comparison = Comparison(reason is None, top1_agreement=accuracy.agreement_with_torch, reason=reason)
    return Check.of("accuracy", runtime, precision, accuracy.images, comparison)


def check_paired(answers: Answers, pair: Paired, images: int, budget: float) -> Check:
    """Check that a runtime is as accurate as PyTorch on labelled images.

    It fails where it is worse by more than the budget, and by more than chance explains.

    Args:
        answers: of the runtime.
        pair: the comparison of the runtime with PyTorch.
        images: how many.
        budget: in percentage points.
    """
    lost = 100 * (pair.torch_only - pair.runtime_only) / images
    reason = None
    if pair.torch_only or pair.runtime_only:
        reason = (
            f"PyTorch alone is right on {pair.torch_only} of {images} images, {answers.runtime} alone on "
            f"{pair.runtime_only} (McNemar's exact test: p = {pair.p_value:.2g})"
        )
    comparison = Comparison(not (lost > budget and pair.p_value < SIGNIFICANT), reason=reason)
    return Check.of("accuracy", answers.runtime, answers.precision, images, comparison)


def check_labelled_pixels(
    answers: Answers, accuracy: PixelAccuracy, torch: PixelAccuracy, decided: Check, budget: float
) -> Check:
    """Check that a runtime labels pixels as well as PyTorch does, by mean intersection over union.

    It fails where it is worse by more than the budget, and by more than pixels explain whose margin is below the
    noise. There is no test of significance: neighbouring pixels are not independent.

    Args:
        answers: of the runtime.
        accuracy: the runtime's.
        torch: PyTorch's, on the same pixels.
        decided: the check of the runtime's classes against PyTorch's on the same images.
        budget: in percentage points.
    """
    reason, passed = None, True
    if accuracy.miou is None or torch.miou is None:
        reason, passed = "no pixel of these images has a class; expected annotations with numbers above 0", False
    elif accuracy != torch:
        lost = 100 * (torch.miou - accuracy.miou)
        passed = decided.passed or lost <= budget
        reason = f"mIoU {accuracy.miou:.2%}, PyTorch's {torch.miou:.2%}: {lost:+.3f} points lost"
    comparison = Comparison(passed, reason=reason)
    return Check.of("accuracy", answers.runtime, answers.precision, decided.batch, comparison)
