"""Backbones that nobody here wrote, from Hugging Face's configurations: every check holds, and faults are found."""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import dmformer
from dmformer.bundle.reader import open_bundle
from dmformer.errors import StageFailed
from dmformer.graph.simplify import Simplifier
from dmformer.progress import silent
from dmformer.verify.localize import localize
from dmformer.verify.reference import OwnModule
from tests.backbones import BACKBONES, SIZE, backbone
from tests.bundles import adopt
from tests.conftest import made_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnx import ModelProto

    from dmformer.export.cached import ExportResult
    from dmformer.verify.report import Check

pytest.importorskip("transformers")
# transformers and the exporter warn of their own ways.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick")]

QUICK = ("resnet", "vit")
REFUSED = {
    "efficientnet": r"conversion to OpenVINO failed: AveragePool .*pooler.*Kernel after dilation has size",
    "mobilevitv2": "export to ONNX failed",  # torch.nn.functional.fold with sizes that are open
}
# Weights that are drawn at random: what int8 or fp16 changes is not small beside what images differ by.
UNTRAINED = "parity cannot be judged: PyTorch's output 'logits' differs between images by .* noise allows a limit"
LOUD = ("resnet", "mobilevit", "focalnet", "mobilenetv1", "mobilenetv2", "hgnetv2", "levit")


def export(name: str, output: Path, **options: object) -> ExportResult:
    formats = ["onnx", "openvino"]
    return dmformer.export(backbone(name), image_size=SIZE, formats=formats, output=output, use_cache=False, **options)


def check(name: str, output: Path) -> None:
    result = export(name, output)
    assert result.parity.passed
    assert {check.runtime for check in result.parity.checks} >= {"onnxruntime", "openvino"}
    assert "layers" in {check.stage for check in result.parity.checks}


@pytest.mark.medium
@pytest.mark.parametrize("name", QUICK)
def test_every_check_holds(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in QUICK])
def test_every_check_holds_or_there_is_a_reason(name: str, tmp_path: Path) -> None:
    if name in REFUSED:
        with pytest.raises(StageFailed, match=REFUSED[name]):
            check(name, tmp_path / "b")
    else:
        check(name, tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in BACKBONES if n not in REFUSED and "ForImage" in BACKBONES[n][1]])
def test_reduced_precisions_hold_or_there_is_a_reason(
    name: str, tmp_path: Path, few_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reduce() -> ExportResult:
        return export(
            name, tmp_path / "b", precisions=["fp32", "fp16", "int8"], calibration=few_images, max_accuracy_drop=100,
            force=True,
        )  # fmt: skip

    if name == "bit":  # its weights are standardised in the traced file, and folded by onnxsim, which quick leaves out
        monkeypatch.setattr(import_module("dmformer.export.graph"), "Simplifier", Simplifier)
    reason = ""
    checks: tuple[Check, ...] = ()
    try:
        checks = reduce().parity.checks
    except StageFailed as error:
        reason = str(error)
    if reason:
        assert name in LOUD
        assert re.search(UNTRAINED, reason)
    failed = {(one.stage, one.precision) for one in checks if not one.passed}
    assert not failed


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a backbone, simplified; shared, not to be spoilt."""

    def make(folder: Path) -> Path:
        return dmformer.export(
            backbone("resnet"), image_size=SIZE, output=folder / "b", formats=["onnx"], use_cache=False
        ).output

    return made_once(tmp_path_factory, "foreign", make)


STAGE = "resnet.encoder.stages.2.layers.0.layer.1.convolution"


def scale(model: ModelProto) -> None:
    weight = weight_of(model)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.02), weight.name))


def swap(model: ModelProto) -> None:
    weight = weight_of(model)
    array = numpy_helper.to_array(weight).copy()
    array[[0, 1]] = array[[1, 0]]
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def dilate(model: ModelProto) -> None:
    node = node_of(model, f"{STAGE}/Conv")
    for attribute in node.attribute:
        if attribute.name in ("dilations", "pads"):
            attribute.ints[:] = [2] * len(attribute.ints)


def lose_activation(model: ModelProto) -> None:
    node_of(model, f"{STAGE.removesuffix('.1.convolution')}.0.activation/Relu").op_type = "Identity"


def node_of(model: ModelProto, name: str) -> onnx.NodeProto:
    (node,) = [node for node in model.graph.node if node.name == name]
    return node


def weight_of(model: ModelProto) -> onnx.TensorProto:
    name = node_of(model, f"{STAGE}/Conv").input[1]
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return weight


@pytest.mark.medium
@pytest.mark.parametrize(
    ("spoil", "module"),
    [
        (swap, STAGE),
        pytest.param(scale, STAGE, marks=pytest.mark.slow),
        pytest.param(dilate, STAGE, marks=pytest.mark.slow),
        pytest.param(lose_activation, f"{STAGE.removesuffix('.1.convolution')}.0.activation", marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_bisected_to_the_module(
    foreign: Path, tmp_path: Path, spoil: Callable[[ModelProto], None], module: str
) -> None:
    bundle, name = Path(shutil.copytree(foreign, tmp_path / "b")), "onnx/fp32/model.onnx"
    model = onnx.load(bundle / name)
    spoil(model)
    onnx.save(model, bundle / name)
    adopt(bundle, name)
    own = OwnModule(backbone("resnet"), None)
    report = dmformer.verify(bundle, runtimes=["ort"], module=own.module)
    assert "layers" in {check.stage for check in report.checks if not check.passed}
    found = localize(open_bundle(bundle), report, weights=None, folder=tmp_path / "c", stage=silent, module=own)
    assert [finding.module for finding in found.findings] == [module]
