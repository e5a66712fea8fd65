"""int8 weights of 7 bits are right on processors without VNNI, those of 8 bits are not; which processors those are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

import dmformer
from dmformer import machine
from dmformer.bundle.reader import open_bundle
from dmformer.errors import UsageError
from dmformer.export.build import build
from dmformer.export.steps import VerifiedArtifact
from dmformer.machine import describe_processor, max_isa, without_vnni
from dmformer.runtimes.openvino import OpenVinoRuntime
from tests.bundles import rewrite
from tests.precisions import SATURATES, arrays, unheld

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from tests.conftest import Run

X86 = pytest.mark.skipif(
    describe_processor().architecture != "x86_64", reason="this processor is no x86-64, and does not saturate"
)
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


@pytest.mark.slow
def test_what_is_built_on_a_device_keeps_the_range(
    reduced_bundle: Path, full_range: ExportResult, tmp_path: Path
) -> None:
    full = Path(shutil.copytree(full_range.output, tmp_path / "full"))
    (seven,) = build(reduced_bundle, "openvino", precisions=["int8"]).artifacts
    assert seven.weight_bits == 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            import_module("dmformer.export.steps"),
            "verify_artifact",
            lambda _work, _row, artifact, _file: VerifiedArtifact(artifact, ()),
        )
        (eight,) = build(full, "openvino", precisions=["int8"]).artifacts
    assert eight.weight_bits == 8


@pytest.mark.parametrize("bits", [0, 6, 9, 16])
def test_other_numbers_of_bits_are_refused(bits: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"`weight_bits` is {bits}; expected 7, right on every processor, or 8"):
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
    for node in runtime.model.get_runtime_model().get_ops():
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


@pytest.mark.slow
@X86
def test_eight_bits_fail_there_and_the_cause_is_named(full_range: ExportResult, cli: Callable[..., Run]) -> None:
    run = cli("verify", full_range.output, "--runtime", "ov", ONEDNN_MAX_CPU_ISA="AVX2")
    assert run.code == 1
    assert run.err.startswith(f"note: openvino int8: {SATURATES}: ")  # before anything is run
    assert "runtime in openvino int8" in run.error_line
    assert SATURATES in run.error_line
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
        kernels = [n.get_rt_info()["primitiveType"].astype(str) for n in runtime.model.get_runtime_model().get_ops()]
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
    # What names the real processor to a library (OPENBLAS_CORETYPE) would not hold for this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    done = subprocess.run(
        ["qemu-x86_64-static", "-cpu", "Nehalem", sys.executable, "-c", SHARE_OF_LIMIT, *folders],
        env=environment,
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
    unheld(monkeypatch)
    if held is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    named = f"ONEDNN_MAX_CPU_ISA {expected}" if expected and expected.startswith("holds") else expected
    assert without_vnni() == named
    assert OpenVinoRuntime.support.saturates() == named


def test_the_newer_name_of_the_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    unheld(monkeypatch)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "sse41")
    monkeypatch.setattr(machine, "instructions", lambda: frozenset({"avx_vnni"}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert max_isa() == "SSE41"
    assert (without_vnni() or "").startswith("DNNL_MAX_CPU_ISA holds")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    assert max_isa() == "SSE41"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "all")
    assert max_isa() is None
