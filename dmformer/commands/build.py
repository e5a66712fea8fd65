"""``dmformer build``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.export.options import EngineOptions

if TYPE_CHECKING:
    from dmformer.export.build import BuildReport


def build(
    format_name: Annotated[
        str, typer.Option("--format", metavar="NAME", help="tensorrt (trt), openvino (ov) or ncnn.")
    ],
    bundle: options.BundleArgument = None,
    precisions: options.PrecisionOption = None,
    flavour: options.FlavourOption = EngineOptions.flavour,
    targets: options.TargetOption = None,
    min_batch: options.MinBatchOption = EngineOptions.min_batch,
    opt_batch: options.OptBatchOption = EngineOptions.opt_batch,
    max_batch: options.MaxBatchOption = EngineOptions.max_batch,
    workspace_mb: options.WorkspaceOption = EngineOptions.workspace_mb,
    json_file: options.JsonOption = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Build an engine on this machine from the ONNX files of a bundle, verify it, and put it into the bundle.

    Needs neither PyTorch nor onnx: it is what a device does.
    """
    from dmformer.export.build import build as run_build

    engine = EngineOptions(flavour, targets or (), min_batch, opt_batch, max_batch, workspace_mb)
    opened = options.find_bundle(bundle)
    with present.stages() as shown:
        found = run_build(opened, format_name, precisions=precisions or [], engine=engine, stage=shown.stage)
    _show(found, json_file)
    present.write_json(found, json_file)


def _show(found: BuildReport, json_file: str | None) -> None:
    listing = present.table("Built", ["file", "precision", "size", "SHA-256", "for"], numeric=["size"])
    for artifact in found.artifacts:
        for file in artifact.files:
            cells = [file.path, artifact.precision, present.megabytes(file.bytes), file.sha256[:12] + "…"]
            present.add_row(listing, [*cells, present.tied_to(artifact) or "any machine"])
    present.show(listing, json_file)
    for reason in found.parity.skipped:
        present.show(f"not done: {reason}", json_file)
    if found.parity.checks:
        present.show(f"Parity with PyTorch's stored answers: all {len(found.parity.checks)} checks held.", json_file)
    for note in found.notes:
        present.say(f"note: {note}")
