"""``dmformer eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.bundle.manifest import Accuracy
    from dmformer.verify.evaluate import EvalReport


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Images, in folders named after their classes or, for segmentation, as ADE20K has them; or loose.",
        ),
    ],
    bundle: options.BundleArgument = None,
    runtimes: options.RuntimeOption = None,
    precisions: options.PrecisionOption = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Checkpoint to agree with; otherwise the bundle's own."),
    ] = None,
    weights_key: options.WeightsKeyOption = None,
    module: options.ModuleOption = None,
    module_options: options.ModuleArgumentsOption = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="End at an image that cannot be read; otherwise it is named and left out."),
    ] = False,
    json_file: options.JsonOption = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Measure accuracy on labelled images, and agreement with PyTorch, for every runtime and precision of a bundle.

    Images that cannot be read are left out, counted and named, and the exit code is 0; with --strict, the first is an
    error with exit code 2.
    """
    from dmformer.verify.evaluate import evaluate as run_evaluate

    opened = options.find_bundle(bundle)
    with present.stages() as shown:
        report = run_evaluate(
            opened,
            data,
            runtimes=runtimes or [],
            precisions=precisions or [],
            weights=weights,
            weights_key=weights_key,
            module=module,
            module_options=options.parse_pairs(module_options or [], "--module-option", "num_classes=10"),
            skip_unreadable=not strict,
            stage=shown.stage,
        )
    _show(report, json_file)
    present.write_json(report, json_file)


def _show(report: EvalReport, json_file: str | None) -> None:
    rows: list[tuple[str, Accuracy]] = [(f"{row.runtime} {row.precision}", row) for row in report.results]
    if report.torch is not None:
        rows.insert(0, ("PyTorch", report.torch))
    shown = _PIXEL_COLUMNS if report.task == "segmentation" else _CLASS_COLUMNS
    listing = present.table(f"{report.images} images of {report.data}", ["runtime", *shown], numeric=list(shown))
    for name, row in rows:
        present.add_row(listing, [name, *(cell(row) for cell in shown.values())])
    present.show(listing, json_file)
    _show_weakest(rows[0], report.classes, json_file)
    for result in report.results:
        if result.paired is not None and (result.paired.torch_only or result.paired.runtime_only):
            pair = result.paired
            present.show(
                f"{result.runtime} {result.precision}: PyTorch alone is right on {pair.torch_only} images, the runtime "
                f"alone on {pair.runtime_only} (McNemar's exact test: p = {pair.p_value:.2g})",
                json_file,
            )
    if report.unreadable:
        count = f"{len(report.unreadable)} of {len(report.unreadable) + report.images}"
        present.say(f"note: {count} images cannot be read and were left out:")
    for reason in report.unreadable[:_MOST_NAMED]:
        present.say(f"  {reason}")
    for note in report.notes:
        present.say(f"note: {note}")
    for reason in report.skipped:
        present.say(f"not measured: {reason}")
    if not report.labelled:
        layout = "images/validation and annotations/validation"
        present.say(
            "no accuracy without labels; expected "
            + (layout if report.task == "segmentation" else "a subfolder for each class")
        )


def _show_weakest(row: tuple[str, Accuracy], classes: tuple[str, ...], json_file: str | None) -> None:
    """The classes whose pixels are found worst."""
    name, accuracy = row
    known = [(iou, index) for index, iou in enumerate(accuracy.iou or ()) if iou is not None]
    if known:
        weakest = sorted(known)[:_WEAKEST]
        said = ", ".join(f"{classes[index] if classes else index} {iou:.1%}" for iou, index in weakest)
        present.show(f"weakest classes by intersection over union, {name}: {said}", json_file)


def _interval(row: Accuracy) -> str:
    interval = row.top1_interval
    return "-" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"


_WEAKEST = 5
_MOST_NAMED = 10  # images that cannot be read; the JSON report has all
_CLASS_COLUMNS: dict[str, Callable[[Accuracy], str]] = {
    "top-1": lambda row: present.percent(row.top1),
    "95 % interval": _interval,
    "top-5": lambda row: present.percent(row.top5),
    "agrees with PyTorch": lambda row: present.percent(row.agreement_with_torch),
}
_PIXEL_COLUMNS: dict[str, Callable[[Accuracy], str]] = {
    "mIoU": lambda row: present.percent(row.miou),
    "pixel accuracy": lambda row: present.percent(row.pixel_accuracy),
    "agrees with PyTorch": lambda row: present.percent(row.agreement_with_torch),
}
