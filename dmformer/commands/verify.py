"""``dmformer verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _present as present
from dmformer.errors import CheckFailed

if TYPE_CHECKING:
    from rich.text import Text

    from dmformer.verify.parity import ParityReport


def verify(
    bundle: present.BundleArgument = None,
    runtime: present.RuntimeOption = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Compare with this checkpoint; needs PyTorch."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Compare on these images too; needs PyTorch."),
    ] = None,
    json_file: present.JsonOption = None,
) -> None:
    """Check that a bundle's runtimes answer as PyTorch does.

    Without --weights and --images the reference is in the bundle, and PyTorch is not needed.
    """
    from dmformer.verify.api import verify as run_verify
    from dmformer.verify.parity import failure

    present.check_json_target(json_file)
    opened = present.bundle_named(bundle)
    with present.stages() as shown:
        report = run_verify(opened, runtimes=runtime or [], weights=weights, images=images, stage=shown.stage)
    _show(report, json_file)
    present.write_json(report, json_file)
    if not report.passed:
        raise CheckFailed(failure(report))


def _show(report: ParityReport, json_file: str | None) -> None:
    columns = ["", "stage", "runtime", "precision", "batch", "max abs", "of limit", "cosine", "top-1"]
    listing = present.table("Parity with PyTorch", columns, numeric=columns[4:])
    for check in sorted(report.checks, key=lambda check: check.passed):  # what failed comes first
        share = None if check.max_abs is None or not check.limit else check.max_abs / check.limit
        cells: list[str | Text] = [
            present.mark(check.passed, "FAILED"),
            check.stage,
            check.runtime,
            check.precision,
            str(check.batch),
            "-" if check.max_abs is None else f"{check.max_abs:.2g}",
            "-" if share is None else f"{share:.0%}",
            "-" if check.cosine is None else f"{check.cosine:.6f}",
            "-" if check.top1_agreement is None else f"{check.top1_agreement:.0%}",
        ]
        present.add_row(listing, cells)
    present.show(listing, json_file)
    for limit, source in dict.fromkeys((check.limit, check.limit_source) for check in report.checks):
        if limit is not None:
            present.show(f"limit {limit:.2g}: {source}", json_file)
    for check in report.checks:
        if check.passed and check.reason is not None:
            present.show(f"{check.runtime} {check.precision}: {check.reason}", json_file)
    for reason in report.skipped:
        present.say(f"not checked: {reason}")
