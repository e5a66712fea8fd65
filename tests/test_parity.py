"""Parity must fail: each fault goes through the real export path and must be caught in every runtime."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import nn

import dmformer
from benchmarks.faults import random_options
from dmformer.assets import DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from dmformer.bundle.golden import Golden, load_golden
from dmformer.data.images import list_images
from dmformer.errors import StageFailed
from dmformer.export.formats import ConversionSource, convert
from dmformer.export.networks import random_checkpoint
from dmformer.graph.trace import trace
from dmformer.models.checkpoint import Checkpoint, load_checkpoint
from dmformer.models.dmformer import DMFormer, Gate
from dmformer.runtimes import registry
from dmformer.runtimes.onnxruntime import OnnxRuntime
from dmformer.verify.answers import ask
from dmformer.verify.compare import Limit, compare, float32_limit, largest_difference, largest_value
from dmformer.verify.parity import check_answers, check_consistency, check_preprocessing, references
from dmformer.verify.reference import golden_pixels, make_golden
from dmformer.verify.report import Check, parity_report
from tests.tiers import first

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dmformer.export.cached import ExportResult


ENGINES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Subject:
    """A checkpoint and what PyTorch answers with it."""

    checkpoint: Checkpoint
    golden: Golden


@pytest.fixture(scope="module", params=["demonstration", "dmformer_s"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """The trained demonstration checkpoint; DMFormer-S with lively weights, fewer blocks and pixels."""
    if request.param == "demonstration":
        checkpoint = load_checkpoint(DEMONSTRATION_CHECKPOINT)
        pixels = golden_pixels(checkpoint.preprocessing, list_images(SAMPLE_IMAGES))
    else:
        checkpoint = random_checkpoint("dmformer_s", {"num_classes": 10, "depths": [1, 1, 2, 1]}, image_size=64, seed=1)
        pixels = golden_pixels(checkpoint.preprocessing, [])
    return Subject(checkpoint, make_golden(checkpoint.model(), checkpoint.preprocessing, pixels))


def checks_of(subject: Subject, model: DMFormer, folder: Path, engines: Sequence[str]) -> list[Check]:
    """Trace this model, convert it for each engine, and compare it with the subject's golden outputs."""
    traced = folder / "traced.onnx"
    trace(subject.checkpoint, model, traced)
    checks: list[Check] = []
    for row in map(registry.entry, engines):
        target = folder / row.name
        target.mkdir()
        files = convert(row, ConversionSource(traced, "fp32", subject.checkpoint), target).files
        checks.extend(
            check_answers(
                "runtime",
                ask(
                    registry.available_adapter(row)(files[0], threads=1),
                    subject.golden.inputs,
                    subject.golden.thinned,
                    consistency=False,
                ),
                references(subject.golden, "fp32"),
            )
        )
    return checks


def perturb(name: str) -> Callable[[DMFormer], None]:
    def fault(model: DMFormer) -> None:
        with torch.no_grad():
            model.state_dict()[name].mul_(1.01)

    return fault


def swap_dilations(model: DMFormer) -> None:
    branches = model.stages[0].blocks[0].dma.branches
    for branch, dilation in zip(branches, (3, 2, 1), strict=True):
        branch.dilation, branch.padding = (dilation,) * 2, (dilation * (branch.kernel_size[0] // 2),) * 2


def swap_classes(model: DMFormer) -> None:
    order = [1, 0, *range(2, model.config.num_classes)]
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[order].clone())
        model.head.bias.copy_(model.head.bias[order].clone())


def swap_channels(model: DMFormer) -> None:
    weight = model.stages[0].downsample.conv1.weight
    with torch.no_grad():
        weight.copy_(weight.flip(1).clone())


def wrong_epsilon(model: DMFormer) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3


class OpenGate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x[:, :, :1, :1])


def drop_gate(model: DMFormer) -> None:
    gate = model.stages[2].blocks[1].dma.gate
    assert isinstance(gate, Gate)
    model.stages[2].blocks[1].dma.gate = OpenGate()


def not_a_number(model: DMFormer) -> None:
    with torch.no_grad():
        model.stages[1].blocks[0].ffn.fc1.weight.view(-1)[3] = torch.nan


FAULTS = {
    "1 % of a depth-wise kernel": perturb("stages.2.blocks.1.dma.branches.1.weight"),
    "1 % of a gate's layer": perturb("stages.1.blocks.0.dma.gate.fc2.weight"),
    "1 % of a layer scale": perturb("stages.3.blocks.0.scale2.gamma"),
    "1 % of BatchNorm statistics": perturb("stages.0.blocks.0.norm2.running_var"),
    "1 % of the head's weights": perturb("head.weight"),
    "swapped dilations": swap_dilations,
    "two swapped classes": swap_classes,
    "RGB as BGR": swap_channels,
    "BatchNorm epsilon 1e-3": wrong_epsilon,
    "a dropped gate": drop_gate,
    "a NaN weight": not_a_number,
}


def test_the_right_model_passes(subject: Subject, tmp_path: Path) -> None:
    checks = checks_of(subject, subject.checkpoint.model(), tmp_path, ENGINES)
    assert [(check.runtime, check.batch) for check in checks] == [(e, b) for e in ENGINES for b in (1, 2, 5)]
    assert parity_report(checks).passed, checks


# A share of a tensor is judged against a noise that grows with the width; a wrong structure is as wrong in any.
CASES = [
    *first(4, [("demonstration", name) for name in FAULTS]),
    *(pytest.param("dmformer_s", name, marks=pytest.mark.slow) for name in FAULTS if "1 %" in name),
]


@pytest.mark.parametrize(("subject", "fault"), CASES, indirect=["subject"])
def test_a_fault_is_caught(subject: Subject, fault: str, tmp_path: Path) -> None:
    model = subject.checkpoint.model()
    FAULTS[fault](model)
    checks = checks_of(subject, model, tmp_path, ENGINES)
    assert len(checks) == 6
    assert not any(check.passed for check in checks), checks
    if fault == "a NaN weight":  # named before any figure
        assert all(check.max_abs is None and "NaN" in (check.reason or "") for check in checks)


def test_a_baked_in_batch_is_caught(subject: Subject, tmp_path: Path) -> None:
    traced = tmp_path / "baked.onnx"
    trace(subject.checkpoint, subject.checkpoint.model(), traced)
    model = onnx.load(traced)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, traced)
    row = registry.entry("onnxruntime")
    answers = ask(registry.available_adapter(row)(traced), subject.golden.inputs, subject.golden.thinned)
    checks = check_answers("runtime", answers, references(subject.golden, "fp32"))
    assert [(check.batch, check.passed) for check in checks] == [(1, True), (2, False), (5, False)]


def test_exchanged_channels_in_preprocessing_are_caught(subject: Subject) -> None:
    preprocessing = subject.checkpoint.preprocessing
    assert all(check.passed for check in check_preprocessing(preprocessing, subject.golden))
    for wrong in (
        msgspec.structs.replace(preprocessing, channels="BGR"),
        msgspec.structs.replace(preprocessing, mean=(0.5, 0.5, 0.501)),
        msgspec.structs.replace(preprocessing, std=(0.5, 0.501, 0.5)),
    ):
        pixels, tensors = check_preprocessing(wrong, subject.golden)
        assert pixels.passed
        assert not tensors.passed


@pytest.mark.parametrize("wrong", [{"interpolation": "bilinear"}, {"crop_fraction": 0.9}, {"image_size": 96}])
def test_another_resize_filter_or_crop_is_caught(subject: Subject, wrong: dict[str, Any]) -> None:
    right = subject.checkpoint.preprocessing
    changed = msgspec.structs.replace(right, **wrong)
    assert changed != right
    assert not check_preprocessing(changed, subject.golden)[0].passed


def test_a_golden_file_without_source_images_fails(subject: Subject) -> None:
    pixels, tensors = check_preprocessing(subject.checkpoint.preprocessing, replace(subject.golden, sources=()))
    assert (pixels.passed, tensors.passed) == (False, True)


def test_one_percent_of_any_tensor_is_caught_unless_it_drowns_in_rounding(subject: Subject) -> None:
    """Some biases are so near to zero that 1 % of them is hardly more than float32's own noise."""
    model, golden = subject.checkpoint.model(), subject.golden
    (reference,) = golden.outputs.values()
    (limit,) = float32_limit(golden.outputs, golden.outputs_float64).values()
    inputs = torch.from_numpy(golden.inputs)
    tensors = [(k, v) for k, v in model.state_dict().items() if v.is_floating_point()]
    tensors = tensors[:: 20 if subject.checkpoint.arch == "dmformer_s" else 1]  # all of nano's, some of S's
    missed = []
    for name, tensor in tensors:
        before = tensor.clone()
        tensor.mul_(1.01)
        with torch.inference_mode():
            answer = model(inputs).numpy()
        tensor.copy_(before)
        if compare(answer, reference, limit).passed:
            missed.append(name)
    assert all(name.endswith((".bias", ".running_mean")) for name in missed), missed
    assert len(missed) <= 0.2 * len(tensors), missed


def test_a_reference_that_is_not_finite_is_refused(subject: Subject) -> None:
    golden = copy.deepcopy(subject.golden)
    next(iter(golden.outputs.values()))[0, 0] = np.inf
    with pytest.raises(StageFailed, match="NaN or infinite"):
        float32_limit(golden.outputs, golden.outputs_float64)


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (np.zeros((2, 3), np.float32), "shape"),
        (np.zeros((2, 4), np.float64), "type"),
        (np.full((2, 4), np.nan, np.float32), "8 of 8"),
        (np.array([[0, 0, 0, np.inf], [0, 0, 0, 0]], np.float32), "1 of 8"),
        (np.full((2, 4), 2e-3, np.float32), "differs by 0.002, limit 0.001"),
    ],
)
def test_compare_fails_with_the_reason(candidate: np.ndarray, reason: str) -> None:
    comparison = compare(candidate, np.zeros((2, 4), np.float32), Limit(1e-3, "test"))
    assert not comparison.passed
    assert reason in (comparison.reason or "")


@pytest.mark.parametrize(
    "spoil",
    [lambda head: head.bias.add_(1e7), lambda head: head.weight.zero_(), lambda head: head.weight.mul_(1e-9)],
    ids=["logits that drown in their offset", "constant outputs", "outputs that hardly depend on the image"],
)
def test_a_reference_that_tells_nothing_is_refused(spoil: Callable[[nn.Linear], torch.Tensor], tmp_path: Path) -> None:
    checkpoint = load_checkpoint(DEMONSTRATION_CHECKPOINT)
    model = checkpoint.model()
    with torch.no_grad():
        model.head.bias.add_(1)
        spoil(model.head)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(StageFailed, match="parity cannot be judged"):
        dmformer.export(tmp_path / "w.pth", image_size=32, output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_no_check_is_no_pass() -> None:
    assert not parity_report([]).passed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_clean_exports_raise_no_alarm(seed: int, tmp_path: Path) -> None:
    """Random configurations and weights through trace and both engines; the whole pipeline is in test_export."""
    random = np.random.default_rng(seed)
    options = random_options(random)
    checkpoint = random_checkpoint("dmformer_nano", options, image_size=int(random.choice([32, 64, 80])), seed=seed)
    model = checkpoint.model()
    golden = make_golden(model, checkpoint.preprocessing, golden_pixels(checkpoint.preprocessing, []))
    checks = checks_of(Subject(checkpoint, golden), model, tmp_path, ENGINES)
    assert parity_report(checks).passed, checks


class Spoilt(OnnxRuntime):
    """Right in every batch size, and wrong in a way that only a second look sees."""

    asked = 0


class Uneven(Spoilt):
    def infer(self, inputs: Any) -> Any:
        answers = super().infer(inputs)
        (rows,) = inputs.values()
        if len(rows) == 5 and (rows == rows[:1]).all():
            answers["logits"][-1] += 1e-3
        return answers


class NoNumber(Spoilt):
    def infer(self, inputs: Any) -> Any:
        answers = super().infer(inputs)
        (rows,) = inputs.values()
        if len(rows) == 5 and (rows == rows[:1]).all():
            answers["logits"][-1] = np.nan
        return answers


class ByPlace(Spoilt):
    """As a runtime that has learnt the answers by heart: row by row, whatever the rows are."""

    learnt: Any = None

    def infer(self, inputs: Any) -> Any:
        answers = super().infer(inputs)
        (rows,) = inputs.values()
        if len(rows) == 5 and not (rows == rows[:1]).all():
            self.learnt = self.learnt or answers
            return {name: array.copy() for name, array in self.learnt.items()}
        return answers


class Drifting(Spoilt):
    """What was asked before is in the answer."""

    def infer(self, inputs: Any) -> Any:
        answers = super().infer(inputs)
        self.asked += 1
        (rows,) = inputs.values()
        if len(rows) == 2 and self.asked > 8:  # all rows were asked, one by one and in pairs
            answers["logits"] += 1e-3 * (self.asked % 2)
        return answers


@pytest.mark.parametrize(
    ("kind", "row"), [(Uneven, "rows"), (NoNumber, "rows"), (ByPlace, "shuffled"), (Drifting, "repeated")]
)
def test_a_runtime_that_contradicts_itself_is_caught(exported: ExportResult, kind: type[Spoilt], row: str) -> None:
    golden = load_golden(exported.output / "golden.npz")
    answers = ask(kind(exported.output / "onnx/fp32/model.onnx"), golden.inputs, golden.thinned)
    compared_with = references(golden, "fp32")
    assert all(check.passed for check in check_answers("runtime", answers, compared_with))
    (failed,) = [check for check in check_consistency(answers, compared_with) if not check.passed]
    assert (failed.stage, failed.against) == (row, "itself")
    assert "get answers that are" in (failed.reason or "")


def test_a_batch_that_differs_from_its_rows_is_caught(exported: ExportResult) -> None:
    golden = load_golden(exported.output / "golden.npz")
    answers = ask(OnnxRuntime(exported.output / "onnx/fp32/model.onnx"), golden.inputs, golden.thinned)
    largest = {name: array + np.float32(1e-3) for name, array in answers.by_batch[5].items()}  # type: ignore[union-attr]
    moved = replace(answers, by_batch={**answers.by_batch, 5: largest})
    failed = [check.stage for check in check_consistency(moved, references(golden, "fp32")) if not check.passed]
    assert failed == ["batches"]


def test_a_difference_is_found_in_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("dmformer.verify.compare"), "_PIECE", 8)
    expected = np.zeros((3, 7), np.float32)
    for place in range(expected.size):
        shown = expected.copy()
        shown.flat[place] = -2
        assert largest_difference(shown, expected) == 2
        assert largest_difference(shown.T, expected.T) == 2
        for bad in (np.nan, np.inf):
            shown.flat[place] = bad
            assert not np.isfinite(largest_difference(shown, expected))
            assert not np.isfinite(largest_value(shown))
    assert largest_value(np.array([-3.0, 2.0])) == 3
    assert largest_difference(expected, expected[:, :1]) == np.inf
