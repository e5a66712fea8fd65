"""``dmformer inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.machine import processor_title

_MOST_SENSITIVE = 5

if TYPE_CHECKING:
    from dmformer.bundle.manifest import Manifest


def inspect(
    bundle: options.BundleArgument = None,
    json_file: options.JsonOption = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Show what is in a bundle."""
    opened = options.find_bundle(bundle)
    present.write_json(opened.manifest, json_file)
    if json_file == "-":
        return
    _show(opened.manifest, str(opened.source))


def _show(manifest: Manifest, root: str) -> None:
    model, pre = manifest.model, manifest.preprocessing
    facts = present.table(f"Bundle {root}", ["", "what it is"])
    evidence = manifest.evidence.parity
    int8 = [artifact for artifact in manifest.artifacts if artifact.precision == "int8"]
    measured = [manifest.evidence.accuracy] if manifest.evidence.accuracy is not None else []
    for name, value in (
        (
            "model",
            f"{model.arch}, {model.task}" + (f", {manifest.class_count} classes" if manifest.class_count else ""),
        ),
        ("size", f"{model.parameters / 1e6:.2f} M parameters, {model.macs / 1e9:.3g} GMACs an image"),
        ("weights", model.weights_origin),
        ("form", "deploy: everything linear folded" if model.deploy_form else "training: as PyTorch has it"),
        (
            "input",
            f"{pre.image_size}x{pre.image_size} {pre.channels}, {pre.interpolation}, crop {pre.crop_fraction:g}"
            + ("; height and width are open" if manifest.open_size else ""),
        ),
        *(("output", f"{output.name}, {_shape(output.shape)}") for output in manifest.outputs),
        ("normalised", f"mean {_numbers(pre.mean)}, deviation {_numbers(pre.std)}"),
        ("parity", f"{_HELD[evidence.passed]}, {evidence.checks} checks, {evidence.failed} failed"),
        *(
            ("checked on", processor_title(msgspec.structs.asdict(checked)))
            for checked in [manifest.evidence.processor]
            if checked is not None
        ),
        *(
            (
                "asked on",
                f"{one.processor}: {one.format} {one.precision} by {one.engine}, {_HELD[one.passed]}, {one.asked}",
            )
            for one in manifest.evidence.processors
        ),
        *(("int8 weights", bits) for bits in sorted({_WEIGHTS[artifact.full_range] for artifact in int8})),
        *(("measured", f"{cached.made}: {cached.what}") for cached in manifest.evidence.cached),
        *(("accuracy", f"measured on {accuracy.images} calibration images") for accuracy in measured),
        ("made by", f"dmformer {manifest.tool_version}"),
        *(("note", note) for note in model.notes),
    ):
        present.add_row(facts, [name, value])
    present.show(facts)
    listing = present.table("Artifacts", ["format", "precision", "size", "file", "built with"], numeric=["size"])
    for artifact in manifest.artifacts:
        built = ", ".join(f"{name} {version}" for name, version in artifact.built_with.items())
        if tied := present.tied_to(artifact):
            built += f" for {tied}"
        size = present.megabytes(artifact.bytes)
        present.add_row(listing, [artifact.format, artifact.precision, size, artifact.files[0].path, built])
    present.show(listing)
    if manifest.evidence.latency is not None:
        present.show(present.artifact_findings(manifest.artifacts))
    for precision, sensitivity in {item.precision: item.sensitivity for item in manifest.artifacts}.items():
        if sensitivity:
            most = sorted(sensitivity.items(), key=lambda pair: -pair[1])[:_MOST_SENSITIVE]
            said = ", ".join(f"{block} {error:.1%}" for block, error in most)
            present.show(f"most sensitive to {precision} (error of the outputs over their spread): {said}")
    for precision, kept in {item.precision: item.kept_in_fp32 for item in manifest.artifacts}.items():
        for block, reason in kept.items():
            present.show(f"{block} stays in fp32 at {precision}: {reason}")


_HELD = {True: "held", False: "FAILED"}
_WEIGHTS = {
    False: "7 bits: no processor saturates",
    True: "8 bits: for processors with VNNI (x86) or the dot product (Arm), and for TensorRT",
}


def _shape(shape: tuple[int | str, ...]) -> str:
    return " x ".join(map(str, shape))


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
