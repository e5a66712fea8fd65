"""``dmformer.verify``: compare a bundle with its golden outputs, or with a checkpoint on images."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer._optional import require
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import select
from dmformer.data.annotated import label_maps
from dmformer.data.images import ImageSet, list_images, load_pixels
from dmformer.errors import UsageError
from dmformer.progress import silent
from dmformer.runtimes import registry
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
from dmformer.verify.reference import (
    OwnModule,
    ReferenceSource,
    form_in,
    golden_at_other_size,
    make_golden,
    reference_checkpoint,
)
from dmformer.verify.report import PYTORCH, Check, ParityReport, add_cause, parity_report
from dmformer.verify.tasks import measure_of
from dmformer.verify.tasks.classification import paired
from dmformer.verify.tasks.segmentation import confusion_matrix, pixel_accuracy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.select import Choice
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.progress import Progress
    from dmformer.verify.inner import ModuleTruth

_NOTHING_GIVEN = ReferenceSource()
MOST_IMAGES = 64  # of a folder, evenly spread over it
_FOR_TRAINING = ("drop_path", "layer_scale")  # fields of the configuration that change nothing in a trained network


def verify(
    bundle: str | Path | Bundle,
    *,
    runtimes: Sequence[str] = (),
    weights: str | Path | None = None,
    module: Any = None,
    module_options: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    images: str | Path | None = None,
    layers: bool = False,
    bisect: str | Path | None = None,
    cpus: Sequence[str] = (),
    engines: Sequence[str] = (),
    root: str | Path | None = None,
    server: str | None = None,
    model: str | None = None,
    precision: str | None = None,
    limit_s: float | None = None,
    stage: Progress = silent,
    note: Callable[[str], object] = lambda _: None,
) -> ParityReport:
    """Compare what the runtimes of a bundle answer with what PyTorch answers.

    Without ``weights``, ``images`` and ``bisect`` the reference is the bundle's golden outputs, and PyTorch is not
    needed.

    Args:
        bundle: a bundle's folder.
        runtimes: names of runtimes; otherwise every one that can run on this machine.
        weights: a checkpoint to compare with; the golden outputs are compared with it too.
        module: a network of one's own to compare with, ``FILE.py:NAME``, ``package.module:NAME`` or an ``nn.Module``;
            with ``weights``, where it was exported with some. This runs the file's code.
        module_options: arguments of the function or class that makes it; otherwise those of the export.
        weights_key: which of several sets of weights in that file; ``.`` is its top level.
        images: a folder of images to compare on beside the golden ones, at most 64 of them, spread evenly over the
            folder; needs PyTorch, and ``weights`` or a bundle with the ``torch`` format.
        layers: compare with the checkpoint of the ``torch`` format, layer by layer, where the bundle has it.
        bisect: find the node where each failure begins, and save it below this folder as a case to run alone
            (:func:`dmformer.verify.localize.case.run_case`); compares layers as well. Needs PyTorch and ONNX.
        cpus: processors to emulate with QEMU and ask instead of this machine, as in ``cortex-a72``.
        engines: releases to ask instead of those installed, ``PACKAGE==VERSION``, or ``PACKAGE==FIRST..LAST`` for all
            between two, where the first bad one is looked for by halving.
        root: with ``cpus``, a root file system of the device; otherwise a small Debian is laid out.
        server: address of a running server of the Open Inference Protocol, as in ``http://localhost:8000`` or
            ``grpc://localhost:8001``, that is asked instead of this machine's runtimes.
        model: with ``server``, the name of one of its models; otherwise all that are named as ``serve-layout`` names
            those of the bundle.
        precision: with ``model``, that of the artifact behind it, where neither its name nor its configuration says so.
        limit_s: with ``server``, seconds that one answer may take; otherwise 60.
        stage: told about each step.
        note: told, before anything runs, what is to be known about an artifact on this machine.

    Raises:
        CheckFailed: a file is not what the manifest says, or is not listed in it.
        UnavailableError: a runtime that was named, or every one, cannot run on this machine, or a package is missing;
            or the server cannot be asked.
        UsageError: an argument or a file cannot be used.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    own = OwnModule.of(module, module_options)
    if server is None and (model is not None or precision is not None or limit_s is not None):
        raise UsageError(
            "`model`, `precision` or `limit_s` without `server`; expected the address of the server that has it"
        )
    elsewhere = bool(cpus or engines or root is not None)
    if elsewhere or server is not None:
        given = (weights, weights_key, own, images, layers or None, bisect)
        _check_place(server, elsewhere, golden_alone=all(one is None for one in given))
        if server is not None:
            from dmformer.serve.client import LIMIT_S
            from dmformer.verify.server import verify_server

            return verify_server(
                opened,
                server,
                model=model,
                runtimes=runtimes,
                precision=precision,
                limit_s=LIMIT_S if limit_s is None else limit_s,
                stage=stage,
            )
        from dmformer.verify.replay import verify_elsewhere

        folder = Path(root) if root is not None else None
        return verify_elsewhere(
            opened, runtimes=runtimes, cpus=cpus, engines=engines, root=folder, stage=stage, note=note
        )
    source = ReferenceSource.of(weights, own, weights_key)
    if bisect is not None:
        for package in ("torch", "onnx"):
            require(package, extra="export", purpose="`bisect`")
    chosen, skipped = select(opened, runtimes)
    for choice in chosen:
        if choice.saturation_risk is not None:
            note(f"{choice.title}: {choice.saturation_risk}")
    report = check_choices(
        opened,
        chosen,
        skipped,
        source=source,
        images=Path(images) if images is not None else None,
        layers=layers or bisect is not None,
        stage=stage,
        unasked=_broken_engines(opened) if not runtimes or "all" in map(str.lower, runtimes) else (),
    )
    if bisect is None or report.passed:
        return report
    from dmformer.verify.localize import localize

    return localize(
        opened, report, weights=source.weights, folder=Path(bisect), stage=stage, module=own, weights_key=weights_key
    )


def _check_place(server: str | None, elsewhere: bool, *, golden_alone: bool) -> None:
    """Refuse what cannot be asked of a server or elsewhere."""
    if server is not None and elsewhere:
        raise UsageError("`server` with `cpus`, `engines` or `root`; expected one place to ask at a time")
    if not golden_alone:
        named = "`server` asks" if server is not None else "`cpus`, `engines` and `root` ask"
        raise UsageError(
            f"{named} for the golden answers; expected them without `weights`, `module`, `images`, `layers` and "
            "`bisect`"
        )


def check_choices(
    bundle: Bundle,
    chosen: Sequence[Choice],
    skipped: list[str],
    *,
    source: ReferenceSource = _NOTHING_GIVEN,
    images: Path | None = None,
    layers: bool = False,
    stage: Progress = silent,
    unasked: Sequence[Check] = (),
) -> ParityReport:
    """Make every check of the artifacts chosen; arguments as for :func:`verify`."""
    with stage("integrity"):
        bundle.check_all()
    golden = bundle.golden()
    with stage("preprocessing"):
        checks = check_preprocessing(bundle.manifest.preprocessing, golden)
    extra: ImageSet | None = None
    reference = golden
    truth: ModuleTruth | None = None
    if source.is_given or images is not None or (layers and bundle.artifacts("torch")):
        if images is not None:
            extra, reason = _image_set(bundle, images)
            skipped += [reason] if reason else []
        with stage("PyTorch reference"):
            checkpoint = reference_checkpoint(bundle, *source)
            reference = _recompute(bundle, checkpoint, golden, extra)
            checks.append(_check_description(bundle, checkpoint))
            checks += [_check_golden(part, reference.sizes[size], size) for size, part in golden.sizes.items()]
            truth = _layers(bundle, checkpoint, golden)
    for choice in chosen:
        with stage(choice.title):
            checks.extend(_check_choice(choice, golden, reference, extra))
            if truth is not None and choice.artifact.precision == "fp32":
                layer_check = truth.check(functools.partial(choice.runtime, None))
                if isinstance(layer_check, Check):
                    checks.append(layer_check)
                else:
                    skipped.append(layer_check)
    return parity_report([*checks, *unasked], skipped, [choice.artifact for choice in chosen])


def _broken_engines(bundle: Bundle) -> list[Check]:
    """A failed check for each artifact whose engine is there and cannot be asked: what was not checked did not hold."""
    checks = []
    for artifact in bundle.manifest.artifacts:
        row = registry.reader_of(artifact.format)
        if row is not None and (status := registry.support(row).probe()).broken:
            comparison = Comparison(False, reason=f"the engine cannot be asked: {status.reason}")
            checks.append(Check.of("runtime", row.name, artifact.precision, 1, comparison))
    return checks


def _layers(bundle: Bundle, checkpoint: Checkpoint, golden: Golden) -> ModuleTruth:
    """What each layer should give for the last golden image; showing an engine's inside needs the ONNX package."""
    from dmformer.verify.inner import ModuleTruth

    return ModuleTruth(form_in(bundle, checkpoint.model()), golden.noise)


def _check_choice(choice: Choice, golden: Golden, reference: Golden, extra: ImageSet | None) -> list[Check]:
    """Check an artifact on the golden images, and on extra ones where there are some.

    Of the extra ones there are PyTorch's answers alone, so that at a reduced precision decisions are compared there,
    not values.

    Args:
        choice: the artifact and its runtime.
        golden: the bundle's.
        reference: PyTorch's answers to the golden images, and after them to the extra ones.
        extra: images beside the golden ones.
    """
    runtime, precision, count = choice.runtime(), choice.artifact.precision, len(golden.images)
    rows = None if extra is None else reference.inputs[count:]
    answers = ask(runtime, golden.inputs, golden.thinned, extra=rows, other_size=golden.other_size)
    pytorch_golden = {name: array[:count] for name, array in reference.outputs.items()}
    checks = check_artifact(answers, golden, choice.entry, choice.artifact, pytorch_golden)
    if extra is None or answers.extra is None:  # of a failure the checks say why
        return checks
    to_extra = Answers(answers.runtime, precision, {len(extra): answers.extra})
    expected = {name: array[count:] for name, array in reference.outputs.items()}
    if precision == "fp32":
        pytorch = Reference(PYTORCH, expected, float32_limit(reference.outputs, reference.outputs_float64))
        checks += check_answers("images", to_extra, [pytorch])
    else:
        float16_sums = registry.support(choice.entry).sums_in_float16()
        pytorch = replace(references(golden, precision, None, float16_sums)[0], outputs=expected)
    decisions = check_decisions(to_extra, answers.extra, pytorch)
    for check in tuple(decisions):
        if extra.labelled and (check.decisions is not None or check.pixels is not None):
            logits, torch_logits = answers.extra[OUTPUT_NAME], expected[OUTPUT_NAME]
            decisions.append(_check_labelled(choice, to_extra, (logits, torch_logits), extra, check, golden))
    return checks + add_cause(decisions, choice.saturation_risk)


def _check_labelled(
    choice: Choice,
    answers: Answers,
    logits: tuple[NDArray[Any], NDArray[Any]],
    images: ImageSet,
    decided: Check,
    golden: Golden,
) -> Check:
    """Check a runtime's accuracy on labelled images against PyTorch's, from the logits of both."""
    evidence = choice.bundle.manifest.evidence.accuracy
    budget = evidence.max_points_lost if evidence else 0.0
    if images.labels is not None:
        return check_paired(answers, paired(*logits, images.labels), len(images), budget)
    classes, stride = choice.bundle.manifest.class_count, golden.strides.get(OUTPUT_NAME, 1)
    labels = np.stack([row[::stride, ::stride] for row in label_maps(images, classes)])
    accuracy, torch = (pixel_accuracy(confusion_matrix(array.argmax(1), labels, classes)) for array in logits)
    return check_labelled_pixels(answers, accuracy, torch, decided, budget)


def _image_set(bundle: Bundle, folder: Path) -> tuple[ImageSet, str | None]:
    """Images of a folder, with labels where its subfolders are classes; otherwise why there are none."""
    manifest = bundle.manifest
    try:
        measure = measure_of(manifest.model.task, manifest.class_count)
        images = measure.images(folder, manifest.preprocessing, manifest.model.classes)
    except UsageError as error:
        paths = tuple(list_images(folder))
        return ImageSet(paths, None, manifest.preprocessing).spread(MOST_IMAGES), f"accuracy: {error}"
    return images.spread(MOST_IMAGES), None


def _recompute(bundle: Bundle, checkpoint: Checkpoint, golden: Golden, extra: ImageSet | None) -> Golden:
    """PyTorch's answers to the golden images, and after them to extra ones."""
    pixels = golden.images
    if extra is not None:
        pixels = np.concatenate([pixels, load_pixels(extra.paths, bundle.manifest.preprocessing)])
    model, preprocessing = checkpoint.model(), bundle.manifest.preprocessing
    other_size = golden_at_other_size(model, preprocessing) if golden.other_size is not None else None
    return replace(make_golden(model, preprocessing, pixels), other_size=other_size)


def _check_description(bundle: Bundle, checkpoint: Checkpoint) -> Check:
    """Compare what the checkpoint says of itself with the manifest, but for what the export was given instead."""
    from dmformer.models.config import DMFormerConfig

    model, ours = bundle.manifest.model, checkpoint.config.to_dict()
    # Fields that were not there yet have their defaults.
    exported_as = model.config if model.module is not None else {**DMFormerConfig().to_dict(), **model.config}
    differing = [name for name in ours if name not in _FOR_TRAINING and ours[name] != exported_as.get(name)]
    if checkpoint.described:
        exported = bundle.manifest.preprocessing
        chosen = {name: getattr(exported, name) for name in ("image_size", *model.overridden) if name != "classes"}
        if checkpoint.preprocessing.with_fields(chosen) != exported:
            differing.append("preprocessing")
        if checkpoint.classes != model.classes and "classes" not in model.overridden:
            differing.append("classes")
    reason = f"checkpoint and manifest differ in {', '.join(differing)}" if differing else None
    comparison = Comparison(not differing, reason=reason)
    return Check.of("description", "torch", "fp32", len(bundle.manifest.inputs), comparison, against="manifest")


def _check_golden(golden: Golden, reference: Golden, size: str | None) -> Check:
    """Compare the bundle's stored answers with the checkpoint's: is the bundle made from these weights?"""
    rows = len(golden.images)
    limits = float32_limit(reference.outputs, reference.outputs_float64)
    expected = Reference(PYTORCH, {name: array[:rows] for name, array in reference.outputs.items()}, limits)
    (check,) = check_answers("golden", Answers("torch", "fp32", {rows: dict(golden.outputs)}), [expected], size)
    return check
