"""``dmformer eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _present as present

if TYPE_CHECKING:
    from dmformer.bundle.manifest import Accuracy
    from dmformer.verify.evaluate import EvalReport


def evaluate(
    data: Annotated[
        Path,
        typer.Option("--data", metavar="DIR", help="Images, in folders named after their classes; or loose ones."),
    ],
    bundle: present.BundleArgument = None,
    runtime: present.RuntimeOption = None,
    precision: present.PrecisionOption = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Checkpoint to agree with; otherwise the bundle's own."),
    ] = None,
    json_file: present.JsonOption = None,
) -> None:
    """Measure accuracy on labelled images, and agreement with PyTorch, for every runtime and precision of a bundle."""
    from dmformer.verify.evaluate import evaluate as run_evaluate

    present.check_json_target(json_file)
    opened = present.bundle_named(bundle)
    with present.stages() as shown:
        report = run_evaluate(
            opened, data, runtimes=runtime or [], precisions=precision or [], weights=weights, stage=shown.stage
        )
    _show(report, json_file)
    present.write_json(report, json_file)


def _show(report: EvalReport, json_file: str | None) -> None:
    columns = ["runtime", "top-1", "95 % interval", "top-5", "agrees with PyTorch"]
    title = f"{report.images} images of {report.data}"
    listing = present.table(title, columns, numeric=columns[1:])
    rows: list[tuple[str, Accuracy]] = [(f"{row.runtime} {row.precision}", row) for row in report.results]
    if report.torch is not None:
        rows.insert(0, ("PyTorch", report.torch))
    for name, row in rows:
        interval = row.top1_interval
        cells = [
            name,
            present.percent(row.top1),
            "-" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}",
            present.percent(row.top5),
            present.percent(row.agreement_with_torch),
        ]
        present.add_row(listing, cells)
    present.show(listing, json_file)
    for result in report.results:
        if result.paired is not None and (result.paired.torch_only or result.paired.runtime_only):
            pair = result.paired
            present.show(
                f"{result.runtime} {result.precision}: PyTorch alone is right on {pair.torch_only} images, the runtime "
                f"alone on {pair.runtime_only} (McNemar's exact test: p = {pair.p_value:.2g})",
                json_file,
            )
    for note in report.notes:
        present.say(f"note: {note}")
    for reason in report.skipped:
        present.say(f"not measured: {reason}")
    if not report.labelled:
        present.say("no accuracy without labels; expected a subfolder for each class")
