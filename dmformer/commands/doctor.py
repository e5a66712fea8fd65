"""``dmformer doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _present as present

if TYPE_CHECKING:
    from rich.table import Table

    from dmformer.bundle.diagnosis import Finding


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Also say which of its artifacts run here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show what this machine can run, and what is missing."""
    from dmformer.bundle.diagnosis import diagnose
    from dmformer.bundle.reader import open_bundle

    found = diagnose(open_bundle(bundle) if bundle is not None else None)
    if as_json:
        present.write_json(found, "-")
        return
    present.show(f"{found.machine['cpu']}, {found.machine['cores']} cores, {found.machine['os']}, "
                 f"Python {found.machine['versions']['python']}")  # fmt: skip
    runtimes = present.table("Runtimes", ["", "runtime", "version", "what is missing"])
    for runtime in found.runtimes:
        _add(runtimes, runtime)
    present.show(runtimes)
    tools = present.table("For export, training and signing", ["", "package", "version", "what is missing"])
    for tool in found.tools:
        _add(tools, tool)
    present.show(tools)
    if found.artifacts:
        artifacts = present.table(f"Bundle {bundle}", ["", "format", "precision", "runs here"])
        for artifact in found.artifacts:
            mark = present.mark(artifact.runs)
            present.add_row(artifacts, [mark, artifact.format, artifact.precision, artifact.reason or "yes"])
        present.show(artifacts)


def _add(listing: Table, finding: Finding) -> None:
    mark = present.mark(finding.available)
    present.add_row(listing, [mark, finding.name, finding.version or "-", finding.reason or ""])
