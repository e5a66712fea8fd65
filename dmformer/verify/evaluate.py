"""``dmformer eval``: the accuracy of every artifact of a bundle on a folder of images, preprocessing included."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

from dmformer.bundle.manifest import Accuracy
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import select
from dmformer.errors import UnavailableError, UsageError
from dmformer.progress import silent
from dmformer.task import Task
from dmformer.verify.reference import reference_checkpoint
from dmformer.verify.tasks.classification import Paired  # noqa: TC001 - the type of a field
from dmformer.verify.tasks.measures import Tally, finite, measure_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dmformer.data.images import ImageSet
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.progress import Progress
    from dmformer.runtimes.base import Runtime


class EvalResult(Accuracy, frozen=True, kw_only=True):
    """One artifact in its runtime; ``paired`` is its comparison with PyTorch, where there are labels and weights."""

    runtime: str
    precision: str
    artifact_sha256: str
    paired: Paired | None = None


class EvalReport(Struct, frozen=True, kw_only=True):
    """What ``eval`` found. Shares from 0 to 1.

    ``classes`` are the names of the network's classes, in the order of ``iou``; empty where it has none.
    ``torch`` is PyTorch's own accuracy where its weights were at hand; ``skipped`` has a sentence for whatever was not
    measured, ``notes`` one for each artifact that is computed in another precision than its own, and one where the
    labels themselves look wrong.
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


def evaluate(
    bundle: str | Path | Bundle,
    data: str | Path,
    *,
    runtimes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    weights: str | Path | None = None,
    stage: Progress = silent,
) -> EvalReport:
    """Top-1 and top-5 accuracy or, for segmentation, mean intersection over union; and agreement with PyTorch.

    Args:
        bundle: a bundle's folder.
        data: a folder of images. Accuracy needs labels: subfolders named after classes or, for segmentation, ADE20K's
            ``images/validation`` and ``annotations/validation``. Without them only agreement with PyTorch is measured.
        runtimes: names of runtimes; otherwise every one that can run on this machine.
        precisions: of the artifacts; otherwise all.
        weights: the checkpoint for agreement, where the bundle has not the ``torch`` format.
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
    checkpoint, reason = _reference(opened, images, Path(weights) if weights is not None else None)
    counted = [_Counted(choice.runtime(), measure.tally()) for choice in chosen]
    torch = measure.tally() if checkpoint is not None else None
    names = [*(["PyTorch"] if checkpoint else []), *(choice.title for choice in chosen)]
    with ExitStack() as open_, stage(", ".join(names), measure.parts(images)) as advance:
        ask_torch = _asking(checkpoint) if checkpoint is not None else None
        for one in counted:
            open_.enter_context(one.runtime)
        # Side by side, so that images and annotations are read once, and no answers are kept.
        for batch, truth in zip(images.batches(measure.batch), measure.truths(images), strict=True):
            expected = None
            if torch is not None and ask_torch is not None:
                expected = measure.kept(finite(ask_torch(batch), "PyTorch itself"))
                torch.add(expected, truth, expected)
            for runtime, tally in counted:
                (name,) = (spec.name for spec in runtime.inputs)
                kept = measure.kept(finite(runtime.run_rows({name: batch}), runtime.name))
                tally.add(kept, truth, expected)
            advance()
    results = []
    for choice, (_, tally) in zip(chosen, counted, strict=True):
        accuracy = tally.accuracy()
        results.append(
            EvalResult(
                runtime=choice.entry.name,
                precision=choice.artifact.precision,
                artifact_sha256=choice.artifact.sha256,
                paired=tally.paired(),
                **{field: getattr(accuracy, field) for field in accuracy.__struct_fields__},
            )
        )
    doubt = (torch or counted[-1].tally).doubt()
    return EvalReport(
        data=str(data),
        images=len(images),
        labelled=images.labelled,
        task=manifest.model.task,
        classes=manifest.model.classes,
        results=tuple(results),
        torch=None if torch is None else torch.accuracy(),
        notes=(
            *([doubt] if doubt else []),
            *(f"{one.title}: {one.caveat}" for one in chosen if one.caveat),
        ),
        skipped=(*skipped, *([f"agreement with PyTorch: {reason}"] if reason else [])),
    )


class _Counted(NamedTuple):
    runtime: Runtime
    tally: Tally


def _asking(checkpoint: Checkpoint) -> Callable[[NDArray[np.float32]], dict[str, NDArray[Any]]]:
    from dmformer.verify.reference import torch_outputs

    return functools.partial(torch_outputs, checkpoint.model())


def _reference(bundle: Bundle, images: ImageSet, weights: Path | None) -> tuple[Checkpoint | None, str | None]:
    """What agreement is measured with, or why there is nothing; without either nothing could be measured."""
    if weights is None and not bundle.artifacts("torch"):
        reason = "the bundle has no torch format; give --weights FILE, or export with --format torch as well"
    else:
        try:
            return reference_checkpoint(bundle, weights), None
        except UnavailableError as error:
            if not images.labelled or weights is not None:
                raise
            reason = str(error)
    if not images.labelled:
        raise UsageError(f"images without labels, and agreement with PyTorch cannot be measured: {reason}")
    return None, reason
