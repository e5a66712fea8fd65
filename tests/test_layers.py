"""In which precision layers run: every runtime tells it truly, and a promise that is not kept has a reason."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dmformer.errors import UnavailableError
from dmformer.export.formats import is_compiled
from dmformer.runtimes import registry
from dmformer.runtimes.inspector import describe_layers, is_compute, precision_of, shortfall
from tests.precisions import calibration_of, source_of
from tests.test_runtimes import every_runtime, usable

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from dmformer.export.precisions import PrecisionFile, PrecisionSource
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.runtimes.base import Runtime

PAIRS = [
    pytest.param(row, precision, id=f"{row.name}-{precision}")
    for row in registry.ENTRIES
    if not is_compiled(row)  # an engine for a GPU has tests of its own
    for precision in registry.support(row).precisions
]
every_precision = pytest.mark.parametrize(("row", "precision"), PAIRS)


class Artifacts:
    """The demonstration checkpoint in every precision, converted to a format when it is first asked for."""

    def __init__(self, checkpoint: Checkpoint, source: PrecisionSource) -> None:
        self.checkpoint = checkpoint
        self.source = source
        self._made: dict[str, PrecisionFile] = {}

    def made(self, precision: str) -> PrecisionFile:
        from dmformer.export.precisions import PrecisionFile, make

        if precision == "fp32":
            return PrecisionFile(self.source.onnx, precision, promised_share=1.0)
        if precision not in self._made:
            self._made[precision] = make(precision, self.source)
        return self._made[precision]

    def path(self, row: registry.RuntimeEntry, precision: str) -> Path:
        from dmformer.export.formats import ConversionSource, check_convertible, convert
        from dmformer.export.options import EngineOptions

        try:
            check_convertible(row, EngineOptions())
        except UnavailableError as error:
            pytest.skip(str(error))
        folder = self.source.scratch / row.format / precision
        if not folder.exists():
            file = self.made(precision)
            source = ConversionSource(
                file.onnx,
                precision,
                self.checkpoint,
                float32=self.source.onnx,
                kept_in_fp32=tuple(file.kept_in_fp32),
                form=self.form,
            )
            folder.mkdir(parents=True)
            convert(row, source, folder)
        return min(folder.iterdir(), key=lambda path: path.suffix == ".bin")  # weights beside a graph come after it

    def runtime(self, row: registry.RuntimeEntry, precision: str) -> Runtime:
        return usable(row)(self.path(row, precision), threads=1, precision=precision)

    def form(self) -> nn.Module:
        from dmformer.models.deploy import deploy

        return deploy(self.checkpoint.model())

    def count(self, row: registry.RuntimeEntry) -> int:
        """How many convolutions and linear layers the network has in the form that a runtime gets."""
        from torch import nn

        form = self.checkpoint.model() if row.format == "torch" else self.form()
        return sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in form.modules())


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    from dmformer.export.networks import find_network
    from dmformer.export.options import ExportOptions

    found = find_network(ExportOptions())
    assert found.calibration is not None
    images = found.calibration.spread(40)
    calibration, inputs = calibration_of(found.checkpoint, images), next(images.batches(8))
    source = source_of(found.checkpoint, tmp_path_factory.mktemp("precisions"), inputs, calibration)
    return Artifacts(found.checkpoint, replace(source, max_points_lost=100.0))


def answer(runtime: Runtime, inputs: NDArray[np.float32]) -> NDArray[Any]:
    return runtime.run({runtime.inputs[0].name: inputs})[runtime.outputs[0].name]


# --- The contract -----------------------------------------------------------------------------------------------------


@every_runtime
def test_a_float32_artifact_has_all_its_layers_in_float32(row: registry.RuntimeEntry, artifacts: Artifacts) -> None:
    with artifacts.runtime(row, "fp32") as runtime:
        assert runtime.inspect().layers() == {"fp32": artifacts.count(row)}


@every_precision
def test_layers_are_those_of_the_network(row: registry.RuntimeEntry, precision: str, artifacts: Artifacts) -> None:
    with artifacts.runtime(row, precision) as runtime:
        assert sum(runtime.inspect().layers().values()) == artifacts.count(row)


@every_precision
def test_a_promise_is_kept_or_there_is_a_reason(
    row: registry.RuntimeEntry, precision: str, artifacts: Artifacts
) -> None:
    promised = artifacts.made(precision).promised_share
    assert 0.5 < promised <= 1
    with artifacts.runtime(row, precision) as runtime:
        layers, reason = runtime.inspect().layers(), runtime.support.cannot_compute(precision)
    short = shortfall(layers, precision, promised)
    assert (short is None) == (reason is None), (short, reason)
    if reason is None:
        assert layers[precision] == round(promised * artifacts.count(row))
        return
    assert layers == {"fp32": artifacts.count(row)}
    assert reason.startswith(row.name)
    assert reason.endswith("computes in float32")
    assert "\n" not in reason


@every_runtime
def test_float32_is_always_there(row: registry.RuntimeEntry) -> None:
    assert usable(row).support.cannot_compute("fp32") is None


@every_precision
def test_layers_show_what_is_in_the_file_whatever_it_is_called(
    row: registry.RuntimeEntry, precision: str, artifacts: Artifacts
) -> None:
    with usable(row)(artifacts.path(row, "fp32"), threads=1, precision=precision) as runtime:
        found = runtime.inspect().layers()
    # Floating point of a file may be computed in float16 where that was asked for and the processor has it.
    assert set(found) <= ({"fp32", "fp16"} if precision == "fp16" else {"fp32"})


@every_precision
def test_asking_for_layers_changes_nothing(
    row: registry.RuntimeEntry, precision: str, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(folder)
    inputs = artifacts.source.inputs
    with artifacts.runtime(row, precision) as runtime:
        before, layers, details = answer(runtime, inputs), runtime.inspect().layers(), runtime.details
        assert runtime.inspect().layers() == layers
        assert runtime.details == details
        np.testing.assert_array_equal(answer(runtime, inputs), before)
    assert list(folder.iterdir()) == []


@every_precision
def test_every_precision_answers_much_as_float32_does(
    row: registry.RuntimeEntry, precision: str, artifacts: Artifacts
) -> None:
    inputs = artifacts.source.inputs
    with artifacts.runtime(row, "fp32") as runtime:
        exact = answer(runtime, inputs)
    with artifacts.runtime(row, precision) as runtime:
        found = answer(runtime, inputs)
    assert found.dtype == np.float32
    error = float(np.abs(found - exact).max() / exact.std())
    least, most = {"fp32": (0, 1e-4), "fp16": (1e-6, 0.02), "int8": (1e-3, 0.3)}[precision]
    assert least <= error <= most


# --- What single engines say ------------------------------------------------------------------------------------------


def test_openvino_has_as_many_kernels_of_8_bits_as_it_has_int8_layers(artifacts: Artifacts) -> None:
    counts = {}
    for precision in ("fp32", "int8"):
        with artifacts.runtime(registry.entry("openvino"), precision) as runtime:
            told = [node.get_rt_info() for node in runtime.model.get_runtime_model().get_ops()]  # type: ignore[attr-defined]
            types = [one["runtimePrecision"].astype(str) for one in told if one["layerType"].astype(str) == "Const"]
            counts[precision] = (types.count("i8"), runtime.inspect().layers().get("int8", 0))
    assert counts["fp32"] == (0, 0)
    assert counts["int8"][0] == counts["int8"][1] > 0


def test_openvino_that_is_wrong_about_float16_fails_to_load(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = registry.entry("openvino")
    kind = usable(row)
    if kind.support.cannot_compute("fp16") is None:
        pytest.skip("this processor has float16 arithmetic")
    from dmformer.errors import StageFailed

    monkeypatch.setattr(kind.support, "cannot_compute", lambda _: None)
    runtime = artifacts.runtime(row, "fp16")
    with pytest.raises(StageFailed, match="compiled for CPU at f32; expected CPU at f16"), runtime:
        pass


@pytest.mark.parametrize(("machine", "has"), [("x86_64", False), ("AMD64", False), ("aarch64", True), ("arm64", True)])
def test_onnxruntime_has_float16_on_arm_only(machine: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    kind = usable(registry.entry("onnxruntime"))
    assert (kind.support.cannot_compute("fp16") is None) is has
    assert kind.support.cannot_compute("int8") is not None


@pytest.mark.parametrize(("sets", "has"), [("asimd crc32", False), ("asimd fphp asimdhp", True), ("", True)])
def test_onnxruntime_has_no_float16_on_older_arm(sets: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime 1.32.0 computed every convolution in float32 on an emulated Cortex-A72."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    kind = usable(registry.entry("onnxruntime"))
    monkeypatch.setattr("dmformer.runtimes.onnxruntime.instructions", lambda: frozenset(sets.split()))
    assert (kind.support.cannot_compute("fp16") is None) is has


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "ncnn", "litert"])
@pytest.mark.parametrize(
    ("machine", "sets", "summed"),
    [("aarch64", "asimd fphp asimdhp", True), ("aarch64", "asimd", False), ("x86_64", "avx2 avx512_fp16", False)],
)
def test_sums_are_float16_where_arm_has_that_arithmetic(
    name: str, machine: str, sets: str, summed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found on an emulated Cortex-A76, whose answers were further off than results rounded to float16 explain."""
    row = registry.entry(name)
    monkeypatch.setattr("platform.machine", lambda: machine)
    for module in ("onnxruntime", "ncnn"):
        monkeypatch.setattr(f"dmformer.runtimes.{module}.instructions", lambda: frozenset(sets.split()))
    monkeypatch.setattr("dmformer.runtimes.openvino._has_float16", lambda: "hp" in sets or "fp16" in sets)
    assert registry.support(row).sums_in_float16() is (summed and name != "litert")


@pytest.mark.parametrize(("machine", "has"), [("x86_64", True), ("aarch64", False)])
def test_openvino_computes_little_in_int8_on_arm(machine: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 of 57 layers on an emulated Cortex-A76, and right answers."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    reason = registry.support(registry.entry("openvino")).cannot_compute("int8")
    assert (reason is None) is has


@pytest.mark.parametrize(("capabilities", "has"), [(["FP32", "FP16"], True), (["FP32", "INT8", "BF16"], False)])
def test_openvino_has_float16_where_its_plugin_says_so(
    capabilities: list[str], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = usable(registry.entry("openvino"))
    monkeypatch.setattr("openvino.Core.get_property", lambda *_: capabilities)
    assert (kind.support.cannot_compute("fp16") is None) is has
    assert kind.support.cannot_compute("int8") is None


# --- Names and shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("float", "float32", "f32", "F32"), "fp32"),
        (("float16", "f16", "F16"), "fp16"),
        (("int8", "uint8", "i8", "u8", "I8"), "int8"),
        (("bf16",), "bf16"),
        (("double",), "double"),
        (("",), ""),
    ],
)
def test_precision_of(names: tuple[str, ...], expected: str) -> None:
    assert {precision_of(name) for name in names} == {expected}


PRODUCTS = """
    Conv FusedConv QLinearConv ConvInteger ConvTranspose Conv2d Convolution GroupConvolution Deconvolution
    Gemm FusedGemm QGemm MatMul MatMulInteger FusedMatMul FullyConnected
"""
OTHERS = """
    Relu Gelu Add Mul Sigmoid GlobalAveragePool Cast Reorder Const Subgraph Reshape Eltwise Concat LayerScale
    QuantizeLinear DequantizeLinear FakeQuantize Convert ConvertLike
"""


@pytest.mark.parametrize("operator", PRODUCTS.split())
def test_products_compute(operator: str) -> None:
    assert is_compute(operator)
    assert is_compute(operator.upper())


@pytest.mark.parametrize("operator", OTHERS.split())
def test_nothing_else_computes(operator: str) -> None:
    assert not is_compute(operator)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({}, ""),
        ({"fp32": 57}, "57 fp32"),
        ({"fp32": 26, "int8": 31}, "31 int8, 26 fp32"),
        ({"int8": 1, "fp32": 100, "fp16": 7}, "100 fp32, 7 fp16, 1 int8"),
    ],
)
def test_describe(layers: dict[str, int], expected: str) -> None:
    assert describe_layers(layers) == expected


@pytest.mark.parametrize("total", [*range(1, 60), 197, 1000])
def test_a_promise_is_kept_to_the_layer(total: int) -> None:
    for promised in range(total + 1):
        layers = {"int8": promised, "fp32": total - promised}
        assert shortfall(layers, "int8", promised / total) is None
        assert shortfall(layers, "int8", max(0, promised - 1) / total) is None
        if promised < total:
            assert shortfall(layers, "int8", (promised + 1) / total) is not None


def test_nothing_promised_is_kept_by_any_layer() -> None:
    assert shortfall({"fp32": 3}, "int8", 0.0) is None


@pytest.mark.parametrize("layers", [{}, {"fp32": 0}])
@pytest.mark.parametrize("promised", [0.0, 1.0])
def test_no_layer_keeps_no_promise(layers: dict[str, int], promised: float) -> None:
    assert shortfall(layers, "fp32", promised) == "the engine shows no compute layer"


def test_a_shortfall_tells_shares_and_counts() -> None:
    found = shortfall({"fp32": 26, "int8": 31}, "int8", 0.75)
    assert found == "int8 in 54% of 57 compute layers (31 int8, 26 fp32); promised 75%"
    assert shortfall({"fp32": 57}, "fp16", 1.0) == "fp16 in 0% of 57 compute layers (57 fp32); promised 100%"
