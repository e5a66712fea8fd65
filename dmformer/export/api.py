"""``dmformer.export``: what the command does, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmformer.bundle.manifest import DEFAULT_BUNDLE, SAFE_WEIGHT_BITS, WEIGHT_BITS
from dmformer.cache import NoCache, open_cache
from dmformer.errors import UnavailableError, UsageError
from dmformer.export.formats import EngineOptions, check_convertible, check_size, is_compiled
from dmformer.export.known import KnownExport
from dmformer.export.precisions import PRECISIONS, check_calibrated
from dmformer.export.request import ExportRequest, ExportResult
from dmformer.progress import silent
from dmformer.runtimes import registry
from dmformer.task import STRIDES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import TypedDict, Unpack

    from dmformer.progress import Progress
    from dmformer.task import Task

    class ExportOptions(TypedDict, total=False):
        """The keyword arguments of :func:`export` and :func:`make_request`, which has the defaults."""

        arch: str | None
        task: Task | None
        formats: Sequence[str]
        precisions: Sequence[str]
        output: str | Path
        image_size: int | None
        images: str | Path | None
        calibration: str | Path | None
        max_accuracy_drop: float
        weight_bits: int
        options: Mapping[str, Any] | None
        seed: int
        deploy_form: bool
        open_size: bool
        force: bool
        engine: EngineOptions | None


AUTO = "auto"


def export(
    weights: str | Path | None = None,
    *,
    stage: Progress = silent,
    use_cache: bool = True,
    **arguments: Unpack[ExportOptions],
) -> ExportResult:
    """Export a checkpoint to a verified bundle.

    Args:
        weights: a checkpoint file; without it and without ``arch``, the demonstration checkpoint.
        stage: told about each step.
        use_cache: take what was made before with the same inputs and versions, and keep what is made now
            (:mod:`dmformer.cache`); the manifest names what was taken, and when it was measured.
        **arguments: those of :func:`make_request`.

    Raises:
        CheckFailed: a check failed; nothing was written, unless ``force``.
        StageFailed: a stage broke; nothing was written.
        UnavailableError: a package that a format needs is not installed.
        UsageError: an argument or a file cannot be used.
    """
    path = Path(weights) if weights is not None else None
    known = KnownExport(open_cache() if use_cache else NoCache(), path, arguments)
    taken = known.take(Path(arguments.get("output", DEFAULT_BUNDLE)))
    if taken is not None:
        return taken
    from dmformer.export.pipeline import export as run_export

    return run_export(make_request(weights, **arguments), stage, known)


def make_request(
    weights: str | Path | None = None,
    *,
    arch: str | None = None,
    task: Task | None = None,
    formats: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    output: str | Path = DEFAULT_BUNDLE,
    image_size: int | None = None,
    images: str | Path | None = None,
    calibration: str | Path | None = None,
    max_accuracy_drop: float = 0.5,
    weight_bits: int = SAFE_WEIGHT_BITS,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    deploy_form: bool = True,
    open_size: bool = False,
    force: bool = False,
    engine: EngineOptions | None = None,
) -> ExportRequest:
    """Everything an export needs, read and checked; nothing is run.

    Args:
        weights: a checkpoint file; without it and without ``arch``, the task's demonstration checkpoint.
        arch: a variant's name; without ``weights``, its seeded random weights are exported and marked so.
        task: ``features`` leaves the head out and exports the four stage maps; otherwise the network's own.
        formats: names or aliases of formats, or ``all``.
        precisions: of ``fp32``, ``fp16`` and ``int8``; or ``auto``: for each format the fastest on this machine within
            the accuracy budget.
        output: the bundle's folder; a bundle that is there is replaced.
        image_size: side of the input in pixels; otherwise the checkpoint's.
        images: folder of real images to compare on; noise fills up.
        calibration: folder of images like those that the device will see, in subfolders named after their classes
            (for segmentation: in ADE20K's folders, the training part) where accuracy is to be measured by labels. Of
            more than 512, as many are taken evenly; ranges are measured on 128 of those.
        max_accuracy_drop: accuracy that a reduced precision may lose against PyTorch on the calibration images, in
            percentage points: of top-1 or mean intersection over union with labels, of agreement without.
        weight_bits: bits that int8 weights use: 7, whose sums no processor saturates, or 8, for processors known to
            have VNNI (x86) or the dot product (Arm), and for TensorRT.
        options: fields of the model's configuration that override what the checkpoint says.
        seed: of random weights.
        deploy_form: fold everything linear before tracing; the outputs stay the same.
        open_size: leave height and width of the input open; for segmentation to multiples of 32.
        force: write the bundle although a check failed.
        engine: how formats that are compiled are compiled.

    Raises:
        UsageError: an argument or a file cannot be used.
    """
    if not 0 <= max_accuracy_drop <= 100:
        raise UsageError(f"max_accuracy_drop is {max_accuracy_drop:g}; expected percentage points, 0 to 100")
    if type(weight_bits) is not int or weight_bits not in WEIGHT_BITS:
        raise UsageError(f"weight_bits is {weight_bits!r}; expected 7, right on every processor, or 8")
    from dmformer.export.networks import find_source

    source = find_source(
        Path(weights) if weights is not None else None,
        arch,
        task,
        options or {},
        open_size,
        image_size,
        Path(images) if images is not None else None,
        Path(calibration) if calibration is not None else None,
        seed,
    )
    _check_task(source.checkpoint.config.task, source.checkpoint.preprocessing.image_size, precisions, calibration)
    chosen = _precisions(precisions, calibrated=source.calibration is not None)
    if calibration is not None and chosen == ("fp32",):
        raise UsageError(
            "calibration images, and precision fp32 alone, which needs none; expected a reduced one as well: "
            "--precision int8, fp16 or auto"
        )
    if weight_bits != SAFE_WEIGHT_BITS and "int8" not in chosen:
        raise UsageError(f"int8 weights of {weight_bits} bits, and no int8; expected --precision int8 or auto as well")
    check_calibrated(chosen, source.calibration)
    engine = engine or EngineOptions()
    rows = [registry.entry_of_format(name) for name in formats if name.lower() != "all"]
    if engine != EngineOptions() and len(rows) == len(formats) and not any(is_compiled(row) for row in rows):
        raise UsageError("options of an engine, and no format that is compiled; expected --format trt as well")
    chosen_formats, not_made = _formats(formats, chosen, engine, open_size=open_size)
    request = ExportRequest(
        checkpoint=source.checkpoint,
        weights=source.weights,
        formats=chosen_formats,
        output=Path(output),
        precisions=chosen,
        choose_fastest=_is_auto(precisions),
        calibration=source.calibration,
        max_points_lost=max_accuracy_drop,
        weight_bits=weight_bits,
        seed=source.seed,
        images=source.images,
        deploy_form=deploy_form,
        force=force,
        engine=engine,
        not_made=not_made,
    )
    request.pairs()
    return request


def _check_task(task: Task, image_size: int, precisions: Sequence[str], calibration: object) -> None:
    if task == "segmentation" and image_size % STRIDES[-1]:
        raise UsageError(f"--image-size {image_size} for segmentation; expected a multiple of {STRIDES[-1]}")
    if task == "features" and (calibration is not None or {"int8", AUTO} & {name.lower() for name in precisions}):
        raise UsageError(
            "features have no accuracy, to which int8, auto and --calibration would have to keep; expected fp32 or "
            "fp16, or the network with its head"
        )


def _precisions(names: Sequence[str], *, calibrated: bool) -> tuple[str, ...]:
    """Canonical names, each once; ``auto`` stands for all that can be made."""
    lower = [name.lower() for name in names]
    if AUTO in lower and set(lower) != {AUTO}:
        raise UsageError(
            f"precision {AUTO} with {', '.join(name for name in lower if name != AUTO)}; expected it alone"
        )
    if AUTO in lower:
        if not calibrated:
            raise UsageError(f"precision {AUTO} without images to measure accuracy on; expected --calibration DIR")
        return PRECISIONS
    if unknown := [name for name in lower if name not in PRECISIONS]:
        raise UsageError(f"precision {unknown[0]!r}; expected one of {', '.join(PRECISIONS)}, or {AUTO}")
    return tuple(dict.fromkeys(lower))


def _is_auto(names: Sequence[str]) -> bool:
    return any(name.lower() == AUTO for name in names)


def _formats(
    names: Sequence[str], precisions: Sequence[str], engine: EngineOptions, *, open_size: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Canonical names, each once, in the order given; ``all`` stands for those that can be made, and says of the rest.

    Those that take none of the precisions are no part of ``all``.
    """
    found: list[str] = []
    left_out: list[str] = []
    for name in names:
        if name.lower() != "all":
            row = registry.entry_of_format(name)
            check_size(row, open_size)
            found.append(row.format)
            continue
        for row in registry.ENTRIES:
            if not set(registry.support(row).precisions) & set(precisions):
                continue
            try:
                check_size(row, open_size)
                check_convertible(row, engine)
                found.append(row.format)
            except (UnavailableError, UsageError) as error:
                left_out.append(f"{row.format}: {error}")
    return tuple(dict.fromkeys(found)), tuple(dict.fromkeys(left_out))
