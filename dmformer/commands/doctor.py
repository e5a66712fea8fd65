"""``dmformer doctor``."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.machine import processor_title

if TYPE_CHECKING:
    from rich.table import Table

    from dmformer.device.doctor import ArtifactStatus, Component


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Also say which of its artifacts run here.")
    ] = None,
    json_file: options.JsonOption = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Show what this machine can run, and what is missing."""
    from dmformer.bundle.reader import open_bundle
    from dmformer.device.doctor import examine_machine
    from dmformer.export.build import cannot_build

    opened = open_bundle(bundle) if bundle is not None else None
    report = examine_machine(opened, partial(cannot_build, opened) if opened is not None else None)
    present.write_json(report, json_file)
    if json_file == "-":
        return
    machine = report.machine
    memory = machine["available_memory_mb"]
    present.show(
        f"{processor_title(machine)}, {machine['cores']} cores, "
        f"{'' if memory is None else f'{memory} MB of memory available, '}{machine['os']}, "
        f"Python {machine['versions']['python']}"
    )
    runtimes = present.table("Runtimes", ["", "runtime", "version", "what is missing"])
    for runtime in report.runtimes:
        _add(runtimes, runtime)
    present.show(runtimes)
    if trusted := [runtime.name for runtime in report.runtimes if runtime.untried]:
        present.show(f"Not loaded: {', '.join(trusted)}; their libraries are whole. dmformer verify loads them.\n")
    tools = present.table("For export, training and signing", ["", "package", "version", "what is missing"])
    for tool in report.tools:
        _add(tools, tool)
    present.show(tools)
    if report.artifacts:
        artifacts = present.table(f"Bundle {bundle}", ["", "format", "precision", "here"])
        for artifact in report.artifacts:
            mark = present.mark(artifact.runs, bad="build" if artifact.buildable else "no")
            present.add_row(artifacts, [mark, artifact.format, artifact.precision, _verdict(artifact, bundle)])
        present.show(artifacts)


def _verdict(artifact: ArtifactStatus, bundle: Path | None) -> str:
    verdict = ["runs here"] if artifact.runs else [] if artifact.held else ["not in the bundle"]
    if artifact.chosen:
        verdict.append("--runtime auto takes it")
    if artifact.reason:
        verdict.append(artifact.reason)
    if artifact.buildable:
        verdict.append(f"can be built here: dmformer build {shlex.quote(str(bundle))} --format {artifact.format}")
    elif artifact.not_buildable is not None and artifact.not_buildable not in verdict:
        verdict.append(f"cannot be built here: {artifact.not_buildable}")
    return "; ".join(verdict)


def _add(listing: Table, component: Component) -> None:
    mark = present.mark(component.available)
    present.add_row(listing, [mark, component.name, component.version or "-", component.reason or ""])
