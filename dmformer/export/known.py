"""A whole export that was made before, found without PyTorch: by what was asked for, and by what is in every file.

:mod:`dmformer.export.pipeline` keeps the stages of an export one by one; this keeps the bundle that they make.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dmformer.bundle.manifest import MANIFEST, Manifest
from dmformer.bundle.reader import own_bundle
from dmformer.bundle.writer import staged
from dmformer.data.images import list_images
from dmformer.errors import UsageError
from dmformer.export.formats import is_compiled
from dmformer.export.request import ExportResult
from dmformer.runtimes import registry
from dmformer.verify.report import ParityReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dmformer.cache import Cache

_WHAT = "the whole export"
_OF_NO_MATTER = ("output", "force")  # what is kept passed its checks


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """Every file of a bundle, and its parity report."""

    files: tuple[Path, ...]
    parity: ParityReport


class KnownExport:
    """One export, as its arguments ask for it.

    Args:
        cache: where it may be, and is kept.
        weights: a checkpoint file.
        arguments: all the others of :func:`dmformer.export.api.make_request`.
    """

    def __init__(self, cache: Cache, weights: Path | None, arguments: Mapping[str, Any]) -> None:
        self.cache = cache
        self._asked = (weights, arguments)
        self.key = self._find_key()

    def _find_key(self) -> str:
        """Empty where nothing is cached, or something cannot be read: the export itself says what."""
        try:
            return self.cache.key(_WHAT, _inputs(*self._asked))
        except (OSError, UsageError):
            return ""

    def take(self, output: Path) -> ExportResult | None:
        """Write the bundle from the cache, its evidence marked as measured then; ``None`` where it has none.

        Raises:
            StageFailed: the bundle could not be written.
            UsageError: the output folder cannot be used.
        """
        if not self.cache.holds(self.key):
            return None
        try:
            with staged(output) as folder:
                manifest, parity = self._fill(folder, self.key)
        except _NotWhole:
            self.cache.taken.clear()  # nothing of it is used
            return None
        return ExportResult(output, manifest, parity)

    def _fill(self, folder: Path, key: str) -> tuple[Manifest, ParityReport]:
        found = self.cache.find(key, Whole, folder)
        if found is None:
            raise _NotWhole
        bundle = own_bundle(folder)
        # What was kept agreed with its manifest, and is here again to the bit: the cache hashed it on its way.
        sizes = {entry.path: entry.bytes for entry in bundle.manifest.entries}
        if bundle.unlisted() or sizes != {name: (folder / name).stat().st_size for name in sizes}:
            raise _NotWhole
        evidence = bundle.manifest.evidence
        marked = (*self.cache.taken, *evidence.cached)
        manifest = msgspec.structs.replace(bundle.manifest, evidence=msgspec.structs.replace(evidence, cached=marked))
        (folder / MANIFEST).write_bytes(manifest.encode())
        return manifest, found.parity

    def keep(self, folder: Path, made: ExportResult) -> None:
        """Keep a bundle in which every check held and nothing is missing that was asked for.

        Args:
            folder: it, before anybody else can see or replace it.
            made: what was found of it.

        Raises:
            CheckFailed: it is not what its manifest says.
        """
        changed = self._find_key() != self.key  # a file, while the export ran: nobody knows which of the two it read
        if not self.key or changed or not made.parity.passed or made.broken:
            return
        bundle = own_bundle(folder)
        bundle.check_all()
        names = [MANIFEST, *(entry.path for entry in bundle.manifest.entries)]
        whole = Whole(files=tuple(folder / name for name in names), parity=made.parity)
        self.cache.keep(self.key, f"{made.manifest.model.arch}: {_WHAT}", whole, folder)


class _NotWhole(Exception):
    """The cache's entry turned out to be damaged."""


def _inputs(weights: Path | None, arguments: Mapping[str, Any]) -> list[Any]:
    """The arguments, files by their content.

    Raises:
        OSError: a file cannot be read.
        UsageError: a folder has no images, or an engine is asked for: that depends on more than its inputs.
    """
    given = {name: value for name, value in arguments.items() if name not in _OF_NO_MATTER}
    formats = given.get("formats", ())
    if "all" in formats or any(is_compiled(registry.entry_of_format(name)) for name in formats):
        raise UsageError("an engine depends on drivers and devices")
    for name in ("images", "calibration"):
        if given.get(name) is not None:
            folder = Path(given[name])
            given[name] = [(path.relative_to(folder).as_posix(), path) for path in list_images(folder)]
    return [weights and (weights.suffix, weights), given]
