"""Every accuracy that was measured of a bundle, with its interval: for the page and for the bill of materials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmformer.page.document import Section, Table, with_rest
from dmformer.signoff.pictures import Share, accuracy_picture

if TYPE_CHECKING:
    from dmformer.bundle.manifest import Accuracy
    from dmformer.signoff.api import SignOff

_MOST_DRAWN = 30
_JUDGED_BY = ("top-1", "mIoU")  # the accuracy that is drawn


def shares(accuracy: Accuracy, label: str) -> list[Share]:
    """Return what was measured of an accuracy."""
    kinds = (
        ("top-1", accuracy.top1, accuracy.top1_interval),
        ("top-5", accuracy.top5, accuracy.top5_interval),
        ("mIoU", accuracy.miou, None),
        ("pixel accuracy", accuracy.pixel_accuracy, None),
        ("agreement with PyTorch", accuracy.agreement_with_torch, None),
    )
    return [
        Share(label=label, kind=kind, value=value, interval=interval)
        for kind, value, interval in kinds
        if value is not None
    ]


def measured_accuracies(known: SignOff) -> list[tuple[str, str, Accuracy]]:
    """Return every accuracy that was measured: what it is of, on which images, and the figures."""
    found: list[tuple[str, str, Accuracy]] = []
    for source, manifest in known.bundles:
        evidence = manifest.evidence.accuracy
        if evidence is not None:
            images = known.named(source, f"{evidence.images} calibration images")
            found.append(("PyTorch", images, evidence.torch))
            found += [
                (f"{one.format} {one.precision}", images, one.accuracy) for one in manifest.artifacts if one.accuracy
            ]
    for source in known.sources:
        if source.accuracy is not None:
            images = f"{source.accuracy.images} images of {source.accuracy.data}, {source.title}"
            if source.accuracy.torch is not None:
                found.append(("PyTorch", images, source.accuracy.torch))
            found += [(f"{one.runtime} {one.precision}", images, one) for one in source.accuracy.results]
    return found


def accuracy_section(known: SignOff) -> Section:
    """Return the section of accuracy."""
    measured = measured_accuracies(known)
    if not measured:
        return Section(title="Accuracy")
    found = [
        (name, images, {share.kind: share for share in shares(accuracy, name)}) for name, images, accuracy in measured
    ]
    kinds = list(dict.fromkeys(kind for _, _, by_kind in found for kind in by_kind))
    rows = [[name, *(_percent(by_kind.get(kind)) for kind in kinds), images] for name, images, by_kind in found]
    first = next((kind for kind in _JUDGED_BY if kind in kinds), kinds[0] if kinds else "")
    drawn = [by_kind[first] for _, _, by_kind in found if first in by_kind]
    lost = [
        [known.named(source, f"{one.format} {one.precision}"), f"{one.points_lost:.2f}"]
        for source, manifest in known.bundles
        for one in manifest.artifacts
        if one.points_lost is not None
    ]
    budget = known.manifest.evidence.accuracy
    allowed = "" if budget is None else f"; the accuracy budget is {budget.max_points_lost:g}"
    return Section(
        title="Accuracy",
        caption=with_rest(
            "With intervals of 95 % confidence: what the same network may reach on other images of the same kind.",
            len(drawn),
            _MOST_DRAWN,
        ),
        parts=[
            *([accuracy_picture(drawn[:_MOST_DRAWN])] if drawn else []),
            Table(columns=["", *kinds, "images"], rows=rows, texts=1),
            *([Table(columns=["artifact", f"percentage points lost{allowed}"], rows=lost)] if lost else []),
        ],
    )


def _percent(share: Share | None) -> str:
    if share is None:
        return "-"
    if share.interval is None:
        return f"{share.value:.2%}"
    return f"{share.value:.2%} ({share.interval[0]:.1%} to {share.interval[1]:.1%})"
