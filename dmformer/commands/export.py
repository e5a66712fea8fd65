"""``dmformer export``."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _options
from dmformer.commands import _present as present
from dmformer.commands._options import parse_numbers, parse_pairs
from dmformer.data.preprocessing import Interpolation
from dmformer.errors import CheckFailed, StageFailed
from dmformer.export.options import ChannelOrder, EngineOptions, ExportOptions
from dmformer.task import Task, class_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bundle.manifest import Model
    from dmformer.export.cached import ExportResult
    from dmformer.export.plan import ExportPlan
    from dmformer.models.checkpoint import Checkpoint

_option = functools.partial(_options.option, ExportOptions)


def export(
    weights: Annotated[Path | None, _option("weights", "--weights", metavar="FILE")] = None,
    weights_key: Annotated[str | None, _option("weights_key", "--weights-key", metavar="KEY")] = None,
    arch: Annotated[str | None, _option("arch", "--arch", metavar="NAME")] = ExportOptions.arch,
    module: Annotated[str | None, _option("module", "--module", metavar="FILE.py:NAME")] = ExportOptions.module,
    module_options: Annotated[
        list[str] | None, _option("module_options", "--module-option", metavar="KEY=VALUE")
    ] = None,
    task: Annotated[Task | None, _option("task", "--task", metavar="NAME", case_sensitive=False)] = ExportOptions.task,
    formats: Annotated[list[str] | None, _option("formats", "--format", metavar="NAME")] = None,
    precisions: Annotated[list[str] | None, _option("precisions", "--precision", metavar="NAME")] = None,
    output: Annotated[Path, _option("output", "--output", metavar="DIR")] = Path(ExportOptions.output),
    image_size: Annotated[int | None, _option("image_size", "--image-size")] = ExportOptions.image_size,
    preprocessing: Annotated[Path | None, _option("preprocessing", "--preprocessing", metavar="FILE")] = None,
    mean: Annotated[str | None, _option("mean", "--mean", metavar="A,B,C")] = None,
    std: Annotated[str | None, _option("std", "--std", metavar="A,B,C")] = None,
    interpolation: Annotated[Interpolation | None, _option("interpolation", "--interpolation", metavar="NAME")] = None,
    crop_fraction: Annotated[float | None, _option("crop_fraction", "--crop-fraction", metavar="F")] = None,
    channel_order: Annotated[
        ChannelOrder | None, _option("channel_order", "--channel-order", case_sensitive=False)
    ] = None,
    classes: Annotated[Path | None, _option("classes", "--classes", metavar="FILE")] = None,
    open_size: Annotated[bool, _option("open_size", "--dynamic-size")] = ExportOptions.open_size,
    images: Annotated[Path | None, _option("images", "--images", metavar="DIR")] = None,
    calibration: Annotated[Path | None, _option("calibration", "--calibration", metavar="DIR")] = None,
    max_accuracy_drop: Annotated[
        float, _option("max_accuracy_drop", "--max-accuracy-drop", metavar="POINTS")
    ] = ExportOptions.max_accuracy_drop,
    weight_bits: Annotated[int, _option("weight_bits", "--weight-bits", metavar="7|8")] = ExportOptions.weight_bits,
    deploy_form: Annotated[bool, _option("deploy_form", "--deploy-form/--no-deploy-form")] = ExportOptions.deploy_form,
    options: Annotated[list[str] | None, _option("options", "--model-option", metavar="KEY=VALUE")] = None,
    key_map: Annotated[Path | None, _option("key_map", "--key-map", metavar="FILE")] = None,
    save_key_map: Annotated[Path | None, _option("save_key_map", "--save-key-map", metavar="FILE")] = None,
    seed: Annotated[int, _option("seed", "--seed", min=0, max=2**63 - 1)] = ExportOptions.seed,
    flavour: _options.FlavourOption = EngineOptions.flavour,
    targets: _options.TargetOption = None,
    min_batch: _options.MinBatchOption = EngineOptions.min_batch,
    opt_batch: _options.OptBatchOption = EngineOptions.opt_batch,
    max_batch: _options.MaxBatchOption = EngineOptions.max_batch,
    workspace_mb: _options.WorkspaceOption = EngineOptions.workspace_mb,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and stop.")] = False,
    force: Annotated[bool, _option("force", "--force")] = ExportOptions.force,
    use_cache: Annotated[bool, _option("use_cache", "--cache/--no-cache")] = ExportOptions.use_cache,
    debug: _options.DebugOption = False,
) -> None:
    """Take a checkpoint to a verified bundle: ONNX, OpenVINO, TensorRT, ncnn.

    Without --weights and --arch, a trained demonstration checkpoint that ships with the package is exported: one of
    digits or, with --task segmentation, one of scenes made of them.
    """
    from dmformer.bundle.writer import check_destination
    from dmformer.export.run import plan_export, run_export

    check_destination(output)
    planned: list[ExportPlan] = []

    def announce(plan: ExportPlan) -> None:
        planned.append(plan)
        _say_source(plan.network.weights, plan.network.seed, plan.network.checkpoint, plan.network.notes)
        for note in plan.expected_saturation:
            present.say(f"note: {note}")

    asked = ExportOptions(
        weights=weights,
        weights_key=weights_key,
        arch=arch,
        module=module,
        module_options=parse_pairs(module_options or [], "--module-option", "num_classes=10"),
        task=task,
        formats=formats or ExportOptions.formats,
        precisions=precisions or ExportOptions.precisions,
        output=output,
        image_size=image_size,
        preprocessing=preprocessing,
        mean=parse_numbers(mean, "--mean"),
        std=parse_numbers(std, "--std"),
        interpolation=interpolation,
        crop_fraction=crop_fraction,
        channel_order=channel_order,
        classes=classes,
        open_size=open_size,
        images=images,
        calibration=calibration,
        max_accuracy_drop=max_accuracy_drop,
        weight_bits=weight_bits,
        deploy_form=deploy_form,
        options=parse_pairs(options or [], "--model-option", "gate_input=x_prime"),
        key_map=key_map,
        save_key_map=save_key_map,
        seed=seed,
        engine=EngineOptions(flavour, targets or (), min_batch, opt_batch, max_batch, workspace_mb),
        force=force,
        use_cache=use_cache and not dry_run,
    )
    if dry_run:
        plan = plan_export(asked)
        announce(plan)
        plan.check_possible()
        _show_plan(plan)
        return
    with present.stages() as shown:
        result = run_export(replace(asked, stage=shown.stage), announce)
    if not planned:  # the cache had it
        model = result.manifest.model
        _say_source(model.weights, model.seed, model, model.notes)
    _show_result(result)
    _options.remember_bundle(output)
    if result.broken:
        raise StageFailed(f"{'; '.join(result.broken)}; the rest was written to {output}")
    if not result.parity.passed:
        from dmformer.verify.report import failure

        raise CheckFailed(
            f"{failure(result.parity)}; the bundle was written to {output} all the same, as --force asked"
        )


def _say_source(weights: str, seed: int | None, model: Checkpoint | Model, notes: Sequence[str]) -> None:
    training = model.training
    if weights == "demonstration":
        top1, miou = training.get("held_out_top1"), training.get("held_out_miou")
        said = f", {top1:.1%} on held-out digits" if isinstance(top1, float) else ""
        said = f", mIoU {miou:.1%} on held-out scenes" if isinstance(miou, float) else said
        present.say(f"no --weights given: exporting the demonstration checkpoint that ships with dmformer{said}")
    if weights == "random":
        present.say(
            f"warning: no --weights given: {model.arch} gets random weights (seed {seed}); "
            "good for timing, its answers mean nothing"
        )
    for note in notes:
        present.say(f"note: {note}")


def _show_plan(plan: ExportPlan) -> None:
    checkpoint = plan.network.checkpoint
    size, config = checkpoint.preprocessing.image_size, checkpoint.config
    classes = f", {class_count(config.task, config.num_classes)} classes" if config.task != "features" else ""
    present.say(f"{checkpoint.arch}, {config.task}{classes}, {size}x{size} pixels")
    present.say(f"would write to {plan.output}:")
    for path in plan.files:
        present.show(path)
    for reason in plan.not_made:
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
    if manifest.evidence.accuracy is not None and manifest.evidence.accuracy.label_doubt is not None:
        present.say(f"note: calibration images: {manifest.evidence.accuracy.label_doubt}")
    if result.not_kept is not None:
        present.say(f"note: the cache could not be written: {result.not_kept}")
    evidence = manifest.evidence.parity
    worst = max((check.max_abs or 0.0) / check.limit for check in result.parity.checks if check.limit)
    present.show(
        f"Parity with PyTorch: {evidence.checks - evidence.failed} of {evidence.checks} checks held; "
        f"the largest difference is {worst:.0%} of its limit. Simplification: {result.manifest.simplification.reason}."
    )
