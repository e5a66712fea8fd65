"""One artifact: made from an ONNX file by its format's converter, and asked in its runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dmformer.bundle.manifest import Artifact, file_entry
from dmformer.export.formats import convert
from dmformer.runtimes import registry
from dmformer.verify.answers import Answers, ask
from dmformer.verify.parity import check_answers, check_artifact, check_consistency, check_other_size, references
from dmformer.verify.report import Check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dmformer.bundle.golden import Golden
    from dmformer.export.formats import ConversionSource
    from dmformer.runtimes.base import Runtime


@dataclass(frozen=True)
class Built:
    """An artifact as its converter made it, and its files."""

    artifact: Artifact
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Proven:
    """An artifact with all that was found of it, and its checks."""

    artifact: Artifact
    checks: tuple[Check, ...]


def make_artifact(
    row: registry.RuntimeEntry,
    source: ConversionSource,
    root: Path,
    *,
    promised_share: float,
    kept_in_fp32: Mapping[str, str],
    sensitivity: Mapping[str, float],
    weight_bits: int | None,
) -> Artifact:
    """Convert into ``root/FORMAT/PRECISION``, which exists; what is known of the ONNX file holds for the artifact too.

    Raises:
        StageFailed: the converter failed.
        UnavailableError: a package that it needs is not installed.
    """
    with source.stage(f"convert to {row.format} {source.precision}"):
        converted = convert(row, source, root / row.format / source.precision)
        files = tuple(file_entry(root, path) for path in converted.files)
    return Artifact(
        format=row.format,
        precision=source.precision,
        files=files,
        built_with=converted.built_with,
        promised_share=promised_share,
        kept_in_fp32=dict(kept_in_fp32),
        sensitivity=dict(sensitivity),
        weight_bits=weight_bits,
        target=converted.target,
    )


def runtime_of(row: registry.RuntimeEntry, artifact: Artifact, root: Path) -> Runtime:
    """The runtime of an artifact below ``root``, not yet open.

    Raises:
        UnavailableError: it cannot run on this machine.
    """
    adapter = registry.available_adapter(row)
    return adapter(root / artifact.files[0].path, precision=artifact.precision, target=artifact.target)


def check_onnx(path: Path, precision: str, golden: Golden) -> list[Check]:
    """The checks of an ONNX file in onnxruntime, in place of an engine that cannot run here."""
    adapter = registry.available_adapter(registry.entry("onnxruntime"))
    answers = ask(adapter(path, precision=precision), golden.inputs, golden.thinned, other_size=golden.other_size)
    compared_with = references(golden, precision)
    return [
        *check_answers("onnx", answers, compared_with),
        *check_consistency(answers, compared_with),
        *check_other_size("onnx", answers, golden),
    ]


def proven(
    row: registry.RuntimeEntry, artifact: Artifact, root: Path, golden: Golden, known: Answers | None = None
) -> tuple[Artifact, list[Check]]:
    """The artifact with the precision of its layers, and its checks.

    Args:
        row: of its format.
        artifact: below ``root``.
        root: the bundle.
        golden: what to ask.
        known: what the runtime answered with a file of the same content.
    """
    answers = known or ask(runtime_of(row, artifact, root), golden.inputs, golden.thinned, other_size=golden.other_size)
    checks = check_artifact(answers, golden, row, artifact)
    return msgspec.structs.replace(artifact, layers=answers.layers), checks
