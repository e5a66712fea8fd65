"""A network of one's own: what it may be, what is refused in one line, and what becomes of it in every step."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils._triton import has_triton_package

import dmformer
from dmformer.bundle.reader import open_bundle
from dmformer.errors import StageFailed, UsageError
from dmformer.export.options import ExportOptions
from dmformer.export.run import plan_export
from dmformer.files import hash_file
from dmformer.models.own import load_own
from dmformer.progress import silent
from dmformer.task import FEATURE_NAMES
from dmformer.verify.executors import Emulation, round_layers_
from dmformer.verify.localize import localize
from dmformer.verify.reference import OwnModule
from tests import own_network
from tests.bundles import adopt, one_line
from tests.conftest import made_once, timed_as
from tests.own_network import OwnDMFormer, build

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from tests.conftest import Run

SOURCE = Path(own_network.__file__)
REFERENCE = f"{SOURCE}:build"


class Small(nn.Module):
    """Whatever a test wants of a network; by itself a classifier of four classes."""

    def __init__(self, answer: Callable[[nn.Module, Tensor], Any] | None = None, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.answer = nn.Conv2d(channels, 4, 3, padding=1), answer
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x).mean((2, 3)) if self.answer is None else self.answer(self, x)


def pyramid(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    maps = model.conv(x)
    return tuple(nn.functional.avg_pool2d(maps, stride) for stride in (4, 8, 16, 32))


@pytest.mark.parametrize(
    ("answer", "task", "outputs"),
    [
        (None, "classification", {"logits": (4,)}),
        (lambda m, x: {"loss": None, "logits": m.conv(x).mean((2, 3))}, "classification", {"logits": (4,)}),
        (lambda m, x: m.conv(x), "segmentation", {"logits": (4, 64, 64)}),
        (lambda m, x: {"out": m.conv(x), "aux": m.conv(x)}, "segmentation", {"logits": (4, 64, 64)}),
        (pyramid, "features", dict(zip(FEATURE_NAMES, [(4, side, side) for side in (16, 8, 4, 2)], strict=True))),
        (lambda m, x: pyramid(m, x)[:2], "features", {"features_0": (4, 16, 16), "features_1": (4, 8, 8)}),
        (lambda m, x: {"a.b": pyramid(m, x)[1]}, "features", {"a_b": (4, 8, 8)}),
    ],
)  # fmt: skip
def test_the_task_is_what_the_network_gives(answer: Any, task: str, outputs: dict[str, tuple[int, ...]]) -> None:
    checkpoint = load_own(Small(answer), image_size=64).checkpoint
    assert (checkpoint.config.task, checkpoint.config.outputs) == (task, outputs)
    assert checkpoint.config.num_classes == (0 if task == "features" else 4)
    assert list(checkpoint.shapes) == ["image", *outputs]
    assert list(checkpoint.model()(torch.zeros(1, 3, 64, 64))) == list(outputs)


def test_weights_that_are_computed_are_folded_in() -> None:
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    torch.manual_seed(3)
    model = Small()
    model.conv = spectral_norm(weight_norm(model.conv))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(images)
    checkpoint = load_own(model, image_size=32).checkpoint
    assert [name for name in checkpoint.state if name.startswith("conv.")] == ["conv.bias", "conv.weight"]
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.model()(images)["logits"], expected)
    assert nn.utils.parametrize.is_parametrized(model.conv)  # the one at hand is left as it is


def test_int8_of_a_weight_that_no_module_owns_is_refused() -> None:
    model = Small(lambda m, x: nn.functional.conv2d(x, m.norm.weight.view(1, 4, 1, 1)[:, :3]).mean((2, 3)))
    emulation = Emulation("int8", layers=frozenset({"/Conv"}), peaks={"": 1.0})
    with pytest.raises(StageFailed, match=r"in module '' has no weight of that module's own; expected a torch.nn.Conv"):
        round_layers_(model, emulation)


def train_norm(model: nn.Module, x: Tensor) -> Tensor:
    return model.norm.train()(model.conv(x)).mean((2, 3))


def decide(model: nn.Module, x: Tensor) -> Tensor:
    logits = model.conv(x).mean((2, 3))
    return logits if logits.max() > 0 else -logits


def fail(_model: nn.Module, _x: Tensor) -> Tensor:
    raise RuntimeError("no such thing\nand a second line")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda m, x: nn.functional.dropout(m.conv(x).mean((2, 3))), "answers the same image differently each time"),
        (train_norm, "answers an image differently beside others"),
        (decide, "decides by the values of a tensor"),
        (fail, r"raised when it was asked with 3 channels of 64 pixels a side: RuntimeError: no such thing; expected"),
        (lambda *_: None, r"gives NoneType; expected logits \(N, classes\)"),
        (lambda m, x: m.conv(x).flatten(2), r"gives a tensor \(2, 4, 4096\); expected logits"),
        (lambda m, x: m.conv(x).mean((2, 3)).bfloat16(), r"gives a tensor \(2, 4\) of type bfloat16; expected logits"),
        (lambda m, x: m.conv(x).mean((1, 2, 3)), r"gives a tensor \(2,\); expected logits \(N, classes\)"),
        (lambda m, x: m.conv(x).mean((2, 3)).argmax(1), r"gives a tensor \(2,\); expected logits"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_exported_is_refused_in_one_line(answer: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        load_own(Small(answer), image_size=64)
    one_line(refused.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("text", "name", "options", "message"),
    [
        ("raise ValueError('nope')", "x", {}, "raised while it was imported: ValueError: nope"),
        ("import sys; sys.exit(3)", "x", {}, "raised while it was imported: SystemExit: 3"),
        ("import no_such_package", "x", {}, "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def build(dim): pass", "build", {}, "with no arguments: missing a required argument: 'dim'; expected"),
        ("def build(): pass", "build", {"dim": 3}, "with dim: got an unexpected keyword argument 'dim'"),
        ("def build(): pass", "build", {}, "gave NoneType; expected an nn.Module"),
        ("def build(): return 1 / 0", "build", {}, "raised while it made the network: ZeroDivisionError"),
        ("build = 3", "build", {}, "is of type int; expected a function, a class or an nn.Module"),
        ("def build(): pass", "built", {}, "there is no 'built' in it; it has build"),
        ("def build(config): pass", "build", {}, "expected `module_options` that it takes, or a function that"),
        ("from torch import nn; net = nn.Identity()", "net", {}, "has no parameters"),
        ("from torch import nn; net = nn.LazyLinear(3)", "net", {}, "weights whose shapes its first image decides"),
        ("from torch import nn; build = lambda: nn.LazyLinear(3)", "build", {}, "weights whose shapes its first image"),
        ("import torch; net = torch.jit.script(torch.nn.Linear(3, 3))", "net", {}, "is TorchScript; expected the nn.M"),
        ("import torch; build = lambda: torch.ones(3, device='cuda')", "build", {}, "expected a network on the CPU"),
        ("from torch import nn; net = nn.Identity()", "net", {"a": 1}, "which is made already; expected none"),
    ],
)  # fmt: skip
def test_a_file_that_gives_no_network_is_refused_in_one_line(
    tmp_path: Path, text: str, name: str, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "written.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as refused:
        load_own(f"{path}:{name}", options, image_size=64)
    one_line(refused.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("around", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_what_is_around_a_network_is_left_out(around: Callable[[nn.Module], nn.Module]) -> None:
    checkpoint = load_own(around(Small()), image_size=32).checkpoint
    assert checkpoint.arch == "Small"
    assert checkpoint.config.origin.reference == f"{__name__}:Small"
    assert "conv.weight" in checkpoint.state


NETWORK = """
from torch import nn


class Network(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)

    def forward(self, x):
        return super().forward(x).mean((2, 3))
"""


@pytest.mark.parametrize("name", ["wave.py", "tests.py", "my-net.v2.py"])
def test_a_file_takes_no_other_modules_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported later is found, whatever the file, and those beside it, are called."""
    (tmp_path / name).write_text(NETWORK, encoding="utf-8")
    (tmp_path / "colorsys.py").write_text("wrong", encoding="utf-8")
    for standard in ("wave", "colorsys"):
        monkeypatch.delitem(sys.modules, standard, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_own(f"{tmp_path / name}:Network", image_size=32).checkpoint.arch == "Network"
    for standard in ("wave", "colorsys"):
        imported = importlib.import_module(standard)
        assert tmp_path not in Path(str(imported.__file__)).parents
    assert load_own(f"{tmp_path / name}:Network", image_size=32).checkpoint.arch == "Network"


def test_a_folder_beside_a_file_is_not_taken_for_an_optional_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch would import Triton from a server's folder of that name, and fail for what it has not."""
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    has_triton_package.cache_clear()
    load_own(f"{tmp_path / 'net.py'}:Network", image_size=32)
    assert not has_triton_package()


def test_what_a_file_sets_for_all_does_not_last(tmp_path: Path) -> None:
    text = f"import torch; torch.set_default_dtype(torch.float64){NETWORK}"
    (tmp_path / "doubles.py").write_text(text, encoding="utf-8")
    assert load_own(f"{tmp_path / 'doubles.py'}:Network", image_size=32).checkpoint.arch == "Network"
    assert torch.get_default_dtype() == torch.float32


def test_a_part_of_a_package_is_told(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    (tmp_path / "part.py").write_text("from .helper import Network", encoding="utf-8")
    with pytest.raises(
        UsageError, match=r"relative import.*as it is part of a package, package.module:NAME in the fold"
    ):
        load_own(f"{tmp_path / 'part.py'}:Network")


@pytest.mark.parametrize("reference", ["own.py", ":build", "no_file.py:build", "no.such.package:build"])
def test_a_reference_that_leads_nowhere_is_refused(reference: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        load_own(reference, image_size=64)


def test_what_a_file_prints_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "talks.py"
    path.write_text(SOURCE.read_text(encoding="utf-8") + "\nprint('hello')\n", encoding="utf-8")
    load_own(f"{path}:build", image_size=64)
    assert capsys.readouterr().out == ""


def test_the_network_at_hand_is_left_as_it_is() -> None:
    model = Small().half().train()
    own = load_own(model, image_size=64).checkpoint
    assert model.training
    assert model.conv.weight.dtype == torch.float16
    assert "weights of type float16 were converted to float32" in own.notes
    assert "no checkpoint was given: the weights are those that module Small comes with" in own.notes
    made = own.model()
    assert not made.training
    made.conv.weight.data.zero_()
    assert own.state["conv.weight"].abs().max() > 0


def test_weights_that_are_drawn_are_random_and_follow_the_seed() -> None:
    drawn, again = (load_own(f"{SOURCE}:OwnDMFormer", image_size=64, seed=seed) for seed in (5, 5))
    other = load_own(f"{SOURCE}:OwnDMFormer", image_size=64, seed=6)
    assert drawn.random
    name = "head.weight"
    assert torch.equal(drawn.checkpoint.state[name], again.checkpoint.state[name])
    assert not torch.equal(drawn.checkpoint.state[name], other.checkpoint.state[name])
    assert not load_own(REFERENCE, image_size=64).random


@pytest.mark.parametrize("wrapped", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_read_out_of_what_training_scripts_save(
    tmp_path: Path, wrapped: Callable[[Any], Any], prefix: str
) -> None:
    state = {prefix + name: value for name, value in build().state_dict().items()}
    torch.save(wrapped(state), tmp_path / "w.pth")
    own = load_own(f"{SOURCE}:OwnDMFormer", None, tmp_path / "w.pth", 64)
    assert not own.random
    assert own.checkpoint.sha256 == hash_file(tmp_path / "w.pth")[0]
    assert torch.equal(own.checkpoint.state["head.weight"], state[prefix + "head.weight"])
    assert own.checkpoint.config.origin.source_sha256 == hash_file(SOURCE)[0]


def test_weights_that_do_not_fit_are_listed_in_one_line(tmp_path: Path) -> None:
    state = build().state_dict()
    state["strange"] = state.pop("norm1.weight")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UsageError) as refused:
        load_own(REFERENCE, {"num_classes": 7}, tmp_path / "w.pth", 64)
    assert one_line(refused.value).endswith(
        "does not fit module " + repr(REFERENCE) + ": 1 missing: norm1.weight; 1 unexpected: strange; 2 of another "
        "shape: head.bias (received (10,), expected (7,)), head.weight (received (10, 32), expected (7, 32))"
    )


def test_a_tensor_with_two_names_may_be_in_the_file_once(tmp_path: Path) -> None:
    model = Small()
    model.twin = model.conv
    state = model.state_dict()
    torch.save({name: value + 1 for name, value in state.items() if not name.startswith("conv.")}, tmp_path / "w.pth")
    own = load_own(model, None, tmp_path / "w.pth", 64).checkpoint.state
    assert torch.equal(own["conv.weight"], state["conv.weight"] + 1)
    assert torch.equal(own["twin.weight"], own["conv.weight"])


@pytest.mark.parametrize("value", [nn.GELU, torch.float32, 2**70, {(1, 2): 3}])
def test_arguments_that_no_manifest_could_hold_are_refused(value: object) -> None:
    with pytest.raises(
        UsageError, match=r"`module_options` num_classes: .*; expected what JSON can hold, or the network"
    ):
        load_own(REFERENCE, {"num_classes": value}, image_size=64)


def test_a_module_may_change_where_modules_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    text = SOURCE.read_text(encoding="utf-8")
    text = text.replace("from __future__ import annotations\n", "from __future__ import annotations\nimport sys\n", 1)
    (tmp_path / "forgets_its_folder.py").write_text(f"{text}\nsys.path.pop(0)\n", encoding="utf-8")
    assert load_own("forgets_its_folder:build", image_size=64).checkpoint
    assert str(tmp_path) in sys.path


def test_numbers_that_are_no_weights_are_loaded_too(tmp_path: Path) -> None:
    model = Small()
    model.register_buffer("table", torch.arange(6))
    torch.save({**model.state_dict(), "table": torch.arange(6) + 1}, tmp_path / "w.pth")
    state = load_own(model, None, tmp_path / "w.pth", 64).checkpoint.state
    assert torch.equal(state["table"], torch.arange(6) + 1)


def test_blocks_are_what_lists_repeat_and_what_is_beside_them() -> None:
    blocks = load_own(REFERENCE, image_size=64).checkpoint.config
    stages = [
        *("patch_embed1", "block1.0", "norm1", "patch_embed2", "block2.0", "block2.1", "norm2"),
        *("patch_embed3", "block3.0", "norm3", "patch_embed4", "block4.0", "norm4", "head"),
    ]
    assert list(blocks.blocks) == stages
    assert blocks.block_of("block2.1.attn.proj_in/Conv") == "block2.1"
    assert blocks.block_of("block2.10/Conv") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "dmformer_s"}, "`module` with `arch` or `options`"),
        ({"options": {"gate_input": "x"}}, "`module` with `arch` or `options`"),
        ({"task": "features"}, "`task` features for OwnDMFormer, which is for classification; expected `task` classif"),
        ({"formats": ["torch"]}, "format torch holds the weights of a DMFormer alone"),
        ({"module": None, "module_options": {"a": 1}}, "`module_options` without `module`"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_export(ExportOptions(**{"module": REFERENCE, "image_size": 64, **options}))


def test_every_format_but_torch_is_planned_without_the_deploy_form() -> None:
    plan = plan_export(ExportOptions(build(), formats=["all"], image_size=64))
    assert not plan.options.deploy_form
    assert "torch" not in plan.formats
    assert any(reason.startswith("torch: format torch holds") for reason in plan.not_made)


@pytest.fixture(scope="session")
def own_exported(tmp_path_factory: pytest.TempPathFactory, few_images: Path) -> ExportResult:
    """The network above at every precision, without timing; shared, not to be spoilt."""

    def make(folder: Path) -> ExportResult:
        from dmformer.export import steps

        torch.save({"state_dict": build().state_dict()}, folder / "own.pth")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "time_artifacts", timed_as({}))
            return dmformer.export(
                folder / "own.pth",
                module=f"{SOURCE}:OwnDMFormer",
                image_size=64,
                formats=["onnx", "openvino"],
                precisions=["fp32", "fp16", "int8"],
                calibration=few_images,
                max_accuracy_drop=20,
                output=folder / "bundle",
                use_cache=False,
            )

    return made_once(tmp_path_factory, "own_exported", make)


@pytest.mark.slow
def test_every_check_holds_at_every_precision(own_exported: ExportResult) -> None:
    assert own_exported.parity.passed
    checks = {(check.stage, check.runtime, check.precision) for check in own_exported.parity.checks}
    for runtime in ("onnxruntime", "openvino"):
        for precision in ("fp32", "fp16", "int8"):
            assert ("runtime", runtime, precision) in checks
    assert ("layers", "onnxruntime", "fp32") in checks
    (tensors,) = [c for c in own_exported.parity.checks if (c.stage, c.precision) == ("tensors", "fp16")]
    assert "LayerNormalization" in tensors.limit_source
    assert "by ONNX's reference implementation" in tensors.limit_source


@pytest.mark.slow
def test_the_manifest_says_where_it_came_from(own_exported: ExportResult) -> None:
    model = own_exported.manifest.model
    assert (model.arch, model.task, model.weights, model.deploy_form) == (
        "OwnDMFormer", "classification", "checkpoint", False
    )  # fmt: skip
    assert model.module is not None
    assert model.module.reference == "own_network.py:OwnDMFormer"
    assert model.module.source_sha256 == hash_file(SOURCE)[0]
    assert model.parameters == sum(parameter.numel() for parameter in build().parameters())
    (int8,) = [a for a in own_exported.manifest.artifacts if (a.format, a.precision) == ("onnx", "int8")]
    assert {"patch_embed2", "block2.1"} <= set(int8.sensitivity)


@pytest.mark.slow
def test_a_scale_that_was_folded_is_told_from_a_fault(own_exported: ExportResult) -> None:
    (layers,) = [c for c in own_exported.parity.checks if (c.stage, c.runtime) == ("layers", "onnxruntime") and c.limit]
    assert layers.passed
    assert f"{sum(own_network.DEPTHS)} layers have a scale folded into them" in layers.limit_source


def weights_of(bundle: Path) -> Path:
    return bundle.parent / "own.pth"


@pytest.mark.parametrize("runtime", ["ort", "ov"])
@pytest.mark.slow
def test_verify_compares_with_the_network(own_exported: ExportResult, runtime: str) -> None:
    bundle = own_exported.output
    weights = weights_of(bundle)
    report = dmformer.verify(bundle, runtimes=[runtime], module=f"{SOURCE}:OwnDMFormer", weights=weights)
    assert report.passed
    assert {"description", "golden", "layers"} <= {check.stage for check in report.checks}
    other = dmformer.verify(bundle, runtimes=[runtime], module=own_network.lively(OwnDMFormer(), 4))
    assert "golden" in {check.stage for check in other.checks if not check.passed}
    with pytest.raises(UsageError, match=r"network is own_network.py:OwnDMFormer.*expected `module` as well"):
        dmformer.verify(bundle, runtimes=[runtime], weights=weights)


def with_fault(own_exported: ExportResult, folder: Path, channels: slice) -> Path:
    """The bundle with some channels of a convolution multiplied in its ONNX file."""
    bundle = Path(shutil.copytree(own_exported.output, folder / "b"))
    path = bundle / "onnx/fp32/model.onnx"
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if node.name == "block2.1.attn.value/Conv"]
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
    spoilt = numpy_helper.to_array(weight).copy()
    spoilt[channels] *= np.float32(1.05)
    weight.CopyFrom(numpy_helper.from_array(spoilt, weight.name))
    onnx.save(model, path)
    adopt(bundle, "onnx/fp32/model.onnx")
    return bundle


@pytest.mark.parametrize("channels", [slice(None), slice(0, 1)])
@pytest.mark.slow
def test_a_fault_is_found_in_its_own_module(own_exported: ExportResult, tmp_path: Path, channels: slice) -> None:
    bundle, own = with_fault(own_exported, tmp_path, channels), f"{SOURCE}:OwnDMFormer"
    report = dmformer.verify(bundle, runtimes=["ort"], module=own, weights=weights_of(own_exported.output))
    layers = [check for check in report.checks if check.stage == "layers" and check.precision == "fp32"]
    assert [check.passed for check in layers] == [False]
    assert "the first is module block2.1.attn.value: by" in str(layers[0].reason)


@pytest.mark.slow
def test_a_fault_is_bisected_to_its_own_module(own_exported: ExportResult, tmp_path: Path) -> None:
    bundle, own = with_fault(own_exported, tmp_path, slice(None)), OwnModule(f"{SOURCE}:OwnDMFormer", None)
    weights = weights_of(own_exported.output)
    report = dmformer.verify(bundle, runtimes=["ort"], module=own.module, weights=weights)
    found = localize(open_bundle(bundle), report, weights=weights, folder=tmp_path / "c", stage=silent, module=own)
    assert {finding.module for finding in found.findings if finding.precision == "fp32"} == {"block2.1.attn.value"}


@pytest.mark.usefixtures("quick")
def test_features_have_the_networks_names(tmp_path: Path) -> None:
    model = own_network.lively(OwnDMFormer(features=True))
    result = dmformer.export(model, image_size=64, output=tmp_path / "b", use_cache=False)
    assert result.parity.passed
    assert [output.name for output in result.manifest.outputs] == ["stage1", "stage2", "stage3", "stage4"]
    assert result.manifest.model.weights == "module"
    assert dmformer.verify(tmp_path / "b").passed


PRINTING = """

import os

quiet = OwnDMFormer.forward


def forward(self, x):
    print("python prints")
    os.write(1, b"descriptor prints\\n")
    return quiet(self, x)


OwnDMFormer.forward = forward
"""


@pytest.mark.slow
def test_the_command_line_takes_a_file(cli: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE.read_text(encoding="utf-8") + PRINTING, encoding="utf-8")
    asked = ("--module", "mine.py:build", "--module-option", "num_classes=3", "--image-size", "32", "--output", "b")
    done = cli("export", *asked)
    assert done.code == 0, done.err
    assert "the weights are those that module 'mine.py:build' comes with" in done.err
    assert "python prints" not in done.out
    assert "python prints" in done.err
    assert "descriptor prints" not in done.out
    assert "descriptor prints" in done.err
    assert "the usual was assumed" in done.err
    assert "mean 0.485, 0.456, 0.406" in done.err
    assert "images are seen with 32 pixels a side" in done.err
    assert cli("verify", "b", "--module", "mine.py:build").code == 0
    refused = cli("export", "--module", "mine.py:build", "--module-option", "classes=3")
    assert refused.code == 2
    assert refused.error_line.endswith("unexpected keyword argument 'classes'; expected --module-option that it takes")


def test_a_scale_is_forgiven_only_where_what_follows_is_right() -> None:
    from dmformer.verify.inner import ModuleTruth

    rows = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    truth = ModuleTruth(load_own(REFERENCE, image_size=32).checkpoint.model(), rows)
    names = list(truth.truth)
    right = dict.fromkeys(names, 0.0)
    assert truth._folded(right | {names[1]: 1.0}, {names[1]}) == {names[1]}
    assert truth._folded(right | {names[1]: 1.0}, set()) == set()
    assert truth._folded(right | {names[1]: 1.0, names[2]: 1.0}, {names[1]}) == set()
    assert truth._folded(right | {names[-1]: 1.0}, {names[-1]}) == set()
    spoilt = right | {names[1]: 1.0, names[4]: 1.0, names[5]: 1.0}  # a fault at 4, long after a scale at 1
    assert truth._folded(spoilt, {names[1], names[4]}) == {names[1]}
