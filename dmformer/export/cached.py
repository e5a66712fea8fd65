"""A whole export that was made before, found by what was asked for and what is in every file, without PyTorch.

The steps of an export are kept one by one (:class:`dmformer.export.loop.Loop`); this keeps the bundle that they make.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dmformer.bundle.manifest import MANIFEST, Manifest
from dmformer.bundle.reader import own_bundle
from dmformer.bundle.writer import staged
from dmformer.data.description import description_beside, plain_name
from dmformer.data.images import list_images
from dmformer.errors import UsageError
from dmformer.export.formats import is_compiled
from dmformer.models.checkpoint_file import checkpoint_files
from dmformer.runtimes import registry
from dmformer.verify.report import ParityReport

if TYPE_CHECKING:
    from dmformer.cache import Cache
    from dmformer.export.options import ExportOptions

_WHOLE = "the whole export"
# Options that change nothing in a bundle whose checks held.
_NO_INPUT = ("output", "force", "use_cache", "stage", "save_key_map")


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what was found on the way.

    Attributes:
        output: the bundle's folder.
        manifest: of the bundle.
        parity: every check.
        broken: the engines that could not be built, and why.
        not_kept: why the cache did not take what was made.
    """

    output: Path
    manifest: Manifest
    parity: ParityReport
    broken: tuple[str, ...] = ()
    not_kept: str | None = None


class CachedBundle(msgspec.Struct, frozen=True, kw_only=True):
    """Every file of a bundle that the cache keeps as a whole, and its parity report."""

    files: tuple[Path, ...]
    parity: ParityReport


def key_of(cache: Cache, options: ExportOptions) -> str:
    """Stands for an export by its options, files by their content.

    Empty where something cannot be read, which the export itself tells, where an engine is asked for, which depends on
    drivers and devices, where a network of one's own is exported, of whose code nobody knows what it imports and reads,
    and where a key map is to be written, which a bundle is without.
    """
    if options.module is not None or options.save_key_map is not None:
        return ""
    given: dict[str, Any] = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name not in _NO_INPUT
    }
    formats = [name.lower() for name in options.formats]
    try:
        if "all" in formats or any(is_compiled(registry.entry_of_format(name)) for name in formats):
            return ""
        for name in ("images", "calibration"):
            if given[name] is not None:
                folder = Path(given[name])
                given[name] = [(plain_name(path.relative_to(folder).as_posix()), path) for path in list_images(folder)]
        if options.weights is not None:
            path = Path(options.weights)
            beside = description_beside(path)
            given["weights"] = (path.suffix, *checkpoint_files(path), None if beside is None else beside.source)
        for name in ("preprocessing", "classes", "key_map"):
            if given[name] is not None:
                given[name] = Path(given[name])
        return cache.key(_WHOLE, given)
    except (OSError, UsageError):
        return ""


def keep(cache: Cache, key: str, options: ExportOptions, folder: Path, result: ExportResult) -> None:
    """Keep a bundle in which every check held and nothing is missing, before anybody else can see or replace it.

    Raises:
        CheckFailed: it is not what its manifest says.
    """
    # Where a file changed while the export ran, nobody knows which of the two it read.
    if not key or not result.parity.passed or result.broken or key_of(cache, options) != key:
        return
    bundle = own_bundle(folder)
    bundle.check_all()
    names = [MANIFEST, *(entry.path for entry in bundle.manifest.entries)]
    whole = CachedBundle(files=tuple(folder / name for name in names), parity=result.parity)
    cache.keep(key, f"{result.manifest.model.arch}: {_WHOLE}", whole, folder)


def find(cache: Cache, key: str, output: Path) -> ExportResult | None:
    """Write the bundle from the cache, its evidence marked as measured then; ``None`` where it has none.

    Raises:
        StageFailed: the bundle could not be written.
        UsageError: the output folder cannot be used.
    """
    if not cache.holds(key):
        return None
    try:
        with staged(output) as folder:
            manifest, parity = _written(cache, key, folder)
    except _Damaged:
        cache.taken.clear()  # nothing of it is used
        return None
    return ExportResult(output, manifest, parity)


def _written(cache: Cache, key: str, folder: Path) -> tuple[Manifest, ParityReport]:
    kept = cache.find(key, CachedBundle, folder)
    if kept is None:
        raise _Damaged
    bundle = own_bundle(folder)
    # What was kept agreed with its manifest, and is here again to the bit: the cache hashed it on its way.
    sizes = {entry.path: entry.bytes for entry in bundle.manifest.entries}
    if bundle.unlisted() or sizes != {name: (folder / name).stat().st_size for name in sizes}:
        raise _Damaged
    evidence = bundle.manifest.evidence
    evidence = msgspec.structs.replace(evidence, cached=(*cache.taken, *evidence.cached))
    manifest = msgspec.structs.replace(bundle.manifest, evidence=evidence)
    (folder / MANIFEST).write_bytes(manifest.encode())
    return manifest, kept.parity


class _Damaged(Exception):
    """The cache's entry is not what was kept."""
