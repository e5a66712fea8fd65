"""The page of a sign-off: the verdict first, then what was shipped, and everything that is known of it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from dmformer.bench.page import FIGURES, LATENCY_CAPTION, latency_picture, row_figures
from dmformer.bench.sentences import limits
from dmformer.data.overlay import class_colours
from dmformer.machine import processor_title
from dmformer.page.document import Gallery, Image, Section, Table, Verdict, render_page
from dmformer.runtimes.inspector import describe_layers
from dmformer.signoff.pictures import (
    CheckRow,
    Share,
    accuracy_picture,
    check_pictures,
    layers_picture,
    sensitivity_pictures,
    share_of_limit,
)
from dmformer.task import OUTPUT_NAME, class_logits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dmformer.bench.report import Result
    from dmformer.bundle.golden import Golden
    from dmformer.bundle.manifest import Accuracy, Manifest, Model
    from dmformer.machine import Processor
    from dmformer.signoff.api import SignOff
    from dmformer.signoff.sources import Source
    from dmformer.verify.report import Check

_MOST_POINTS = 12  # of a verdict; the section that says what is open has all
_MOST_TIMED = 20  # rows of a picture
_MOST_DRAWN = 30
_JUDGED_BY = ("top-1", "mIoU")  # the accuracy that is drawn
_IMAGE_SIDE = 256  # pixels; larger images are made smaller
_OPACITY = 0.5
_NOT_PROVEN = (
    "It gathers what was reported and runs nothing. Hashes prove that files are what the manifest lists, not who wrote "
    "it: a trusted signature does. Checks compare with PyTorch on a few images, on the processors named here; accuracy "
    "is that on the images named here; latency that of the machines named here. A report that was added is as good as "
    "the one who sent it: reports are not signed."
)


def sign_off_page(known: SignOff) -> str:
    """Return the page, as HTML.

    Raises:
        UnavailableError: a package is missing.
    """
    manifest, opened = known.manifest, known.sources[0].bundle
    assert opened is not None
    listing = _sections(known)
    return render_page(
        f"Sign-off of {manifest.model.arch}",
        f"{_size(manifest)} · made by dmformer {manifest.tool_version} · manifest {opened.manifest_sha256[:16]}…",
        _verdicts(known),
        [section for section in listing if section.parts],
    )


def _verdicts(known: SignOff) -> list[Verdict]:
    verdicts = [Verdict(text=known.verdict, points=_first(known.failures), held=known.passed)]
    if known.open_points:
        verdicts.append(Verdict(text=f"{len(known.open_points)} open points", points=_first(known.open_points)))
    return verdicts


def _first(points: Sequence[str]) -> list[str]:
    more = len(points) - _MOST_POINTS
    return [*points[:_MOST_POINTS], *([f"and {more} more"] if more > 0 else [])]


def _sections(known: SignOff) -> list[Section]:
    return [
        _shipped(known),
        _checks(known),
        _decisions(known),
        _layers(known),
        _accuracy(known),
        *_latency(known),
        _places(known),
        _sensitivity(known),
        _assumed(known),
        Section(title="What remains open", parts=_lines(known.open_points)),
        Section(title="What this page does not prove", parts=_lines([_NOT_PROVEN])),
        _every_check(known),
    ]


def _lines(lines: Sequence[str]) -> list[Table]:
    return [Table(rows=[[line] for line in lines], texts=1)] if lines else []


def _bundles(known: SignOff) -> Iterator[tuple[Source, Manifest]]:
    for source in known.sources:
        if source.bundle is not None:
            yield source, source.bundle.manifest


def _named(known: SignOff, source: Source, label: str) -> str:
    """Return a label of something in a bundle, with the bundle where there are several."""
    several = sum(one.bundle is not None for one in known.sources) > 1
    return f"{label}, {source.title}" if several else label


# --- what was shipped -------------------------------------------------------------------------------------------------


def _size(manifest: Manifest) -> str:
    classes = f", {manifest.class_count} classes" if manifest.class_count else ""
    return f"{manifest.model.task}{classes}, {manifest.model.parameters / 1e6:.2f} M parameters"


def _shipped(known: SignOff) -> Section:
    facts, files = [], []
    for source, manifest in _bundles(known):
        model, pre = manifest.model, manifest.preprocessing
        assert source.bundle is not None
        module = [] if model.module is None else [("network", f"{model.module.reference}, one's own")]
        inputs = ", ".join(f"{one.name} {' x '.join(map(str, one.shape))}" for one in manifest.inputs)
        outputs = ", ".join(f"{one.name} {' x '.join(map(str, one.shape))}" for one in manifest.outputs)
        rows = [
            ("model", f"{model.arch}, {_size(manifest)}, {model.macs / 1e9:.3g} GMACs an image"),
            *module,
            ("weights", model.weights_origin),
            *[("trained", fact) for fact in [_training(model)] if fact],
            ("form", "deploy: everything linear folded" if model.deploy_form else "training: as PyTorch has it"),
            ("input, output", f"{inputs}; {outputs}"),
            ("images", f"{pre.image_size}x{pre.image_size} {pre.channels}, {pre.interpolation}"),
            ("manifest", f"SHA-256 {source.bundle.manifest_sha256}"),
            ("signature", _signature(source)),
        ]
        facts += [(_named(known, source, name), value) for name, value in rows]
        files += [
            [_named(known, source, entry.path), f"{entry.bytes / 1e6:.2f} MB", entry.sha256]
            for entry in manifest.entries
        ]
    built = [
        [
            _named(known, source, f"{one.format} {one.precision}"),
            f"{one.bytes / 1e6:.1f} MB",
            _built_with(one.built_with),
        ]
        for source, manifest in _bundles(known)
        for one in manifest.artifacts
    ]
    return Section(
        title="What was shipped",
        parts=[
            Table(rows=facts, texts=1),
            Table(rows=built, columns=["artifact", "size", "built with"], texts=1),
            Table(rows=files, columns=["file", "size", "SHA-256"], texts=1),
        ],
    )


def _built_with(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _training(model: Model) -> str:
    """Say what the checkpoint's metadata tells of its training, without the recipe."""
    return ", ".join(f"{name} {value}" for name, value in model.training.items() if not isinstance(value, dict))


def _signature(source: Source) -> str:
    assert source.integrity is not None
    found = source.integrity.signature
    if found.status == "none":
        return "none"
    held = {"trusted": "holds", "unknown key": "holds, by an unknown key", "bad": "does NOT hold"}[found.status]
    trusted = f", trusted as {found.trusted_as}" if found.trusted_as else ""
    return f"{held}; key {found.fingerprint}{trusted}{f' ({found.reason})' if found.reason else ''}"


# --- checks -----------------------------------------------------------------------------------------------------------


def _checks(known: SignOff) -> Section:
    grouped: dict[str, list[tuple[int, Check]]] = {}
    places = {id(source): place for place, source in enumerate(known.sources)}
    for source, check in known.checks:
        grouped.setdefault(check.asked, []).append((places[id(source)], check))
    rows = [CheckRow(label=label, checks=checks) for label, checks in grouped.items()]
    return Section(
        title="Checks",
        caption=(
            "Each check's largest difference over the largest one allowed; beyond the line it fails. A hollow dot "
            "stands for (almost) equal answers. The table at the end has the figures."
        ),
        parts=check_pictures(rows, [source.title for source in known.sources]),
    )


def _every_check(known: SignOff) -> Section:
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


def _decisions(known: SignOff) -> Section:
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
    for source, check in known.checks:
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


def _layers(known: SignOff) -> Section:
    artifacts = [
        (_named(known, source, f"{one.format} {one.precision}"), one)
        for source, manifest in _bundles(known)
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


# --- accuracy ---------------------------------------------------------------------------------------------------------


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
    for source, manifest in _bundles(known):
        evidence = manifest.evidence.accuracy
        if evidence is not None:
            images = _named(known, source, f"{evidence.images} calibration images")
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


def _accuracy(known: SignOff) -> Section:
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
        [_named(known, source, f"{one.format} {one.precision}"), f"{one.points_lost:.2f}"]
        for source, manifest in _bundles(known)
        for one in manifest.artifacts
        if one.points_lost is not None
    ]
    budget = known.manifest.evidence.accuracy
    allowed = "" if budget is None else f"; the accuracy budget is {budget.max_points_lost:g}"
    return Section(
        title="Accuracy",
        caption="With intervals of 95 % confidence: what the same network may reach on other images of the same kind.",
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


# --- latency and machines ---------------------------------------------------------------------------------------------


def _latency(known: SignOff) -> list[Section]:
    timed: list[tuple[Result, str]] = []
    rows, machines = [], []
    for source in known.sources:
        if source.bench is None:
            continue
        place = str(source.bench.environment.get("cpu", "processor not noted"))
        drawn = [
            row for row in source.bench.results if row.timed and row.samples_ns and all(map(_positive, row.samples_ns))
        ]
        timed += [(row, place) for row in drawn]
        rows += [[*row_figures(row), source.title] for row in source.bench.results]
        machines += [[source.title, limit] for limit in [limits(source.bench)] if limit]
    picture = (
        [latency_picture([row for row, _ in timed[:_MOST_TIMED]], [place for _, place in timed[:_MOST_TIMED]])]
        if timed
        else []
    )
    table = [Table(columns=[*FIGURES, "source"], rows=rows, texts=2)] if rows else []
    limit = [Table(columns=["source", "what the machine can do at best"], rows=machines, texts=1)] if machines else []
    return [Section(title="Latency", caption=LATENCY_CAPTION, parts=[*picture, *table, *limit])]


def _positive(samples: tuple[int, ...]) -> bool:
    return bool(samples) and min(samples) > 0


def _places(known: SignOff) -> Section:
    rows = []
    for source in known.sources:
        if source.bundle is not None:
            evidence = source.bundle.manifest.evidence
            made = evidence.processor
            if made is not None:
                rows.append([_cpu(made), "where it was made", _held(evidence.parity.passed), source.title])
            for one in evidence.processors:
                what = f"{one.format} {one.precision} by {one.engine}, {one.asked}"
                rows.append([f"{one.processor}, emulated by {one.emulator}", what, _held(one.passed), source.title])
        elif source.parity is not None:
            if source.parity.processor is not None and not source.parity.replays:
                asked = ", ".join(dict.fromkeys(f"{check.runtime} {check.precision}" for check in source.parity.checks))
                rows.append([_cpu(source.parity.processor), asked, _held(source.parity.passed), source.title])
            for replay in source.parity.replays:
                place = replay.processor or (_cpu(replay.described) if replay.described else "this machine")
                emulated = f", emulated by {replay.emulator}" if replay.emulator else ""
                rows.append([f"{place}{emulated}", f"by {replay.engine}", _held(replay.passed), source.title])
        if source.bench is not None:
            rows.append([str(source.bench.environment.get("cpu", "-")), "timed", "-", source.title])
    return Section(
        title="Where it was checked and timed",
        parts=[
            Table(
                columns=["processor", "what", "verdict", "source"],
                rows=rows,
                texts=3,
                bad=[place for place, row in enumerate(rows) if row[2] == "FAILED"],
            )
        ]
        if rows
        else [],
    )


def _held(passed: bool) -> str:
    return "held" if passed else "FAILED"


def _cpu(processor: Processor) -> str:
    return processor_title(msgspec.structs.asdict(processor))


# --- sensitivity, and what was assumed --------------------------------------------------------------------------------


def _sensitivity(known: SignOff) -> Section:
    found = {
        _named(known, source, one.precision): one.sensitivity
        for source, manifest in _bundles(known)
        for one in manifest.artifacts
        if one.sensitivity
    }
    return Section(
        title="Sensitivity",
        caption="The error that a precision causes in one block alone: where accuracy is lost first.",
        parts=list(sensitivity_pictures(found)),
    )


def _assumed(known: SignOff) -> Section:
    rows = []
    for source, manifest in _bundles(known):
        model = manifest.model
        kept = "kept" if manifest.simplification.kept else "NOT kept"
        lines = [
            *(f"assumed while reading the checkpoint: {note}" for note in model.notes),
            *(f"given to the export instead of the checkpoint's: {name}" for name in model.overridden),
            *(
                [f"an image is of the second class above a probability of {model.threshold:g}"]
                if model.threshold
                else []
            ),
            f"the simplified graph was {kept}: {manifest.simplification.reason}",
            *(f"measured earlier, {cached.made}: {cached.what}" for cached in manifest.evidence.cached),
        ]
        rows += [_named(known, source, line) for line in lines]
    return Section(title="What was assumed", parts=_lines(rows))
