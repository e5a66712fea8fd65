"""``dmformer.verify``: a bundle against its golden outputs, or against a checkpoint and images."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import select
from dmformer.data.annotated import label_maps
from dmformer.data.images import ImageSet, list_images, load_pixels
from dmformer.errors import DMFormerError, UsageError
from dmformer.progress import silent
from dmformer.task import OUTPUT_NAME
from dmformer.verify.answers import Answers, ask
from dmformer.verify.compare import Comparison, Reference, float32_limit
from dmformer.verify.parity import (
    check_answers,
    check_artifact,
    check_decisions,
    check_labelled_pixels,
    check_paired,
    check_preprocessing,
    references,
)
from dmformer.verify.reference import form_in, reference_checkpoint
from dmformer.verify.report import PYTORCH, Check, ParityReport, as_check, explained, report
from dmformer.verify.tasks.classification import paired
from dmformer.verify.tasks.measures import measure_of
from dmformer.verify.tasks.segmentation import confusion_matrix, pixel_accuracy

MOST_IMAGES = 64  # of a folder, evenly spread over it

# Fields of the configuration that change nothing in a trained network.
_FOR_TRAINING = ("drop_path", "layer_scale")

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.select import Choice
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.progress import Progress
    from dmformer.verify.localize.modules import ModuleTruth


def verify(
    bundle: str | Path | Bundle,
    *,
    runtimes: Sequence[str] = (),
    weights: str | Path | None = None,
    images: str | Path | None = None,
    layers: bool = False,
    stage: Progress = silent,
) -> ParityReport:
    """Compare what the runtimes of a bundle answer with what PyTorch answers.

    Without ``weights`` and ``images`` the reference is the bundle's golden outputs, and PyTorch is not needed.

    Args:
        bundle: a bundle's folder.
        runtimes: names of runtimes; otherwise every one that can run on this machine.
        weights: a checkpoint to compare with; the golden outputs are compared with it too.
        images: a folder of images to compare on beside the golden ones, at most 64 of them, spread evenly over the
            folder; needs PyTorch, and ``weights`` or a bundle with the ``torch`` format.
        layers: compare with the checkpoint of the ``torch`` format, layer by layer, where the bundle has it.
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
        checks = check_preprocessing(opened.manifest.preprocessing, golden)
    asked: ImageSet | None = None
    reference = golden
    truth: ModuleTruth | None = None
    if weights is not None or images is not None or (layers and opened.artifacts("torch")):
        if images is not None:
            asked, reason = _labelled(opened, Path(images))
            skipped += [reason] if reason else []
        with stage("PyTorch reference"):
            checkpoint = reference_checkpoint(opened, Path(weights) if weights is not None else None)
            reference = _recompute(opened, checkpoint, golden, asked)
            checks.append(_check_description(opened, checkpoint))
            checks += [_check_golden(part, reference.sizes[size], size) for size, part in golden.sizes.items()]
            truth = _layers(opened, checkpoint, golden)
    for choice in chosen:
        with stage(f"{choice.entry.name} {choice.artifact.precision}"):
            checks.extend(_check_choice(choice, golden, reference, asked))
            if truth is not None and choice.artifact.precision == "fp32":
                found = truth.check(functools.partial(choice.runtime, None))
                skipped += [found] if isinstance(found, str) else []
                checks += [found] if isinstance(found, Check) else []
    return report(checks, skipped)


def _layers(bundle: Bundle, checkpoint: Checkpoint, golden: Golden) -> ModuleTruth:
    """What each layer should give for the first golden image; showing an engine's inside needs the ONNX package."""
    from dmformer.verify.localize.modules import ModuleTruth

    return ModuleTruth(form_in(bundle, checkpoint.model()), golden.noise)


def _check_choice(choice: Choice, golden: Golden, reference: Golden, asked: ImageSet | None) -> list[Check]:
    """An artifact on the golden images, and on the others where there are some.

    The others have PyTorch's answers alone, so that at a reduced precision decisions are compared there, not values.
    """
    runtime, precision, count = choice.runtime(), choice.artifact.precision, len(golden.images)
    more = None if asked is None else reference.inputs[count:]
    answers = ask(runtime, golden.inputs, golden.thinned, others=more, elsewhere=golden.other)
    pytorch_golden = {name: array[:count] for name, array in reference.outputs.items()}
    checks = check_artifact(answers, golden, choice.entry, choice.artifact, pytorch_golden)
    if asked is None or answers.others is None:  # of a failure the checks say why
        return checks
    rest = Answers(answers.runtime, precision, {len(asked): answers.others})
    others = {name: array[count:] for name, array in reference.outputs.items()}
    if precision == "fp32":
        pytorch = Reference(PYTORCH, others, float32_limit(reference.outputs, reference.outputs_float64))
        checks += check_answers("images", rest, [pytorch])
    else:
        pytorch = replace(references(golden, precision)[0], outputs=others)
    decided = check_decisions(rest, answers.others, pytorch)
    for check in tuple(decided):
        if asked.labelled and (check.decisions is not None or check.pixels is not None):
            decided.append(_check_labelled(choice, rest, others[OUTPUT_NAME], asked, check, golden))
    return checks + explained(decided, choice.saturation_risk)


def _check_labelled(
    choice: Choice, answers: Answers, torch: NDArray[Any], asked: ImageSet, decided: Check, golden: Golden
) -> Check:
    """A runtime's accuracy on labelled images against PyTorch's."""
    evidence = choice.bundle.manifest.evidence.accuracy
    most = evidence.max_points_lost if evidence else 0.0
    outputs = answers.largest
    assert not isinstance(outputs, DMFormerError)  # they decided something
    logits = outputs[OUTPUT_NAME]
    if asked.labels is not None:
        return check_paired(answers, paired(logits, torch, asked.labels), len(asked), most)
    classes, stride = choice.bundle.manifest.class_count, golden.strides.get(OUTPUT_NAME, 1)
    labels = np.stack([row[::stride, ::stride] for row in label_maps(asked, classes)])
    found, expected = (pixel_accuracy(confusion_matrix(array.argmax(1), labels, classes)) for array in (logits, torch))
    return check_labelled_pixels(answers, found, expected, decided, most)


def _labelled(bundle: Bundle, folder: Path) -> tuple[ImageSet, str | None]:
    """Images of a folder, with labels where its subfolders are classes; otherwise why there are none."""
    manifest = bundle.manifest
    try:
        measure = measure_of(manifest.model.task, manifest.class_count)
        found = measure.images(folder, manifest.preprocessing, manifest.model.classes)
    except UsageError as error:
        paths = tuple(list_images(folder))
        return ImageSet(paths, None, manifest.preprocessing).spread(MOST_IMAGES), f"accuracy: {error}"
    return found.spread(MOST_IMAGES), None


def _recompute(bundle: Bundle, checkpoint: Checkpoint, golden: Golden, asked: ImageSet | None) -> Golden:
    """PyTorch's answers on the golden images, and on the images given."""
    pixels = golden.images
    if asked is not None:
        pixels = np.concatenate([pixels, load_pixels(asked.paths, bundle.manifest.preprocessing)])
    from dmformer.verify.reference import at_another_size, make_golden

    model, preprocessing = checkpoint.model(), bundle.manifest.preprocessing
    other = at_another_size(model, preprocessing) if golden.other is not None else None
    return replace(make_golden(model, preprocessing, pixels), other=other)


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
    return as_check("description", "torch", "fp32", len(bundle.manifest.inputs), comparison, against="manifest")


def _check_golden(golden: Golden, reference: Golden, size: str | None) -> Check:
    """The bundle's stored answers against the checkpoint's: is the bundle made from these weights?"""
    rows = len(golden.images)
    limits = float32_limit(reference.outputs, reference.outputs_float64)
    expected = Reference(PYTORCH, {name: array[:rows] for name, array in reference.outputs.items()}, limits)
    (check,) = check_answers("golden", Answers("torch", "fp32", {rows: dict(golden.outputs)}), [expected], size)
    return check
