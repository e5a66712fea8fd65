"""The proof of an ONNX file at a reduced precision, before any engine sees it; float16 is mended where it can be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dmformer.bundle.golden import Golden
from dmformer.errors import StageFailed
from dmformer.export.precisions import PrecisionFile
from dmformer.graph import onnx_file
from dmformer.graph.onnx_file import typed_share
from dmformer.verify.executors import emulation_of, graph_outputs, input_name, literal
from dmformer.verify.inner import check_reduced
from dmformer.verify.localize.nodes import find_island
from dmformer.verify.report import Check

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from dmformer.export.precisions import PrecisionSource

_SEEN_IMAGES = 4  # on which PyTorch checks how far the inputs of int8 layers reach


@dataclass(frozen=True)
class Reduced:
    """An ONNX file at a precision, golden outputs with its own, and its checks."""

    file: PrecisionFile
    golden: Golden
    checks: tuple[Check, ...] = ()


def prove(
    precision: str, made: PrecisionFile, form: Callable[[], nn.Module], source: PrecisionSource, golden: Golden
) -> tuple[PrecisionFile, Golden, list[Check]]:
    """The file, golden outputs with its own, and its checks; a float16 file is mended where an island is enough.

    Args:
        precision: its name.
        made: the ONNX file at it.
        form: makes the network in the form that was traced.
        source: what the file was made from.
        golden: with the float32 file's answers.

    Raises:
        StageFailed: answers at the precision are not finite, or it drowns what outputs differ by between images.
    """
    broken: StageFailed | None = None
    for _ in range(len(golden.inputs) + 1):
        broken = None
        try:
            completed, checks = reduced_golden(precision, made, form(), source, golden)
        except StageFailed as error:
            broken = error
        if precision != "fp16" or (broken is None and all(check.passed for check in checks)):
            break
        float16 = onnx_file.read(made.onnx)
        answers = graph_outputs(float16, literal(float16, {input_name(float16): golden.inputs}))
        worst = golden.worst_row(golden.thinned(answers))
        island = find_island(onnx_file.read(source.onnx), worst, made.kept_in_fp32, source.scratch)
        if not island.nodes:
            break
        reason = "beyond the error of float16 there"
        share = typed_share(onnx_file.read(source.scratch / island.file), precision)
        kept = made.kept_in_fp32 | dict.fromkeys(island.nodes, reason)
        made = replace(made, onnx=source.scratch / island.file, promised_share=share, kept_in_fp32=kept)
    if broken is not None:
        raise broken
    return made, completed, checks


def reduced_golden(
    precision: str, made: PrecisionFile, form: nn.Module, source: PrecisionSource, golden: Golden
) -> tuple[Golden, list[Check]]:
    """Golden outputs with those at a reduced precision, and the checks of its ONNX file: against PyTorch and fp32's.

    Args:
        precision: its name.
        made: the file at it.
        form: the network in the form that was traced; used up.
        source: what the file was made from.
        golden: with the float32 file's answers.

    Raises:
        StageFailed: answers at the precision are not finite, or it drowns what outputs differ by between images.
    """
    reduced = onnx_file.read(made.onnx)
    emulation = emulation_of(reduced, precision, made.kept_in_fp32, made.peaks, source.weight_bits)
    calibration = source.calibration.images.spread(_SEEN_IMAGES).batches(1) if source.calibration is not None else ()
    return check_reduced(reduced, onnx_file.read(source.onnx), emulation, form, golden, calibration)
