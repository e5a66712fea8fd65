"""int8 on processors without VNNI: right by default, and where it cannot be, everything that runs it says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import dmformer
from dmformer import machine
from dmformer.bundle import select
from dmformer.bundle.predictor import choose
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import saturation
from dmformer.errors import CheckFailed, UsageError
from dmformer.export import int8
from dmformer.export.build import build
from dmformer.machine import describe_processor, max_isa, without_vnni
from dmformer.runtimes import registry
from dmformer.runtimes.openvino import OpenVinoRuntime
from tests.bundles import rewrite
from tests.conftest import NoSimplifier, Run, made_once, timed_as
from tests.precisions import arrays

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.pipeline import ExportResult
    from dmformer.verify.answers import Answers

CAUSE = "its int8 weights use 8 bits, and their sums may saturate in openvino"
X86 = pytest.mark.skipif(
    describe_processor().architecture != "x86_64", reason="this processor is no x86-64, and does not saturate"
)
OPENVINO = registry.entry("openvino")
# What oneDNN can be held to, in the words of ONEDNN_MAX_CPU_ISA, and still be like a processor that exists.
HELD = [
    "AVX2",
    pytest.param(
        "AVX512_CORE",
        marks=pytest.mark.skipif(
            not {"avx512f", "avx512bw"} <= machine.instructions(), reason="this processor has no AVX-512"
        ),
    ),
]


@pytest.fixture(scope="session")
def full_range(tmp_path_factory: pytest.TempPathFactory, few_images: Path) -> ExportResult:
    """The demonstration checkpoint at int8 with weights of 8 bits, whatever its checks say here; not to be spoilt."""

    def make(folder: Path) -> ExportResult:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmformer.export.pipeline.compare_precisions", timed_as({}))
            patch.setattr("dmformer.export.graph.Simplifier", NoSimplifier)
            return dmformer.export(
                formats=["openvino", "onnx"],
                precisions=["int8", "fp32"],
                weight_bits=8,
                calibration=few_images,
                max_accuracy_drop=100,
                force=True,
                output=folder / "demo",
            )

    return made_once(tmp_path_factory, "full-range", make)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has AVX2 and no VNNI."""
    _unheld(monkeypatch)
    monkeypatch.setattr(machine, "instructions", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def _unheld(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without 'make test-older'."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def quantized_weights(path: Path) -> list[np.ndarray]:
    """The int8 weights of an ONNX file."""
    values = arrays(onnx.load(path).graph)
    return [array for array in values.values() if array.dtype == np.int8 and array.ndim == 4]


# --- the files --------------------------------------------------------------------------------------------------------


def test_by_default_no_weight_is_beyond_64(reduced: ExportResult) -> None:
    weights = quantized_weights(reduced.output / "onnx/int8/model.onnx")
    assert len(weights) > 20
    # One scale a channel, so that each reaches the end of the range.
    assert {int(np.abs(array.astype(int)).max()) for array in weights} == {64}


def test_openvino_has_the_same_weights(reduced: ExportResult) -> None:
    import openvino

    model = openvino.Core().read_model(reduced.output / "openvino/int8/model.xml")
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    found = [node.data for node in constants if node.get_element_type() == openvino.Type.i8 and node.data.ndim == 4]
    assert len(found) == len(quantized_weights(reduced.output / "onnx/int8/model.onnx"))
    assert {int(np.abs(array.astype(int)).max()) for array in found} == {64}


def test_the_full_range_reaches_127(full_range: ExportResult) -> None:
    weights = quantized_weights(full_range.output / "onnx/int8/model.onnx")
    assert {int(np.abs(array.astype(int)).max()) for array in weights} == {127}


def test_the_manifest_says_which(reduced: ExportResult, full_range: ExportResult) -> None:
    for result, bits in ((reduced, 7), (full_range, 8)):
        for artifact in result.manifest.artifacts:
            assert artifact.weight_bits == (bits if artifact.precision == "int8" else None)
            assert artifact.full_range == (artifact.precision == "int8" and bits == 8)


def test_a_bundle_from_before_has_the_full_range(reduced_bundle: Path) -> None:
    rewrite(reduced_bundle, lambda c: [made.pop("weight_bits") for made in c["artifacts"]])
    rewrite(reduced_bundle, lambda c: c["evidence"].pop("processor"))
    bundle = open_bundle(reduced_bundle)
    assert bundle.manifest.evidence.processor is None
    assert [a.full_range for a in bundle.manifest.artifacts] == [
        a.precision == "int8" for a in bundle.manifest.artifacts
    ]


def test_what_is_built_on_a_device_keeps_the_range(
    reduced_bundle: Path, full_range: ExportResult, tmp_path: Path
) -> None:
    full = Path(shutil.copytree(full_range.output, tmp_path / "full"))
    (seven,) = build(reduced_bundle, "openvino", precisions=["int8"]).artifacts
    assert seven.weight_bits == 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmformer.export.build.proven", lambda _row, artifact, *_: (artifact, []))
        (eight,) = build(full, "openvino", precisions=["int8"]).artifacts
    assert eight.weight_bits == 8


@pytest.mark.parametrize("bits", [0, 6, 9, 16])
def test_other_numbers_of_bits_are_refused(bits: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"weight_bits is {bits}; expected 7, right on every processor, or 8"):
        dmformer.export(precisions=["int8"], weight_bits=bits, output=tmp_path / "b")


def test_bits_without_int8_are_refused(inline: Callable[..., Run], tmp_path: Path) -> None:
    run = inline("export", "--weight-bits", "8", "--precision", "fp16", "--output", "b")
    assert run.code == 2
    assert "int8 weights of 8 bits, and no int8" in run.error_line
    assert not (tmp_path / "b").exists()


# --- on an older processor, as oneDNN plays it ------------------------------------------------------------------------

KERNELS = """
import sys
from pathlib import Path
from dmformer.runtimes.openvino import OpenVinoRuntime
with OpenVinoRuntime(Path(sys.argv[1]), precision="int8") as runtime:
    for node in runtime._model.get_runtime_model().get_ops():
        print(node.get_rt_info()["primitiveType"].astype(str))
"""


@X86
@pytest.mark.parametrize("held", HELD)
def test_openvino_can_be_held_back(reduced: ExportResult, held: str) -> None:
    """What the tests below, and 'make test-older', stand on."""
    path = reduced.output / "openvino/int8/model.xml"
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, str(path)],
        env={"ONEDNN_MAX_CPU_ISA": held, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = {line for line in done.stdout.split() if line.endswith("_I8") and "1x1" in line}
    assert kernels
    wanted = {"AVX2": "avx2", "AVX512_CORE": "avx512"}[held]
    assert all(wanted in kernel and "vnni" not in kernel for kernel in kernels), kernels


@X86
@pytest.mark.parametrize("held", HELD)
def test_seven_bits_are_right_on_an_older_processor(reduced: ExportResult, cli: Callable[..., Run], held: str) -> None:
    run = cli("verify", reduced.output, "--runtime", "ov", "--json", "-", ONEDNN_MAX_CPU_ISA=held)
    assert run.code == 0, run.err
    report = json.loads(run.out)
    assert report["processor"]["max_isa"] == held
    shares = [
        check["max_abs"] / check["limit"]
        for check in report["checks"]
        if (check["precision"], check["stage"], check["against"]) == ("int8", "runtime", "onnx int8")
    ]
    assert len(shares) == 3
    assert max(shares) < 0.5  # saturation would be beyond 1
    assert "saturate" not in run.err


@X86
def test_eight_bits_fail_there_and_the_cause_is_named(full_range: ExportResult, cli: Callable[..., Run]) -> None:
    run = cli("verify", full_range.output, "--runtime", "ov", ONEDNN_MAX_CPU_ISA="AVX2")
    assert run.code == 1
    assert run.err.startswith(f"note: openvino int8: {CAUSE}: ")  # before anything is run
    assert "runtime in openvino int8" in run.error_line
    assert CAUSE in run.error_line
    assert "export it again with weights of 7 bits (the default), or run it at another precision" in run.error_line


SHARE_OF_LIMIT = """
import json, sys
import numpy as np
from pathlib import Path
from dmformer.bundle.golden import load_golden
from dmformer.runtimes.openvino import OpenVinoRuntime
from dmformer.verify.parity import references
for folder in map(Path, sys.argv[1:]):
    golden = load_golden(folder / "golden.npz")
    with OpenVinoRuntime(folder / "openvino/int8/model.xml", precision="int8", threads=1) as runtime:
        answers = runtime.run_rows({"image": golden.inputs})["logits"]
        kernels = [n.get_rt_info()["primitiveType"].astype(str) for n in runtime._model.get_runtime_model().get_ops()]
    against = references(golden, "int8")[1]
    apart = float(np.abs(answers - against.outputs["logits"]).max())
    print(json.dumps({"share": apart / against.limits["logits"].max_abs, "kernels": kernels}))
"""


@pytest.mark.slow
@X86
@pytest.mark.skipif(shutil.which("qemu-x86_64-static") is None, reason="no emulator: apt-get install qemu-user-static")
def test_an_emulated_processor_without_avx_agrees(reduced: ExportResult, full_range: ExportResult) -> None:
    """Not held back by a variable: QEMU's Nehalem ends a process by SIGILL at an AVX instruction."""
    folders = [str(result.output) for result in (reduced, full_range)]
    done = subprocess.run(
        ["qemu-x86_64-static", "-cpu", "Nehalem", sys.executable, "-c", SHARE_OF_LIMIT, *folders],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    seven, eight = map(json.loads, done.stdout.splitlines())
    assert any("sse42" in kernel for kernel in seven["kernels"])
    assert not any("avx" in kernel for kernel in seven["kernels"])
    assert seven["share"] < 0.5
    assert eight["share"] > 1


@pytest.mark.skipif(without_vnni() is not None, reason=f"int8 with weights of 8 bits is wrong here: {without_vnni()}")
def test_eight_bits_are_right_where_there_is_vnni(full_range: ExportResult) -> None:
    found = dmformer.verify(full_range.output, runtimes=["openvino"])
    assert found.passed, [check.reason for check in found.checks if not check.passed]


# --- who says so ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without")
def test_an_export_with_eight_bits_names_the_cause(
    inline: Callable[..., Run], few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    from dmformer.verify import parity

    checked = parity.check_artifact

    def far_off(answers: Answers, *arguments: Any) -> Any:
        wrong = {batch: {"logits": found["logits"] + 1000} for batch, found in answers.by_batch.items()}
        return checked(replace(answers, by_batch=wrong) if answers.precision == "int8" else answers, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("dmformer.export.artifact.check_artifact", far_off)
        run = inline(
            "export", "--format", "ov", "--precision", "int8", "--weight-bits", "8",
            "--calibration", few_images, "--max-accuracy-drop", "100", "--output", "b",
        )  # fmt: skip
    assert run.code == 1
    assert CAUSE in run.error_line
    assert "this processor has no VNNI" in run.error_line
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("without")
def test_doctor_says_so_and_auto_takes_another(
    full_range: ExportResult, inline: Callable[..., Run], tmp_path: Path
) -> None:
    run = inline("doctor", full_range.output)
    said = " ".join(run.out.split())
    assert f"runs here; {CAUSE}: this processor has no VNNI" in said
    int8_first = Path(shutil.copytree(full_range.output, tmp_path / "b"))
    rewrite(int8_first, lambda c: c["artifacts"].sort(key=lambda made: made["precision"] != "int8"))
    artifacts = json.loads(inline("doctor", int8_first, "--json").out)["artifacts"]
    taken = [(one["format"], one["precision"]) for one in artifacts if one["chosen"]]
    bundle = open_bundle(int8_first)
    assert bundle.manifest.artifacts[0].full_range
    choice = choose(bundle, None, None)
    assert taken == [(choice.artifact.format, choice.artifact.precision)]
    assert choice.saturation is None
    named = choose(bundle, "openvino", "int8")
    assert named.saturation is not None


@pytest.mark.usefixtures("without")
def test_predict_eval_and_bench_say_so(
    full_range: ExportResult, inline: Callable[..., Run], few_images: Path, worker: Any
) -> None:
    worker()
    image = next((few_images / "7").iterdir())
    predicted = inline("predict", full_range.output, image, "--runtime", "ov", "--precision", "int8")
    measured = inline("eval", full_range.output, "--data", few_images, "--runtime", "ov", "--json", "-")
    timed = inline("bench", full_range.output, "--runtime", "ov", "--json", "-")
    assert f"note: openvino int8: {CAUSE}" in " ".join(predicted.err.split())
    assert [note.startswith(f"openvino int8: {CAUSE}") for note in json.loads(measured.out)["notes"]] == [True]
    assert [note.startswith(f"openvino int8: {CAUSE}") for note in json.loads(timed.out)["notes"]] == [True]
    assert json.loads(timed.out)["environment"]["max_isa"] is None


@pytest.mark.usefixtures("without")
def test_python_is_warned(full_range: ExportResult) -> None:
    with pytest.warns(UserWarning, match="openvino int8: its int8 weights use 8 bits"):
        predictor = dmformer.load(full_range.output, runtime="openvino", precision="int8")
    assert CAUSE in predictor.notes[0]
    assert dmformer.load(full_range.output, runtime="openvino").runtime.precision == "fp32"  # int8 comes last there


@pytest.mark.usefixtures("without")
def test_doctor_says_so_beside_what_else_it_says(
    full_range: ExportResult, inline: Callable[..., Run], tmp_path: Path
) -> None:
    older = Path(shutil.copytree(full_range.output, tmp_path / "older"))
    rewrite(older, lambda c: [made["built_with"].update(openvino="2099.1") for made in c["artifacts"]])
    findings = json.loads(inline("doctor", older, "--json").out)["artifacts"]
    (said,) = [one["reason"] for one in findings if (one["format"], one["precision"]) == ("openvino", "int8")]
    assert "made with openvino 2099.1" in said
    assert CAUSE in said


@pytest.mark.usefixtures("without")
def test_doctor_says_so_of_what_can_be_built(
    full_range: ExportResult, inline: Callable[..., Run], tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(full_range.output, tmp_path / "bare"))
    shutil.rmtree(bare / "openvino")
    rewrite(bare, lambda c: c.update(artifacts=[made for made in c["artifacts"] if made["format"] == "onnx"]))
    findings = json.loads(inline("doctor", bare, "--json").out)["artifacts"]
    built = {one["precision"]: one["reason"] for one in findings if one["format"] == "openvino"}
    assert CAUSE in built["int8"]
    assert built["fp32"] is None


@pytest.mark.usefixtures("without")
def test_auto_looks_at_no_engine_that_it_does_not_need(exported: ExportResult, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    tried = select.cannot_run
    monkeypatch.setattr("dmformer.bundle.predictor.cannot_run", lambda row, a: asked.append(row.name) or tried(row, a))
    choice = choose(open_bundle(exported.output), None, None)
    assert asked == [choice.entry.name]


@pytest.mark.usefixtures("without")
def test_a_case_names_the_cause(full_range: ExportResult, tmp_path: Path) -> None:
    """A limit that nothing keeps stands for what saturates."""
    from dmformer.bundle.manifest import file_entry
    from dmformer.verify.case import Case, run_case, save_case

    golden = open_bundle(full_range.output).golden()
    for full in (True, False):
        shutil.copytree(full_range.output / "openvino/int8", tmp_path / f"case-{full}")
        files = tuple(
            file_entry(tmp_path / f"case-{full}", tmp_path / f"case-{full}/model.{kind}") for kind in ("xml", "bin")
        )
        case = Case(
            runtime="openvino", precision="int8", files=files, node="head", limits={"logits": 1e-9}, full_range=full
        )
        save_case(tmp_path / f"case-{full}", case, {"image": golden.inputs}, dict(golden.outputs_float64))
        (check,) = run_case(tmp_path / f"case-{full}")
        assert not check.passed
        assert (CAUSE in (check.reason or "")) == full


@pytest.mark.usefixtures("without")
def test_only_answers_that_differ_are_explained(full_range: ExportResult, tmp_path: Path) -> None:
    less = Path(shutil.copytree(full_range.output, tmp_path / "less"))
    rewrite(
        less, lambda c: [made.update(promised_share=0.99) for made in c["artifacts"] if made["precision"] == "int8"]
    )
    found = dmformer.verify(less, runtimes=["openvino"])
    (layers,) = [check for check in found.checks if check.stage == "precision" and not check.passed]
    assert "promised 99%" in (layers.reason or "")
    assert CAUSE not in (layers.reason or "")


def test_a_layout_for_a_server_says_so(full_range: ExportResult, inline: Callable[..., Run], tmp_path: Path) -> None:
    run = inline("serve-layout", "ovms", full_range.output, "--output", "served")
    assert run.code == 0, run.err
    said = (tmp_path / "served/README.md").read_text(encoding="utf-8")
    assert (
        said.count("int8 weights of 8 bits, whose sums saturate in OpenVINO on x86 processors without VNNI") == 2
    )  # OVMS runs the ONNX file in OpenVINO, too


def test_a_quantiser_that_leaves_the_range_is_caught(reduced: ExportResult, full_range: ExportResult) -> None:
    seven, eight = (onnx.load(one.output / "onnx/int8/model.onnx") for one in (reduced, full_range))
    int8._check_range(seven, 7)
    int8._check_range(eight, 8)
    with pytest.raises(CheckFailed, match="up to 127; expected 64 at most, 7 bits"):
        int8._check_range(eight, 7)


def test_limits_come_from_the_range_that_is_used(reduced: ExportResult, full_range: ExportResult) -> None:
    """Half the steps, nearly twice the error: with the other's, a limit would be too tight or too wide."""
    errors = []
    for result in (reduced, full_range):
        golden = open_bundle(result.output).golden()
        emulated, truth = golden.emulated["int8"]["logits"], golden.outputs_float64["logits"]
        errors.append(float(np.sqrt(np.mean((emulated - truth) ** 2))))
    assert 1.2 < errors[0] / errors[1] < 3


@pytest.mark.usefixtures("without")
def test_nobody_says_so_of_anything_else(reduced: ExportResult, full_range: ExportResult) -> None:
    for result in (reduced, full_range):
        for artifact in result.manifest.artifacts:
            row = registry.entry_of_format(artifact.format)
            told = saturation(row, artifact.full_range)
            assert (told is not None) == (artifact.full_range and row is OPENVINO)


def test_inspect_says_where_and_which(
    reduced: ExportResult, full_range: ExportResult, inline: Callable[..., Run]
) -> None:
    found = reduced.manifest.evidence.processor
    assert found == describe_processor()
    said = inline("inspect", reduced.output).out
    assert f"checked on    {found.cpu}" in said
    assert "7 bits: no processor saturates" in said
    assert "8 bits: for processors with VNNI" in inline("inspect", full_range.output).out


def test_reports_name_the_processor(reduced: ExportResult) -> None:
    assert dmformer.verify(reduced.output, runtimes=["ort"]).processor == describe_processor()
    written = json.loads((reduced.output / "reports/parity.json").read_bytes())
    assert written["processor"]["architecture"] == describe_processor().architecture


# --- which processors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "sets", "held", "expected"),
    [
        ("x86_64", {"avx2"}, None, "this processor has no VNNI"),
        ("AMD64", {"avx2", "avx512f"}, None, "this processor has no VNNI"),
        ("x86_64", {"avx2", "avx_vnni"}, None, None),
        ("x86_64", {"avx512f", "avx512_vnni"}, None, None),
        ("x86_64", {"avx512f", "avx512_vnni"}, "avx2", "holds oneDNN to AVX2, without this processor's VNNI"),
        ("x86_64", {"avx512_vnni"}, "AVX512_CORE", "holds oneDNN to AVX512_CORE, without this processor's VNNI"),
        ("x86_64", {"avx512_vnni"}, "AVX2_VNNI", "holds oneDNN to AVX2_VNNI, without this processor's VNNI"),
        ("x86_64", {"avx_vnni"}, "AVX512_CORE_BF16", "holds oneDNN to AVX512_CORE_BF16, without this processor's VNNI"),
        ("x86_64", {"avx2"}, "AVX512_CORE", "this processor has no VNNI"),  # nor would it without the variable
        ("x86_64", {"avx_vnni"}, "AVX-2", None),  # oneDNN knows no such name
        ("x86_64", {"avx_vnni"}, "", None),
        ("x86_64", {"avx512_vnni"}, "AVX512_CORE_VNNI", None),
        ("x86_64", {"avx512_vnni"}, "ALL", None),
        ("x86_64", set(), None, "this system does not tell whether its processor has VNNI"),
        ("aarch64", {"asimd"}, None, None),
        ("arm64", set(), "AVX2", None),
    ],
)
def test_which_processors_saturate(
    monkeypatch: pytest.MonkeyPatch, architecture: str, sets: set[str], held: str | None, expected: str | None
) -> None:
    monkeypatch.setattr("platform.machine", lambda: architecture)
    monkeypatch.setattr(machine, "instructions", lambda: frozenset(sets))
    _unheld(monkeypatch)
    if held is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    named = f"ONEDNN_MAX_CPU_ISA {expected}" if expected and expected.startswith("holds") else expected
    assert without_vnni() == named
    assert OpenVinoRuntime.saturates() == named


def test_the_newer_name_of_the_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    _unheld(monkeypatch)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "sse41")
    monkeypatch.setattr(machine, "instructions", lambda: frozenset({"avx_vnni"}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert max_isa() == "SSE41"
    assert (without_vnni() or "").startswith("DNNL_MAX_CPU_ISA holds")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    assert max_isa() == "SSE41"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "all")
    assert max_isa() is None
