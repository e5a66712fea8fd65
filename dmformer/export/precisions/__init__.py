"""The precisions: one table of what makes each from the verified float32 ONNX file, and the proof of what was made.

Precision lives in the ONNX file (tensors typed float16, or QuantizeLinear and DequantizeLinear pairs), so that one file
serves every engine: TensorRT's strongly typed networks know no other way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmformer.bundle.golden import Golden
from dmformer.bundle.manifest import Accuracy
from dmformer.data.images import ImageSet
from dmformer.errors import CheckFailed, StageFailed, UsageError
from dmformer.graph import onnx_file
from dmformer.progress import Progress
from dmformer.runtimes.onnxruntime import OnnxRuntime
from dmformer.task import INPUT_NAME
from dmformer.verify.executors import emulation_of, graph_outputs, input_name, literal
from dmformer.verify.inner import check_reduced
from dmformer.verify.localize.nodes import find_island
from dmformer.verify.report import Check
from dmformer.verify.tasks import Measure, measure_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import nn

    from dmformer.models.dmformer import DMFormerBackbone

# What makes a reduced precision, as ``module:function``.
_MAKERS = {
    "fp16": "dmformer.export.precisions.fp16:to_fp16",
    "int8": "dmformer.export.precisions.int8:to_int8",
}
PRECISIONS = ("fp32", *_MAKERS)

_FEWEST_IMAGES = 10
_SEEN_IMAGES = 4  # on which PyTorch checks how far the inputs of int8 layers reach
RANGE_IMAGES = 128  # calibration images on which ranges are measured, at most


@dataclass(frozen=True)
class Calibration:
    """Images that stand for what the device will see, and what PyTorch makes of them.

    Attributes:
        images: labelled or not.
        measure: what answers to them are scored by.
        kept: what it keeps of PyTorch's outputs.
        accuracy: PyTorch's accuracy, where there are labels.
        label_doubt: a sentence on why the labels may be wrong; ``None`` where nothing speaks against them.
    """

    images: ImageSet
    measure: Measure
    kept: NDArray[Any]
    accuracy: Accuracy
    label_doubt: str | None = None

    @classmethod
    def of(cls, model: DMFormerBackbone, images: ImageSet, advance: Callable[[], object] = lambda: None) -> Calibration:
        """Ask PyTorch.

        Raises:
            StageFailed: an answer is NaN or infinite.
            UsageError: an image cannot be read.
        """
        from dmformer.verify.reference import torch_answers

        measure = measure_of(model.config.task, model.config.num_classes)
        return cls.scored(images, measure, torch_answers(model, images, measure, advance))

    @classmethod
    def scored(cls, images: ImageSet, measure: Measure, kept: NDArray[Any]) -> Calibration:
        """Score what was kept of PyTorch's answers."""
        score = measure.score(kept, images, kept)
        return cls(images, measure, kept, score.accuracy(), score.label_doubt(images.folders))

    def points_lost(self, kept: NDArray[Any]) -> tuple[Accuracy, float]:
        """The accuracy of what was kept of other answers, and the percentage points that it is below PyTorch's."""
        accuracy = self.measure.score(kept, self.images, self.kept).accuracy()
        return accuracy, self.measure.points_lost(accuracy, self.accuracy)


@dataclass(frozen=True)
class PrecisionSource:
    """What a precision may be made from.

    Attributes:
        onnx: the verified float32 file.
        inputs: preprocessed golden images, (N, C, H, W).
        calibration: ``None`` where no images were given.
        max_points_lost: accuracy budget, in percentage points.
        weight_bits: bits that int8 weights use (:data:`dmformer.bundle.manifest.WEIGHT_BITS`).
        scratch: an existing folder for files that do not outlive the export.
        stage: told about each step.
        block_of: the block of the network that a node belongs to, by the node's name; the blocks are judged one by one.
    """

    onnx: Path
    inputs: NDArray[np.float32]
    calibration: Calibration | None
    max_points_lost: float
    weight_bits: int
    scratch: Path
    stage: Progress
    block_of: Callable[[str], str | None]

    @property
    def range_count(self) -> int:
        """How many batches ranges are measured on."""
        return 1 if self.calibration is None else min(RANGE_IMAGES, len(self.calibration.images))

    def range_batches(self) -> Iterable[NDArray[np.float32]]:
        """Batches (N, C, H, W) that ranges are measured on: calibration images one by one, or the golden ones."""
        if self.calibration is None:
            return [self.inputs]
        return self.calibration.images.spread(RANGE_IMAGES).batches(1)


@dataclass(frozen=True)
class PrecisionFile:
    """An ONNX file at one precision.

    Attributes:
        onnx: the file.
        precision: its name.
        promised_share: share of its compute layers typed in the precision, 0..1.
        kept_in_fp32: blocks or nodes that stay in float32 against the rule, and why.
        sensitivity: for each block, the error that the precision causes in it alone, relative to the outputs' spread
            over images; empty where it was not measured.
        weight_bits: bits that quantised weights use; ``None`` where none are.
        peaks: for int8, how far the input of each quantised layer reaches on the calibration images, by its module.
        answers: what the measure of the calibration images keeps of onnxruntime's answers with the file; ``None`` where
            it was not asked.
    """

    onnx: Path
    precision: str
    promised_share: float
    kept_in_fp32: dict[str, str] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    weight_bits: int | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    answers: NDArray[Any] | None = None


def make(precision: str, source: PrecisionSource) -> PrecisionFile:
    """Make the ONNX file at a reduced precision.

    Raises:
        CheckFailed: it cannot be had within the accuracy budget.
        UsageError: it needs calibration images, and there are none.
    """
    module, _, name = _MAKERS[precision].partition(":")
    maker: Callable[[PrecisionSource], PrecisionFile] = getattr(importlib.import_module(module), name)
    return maker(source)


@dataclass(frozen=True)
class Reduced:
    """An ONNX file at a precision, the golden answers with its own, and its checks."""

    file: PrecisionFile
    golden: Golden
    checks: tuple[Check, ...] = ()


def verify_reduced(
    file: PrecisionFile, source: PrecisionSource, form: Callable[[], nn.Module], golden: Golden
) -> Reduced:
    """Verify an ONNX file at a reduced precision before any engine sees it; mend float16 where an island is enough.

    Args:
        file: the file.
        source: what it was made from.
        form: makes the network in the form that was traced.
        golden: with the float32 file's answers.

    Raises:
        StageFailed: answers at the precision are not finite, or it drowns what outputs differ by between images.
    """
    broken: StageFailed | None = None
    for _ in range(len(golden.inputs) + 1):
        broken = None
        try:
            completed, checks = check_file(file, source, form(), golden)
        except StageFailed as error:
            broken = error
        if file.precision != "fp16" or (broken is None and all(check.passed for check in checks)):
            break
        float16 = onnx_file.read(file.onnx)
        answers = graph_outputs(float16, literal(float16, {input_name(float16): golden.inputs}))
        worst = golden.worst_row(golden.thinned(answers))
        island = find_island(onnx_file.read(source.onnx), worst, file.kept_in_fp32, source.scratch)
        if not island.nodes:
            break
        path = source.scratch / island.file
        file = replace(
            file,
            onnx=path,
            promised_share=onnx_file.typed_share(onnx_file.read(path), file.precision),
            kept_in_fp32=file.kept_in_fp32 | dict.fromkeys(island.nodes, "beyond the error of float16 there"),
        )
    if broken is not None:
        raise broken
    return Reduced(file, completed, tuple(checks))


def check_file(
    file: PrecisionFile, source: PrecisionSource, form: nn.Module, golden: Golden
) -> tuple[Golden, list[Check]]:
    """Compare an ONNX file at a reduced precision with PyTorch and the float32 file; gives golden answers with its own.

    Args:
        file: the file.
        source: what it was made from.
        form: the network in the form that was traced; used up.
        golden: with the float32 file's answers.

    Raises:
        StageFailed: answers at the precision are not finite, or it drowns what outputs differ by between images.
    """
    model = onnx_file.read(file.onnx)
    emulation = emulation_of(model, file.precision, file.kept_in_fp32, file.peaks, source.weight_bits)
    calibration = source.calibration.images.spread(_SEEN_IMAGES).batches(1) if source.calibration is not None else ()
    return check_reduced(model, onnx_file.read(source.onnx), emulation, form, golden, calibration)


def check_calibrated(precisions: tuple[str, ...], images: ImageSet | None) -> None:
    """Refuse int8 without images to calibrate on, before any work.

    Raises:
        UsageError: it was asked for.
    """
    if "int8" in precisions and images is not None and len(images) < _FEWEST_IMAGES:
        raise UsageError(f"{len(images)} calibration images; expected at least {_FEWEST_IMAGES}, better hundreds")
    if "int8" in precisions and images is None:
        raise UsageError(
            "precision int8 without calibration images; expected `calibration`, a folder of images like those "
            "that the device will see: ranges measured on anything else would be wrong"
        )


def tensor_peaks(
    path: Path,
    names: Collection[str],
    batches: Iterable[NDArray[np.float32]],
    advance: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Largest absolute value of tensors of a float32 graph, in onnxruntime, over batches (N, C, H, W).

    Args:
        path: an ONNX file.
        names: of its input and of what its nodes give; those that are no floating point have 0.
        batches: at least one.
        advance: told after each batch.

    Raises:
        CheckFailed: one of them is NaN or infinite.
    """
    peaks = dict.fromkeys(names, 0.0)
    with OnnxRuntime(path, taps=[name for name in names if name != INPUT_NAME]) as runtime:
        (start,) = (spec.name for spec in runtime.inputs)
        for batch in batches:
            for name, array in ({start: batch} | runtime.run({start: batch})).items():
                if name not in peaks or array.dtype.kind != "f":  # a shape, or a position
                    continue
                peak = float(np.abs(array).max())
                if not np.isfinite(peak):
                    raise CheckFailed(
                        f"tensor {name!r} is NaN or infinite in float32 on these images; expected numbers"
                    )
                peaks[name] = max(peaks[name], peak)
            advance()
    return peaks
