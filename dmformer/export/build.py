"""``dmformer build``: artifacts made on the machine that runs them, from the ONNX files of a bundle.

Imports neither torch nor onnx.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dmformer.bundle.manifest import MANIFEST, SIGNATURE, Artifact, file_entry
from dmformer.bundle.reader import Bundle, open_bundle, own_bundle, read_signature_file
from dmformer.bundle.writer import staged
from dmformer.cache import Cache
from dmformer.errors import CheckFailed, StageFailed, UnavailableError, UsageError
from dmformer.export.formats import check_convertible, check_from_onnx, check_size, is_compiled
from dmformer.export.loop import Loop, write_report
from dmformer.export.options import EngineOptions
from dmformer.export.precisions import PrecisionFile
from dmformer.export.steps import Work
from dmformer.progress import Progress, silent
from dmformer.runtimes import registry
from dmformer.verify.report import ParityReport, failure, parity_report

if TYPE_CHECKING:
    from collections.abc import Sequence

_SOURCE = "onnx"


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was built, and how it answered; ``parity`` has no checks where nothing could run.

    ``notes`` say what else became of the bundle.
    """

    artifacts: tuple[Artifact, ...]
    parity: ParityReport
    notes: tuple[str, ...] = ()


def build(
    bundle: str | Path | Bundle,
    format_name: str,
    *,
    precisions: Sequence[str] = (),
    engine: EngineOptions | None = None,
    stage: Progress = silent,
) -> BuildReport:
    """Make a format from a bundle's ONNX files, verify it against the golden outputs, and put it into the bundle.

    The bundle is replaced as a whole: a reader sees the old one or the new one.

    Args:
        bundle: a bundle's folder.
        format_name: name or alias of a format.
        precisions: of the ONNX files to build from; otherwise all that the format takes.
        engine: how formats that are compiled are compiled.
        stage: told about each step.

    Raises:
        CheckFailed: a file is not what the manifest says, or what was built answers wrongly; nothing was changed.
        StageFailed: building broke; nothing was changed.
        UnavailableError: the format cannot be built on this machine.
        UsageError: an argument cannot be used, or the bundle has nothing to build from.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    if opened.origin is not None:
        first = f"dmformer unpack {opened.origin}" if opened.origin.is_file() else f"cp -rL {opened.origin} COPY"
        kind = "packed" if opened.origin.is_file() else "a folder of links"
        raise UsageError(f"{opened.origin} is {kind}, and takes nothing in; run first: {first}")
    row, options = registry.entry_of_format(format_name), engine or EngineOptions()
    check_from_onnx(row)
    check_size(row, opened.manifest.open_size)
    if not is_compiled(row) and options != EngineOptions():
        raise UsageError(f"format {row.format} is not compiled for a target; expected no options of an engine")
    sources = _sources(opened, row, [precision.lower() for precision in precisions])
    check_convertible(row, options)
    with staged(opened.root) as folder:
        with stage("integrity"):
            golden = _copy_checked(opened, row, sources, folder).golden()
        in_float32 = opened.artifacts(_SOURCE, "fp32")
        float32 = folder / in_float32[0].files[0].path if in_float32 else None
        loop, work, built = Loop(Cache()), Work(folder, stage, options, golden, float32=float32), []
        for source in sources:
            verified = loop.artifact(work, row, _precision_file(source, folder), network=None)
            loop.checks.extend(verified.checks)
            built.append(verified.artifact)
        parity = parity_report(loop.checks, loop.left_out)
        if loop.checks and not parity.passed:
            raise CheckFailed(f"nothing was changed: {failure(parity)}")
        if own_bundle(opened.root).manifest_sha256 != opened.manifest_sha256:
            raise StageFailed(f"{opened.root} changed while this was built, and was left alone; run it again")
        found_all = BuildReport(artifacts=tuple(built), parity=parity, notes=_unsigned(opened))
        _adopt(opened, folder, built, found_all, row.format)
    return found_all


def _copy_checked(bundle: Bundle, row: registry.RuntimeEntry, sources: Sequence[Artifact], folder: Path) -> Bundle:
    """Copy what the manifest lists and what stays, and check the copies, which are what is built from.

    Of what is replaced, which may be damaged, whole caches are copied: they make building again quicker.
    """
    copies = replace(bundle, root=folder)
    built = {(row.format, source.precision) for source in sources}
    replaced = {
        file for item in bundle.manifest.artifacts if (item.format, item.precision) in built for file in item.files
    }
    for entry in bundle.manifest.entries:
        if entry in replaced and not entry.path.endswith(".cache"):
            continue
        target = folder / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(bundle.locate(entry), target)
            copies.check(entry)
        except CheckFailed:
            if entry not in replaced:
                raise
            target.unlink(missing_ok=True)
    for source in sources:
        copies.load_path(source)
    return copies


def _unsigned(bundle: Bundle) -> tuple[str, ...]:
    """What became of the bundle's signature: it is of a manifest without what was built."""
    if read_signature_file(bundle.root) is None:
        return ()
    note = (
        f"the bundle was signed, and the signer has not seen what was built here: {SIGNATURE} was removed; to sign it "
        "again: dmformer sign BUNDLE --key FILE"
    )
    return (note,)


def cannot_build(bundle: Bundle, row: registry.RuntimeEntry, precision: str) -> str | None:
    """Why a format at a precision cannot be built on this machine from the bundle; nothing is built.

    ``None`` where it can, as far as is known.
    """
    try:
        check_from_onnx(row)
        check_size(row, bundle.manifest.open_size)
        _sources(bundle, row, [precision])
        check_convertible(row, EngineOptions())
    except (UnavailableError, UsageError) as error:
        return str(error)
    return None


def _sources(bundle: Bundle, row: registry.RuntimeEntry, precisions: Sequence[str]) -> list[Artifact]:
    able = registry.support(row).precisions
    wanted = precisions or able
    found = [item for item in bundle.artifacts(_SOURCE) if item.precision in wanted and item.precision in able]
    missing = [precision for precision in precisions if precision not in [item.precision for item in found]]
    if missing or not found:
        has = ", ".join(item.precision for item in bundle.artifacts(_SOURCE)) or "none"
        flags = "".join(f" --precision {precision}" for precision in missing)
        raise UsageError(
            f"{bundle.root}: no ONNX file{' at ' + missing[0] if missing else ''} to build from (it has {has}); "
            f"run: dmformer export --format onnx{flags}"
        )
    return found


def _precision_file(artifact: Artifact, folder: Path) -> PrecisionFile:
    """The ONNX file of a bundle in ``folder``."""
    return PrecisionFile(
        onnx=folder / artifact.files[0].path,
        precision=artifact.precision,
        promised_share=artifact.promised_share,
        kept_in_fp32=artifact.kept_in_fp32,
        sensitivity=artifact.sensitivity,
        weight_bits=artifact.weight_bits,
    )


def _adopt(bundle: Bundle, folder: Path, built: Sequence[Artifact], found: BuildReport, format_name: str) -> None:
    """Write the report, and a manifest in which what was built takes the place of what was there."""
    path = folder / f"reports/build-{format_name}.json"
    write_report(path, found.parity)
    entry = file_entry(folder, path)
    replaced = {(item.format, item.precision) for item in built}
    manifest = msgspec.structs.replace(
        bundle.manifest,
        artifacts=(
            *(item for item in bundle.manifest.artifacts if (item.format, item.precision) not in replaced),
            *built,
        ),
        files=(*(file for file in bundle.manifest.files if file.path != entry.path), entry),
    )
    (folder / MANIFEST).write_bytes(manifest.encode())
