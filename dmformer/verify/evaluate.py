"""``dmformer eval``: the accuracy of every artifact of a bundle on a folder of images, preprocessing included."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from dmformer.bundle.manifest import Accuracy
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import select
from dmformer.data.images import load_pixels, unreadable
from dmformer.errors import UnavailableError, UsageError
from dmformer.progress import silent
from dmformer.task import Task
from dmformer.verify.reference import OwnModule, ReferenceSource, reference_checkpoint, torch_outputs
from dmformer.verify.tasks import finite, measure_of
from dmformer.verify.tasks.classification import Paired  # noqa: TC001 - the type of a field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dmformer.bundle.select import Choice
    from dmformer.data.images import ImageSet
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.progress import Progress
    from dmformer.verify.tasks import Measure, RunningScore


class EvalResult(Accuracy, frozen=True, kw_only=True):
    """The accuracy of one artifact in its runtime.

    Attributes:
        paired: its comparison with PyTorch, where there are labels and weights.
    """

    runtime: str
    precision: str
    artifact_sha256: str
    paired: Paired | None = None


class EvalReport(Struct, frozen=True, kw_only=True):
    """What ``eval`` found; shares from 0 to 1.

    Attributes:
        data: the folder of images.
        images: how many.
        labelled: whether the folder has the right answers.
        task: of the network.
        classes: names of the network's classes, in the order of ``iou``; empty where they have none.
        results: one for each artifact.
        torch: PyTorch's own accuracy, where its weights were at hand.
        skipped: a sentence for whatever was not measured.
        notes: a sentence for each artifact that is computed in another precision than its own, one where the labels
            themselves look wrong, and one about files that were passed over.
        unreadable: each image that was left out because it cannot be read, and why.
    """

    data: str
    images: int
    labelled: bool
    task: Task
    classes: tuple[str, ...]
    results: tuple[EvalResult, ...]
    torch: Accuracy | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def evaluate(
    bundle: str | Path | Bundle,
    data: str | Path,
    *,
    runtimes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    weights: str | Path | None = None,
    module: Any = None,
    module_options: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    skip_unreadable: bool = False,
    stage: Progress = silent,
) -> EvalReport:
    """Measure top-1 and top-5 accuracy or, for segmentation, mean intersection over union; and agreement with PyTorch.

    Args:
        bundle: a bundle's folder.
        data: a folder of images. Accuracy needs labels: subfolders named after classes or, for segmentation, ADE20K's
            ``images/validation`` and ``annotations/validation``. Without them only agreement with PyTorch is measured.
        runtimes: names of runtimes; otherwise every one that can run on this machine.
        precisions: of the artifacts; otherwise all.
        weights: the checkpoint for agreement, where the bundle has not the ``torch`` format.
        module: a network of one's own for agreement, as :func:`dmformer.verify` takes it; this runs its code.
        module_options: arguments of the function or class that makes it; otherwise those of the export.
        weights_key: which of several sets of weights in that file; ``.`` is its top level.
        skip_unreadable: leave images out that cannot be read, and name them in the report; otherwise the first one ends
            the work.
        stage: told about each step.

    Raises:
        CheckFailed: a file is not what the manifest says.
        StageFailed: a runtime failed, or answered with NaN or infinity.
        UnavailableError: a runtime that was named, or every one, cannot run on this machine.
        UsageError: an argument or a file cannot be used, or there would be nothing to measure.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    manifest = opened.manifest
    chosen, skipped = select(opened, runtimes, precisions)
    measure = measure_of(manifest.model.task, manifest.class_count)
    images = measure.images(Path(data), manifest.preprocessing, manifest.model.classes)
    source = ReferenceSource.of(weights, OwnModule.of(module, module_options), weights_key)
    checkpoint, reason = _reference(opened, images, source)
    if reason:
        skipped.append(f"agreement with PyTorch: {reason}")
    names = [*(["PyTorch"] if checkpoint else []), *(choice.title for choice in chosen)]
    with stage(", ".join(names), measure.parts(images)) as advance:
        left_out: list[str] | None = [] if skip_unreadable else None
        scores, torch = _score(chosen, checkpoint, measure, _batches(images, measure, left_out, advance))
    doubt = (torch or scores[-1]).label_doubt(images.folders)
    return EvalReport(
        data=str(data),
        images=len(images) - len(left_out or ()),
        labelled=images.labelled,
        task=manifest.model.task,
        classes=manifest.model.classes,
        results=tuple(_result(choice, score) for choice, score in zip(chosen, scores, strict=True)),
        torch=None if torch is None else torch.accuracy(),
        notes=(
            *images.notes,
            *([doubt] if doubt else []),
            *(f"{one.title}: {one.caveat}" for one in chosen if one.caveat),
        ),
        unreadable=tuple(left_out or ()),
        skipped=tuple(skipped),
    )


def _batches(
    images: ImageSet, measure: Measure, left_out: list[str] | None, advance: Callable[[], object]
) -> Iterator[tuple[ImageSet, NDArray[np.float32]]]:
    """Give the images batch by batch, each with what the network sees of it.

    Args:
        images: all of them.
        measure: says how many are asked at once.
        left_out: gets a sentence about each image that cannot be read; ``None`` lets the first one end the work.
        advance: told after each batch.

    Raises:
        UsageError: an image cannot be read, or none can.
    """
    for start in range(0, len(images), measure.batch):
        part = images.rows(range(len(images))[start : start + measure.batch])
        try:
            batches = list(part.batches(measure.batch))  # one, or none where all of it is left out
        except UsageError:
            if left_out is None:
                raise
            wrong = unreadable(range(len(part)), functools.partial(_load, part), lambda: None)
            left_out += [str(wrong[row]) for row in sorted(wrong)]
            if len(left_out) == len(images):
                raise UsageError(f"none of {len(images)} images can be read, the first: {left_out[0]}") from None
            part = part.rows([row for row in range(len(part)) if row not in wrong])
            batches = list(part.batches(measure.batch))
        for batch in batches:
            yield part, batch
        advance()


def _load(images: ImageSet, row: int) -> NDArray[np.uint8]:
    return load_pixels([images.paths[row]], images.preprocessing)


def _score(
    chosen: Sequence[Choice],
    checkpoint: Checkpoint | None,
    measure: Measure,
    batches: Iterable[tuple[ImageSet, NDArray[np.float32]]],
) -> tuple[list[RunningScore], RunningScore | None]:
    """Score each artifact, and PyTorch where there is a checkpoint.

    They are asked side by side, so that images and annotations are read once, and no answers are kept.
    """
    scores = [measure.new_score() for _ in chosen]
    torch = ask_torch = None
    if checkpoint is not None:
        torch, ask_torch = measure.new_score(), functools.partial(torch_outputs, checkpoint.model())
    with ExitStack() as opened:
        runtimes = [opened.enter_context(choice.runtime()) for choice in chosen]
        for part, batch in batches:
            (labels,) = measure.labels(part)
            expected = None
            if torch is not None and ask_torch is not None:
                expected = measure.keep(finite(ask_torch(batch), "PyTorch itself"))
                torch.add(expected, labels, expected)
            for runtime, score in zip(runtimes, scores, strict=True):
                (name,) = (spec.name for spec in runtime.inputs)
                score.add(measure.keep(finite(runtime.run_rows({name: batch}), runtime.name)), labels, expected)
    return scores, torch


def _result(choice: Choice, score: RunningScore) -> EvalResult:
    return EvalResult(
        runtime=choice.entry.name,
        precision=choice.artifact.precision,
        artifact_sha256=choice.artifact.sha256,
        paired=score.paired(),
        **msgspec.structs.asdict(score.accuracy()),
    )


def _reference(bundle: Bundle, images: ImageSet, source: ReferenceSource) -> tuple[Checkpoint | None, str | None]:
    """What agreement is measured with, or why there is nothing; without either nothing could be measured."""
    if not source.is_given and not bundle.artifacts("torch"):
        reason = "the bundle has no torch format; give the checkpoint, or export the format torch as well"
    else:
        try:
            return reference_checkpoint(bundle, *source), None
        except UnavailableError as error:
            if not images.labelled or source.weights is not None:
                raise
            reason = str(error)
    if not images.labelled:
        raise UsageError(f"images without labels, and agreement with PyTorch cannot be measured: {reason}")
    return None, reason
