"""``dmformer build``: artifacts made on the machine that runs them, from the ONNX files of a bundle.

Imports neither torch nor onnx.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dmformer.bundle.manifest import MANIFEST, Artifact, file_entry, indented_json
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import cannot_run
from dmformer.bundle.writer import staged
from dmformer.errors import CheckFailed, StageFailed, UnavailableError, UsageError
from dmformer.export.artifact import make_artifact, proven
from dmformer.export.formats import ConversionSource, EngineOptions, check_convertible
from dmformer.progress import Stage, silent
from dmformer.runtimes import registry
from dmformer.verify.parity import Check, ParityReport, failure, report

if TYPE_CHECKING:
    from collections.abc import Sequence

_SOURCE = "onnx"


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was built, and how it answered; ``parity`` has no checks where nothing could run."""

    artifacts: tuple[Artifact, ...]
    parity: ParityReport


def build(
    bundle: str | Path | Bundle,
    format_name: str,
    *,
    precisions: Sequence[str] = (),
    engine: EngineOptions | None = None,
    stage: Stage = silent,
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
    row, options = registry.entry_of_format(format_name), engine or EngineOptions()
    if row.format in (_SOURCE, "torch"):
        raise UsageError(f"format {row.format} comes with an export; expected one that is built from ONNX")
    if row.buildable is None and options != EngineOptions():
        raise UsageError(f"format {row.format} is not compiled for a target; expected no options of an engine")
    sources = _sources(opened, row, [precision.lower() for precision in precisions])
    check_convertible(row, options)
    with stage("integrity"):
        for entry in opened.entries():
            if not entry.path.startswith(f"{row.format}/"):  # what is replaced may be damaged
                opened.check(entry)
    golden = opened.golden()
    with staged(opened.root) as folder:
        shutil.copytree(opened.root, folder, dirs_exist_ok=True)
        checks: list[Check] = []
        not_run: list[str] = []
        built = []
        for source in sources:
            artifact = _make(row, source, options, folder, stage)
            if reason := cannot_run(row, artifact):
                not_run.append(f"{row.format} {source.precision}: built and not run, {reason}")
            else:
                with stage(f"verify {row.format} {source.precision} in {row.name}"):
                    artifact, found = proven(row, artifact, folder, golden)
                checks.extend(found)
            built.append(artifact)
        parity = report(checks, not_run)
        if checks and not parity.passed:
            raise CheckFailed(f"nothing was changed: {failure(parity)}")
        if open_bundle(opened.root).manifest != opened.manifest:
            raise StageFailed(f"{opened.root} changed while this was built, and was left alone; run it again")
        _adopt(opened, folder, built, BuildReport(artifacts=tuple(built), parity=parity), row.format)
    return BuildReport(artifacts=tuple(built), parity=parity)


def cannot_build(bundle: Bundle, row: registry.Entry, precision: str) -> str | None:
    """Why a format at a precision cannot be built on this machine from the bundle; nothing is built.

    ``None`` where it can, as far as is known.
    """
    if row.format in (_SOURCE, "torch"):
        return "it comes with an export"
    try:
        _sources(bundle, row, [precision])
        check_convertible(row, EngineOptions())
    except (UnavailableError, UsageError) as error:
        return str(error)
    return None


def _sources(bundle: Bundle, row: registry.Entry, precisions: Sequence[str]) -> list[Artifact]:
    able = registry.adapter(row).precisions
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


def _make(row: registry.Entry, source: Artifact, options: EngineOptions, folder: Path, stage: Stage) -> Artifact:
    target = folder / row.format / source.precision
    kept = {path.name: path.read_bytes() for path in target.glob("*.cache")}  # makes building again quicker
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name, content in kept.items():
        (target / name).write_bytes(content)
    return make_artifact(
        row,
        ConversionSource(folder / source.files[0].path, source.precision, engine=options, stage=stage),
        folder,
        promised_share=source.promised_share,
        kept_in_fp32=source.kept_in_fp32,
        sensitivity=source.sensitivity,
    )


def _adopt(bundle: Bundle, folder: Path, built: Sequence[Artifact], found: BuildReport, format_name: str) -> None:
    """Write the report, and a manifest in which what was built takes the place of what was there."""
    path = folder / f"reports/build-{format_name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(indented_json(found.parity))
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
