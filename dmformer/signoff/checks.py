"""The sections of the page about answers: checks against their limits, decisions, and in which precision layers ran."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from dmformer.data.overlay import class_colours
from dmformer.page.document import Gallery, Image, Section, Table, with_rest
from dmformer.runtimes.inspector import describe_layers
from dmformer.signoff.pictures import MOST_CHECK_ROWS, CheckRow, check_pictures, layers_picture, share_of_limit
from dmformer.task import OUTPUT_NAME, class_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.signoff.api import SignOff
    from dmformer.signoff.sources import Source
    from dmformer.verify.report import Check

_IMAGE_SIDE = 256  # pixels; larger images are made smaller
_OPACITY = 0.5


def checks_section(known: SignOff) -> Section:
    """Return the section with each check against its limit."""
    grouped: dict[str, list[tuple[int, Check]]] = {}
    places = {id(source): place for place, source in enumerate(known.sources)}
    for source, check in known.checks:
        grouped.setdefault(check.asked, []).append((places[id(source)], check))
    rows = [CheckRow(label=label, checks=checks) for label, checks in grouped.items()]
    return Section(
        title="Checks",
        caption=with_rest(
            "Each check's largest difference over the largest one allowed; beyond the line it fails. A hollow dot "
            "stands for (almost) equal answers. The table at the end has the figures.",
            len(rows),
            MOST_CHECK_ROWS,
        ),
        parts=check_pictures(rows, [source.title for source in known.sources]),
    )


def every_check_section(known: SignOff) -> Section:
    """Return a table with a row for the checks of several batches that say the same; those that failed come first."""
    grouped: dict[tuple[object, ...], list[tuple[Source, Check]]] = {}
    for source, check in sorted(known.checks, key=lambda pair: pair[1].passed):
        grouped.setdefault((source.title, check.asked, check.against, check.passed, check.reason), []).append(
            (source, check)
        )
    rows = [_check_cells(group) for group in grouped.values()]
    table = Table(
        columns=["check", "batch", "difference", "limit", "of limit", "against", "source", "verdict"],
        rows=rows,
        texts=3,
        bad=[place for place, group in enumerate(grouped.values()) if not group[0][1].passed],
    )
    sources = dict.fromkeys(check.limit_source for _, check in known.checks if check.limit_source)
    return Section(
        title="Every check",
        caption="The largest difference over the batch sizes; the reports have each.",
        parts=[table, Table(columns=["where the limits come from"], rows=[[one] for one in sources], texts=1)],
    )


def _check_cells(group: Sequence[tuple[Source, Check]]) -> list[str]:
    source, check = max(group, key=lambda pair: (share_of_limit(pair[1]) or 0.0, pair[1].max_abs or 0.0))
    share = share_of_limit(check)
    return [
        check.asked,
        ", ".join(map(str, dict.fromkeys(one.batch for _, one in group))),
        "-" if check.max_abs is None else f"{check.max_abs:.3g}",
        "-" if check.limit is None else f"{check.limit:.3g}",
        "-" if share is None else f"{share:.2%}",
        check.against,
        source.title,
        ("held" if check.passed else "FAILED") + (f": {check.reason}" if check.reason else ""),
    ]


# --- decisions --------------------------------------------------------------------------------------------------------


def decisions_section(known: SignOff) -> Section:
    """Return the section of decisions, with the golden images."""
    decided = [(source, check) for source, check in known.checks if check.decisions or check.pixels]
    rows = [[check.asked, *_decision_cells(check), source.title] for source, check in decided]
    golden = known.sources[0].golden
    columns = ["asked", "images", "as PyTorch", "95 % interval", "flips", "source"]
    parts: list[Table | Gallery] = [Table(columns=columns, rows=rows, texts=2)] if rows else []
    if golden is not None and decided:
        parts.append(Gallery(images=_golden_images(known, golden)))
    return Section(
        title="Decisions",
        caption="How often a runtime chooses PyTorch's class. Below: the golden images, with what PyTorch chooses.",
        parts=parts,
    )


def _decision_cells(check: Check) -> list[str]:
    if check.decisions is not None:
        found = check.decisions
        low, high = found.top1_interval
        flips = "; ".join(
            f"image {flip.image}: class {flip.answered} for {flip.expected}, margin {flip.margin:.3g}"
            f"{', within the noise' if flip.below_noise else ''}"
            for flip in found.flips
        )
        return [str(found.images), f"{found.top1:.2%}", f"{low:.1%} to {high:.1%}", flips or "none"]
    pixels = check.pixels
    assert pixels is not None
    flips = (
        f"{pixels.flips} of {pixels.pixels} pixels, {pixels.below_noise} within the noise" if pixels.flips else "none"
    )
    return [str(pixels.images), f"{pixels.agreement:.4%} of the pixels", "-", flips]


def _golden_images(known: SignOff, golden: Golden) -> list[Image]:
    """Return the golden images, each with PyTorch's choice and with who chose another class."""
    flipped: dict[int, list[str]] = {}
    seen = set()
    for source, check in known.own_checks:
        # The first decisions of an artifact are those on the golden images; others are on images of one's own.
        key = (id(source), check.runtime, check.precision, check.processor, check.engine)
        if check.decisions is None or key in seen:
            continue
        seen.add(key)
        for flip in check.decisions.flips:
            said = f"{check.engine or check.runtime} {check.precision}: {_class_name(known, flip.answered)}"
            flipped.setdefault(flip.image, []).append(said)
    outputs = golden.outputs.get(OUTPUT_NAME)
    images = []
    for place, pixels in enumerate(golden.images):
        flips = flipped.get(place, [])
        chosen, shown = "", pixels
        if outputs is not None and outputs.ndim == 2:
            chosen = f": {_class_name(known, int(class_logits(outputs)[place].argmax()))}"
        elif outputs is not None:
            shown = _coloured(pixels, outputs[place].argmax(0))
        images.append(Image(png=_png(shown), caption="\n".join([f"image {place}{chosen}", *flips]), bad=bool(flips)))
    return images


def _class_name(known: SignOff, number: int) -> str:
    names = known.manifest.model.classes
    return names[number] if 0 <= number < len(names) else f"class {number}"


def _coloured(pixels: NDArray[np.uint8], labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return an image (H, W, C) with the classes of its pixels, thinned or not, in colour."""
    height, width = pixels.shape[:2]
    rows = np.arange(height) * labels.shape[0] // height
    columns = np.arange(width) * labels.shape[1] // width
    colours = class_colours(int(labels.max()) + 1)[labels[rows][:, columns]]
    mixed: NDArray[np.uint8] = (_OPACITY * colours + (1 - _OPACITY) * pixels[..., :3]).astype(np.uint8)
    return mixed


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image as PillowImage

    image = PillowImage.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    target = io.BytesIO()
    image.save(target, "png", optimize=True)
    return target.getvalue()


# --- precision --------------------------------------------------------------------------------------------------------


def layers_section(known: SignOff) -> Section:
    """Return the section of layers by precision."""
    artifacts = [
        (known.named(source, f"{one.format} {one.precision}"), one)
        for source, manifest in known.bundles
        for one in manifest.artifacts
        if one.layers
    ]
    proven = [(source, check) for source, check in known.checks if check.stage == "precision"]
    rows = [
        [
            f"{check.engine or check.runtime} {check.precision}",
            source.title,
            "held" if check.passed else "FAILED",
            check.reason or "",
        ]
        for source, check in proven
    ]
    kept = [
        [block, artifact.precision, reason]
        for artifact in {one.precision: one for _, one in artifacts}.values()
        for block, reason in artifact.kept_in_fp32.items()
    ]
    parts = [layers_picture(artifacts)] if artifacts else []
    tables = [
        *(
            [
                Table(
                    rows=[[label, describe_layers(one.layers)] for label, one in artifacts],
                    columns=["artifact", "compute layers"],
                    texts=1,
                )
            ]
            if artifacts
            else []
        ),
        *(
            [Table(rows=rows, columns=["precision proven", "source", "verdict", "to be known"], texts=3)]
            if rows
            else []
        ),
        *([Table(rows=kept, columns=["stays in fp32", "precision", "why"], texts=2)] if kept else []),
    ]
    return Section(
        title="Layers by precision",
        caption=(
            "In which precision each compute layer ran where the bundle was made, read back from the engine. Dotted: "
            "the share that the precision promises."
        ),
        parts=[*parts, *tables],
    )
