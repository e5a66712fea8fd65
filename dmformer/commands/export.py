"""``dmformer export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.errors import StageFailed
from dmformer.task import Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dmformer.export.api import ExportOptions
    from dmformer.export.request import ExportRequest, ExportResult


def export(
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="Checkpoint: .safetensors, .pt or .pth.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch", metavar="NAME", help="dmformer_nano, _t, _s or _l; with _fpn or _upernet after nano or s too."
        ),
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            "--task",
            metavar="NAME",
            case_sensitive=False,
            help="features: the four stage maps, without a head. Otherwise the network's own.",
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="onnx, openvino (ov), tensorrt (trt), torch or all that can be made here. Repeatable; otherwise onnx.",
        ),
    ] = None,
    precisions: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            metavar="NAME",
            help="fp32, fp16 or int8, repeatable; otherwise fp32. auto: the fastest here within the accuracy budget.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder of the bundle.")] = Path(
        "dmformer-bundle"
    ),
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Side of the input in pixels; otherwise the checkpoint's.")
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Leave height and width open (segmentation: multiples of 32).")
    ] = False,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Real images to compare on; noise fills up.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="DIR",
            help="Images like those the device will see, for int8, 512 of them at most; in folders named after their "
            "classes, or not.",
        ),
    ] = None,
    max_accuracy_drop: Annotated[
        float,
        typer.Option(
            "--max-accuracy-drop",
            metavar="POINTS",
            help="Percentage points of accuracy that fp16 and int8 may lose on the calibration images.",
        ),
    ] = 0.5,
    weight_bits: Annotated[
        int,
        typer.Option(
            "--weight-bits",
            metavar="7|8",
            help="Bits of int8 weights: 7 is right on every processor; 8 for fleets known to have VNNI (x86) or the "
            "dot product (Arm), and for TensorRT.",
        ),
    ] = 7,
    deploy_form: Annotated[
        bool,
        typer.Option(
            "--deploy-form/--no-deploy-form", help="Fold everything linear before tracing: the same function, faster."
        ),
    ] = True,
    model_options: Annotated[
        list[str] | None,
        typer.Option(
            "--model-option",
            metavar="KEY=VALUE",
            help="A field of the model's configuration, like gate_input=x_prime or dilations=[1,1,1]. Repeatable.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the random weights that --arch alone exports.")
    ] = 0,
    flavour: options.FlavourOption = "auto",
    target: options.TargetOption = None,
    min_batch: options.MinBatchOption = 1,
    opt_batch: options.OptBatchOption = 1,
    max_batch: options.MaxBatchOption = 8,
    workspace: options.WorkspaceOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write the bundle although a parity check failed.")] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Make and measure everything anew, and keep nothing (dmformer cache).")
    ] = False,
    debug: options.DebugOption = False,
) -> None:
    """Take a checkpoint to a verified bundle: ONNX, OpenVINO, TensorRT.

    Without --weights and --arch, a trained demonstration checkpoint that ships with the package is exported: one of
    digits or, with --task segmentation, one of scenes made of them.
    """
    from dmformer._optional import require
    from dmformer.bundle.writer import check_destination
    from dmformer.cache import Cache, open_cache
    from dmformer.export.formats import EngineOptions
    from dmformer.export.known import KnownExport

    check_destination(output)
    arguments: ExportOptions = {
        "arch": arch,
        "task": task,
        "formats": formats or ["onnx"],
        "precisions": precisions or ["fp32"],
        "output": output,
        "image_size": image_size,
        "images": images,
        "calibration": calibration,
        "max_accuracy_drop": max_accuracy_drop,
        "weight_bits": weight_bits,
        "options": options.parse_pairs(model_options or [], "--model-option", "gate_input=x_prime"),
        "seed": seed,
        "deploy_form": deploy_form,
        "open_size": dynamic_size,
        "force": force,
        "engine": EngineOptions.of(flavour, target or (), min_batch, opt_batch, max_batch, workspace),
    }
    known = KnownExport(Cache() if no_cache or dry_run else open_cache(), weights, arguments)
    result = known.take(output)  # before PyTorch is imported, which takes seconds
    if result is None:
        require("torch", extra="export", purpose="dmformer export")
        from dmformer.export.api import make_request
        from dmformer.export.pipeline import export as run_export
        from dmformer.export.request import check_possible, expected_saturation

        request = make_request(weights, **arguments)
        model = request.checkpoint
        _say_source(request.weights, model.arch, request.seed, model.notes, model.training)
        for note in expected_saturation(request):
            present.say(f"note: {note}")
        if dry_run:
            check_possible(request)
            _show_plan(request)
            return
        with present.stages() as shown:
            result = run_export(request, shown.stage, known)
    else:
        taken = result.manifest.model
        _say_source(taken.weights, taken.arch, taken.seed, taken.notes, taken.training)
    options.remember_bundle(output)
    _show_result(result)
    if result.broken:
        raise StageFailed(f"{'; '.join(result.broken)}; the rest was written to {output}")
    if not result.parity.passed:
        from dmformer.errors import CheckFailed
        from dmformer.verify.report import failure

        raise CheckFailed(
            f"{failure(result.parity)}; the bundle was written to {output} all the same, as --force asked"
        )


def _say_source(weights: str, arch: str, seed: int | None, notes: Sequence[str], training: Mapping[str, Any]) -> None:
    if weights == "demonstration":
        top1, miou = training.get("held_out_top1"), training.get("held_out_miou")
        said = f", {top1:.1%} on held-out digits" if isinstance(top1, float) else ""
        said = f", mIoU {miou:.1%} on held-out scenes" if isinstance(miou, float) else said
        present.say(f"no --weights given: exporting the demonstration checkpoint that ships with dmformer{said}")
    if weights == "random":
        present.say(
            f"warning: no --weights given: {arch} gets random weights (seed {seed}); "
            "good for timing, its answers mean nothing"
        )
    for note in notes:
        present.say(f"note: {note}")


def _show_plan(request: ExportRequest) -> None:
    from dmformer.export.request import planned_artifacts

    size = request.checkpoint.preprocessing.image_size
    config = request.checkpoint.config
    classes = f", {config.num_classes} classes" if config.task != "features" else ""
    present.say(f"{request.checkpoint.arch}, {config.task}{classes}, {size}x{size} pixels")
    present.say(f"would write to {request.output}:")
    for path in planned_artifacts(request):
        present.show(path)
    for reason in request.not_made:
        present.say(f"not: {reason}")


def _show_result(result: ExportResult) -> None:
    listing = present.table(f"Bundle {result.output}", ["file", "precision", "size", "SHA-256"], numeric=["size"])
    for artifact in result.manifest.artifacts:
        for file in artifact.files:
            size = present.megabytes(file.bytes)
            present.add_row(listing, [file.path, artifact.precision, size, file.sha256[:12] + "…"])
    present.show(listing)
    manifest = result.manifest
    if manifest.evidence.latency is not None:
        present.show(present.artifact_findings(manifest.artifacts))
    for reason in result.parity.skipped:
        present.show(f"not done: {reason}")
    for cached in manifest.evidence.cached:
        present.say(f"from the cache: {cached.what}, measured {cached.made}")
    if manifest.evidence.cached:
        present.say("--no-cache makes and measures it anew")
    if result.not_kept is not None:
        present.say(f"note: the cache could not be written: {result.not_kept}")
    evidence = manifest.evidence.parity
    worst = max((check.max_abs or 0.0) / check.limit for check in result.parity.checks if check.limit)
    present.show(
        f"Parity with PyTorch: {evidence.checks - evidence.failed} of {evidence.checks} checks held; "
        f"the largest difference is {worst:.0%} of its limit. Simplification: {result.manifest.simplification.reason}."
    )
