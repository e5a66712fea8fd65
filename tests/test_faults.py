"""Every seeded fault is caught, and where it sits in a node it is found there; its case shows it alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import numpy as np
import pytest

import dmformer
from benchmarks import faults
from benchmarks.fault_kinds import Fault, spoil_weights
from benchmarks.fault_kinds_elsewhere import IN_BUNDLES, PRECISION
from benchmarks.faults import Bench
from dmformer.assets import DEMONSTRATION_CHECKPOINT
from dmformer.bundle.reader import open_bundle
from dmformer.errors import CheckFailed, UsageError
from dmformer.export.networks import random_checkpoint
from dmformer.models.checkpoint import save_checkpoint
from dmformer.progress import silent
from dmformer.verify import localize as localizing
from dmformer.verify.localize import localize
from dmformer.verify.localize.case import run_case
from tests.bundles import adopt, one_line, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.verify.report import Finding
    from tests.conftest import Run

SCHEMAS = Path(dmformer.__file__).parent / "schemas"
TRUSTED = localizing._trusted
BY_NAME = {fault.name: fault for fault in (*IN_BUNDLES, *PRECISION)}


# Whole benches of faults.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trusted_once")]


@pytest.fixture(scope="module")
def bench(exported: ExportResult, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(exported.output, tmp_path_factory.mktemp("faults"))


def test_there_are_enough_kinds() -> None:
    assert len(BY_NAME) == len(IN_BUNDLES) + len(PRECISION) >= 24
    assert {fault.kind.split()[0] for fault in BY_NAME.values()} == {
        "weights",
        "graph",
        "engine",
        "precision",
        "preprocessing",
        "batching",
    }


@pytest.mark.parametrize("fault", IN_BUNDLES, ids=lambda fault: fault.name)
def test_a_fault_in_a_bundle_is_caught_and_found(bench: Bench, fault: Fault) -> None:
    found = bench.in_bundle(fault)
    assert found.caught
    assert found.located, (found.modules, found.said)


@pytest.mark.parametrize("fault", PRECISION, ids=lambda fault: fault.name)
def test_a_fault_in_a_precision_is_caught_and_found(bench: Bench, fault: Fault) -> None:
    found = bench.in_precision(fault)
    assert found.caught
    assert found.located, (found.modules, found.said)


def test_without_a_fault_nothing_is_caught(bench: Bench) -> None:
    clean = bench.in_bundle(Fault("weights", "none", "head", lambda _: []))
    assert not clean.caught
    assert clean.modules == ()
    for precision in ("fp16", "int8"):
        assert not bench.in_precision(Fault(f"precision {precision}", "none", None, lambda _: [])).caught


@pytest.mark.slow
def test_a_clean_export_raises_no_alarm(tmp_path: Path) -> None:
    assert faults.clean(1, tmp_path)[0] == []


def find(bundle: Path, fault: Fault, cases: Path) -> Finding:
    """The one finding about a bundle that is spoilt in place."""
    fault.inject(bundle)
    opened = open_bundle(bundle)
    report = dmformer.verify(opened, runtimes=[fault.runtime], weights=DEMONSTRATION_CHECKPOINT)
    (finding,) = localize(opened, report, weights=DEMONSTRATION_CHECKPOINT, folder=cases, stage=silent).findings
    return finding


@pytest.mark.parametrize(
    ("name", "at_fault", "difference"),
    [
        ("a dilation of 1", "file", "dilations is [1, 1]; expected [2, 2]"),
        ("1 % of a kernel", "file", "128 of 128 values differ, by up to"),
        ("a lost ReLU", "file", "is Identity; expected Relu"),
        ("a NaN", "file", "holds 1 values that are NaN or infinite"),
        ("a residual from the wrong place", "file", "reads /stages.2/blocks/blocks.0/Add_1_output_0; expected"),
        ("a weight in OpenVINO's own file", "artifact", None),
    ],
)
def test_a_finding_says_whose_fault_it_is_and_its_case_shows_it(
    bundle: Path, tmp_path: Path, name: str, at_fault: str, difference: str | None
) -> None:
    finding = find(bundle, BY_NAME[name], tmp_path / "cases")
    assert finding.at_fault == at_fault
    assert finding.module == BY_NAME[name].module
    if difference is None:
        assert finding.differences == ()
    else:
        assert any(difference in line for line in finding.differences), finding.differences
    assert finding.runs <= 8
    assert finding.most_shown <= 4
    assert finding.case is not None
    case = tmp_path / "cases" / f"{finding.runtime}-fp32"
    assert not run_case(case).passed


def test_a_wrong_kernel_is_the_engines_fault(bundle: Path, tmp_path: Path) -> None:
    fault = BY_NAME["a kernel that computes another GELU"]
    with pytest.MonkeyPatch.context() as patch:
        for one in fault.inject(bundle):
            patch.setattr(one.getter(), one.attribute, one.new)
        opened = open_bundle(bundle)
        report = dmformer.verify(opened, runtimes=["ort"], weights=DEMONSTRATION_CHECKPOINT)
        found = localize(opened, report, weights=DEMONSTRATION_CHECKPOINT, folder=tmp_path / "c", stage=silent)
        (finding,) = found.findings
        assert finding.at_fault == "engine"
        assert not run_case(tmp_path / "c/onnxruntime-fp32").passed
    # The same case where the engine is right.
    assert run_case(tmp_path / "c/onnxruntime-fp32").passed


def test_a_case_that_is_none_is_refused(bundle: Path, tmp_path: Path) -> None:
    find(bundle, BY_NAME["1 % of a kernel"], tmp_path / "cases")
    case = tmp_path / "cases/onnxruntime-fp32"
    content = json.loads((case / "case.json").read_bytes())

    def spoilt(name: str, change: Callable[[Path], object]) -> Path:
        copied = tmp_path / name
        shutil.copytree(case, copied)
        change(copied)
        return copied

    for name, change, error, message in (
        ("gone", lambda c: (c / "case.json").unlink(), UsageError, "no case"),
        ("no-json", lambda c: (c / "case.json").write_text("{"), UsageError, "no case"),
        ("no-arrays", lambda c: (c / "case.npz").write_bytes(b"PK"), UsageError, "no case"),
        ("changed", lambda c: (c / "cut.onnx").write_bytes(b""), CheckFailed, "changed; expected the file"),
        ("no-file", lambda c: (c / "cut.onnx").unlink(), CheckFailed, "missing, or no file"),
        (
            "outside",
            lambda c: (c / "case.json").write_text(
                json.dumps(content | {"files": [content["files"][0] | {"path": "../cut.onnx"}]})
            ),
            UsageError,
            "no case",
        ),
        (
            "no-limits",
            lambda c: (c / "case.json").write_text(json.dumps(content | {"limits": {}})),
            UsageError,
            "the case names",
        ),
        (
            "other-runtime",
            lambda c: (c / "case.json").write_text(json.dumps(content | {"runtime": "abacus"})),
            UsageError,
            "unknown runtime 'abacus'",
        ),
    ):
        with pytest.raises(error, match=message) as raised:
            run_case(spoilt(name, change))
        one_line(raised.value)


def test_without_weights_the_onnx_file_is_trusted_where_it_is_right(reduced_bundle: Path, tmp_path: Path) -> None:
    BY_NAME["a weight in OpenVINO's own file"].inject(reduced_bundle)
    opened = open_bundle(reduced_bundle)
    report = dmformer.verify(opened, runtimes=["ov"])
    for _ in range(2):  # an older case is replaced
        found = localize(opened, report, weights=None, folder=tmp_path / "c", stage=silent)
        (finding,) = found.findings
        assert (finding.runtime, finding.module) == ("openvino", "stages.2.blocks.0.ffn.fc1")
        assert finding.at_fault == "artifact"
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["openvino-fp32"]


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localizing, "_trusted", TRUSTED)


@pytest.mark.usefixtures("untraced")
def test_what_hinders_a_bisection_is_said_and_the_report_kept(bundle: Path, tmp_path: Path) -> None:
    shutil.rmtree(bundle / "torch")
    rewrite(bundle, lambda c: c.update(artifacts=[made for made in c["artifacts"] if made["format"] != "torch"]))
    BY_NAME["1 % of a kernel"].inject(bundle)
    opened = open_bundle(bundle)
    report = dmformer.verify(opened)
    other = random_checkpoint("dmformer_nano", {"num_classes": 10}, 32, seed=1)
    save_checkpoint(tmp_path / "other.safetensors", other)
    (tmp_path / "file").write_bytes(b"")
    for weights, folder, message in (
        (None, "c", "the bisection has nothing to trust"),
        (tmp_path / "other.safetensors", "c", "the golden answers are not those of the checkpoint"),
        (tmp_path / "none.safetensors", "c", "No such file"),
        (DEMONSTRATION_CHECKPOINT, "file", "file"),
    ):
        found = localize(opened, report, weights=weights, folder=tmp_path / folder, stage=silent)
        assert found.checks == report.checks
        assert found.findings == ()
        assert message in found.skipped[-1]
        assert "\n" not in found.skipped[-1]
    assert not (tmp_path / "c").exists()


def test_what_sits_in_no_node_is_not_looked_for(bundle: Path, tmp_path: Path) -> None:
    BY_NAME["another crop"].inject(bundle)
    opened = open_bundle(bundle)
    found = localize(opened, dmformer.verify(opened), weights=None, folder=tmp_path / "c", stage=silent)
    assert found.skipped[-1] == "bisection: what failed (pixels) sits in no node of the graph"


def test_what_fails_in_batches_alone_is_not_looked_for_in_a_node(bundle: Path, tmp_path: Path) -> None:
    BY_NAME["a batch of one baked in"].inject(bundle)
    opened = open_bundle(bundle)
    report = dmformer.verify(opened, runtimes=["ort"])
    found = localize(opened, report, weights=None, folder=tmp_path / "c", stage=silent)
    assert found.findings == ()
    assert "right row by row, and not in batches of 2: look at the batching" in found.skipped[-1]


NOISE = ("stages.0.blocks.0.ffn.fc1.bias", "stages.0.blocks.0.dma.mix.bias", "stages.3.blocks.0.ffn.fc2.bias")


@pytest.mark.parametrize("name", NOISE)
def test_a_fault_that_sinks_below_the_limit_on_its_way_is_found_where_it_is(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    draw = np.random.default_rng(0)
    spoil_weights(bundle, {name: lambda array: array * (1 + 3e-3 * draw.standard_normal(array.shape))})
    opened = open_bundle(bundle)
    report = dmformer.verify(opened, runtimes=["ort"], weights=DEMONSTRATION_CHECKPOINT)
    assert not report.passed
    found = localize(opened, report, weights=DEMONSTRATION_CHECKPOINT, folder=tmp_path / "c", stage=silent)
    (finding,) = found.findings
    assert finding.module == name.removesuffix(".bias")
    assert not run_case(tmp_path / "c/onnxruntime-fp32").passed


def test_the_training_form_as_the_simplifier_leaves_it(tmp_path: Path) -> None:
    """It folds layer scales and norms into convolutions, and leaves these their names."""
    options = {"num_classes": 5, "gate_input": "x_prime", "branch_merge": "concat", "in_channels": 1}
    exported = dmformer.export(
        arch="dmformer_nano",
        options=options,
        image_size=32,
        formats=["torch", "onnx"],
        deploy_form=False,
        output=tmp_path / "b",
    )
    assert exported.parity.passed
    spoil_weights(tmp_path / "b", {"stages.1.downsample.norm.weight": lambda array: 1.05 * array})
    opened = open_bundle(tmp_path / "b")
    report = dmformer.verify(opened, runtimes=["ort"], layers=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localizing, "_trusted", TRUSTED)
        found = localize(opened, report, weights=None, folder=tmp_path / "c", stage=silent)
    (finding,) = found.findings
    assert finding.module.startswith("stages.1.downsample")


def test_a_network_with_a_dead_part_is_judged_all_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A layer scale of zero: its branch gives exactly nothing, and leaves no error to measure."""
    state = {name: value.clone() for name, value in checkpoint.state.items()}
    state["stages.2.blocks.1.scale2.gamma"].zero_()
    save_checkpoint(tmp_path / "dead.safetensors", replace(checkpoint, state=state))
    assert dmformer.export(tmp_path / "dead.safetensors", output=tmp_path / "b").parity.passed


def test_fp16_that_was_spoilt_is_right_once_made_anew(reduced_bundle: Path, tmp_path: Path) -> None:
    name = "onnx/fp16/model.onnx"
    BY_NAME["half the bits of a layer"].inject(reduced_bundle / name)
    adopt(reduced_bundle, name)
    opened = open_bundle(reduced_bundle)
    report = dmformer.verify(opened, runtimes=["ort"])
    (finding,) = localize(
        opened, report, weights=DEMONSTRATION_CHECKPOINT, folder=tmp_path / "c", stage=silent
    ).findings
    assert (finding.precision, finding.module, finding.at_fault) == ("fp16", "stages.1.blocks.0.ffn.fc1", "file")
    assert finding.island is not None
    assert finding.island.passed
    assert finding.island.nodes == ()
    assert "export again" in finding.explanation


def test_the_command_bisects_and_runs_a_case(inline: Callable[..., Run], bundle: Path, tmp_path: Path) -> None:
    BY_NAME["a dilation of 1"].inject(bundle)
    run = inline("verify", bundle, "--runtime", "ort", "--bisect", "--json", "report.json")
    assert run.code == 1, run.err
    assert "checks failed; first: runtime in onnxruntime fp32 at batch 1, against PyTorch" in run.error_line
    words = " ".join(run.out.split())
    assert "FOUND onnxruntime fp32 parts at stages.0.blocks.0.dma.branches.1/Conv" in words
    assert "dilations is [1, 1]; expected [2, 2]" in words
    assert "to see it alone: dmformer verify --case dmformer-bisect/onnxruntime-fp32" in words
    lines = run.out.splitlines()
    assert "FAILED" in next(line for line in lines[3:] if "runtime" in line)  # what failed comes first
    report = json.loads((tmp_path / "report.json").read_bytes())
    jsonschema.validate(report, json.loads((SCHEMAS / "verify.json").read_bytes()))
    assert report["findings"][0]["module"] == "stages.0.blocks.0.dma.branches.1"
    run = inline("verify", "--case", "dmformer-bisect/onnxruntime-fp32")
    assert run.code == 1
    assert "FAILED" in run.out
    assert "1 of 1 checks failed" in run.error_line
    for wrong in (
        ("verify", bundle, "--case", "x"),
        ("verify", "--case", "x", "--bisect"),
        ("verify", "--case", "x", "--precision", "fp16"),
        ("verify", "--case", "x"),
    ):
        assert inline(*wrong).code == 2
