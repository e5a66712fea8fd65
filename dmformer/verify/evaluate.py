"""``dmformer eval``: the accuracy of every artifact of a bundle on a folder of images, preprocessing included."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dmformer.bundle.manifest import Accuracy
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import select
from dmformer.errors import UnavailableError, UsageError
from dmformer.progress import Stage, silent
from dmformer.task import Task
from dmformer.verify.accuracy import Paired  # noqa: TC001 - the type of a field
from dmformer.verify.checkpoint import reference_checkpoint
from dmformer.verify.measures import Measure, measure_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dmformer.data.labelled import ImageSet


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
    stage: Stage = silent,
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
    torch, reason = _torch(opened, images, measure, Path(weights) if weights is not None else None, stage)
    results = []
    for choice in chosen:
        name, precision = choice.entry.name, choice.artifact.precision
        with stage(f"{name} {precision}", measure.parts(images)) as advance:
            kept = measure.answers(choice.runtime(), images, advance)
        accuracy = measure.score(kept, images, torch)
        results.append(
            EvalResult(
                runtime=name,
                precision=precision,
                artifact_sha256=choice.artifact.sha256,
                paired=None if torch is None else measure.paired(kept, torch, images),
                **{field: getattr(accuracy, field) for field in accuracy.__struct_fields__},
            )
        )
    doubt = measure.doubt(kept if torch is None else torch, images)
    return EvalReport(
        data=str(data),
        images=len(images),
        labelled=images.labelled,
        task=manifest.model.task,
        classes=manifest.model.classes,
        results=tuple(results),
        torch=None if torch is None else measure.score(torch, images, torch),
        notes=(
            *([doubt] if doubt else []),
            *(f"{one.title}: {one.caveat}" for one in chosen if one.caveat),
        ),
        skipped=(*skipped, *([f"agreement with PyTorch: {reason}"] if reason else [])),
    )


def _torch(
    bundle: Bundle, images: ImageSet, measure: Measure, weights: Path | None, stage: Stage
) -> tuple[NDArray[Any] | None, str | None]:
    """What is kept of PyTorch's outputs, or why there are none; without either nothing could be measured."""
    if weights is None and not bundle.artifacts("torch"):
        reason = "the bundle has no torch format; give --weights FILE, or export with --format torch as well"
    else:
        try:
            checkpoint = reference_checkpoint(bundle, weights)
        except UnavailableError as error:
            if not images.labelled or weights is not None:
                raise
            reason = str(error)
        else:
            from dmformer.verify.reference import torch_answers

            with stage("PyTorch", measure.parts(images)) as advance:
                return torch_answers(checkpoint.model(), images, measure, advance), None
    if not images.labelled:
        raise UsageError(f"images without labels, and agreement with PyTorch cannot be measured: {reason}")
    return None, reason
