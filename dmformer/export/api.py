"""``dmformer.export``: what the command does, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmformer.bundle.locate import DEFAULT_BUNDLE
from dmformer.errors import UsageError
from dmformer.export.pipeline import ExportRequest, ExportResult, Progress
from dmformer.export.pipeline import export as run_export
from dmformer.export.source import find_source
from dmformer.runtimes import registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PRECISIONS = ("fp32",)


def export(
    weights: str | Path | None = None,
    *,
    arch: str | None = None,
    formats: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    output: str | Path = DEFAULT_BUNDLE,
    image_size: int | None = None,
    images: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a checkpoint to a verified bundle.

    Args:
        weights: a checkpoint file; without it and without ``arch``, the demonstration checkpoint.
        arch: a variant's name; without ``weights``, its seeded random weights are exported and marked so.
        formats: names or aliases of formats, or ``all``.
        precisions: ``fp32``.
        output: the bundle's folder; a bundle that is there is replaced.
        image_size: side of the input in pixels; otherwise the checkpoint's.
        images: folder of real images to compare on; noise fills up.
        options: fields of the model's configuration that override what the checkpoint says.
        seed: of random weights.
        force: write the bundle although a parity check failed.
        progress: told about each stage.

    Raises:
        CheckFailed: a parity check failed; nothing was written, unless ``force``.
        StageFailed: a stage broke; nothing was written.
        UnavailableError: a package that a format needs is not installed.
        UsageError: an argument or a file cannot be used.
    """
    request = make_request(weights, arch, formats, precisions, output, image_size, images, options, seed, force)
    return run_export(request, progress)


def make_request(
    weights: str | Path | None,
    arch: str | None,
    formats: Sequence[str],
    precisions: Sequence[str],
    output: str | Path,
    image_size: int | None,
    images: str | Path | None,
    options: Mapping[str, Any] | None,
    seed: int,
    force: bool,
) -> ExportRequest:
    """Everything an export needs, read and checked; see :func:`export`."""
    precisions = [precision.lower() for precision in precisions]
    if unknown := [precision for precision in precisions if precision not in PRECISIONS]:
        raise UsageError(f"precision {unknown[0]!r}; this version makes {', '.join(PRECISIONS)}")
    source = find_source(
        Path(weights) if weights is not None else None,
        arch,
        options or {},
        image_size,
        Path(images) if images is not None else None,
        seed,
    )
    return ExportRequest(
        checkpoint=source.checkpoint,
        weights=source.weights,
        formats=_formats(formats),
        output=Path(output),
        precisions=tuple(dict.fromkeys(precisions)),
        seed=source.seed,
        images=source.images,
        force=force,
    )


def _formats(names: Sequence[str]) -> tuple[str, ...]:
    """Canonical names, each once, in the order given."""
    found: list[str] = []
    for name in names:
        rows = registry.ENTRIES if name.lower() == "all" else (registry.entry_of_format(name),)
        found.extend(row.format for row in rows)
    return tuple(dict.fromkeys(found))
