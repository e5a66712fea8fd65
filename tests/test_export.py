"""What an export writes, and what it does when a stage breaks."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import dmformer
from dmformer.assets import DEMONSTRATION_CHECKPOINT
from dmformer.bundle.manifest import decode_manifest
from dmformer.errors import CheckFailed, StageFailed, UnavailableError, UsageError
from dmformer.export import graph as making
from dmformer.export.options import ExportOptions
from dmformer.export.run import plan_export
from dmformer.files import hash_file
from dmformer.graph import onnx_file
from dmformer.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dmformer.models.deploy import deploy
from dmformer.verify.answers import batch_sizes
from dmformer.verify.compare import Comparison

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.bundle.golden import Golden
    from dmformer.export.cached import ExportResult
    from dmformer.verify.answers import Answers
    from tests.conftest import Made

FAKE_ONNXSIM = """
import onnx, os, signal
def simplify(model, check_n=0):
    {body}
    return model, True
"""


@pytest.fixture(scope="module")
def graph(exported: ExportResult) -> onnx.ModelProto:
    return onnx.load(exported.output / "onnx/fp32/model.onnx")


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def fake_onnxsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put another onnxsim before the installed one, for child processes."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/onnxsim.py").write_text(FAKE_ONNXSIM.format(body=body), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"), prepend=os.pathsep)


def test_the_graph_is_named_typed_and_open_in_the_batch(graph: onnx.ModelProto) -> None:
    assert graph.opset_import[0].version >= 20
    described = [
        (value.name, [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim])
        for value in (*graph.graph.input, *graph.graph.output)
    ]
    assert described == [("image", ["batch", 3, 32, 32]), ("logits", ["batch", 10])]
    assert "Gelu" in {node.op_type for node in graph.graph.node}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_really_runs(exported: ExportResult, batch: int) -> None:
    session = onnxruntime.InferenceSession(exported.output / "onnx/fp32/model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": np.zeros((batch, 3, 32, 32), np.float32)})[0].shape == (batch, 10)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("deploy_form", [True, False])
def test_node_names_lead_back_to_modules(exported: ExportResult, tmp_path: Path, deploy_form: bool) -> None:
    model: torch.nn.Module = load_checkpoint(DEMONSTRATION_CHECKPOINT).model()
    folder = exported.output
    if not deploy_form:
        folder = dmformer.export(output=tmp_path / "b", deploy_form=False).output
    graph = onnx.load(folder / "onnx/fp32/model.onnx").graph
    modules = {name for name, _ in (deploy(model, 32) if deploy_form else model).named_modules()}
    names = [node.name for node in graph.node]
    assert {name.rpartition("/")[0] for name in names} <= modules
    assert len(set(names)) == len(names)
    assert "stages.2.blocks.1.dma.branches.2/Conv" in names
    assert "stages.0.downsample.conv1/Conv" in names
    of_one_form = "stages.2.blocks.1.dma.mix/Conv", "stages.2.blocks.1.dma.reduce/Conv"
    assert [name in names for name in of_one_form] == [deploy_form, not deploy_form]
    assert decode_manifest((folder / "manifest.json").read_bytes(), "").model.deploy_form == deploy_form


def test_the_file_says_what_it_is(graph: onnx.ModelProto, exported: ExportResult) -> None:
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    checkpoint = load_checkpoint(DEMONSTRATION_CHECKPOINT)
    assert metadata["dmformer.arch"] == "dmformer_nano"
    assert json.loads(metadata["dmformer.classes"]) == list("0123456789")
    assert json.loads(metadata["dmformer.config"]) == checkpoint.config.to_dict()
    assert json.loads(metadata["dmformer.preprocessing"])["image_size"] == 32
    assert metadata["dmformer.checkpoint_sha256"] == hash_file(DEMONSTRATION_CHECKPOINT)[0]
    assert metadata["torch.version"] == torch.__version__
    assert not [key for key in metadata if key.startswith("onnxsim.") and key != "onnxsim.version"]
    assert exported.manifest.model.checkpoint_sha256 == metadata["dmformer.checkpoint_sha256"]


def test_nothing_tells_of_the_machine_that_exported(exported: ExportResult) -> None:
    traces = [str(Path(dmformer.__file__).parents[1]), str(exported.output), "site-packages", "/tmp", str(Path.home())]
    for path in files_below(exported.output):
        data = path.read_bytes()
        assert not [trace for trace in traces if trace.encode() in data], path


def test_the_same_inputs_give_the_same_bytes(exported: ExportResult, made: Made) -> None:
    """From Python and from the command line: another process, hash seed, working folder and output folder."""
    here, there = (
        {path.relative_to(folder) for path in files_below(folder)} for folder in (exported.output, made.bundle)
    )
    assert here == there
    for name in here:
        assert (made.bundle / name).read_bytes() == (exported.output / name).read_bytes(), name


def test_the_manifest_lists_every_file(exported: ExportResult) -> None:
    manifest = decode_manifest((exported.output / "manifest.json").read_bytes(), "manifest")
    assert manifest == exported.manifest
    listed = {file.path for artifact in manifest.artifacts for file in artifact.files}
    listed |= {file.path for file in manifest.files} | {"manifest.json"}
    assert listed == {path.relative_to(exported.output).as_posix() for path in files_below(exported.output)}


def test_openvino_keeps_float32(exported: ExportResult) -> None:
    text = (exported.output / "openvino/fp32/model.xml").read_text(encoding="utf-8")
    assert set(re.findall(r'element_type="(f\d+)"', text)) == {"f32"}


def test_every_stage_is_a_row_of_the_parity_report(exported: ExportResult) -> None:
    rows = [(check.stage, check.runtime, check.against) for check in exported.parity.checks]
    artifact = ("runtime", "rows", "shuffled", "repeated", "batches", "decisions", "precision")
    assert list(dict.fromkeys(row[:2] for row in rows)) == [
        ("training form", "torch"),
        ("deploy form", "torch"),
        ("traced", "onnxruntime"),
        ("simplified", "onnxruntime"),
        ("layers", "onnxruntime"),
        *((stage, runtime) for runtime in ("torch", "onnxruntime", "openvino") for stage in artifact),
    ]
    before = [(stage, against) for stage, _, against in rows if against not in ("PyTorch", "itself", "promise")]
    assert list(dict.fromkeys(before)) == [
        ("deploy form", "training form"),
        ("traced", "deploy form"),
        ("simplified", "traced"),
        ("runtime", "onnx fp32"),
    ]
    for stage, runtime, against in rows:
        if stage in ("training form", "deploy form", "traced", "simplified", "runtime"):
            batches = [
                check.batch
                for check in exported.parity.checks
                if (check.stage, check.runtime, check.against) == (stage, runtime, against)
            ]
            assert batches == ([1, 2] if stage == "training form" else [1, 2, 5])  # 5 is what golden answers come from
    assert exported.manifest.evidence.parity.checks == len(rows)
    assert exported.manifest.simplification.kept


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_random_weights_are_marked(tmp_path: Path) -> None:
    options = {"num_classes": 3, "gate_input": "x_prime", "branch_merge": "concat", "in_channels": 1}
    result = dmformer.export(arch="dmformer_nano", image_size=48, options=options, seed=5, output=tmp_path / "b")
    model = result.manifest.model
    assert (model.weights, model.seed, model.checkpoint_sha256) == ("random", 5, None)
    assert model.config["branch_merge"] == "concat"
    assert result.manifest.inputs[0].shape == ("batch", 1, 48, 48)
    assert result.parity.passed


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_with_assumptions_says_so(tmp_path: Path) -> None:
    model = dmformer.create_model("dmformer_nano", num_classes=2).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    result = dmformer.export(tmp_path / "w.pth", image_size=32, output=tmp_path / "b")
    assert result.manifest.model.weights == "checkpoint"
    assert any("dilations" in note for note in result.manifest.model.notes)
    assert any("assumed" in note and "mean 0.485" in note for note in result.manifest.model.notes)


@pytest.mark.usefixtures("quick")
def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        import_module("dmformer.verify.parity"), "compare", lambda *_: Comparison(False, reason="seeded")
    )
    with pytest.raises(CheckFailed, match=r"nothing was written: .* checks failed.*seeded"):
        dmformer.export(output=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    forced = dmformer.export(output=tmp_path / "b", force=True)
    assert not forced.manifest.evidence.parity.passed
    assert (tmp_path / "b/manifest.json").is_file()


@pytest.mark.usefixtures("quick")
def test_a_baked_in_batch_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole pipeline: one failed check for each batch size but 1, and --force still writes."""

    def baked(checkpoint: object, model: object, destination: Path) -> None:
        trace(checkpoint, model, destination)
        model = onnx.load(destination)
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx.save(model, destination)

    trace = making.trace
    monkeypatch.setattr(making, "trace", baked)
    with pytest.raises(CheckFailed, match="nothing was written"):
        dmformer.export(output=tmp_path / "b")
    forced = dmformer.export(output=tmp_path / "b", force=True)
    failed = [(check.stage, check.batch) for check in forced.parity.checks if not check.passed]
    assert list(dict.fromkeys(failed)) == [
        ("traced", 2),
        ("traced", 5),
        ("runtime", 2),
        ("runtime", 5),
        ("runtime", 1),  # there is no answer of the ONNX file to compare with
        ("decisions", 5),
        ("precision", 1),
    ]
    assert not forced.manifest.simplification.kept


def test_a_crash_in_the_simplifier_is_an_error_of_that_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxsim(tmp_path, monkeypatch, "os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(StageFailed, match="simplification with onnxsim: the process was ended by signal 11"):
        dmformer.export(output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_error_in_the_simplifier_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxsim(tmp_path, monkeypatch, "raise RuntimeError('no such rule')")
    with pytest.raises(StageFailed, match="onnxsim: the process failed: RuntimeError: no such rule"):
        dmformer.export(output=tmp_path / "b")


@pytest.mark.slow
def test_a_simplifier_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxsim(tmp_path, monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr("dmformer.graph.simplify.TIMEOUT_S", 3)
    with pytest.raises(StageFailed, match="did not end within 3 s"):
        dmformer.export(output=tmp_path / "b")


@pytest.mark.slow
def test_a_graph_that_onnxsim_left_alone_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = making._ask_onnxruntime

    def note(file: Path, golden: Golden, *, whole: bool) -> Answers:
        asked.append(file.name)
        return ask(file, golden, whole=whole)

    monkeypatch.setattr(making, "_ask_onnxruntime", note)
    dmformer.export(output=tmp_path / "a")
    assert asked == ["simplified.onnx"]
    fake_onnxsim(tmp_path, monkeypatch, "next(n for n in model.graph.node if n.op_type == 'Gelu').name = 'x/y'")
    assert dmformer.export(output=tmp_path / "b").manifest.simplification.kept
    assert asked == ["simplified.onnx"] * 2  # names of nodes change nothing either
    (tmp_path / "fake/onnxsim.py").write_text(FAKE_ONNXSIM.format(body=DOUBLED))
    assert not dmformer.export(output=tmp_path / "c").manifest.simplification.kept
    assert asked == ["simplified.onnx"] * 2 + ["traced.onnx", "simplified.onnx"]


# One weight, a copy with the least of changes: the graph reads it under the same name.
DOUBLED = """
    weight = next(w for w in model.graph.initializer if w.name.endswith('head.weight'))
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0] += 1
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))"""


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("", True),
        ("one.graph.initializer[0].name = one.graph.node[0].input[1] = 'another'", True),
        ("del one.graph.node[-1]", False),
        ("one.graph.node[0].op_type = 'Another'", False),
        ("one.graph.node[0].attribute[0].ints[0] = 7", False),
        ("one.graph.node[1].input[0] = 'elsewhere'", False),
        ("one.graph.node[0].input[1], one.graph.node[1].input[1] = 'w1', 'w0'", False),
        ("one.graph.initializer[0].raw_data = bytes(16)", False),
        ("one.graph.initializer[0].dims[0] = 2; one.graph.initializer[0].dims[1] = 2", False),
        ("one.graph.output[0].name = 'z'", False),
        ("one.opset_import[0].version = 7", False),
        ("one.opset_import.add(domain='of.nobody', version=1)", True),
    ],
)
def test_graphs_that_differ_are_told_apart(change: str, same: bool) -> None:
    helper = onnx.helper
    value = [helper.make_tensor_value_info(name, 1, ["n", 4]) for name in ("x", "z0")]
    weights = [onnx.numpy_helper.from_array(np.full((1, 4), i + 1, np.float32), f"w{i}") for i in range(2)]
    nodes = [
        helper.make_node("Add", ["x", "w0"], ["y"], axes=[1]),
        helper.make_node("Mul", ["y", "w1"], ["z0"]),
    ]
    one, other = (helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:], weights)) for _ in range(2))
    exec(change, {"one": one})
    assert onnx_file.same_but_for_names(one, other) is same
    assert onnx_file.same_but_for_names(other, one) is same


def test_large_images_are_asked_in_smaller_batches() -> None:
    sizes = {side: batch_sizes(np.empty((1, 1, side, side), np.float32)) for side in (32, 224, 384, 416, 1024)}
    assert sizes == {32: (1, 2, 5), 224: (1, 2, 5), 384: (1, 2, 5), 416: (1, 2, 3), 1024: (1, 2, 3)}


@pytest.mark.slow
def test_a_simplified_graph_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "tensor = model.graph.initializer[0]; array = onnx.numpy_helper.to_array(tensor) * 1.01; "
        "tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))"
    )
    fake_onnxsim(tmp_path, monkeypatch, body)
    result = dmformer.export(output=tmp_path / "b")
    assert not result.manifest.simplification.kept
    assert "not equal to the traced one" in result.manifest.simplification.reason
    assert result.parity.passed  # the traced graph took its place


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    plan = plan_export(ExportOptions(formats=["onnx", "ov"], output=tmp_path / "b"))
    assert plan.files == [
        "manifest.json",
        "golden.npz",
        "onnx/fp32/",
        "openvino/fp32/",
        "reports/parity.json",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": ["coreml"]}, "unknown format 'coreml'"),
        ({"precisions": ["fp64"]}, "precision 'fp64'"),
        ({"arch": "resnet50"}, "unknown architecture 'resnet50'"),
        ({"image_size": 8}, "image_size"),
        ({"images": "/nonexistent"}, "no folder"),
        ({"options": {"gate_input": "y"}}, "gate_input"),
        ({"weights": "/nonexistent.pth"}, "cannot be read"),
    ],
)
def test_bad_requests_are_refused_before_any_work(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        dmformer.export(**{"output": tmp_path / "b", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_engine_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnavailableError, match=r"pip install 'dmformer\[openvino\]'"):
        dmformer.export(formats=["openvino"], output=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_verify_finds_a_bundle_made_from_other_weights(exported: ExportResult, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(DEMONSTRATION_CHECKPOINT)
    checkpoint.state["head.bias"][4] += 0.01
    torch.save(checkpoint.state, tmp_path / "other.pth")
    assert dmformer.verify(exported.output, weights=DEMONSTRATION_CHECKPOINT).passed
    found = dmformer.verify(exported.output, weights=tmp_path / "other.pth", runtimes=["ort"])
    assert not found.passed
    assert [check.stage for check in found.checks if not check.passed] == ["golden", *["runtime"] * 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: replace(c, classes=c.classes[::-1]), "classes"),
        (lambda c: replace(c, preprocessing=msgspec.structs.replace(c.preprocessing, channels="BGR")), "preprocessing"),
        (lambda c: replace(c, config=replace(c.config, dilations=(3, 2, 1))), "dilations"),
        (lambda c: replace(c, config=replace(c.config, batch_norm_eps=1e-3)), "batch_norm_eps"),
    ],
)
def test_verify_finds_a_checkpoint_that_says_otherwise(
    exported: ExportResult, change: Callable[[Checkpoint], Checkpoint], named: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, change(load_checkpoint(DEMONSTRATION_CHECKPOINT)))
    found = dmformer.verify(exported.output, weights=other, runtimes=["ort"])
    (description,) = [check for check in found.checks if check.stage == "description"]
    assert not description.passed
    assert named in (description.reason or "")


def test_verify_looks_at_every_file(bundle: Path) -> None:
    (bundle / "onnx/fp32/evil.so").touch()
    with pytest.raises(CheckFailed, match=r"evil\.so"):
        dmformer.verify(bundle)
    (bundle / "onnx/fp32/evil.so").unlink()
    (bundle / "reports/parity.json").write_text("{}")
    with pytest.raises(CheckFailed, match=r"parity\.json"):
        dmformer.verify(bundle)


def test_verify_says_what_it_did_not_check(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format": "onnx"', b'"format": "onxx"'))
    found = dmformer.verify(bundle)
    assert found.skipped == ("onxx: this version of dmformer has no runtime for it",)


@pytest.mark.slow
def test_modules_in_the_working_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("select", "onnx", "msgspec"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the working folder')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert dmformer.export(output=tmp_path / "b").manifest.simplification.kept


def test_verify_compares_on_images_that_are_given(exported: ExportResult) -> None:
    images = Path(dmformer.__file__).parent / "assets/digits"
    found = dmformer.verify(exported.output, images=images, runtimes=["ort"])
    assert found.passed
    (others,) = [check for check in found.checks if check.stage == "images"]
    assert (others.batch, others.against) == (10, "PyTorch")
    assert "on the same 15 images" in (others.limit_source or "")
    assert [check.batch for check in found.checks if check.stage == "decisions"] == [5, 10]


@pytest.mark.usefixtures("quick")
def test_verify_on_images_needs_weights(tmp_path: Path) -> None:
    dmformer.export(output=tmp_path / "b")
    with pytest.raises(UsageError, match="give the checkpoint as `weights`"):
        dmformer.verify(tmp_path / "b", images=Path(dmformer.__file__).parent / "assets/digits")
