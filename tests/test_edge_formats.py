"""ncnn and LiteRT: faults in their files, what they are asked for and cannot, and what their converters need."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dmformer
from dmformer.assets import CALIBRATION_IMAGES
from dmformer.bundle.reader import open_bundle
from dmformer.errors import StageFailed, UnavailableError, UsageError
from dmformer.export.build import build
from dmformer.export.formats import ConversionSource, litert, ncnn, run_converter
from dmformer.runtimes import registry
from dmformer.runtimes.ncnn import NcnnLayer, NcnnRuntime, locate_weights, read_param, write_param
from dmformer.runtimes.onnxruntime import OnnxRuntime
from tests.bundles import adopt, one_line
from tests.conftest import LITERT
from tests.tiers import first

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.conftest import Run

PARAM, BIN, TFLITE = "ncnn/fp32/model.param", "ncnn/fp32/model.bin", "litert/fp32/model.tflite"


@pytest.fixture
def in_ncnn(with_ncnn: Path, tmp_path: Path) -> Path:
    """A copy of the demonstration bundle with ncnn that a test may spoil."""
    return shutil.copytree(with_ncnn, tmp_path / "ncnn")


@pytest.fixture
def in_litert(tmp_path: Path) -> Path:
    """A copy of the committed LiteRT bundle that a test may spoil."""
    return shutil.copytree(LITERT, tmp_path / "litert")


def failed(bundle: Path, runtime: str) -> set[str]:
    """The stages of the checks that failed."""
    report = dmformer.verify(bundle, runtimes=[runtime])
    return {check.stage for check in report.checks if not check.passed}


def caught(bundle: Path, runtime: str) -> bool:
    """Whether verify tells a fault: by a check of the runtime, or because the files do not go together."""
    try:
        return "runtime" in failed(bundle, runtime)
    except UsageError as error:
        one_line(error)
        return "export it again" in str(error)


def spoil(bundle: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file, and mend its hash."""
    before = (bundle / name).read_bytes()
    after = change(before)
    assert after != before
    (bundle / name).write_bytes(after)
    adopt(bundle, name)


# --- ncnn -------------------------------------------------------------------------------------------------------------


def values(bundle: Path, layer: Callable[[NcnnLayer], bool], change: Callable[[NDArray[Any]], object]) -> None:
    """Change the weights of the first layer that is meant."""
    layers = read_param((bundle / PARAM).read_text())

    def changed(data: bytes) -> bytes:
        whole = bytearray(data)
        weights = next(one for one in locate_weights(layers, data) if layer(one.layer))
        change(np.frombuffer(whole, np.float32)[weights.first // 4 : weights.last // 4])
        return bytes(whole)

    spoil(bundle, BIN, changed)


def swap_classes(weights: NDArray[np.float32]) -> None:
    rows = weights.reshape(10, -1)
    rows[[3, 7]] = rows[[7, 3]]


NCNN_FAULTS: dict[str, Callable[[Path], None]] = {
    "weights of a convolution": lambda bundle: values(
        bundle, lambda layer: "branches.1" in layer.outputs[0], lambda weights: np.multiply(weights, 1.05, out=weights)
    ),
    "a swapped class": lambda bundle: values(bundle, lambda layer: layer.outputs == ("logits",), swap_classes),
    "a dilation": lambda bundle: spoil(
        bundle, PARAM, lambda text: text.replace(b"12=2 13=1 14=4 2=2 3=1 4=4", b"12=1 13=1 14=2 2=1 3=1 4=2", 1)
    ),
    "an activation": lambda bundle: spoil(bundle, PARAM, lambda text: text.replace(b" 9=1", b" 9=0", 1)),
    "truncated weights": lambda bundle: spoil(bundle, BIN, lambda data: data[: len(data) // 2]),
    "a longer file": lambda bundle: spoil(bundle, BIN, lambda data: data + bytes(4)),
    "truncated layers": lambda bundle: spoil(bundle, PARAM, lambda text: text[: len(text) // 2]),
    "a changed byte": lambda bundle: spoil(bundle, BIN, lambda data: data[:1003] + b"\x7e" + data[1004:]),
}


@pytest.mark.parametrize("fault", first(2, NCNN_FAULTS))
def test_faults_in_ncnn_are_caught(in_ncnn: Path, fault: str) -> None:
    NCNN_FAULTS[fault](in_ncnn)
    assert caught(in_ncnn, "ncnn")


@pytest.mark.parametrize("half", [False, True])
def test_float16_arithmetic_goes_without_winograd(with_ncnn: Path, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    """In float16 its transformed sums put a decoder of 3x3 kernels 26 times as far off, on an emulated Cortex-A76."""
    monkeypatch.setattr(NcnnRuntime.support, "cannot_compute", lambda _: None if half else "no float16 here")
    with NcnnRuntime(with_ncnn / PARAM, precision="fp16") as runtime:
        assert runtime.net.opt.use_fp16_arithmetic is half
        assert runtime.net.opt.use_winograd_convolution is not half


def test_without_a_fault_nothing_fails(in_ncnn: Path, in_litert: Path) -> None:
    assert not failed(in_ncnn, "ncnn")
    assert not failed(in_litert, "litert")


def test_bisection_sees_inside_ncnn(in_ncnn: Path, tmp_path: Path) -> None:
    NCNN_FAULTS["weights of a convolution"](in_ncnn)
    report = dmformer.verify(in_ncnn, runtimes=["ncnn"], bisect=tmp_path / "cases")
    (finding,) = report.findings
    assert finding.module == "stages.0.blocks.0.dma.branches.1"
    assert finding.at_fault is None
    assert "reads no ONNX" in finding.explanation


def test_every_named_tensor_is_that_of_the_onnx_file(with_ncnn: Path) -> None:
    bundle = open_bundle(with_ncnn)
    rows = bundle.golden().inputs[:2]
    with NcnnRuntime(with_ncnn / PARAM, threads=1) as runtime:
        taps = sorted(runtime.inspect().inner_tensors() - {"image", "logits"})
    with (
        NcnnRuntime(with_ncnn / PARAM, threads=1, taps=taps) as runtime,
        OnnxRuntime(with_ncnn / "onnx/fp32/model.onnx", threads=1, taps=taps) as expected,
    ):
        found, truth = runtime.run({"image": rows}), expected.run({"image": rows})
    assert len(taps) > 80
    for name in taps:
        np.testing.assert_allclose(found[name], truth[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_the_manifest_says_that_rows_run_one_by_one(with_ncnn: Path) -> None:
    assert {one.format: one.engine_batch for one in open_bundle(with_ncnn).manifest.artifacts} == {
        "torch": None,
        "onnx": None,
        "openvino": None,
        "ncnn": 1,
    }
    assert open_bundle(LITERT).manifest.artifacts[0].engine_batch == 1


def test_ncnn_computes_in_float32_whatever_its_defaults_are(with_ncnn: Path) -> None:
    with NcnnRuntime(with_ncnn / PARAM) as runtime:
        options = {name: getattr(runtime.net.opt, name) for name in dir(runtime.net.opt) if name.startswith("use_")}
    reducing = {name: on for name, on in options.items() if any(kind in name for kind in ("fp16", "bf16", "int8"))}
    assert len(reducing) >= 6
    assert not any(reducing.values())
    assert not options["use_vulkan_compute"]


def test_kernels_of_ncnn_are_its_layers(with_ncnn: Path) -> None:
    bundle = open_bundle(with_ncnn)
    with NcnnRuntime(with_ncnn / PARAM, threads=1) as runtime:
        kernels = runtime.inspect().kernels([{"image": bundle.golden().inputs[:2]}] * 3)
    assert {"Convolution", "ConvolutionDepthWise", "InnerProduct", "GELU"} <= {kernel.operator for kernel in kernels}
    assert all(len(kernel.ns) == 3 and min(kernel.ns) > 0 for kernel in kernels)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("7767517", "7767518"), "does not begin with"),
        (lambda text: text.replace("119 149", "119 150"), "119 layers and 149 tensors"),
        (lambda text: text.replace(" 1 1 image ", " 1 1 other "), "reads 'other', which no layer before it gives"),
        (lambda text: text.replace(" 1 1 image ", " 1 99 image "), "of which the line names"),
        (lambda text: text.replace("Split ", "Split x y", 1), "no .param of ncnn"),
        (lambda _: "", "does not begin with"),
    ],
)
def test_a_param_that_does_not_go_together_is_refused(with_ncnn: Path, change: Callable[[str], str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        read_param(change((with_ncnn / PARAM).read_text()))
    one_line(caught.value)


def test_a_param_is_written_as_it_was_read(with_ncnn: Path) -> None:
    text = (with_ncnn / PARAM).read_text()
    assert write_param(read_param(text)) == text


def test_float16_is_made_from_the_float32_file(reduced_bundle: Path) -> None:
    report = build(reduced_bundle, "ncnn", precisions=["fp16"])
    assert report.parity.passed
    (artifact,) = report.artifacts
    fp32 = (reduced_bundle / "onnx/fp32/model.onnx").stat().st_size
    assert artifact.bytes < 0.6 * fp32
    with pytest.raises(UsageError, match=r"format ncnn at fp16 without the ONNX file in float32"):
        ncnn.to_ncnn(ConversionSource(reduced_bundle / "onnx/fp16/model.onnx", "fp16"), reduced_bundle)


def test_what_stays_in_float32_does_so_in_ncnn(reduced_bundle: Path, tmp_path: Path) -> None:
    path = reduced_bundle / "onnx/fp32/model.onnx"
    source = ConversionSource(
        path, "fp16", float32=path, kept_in_fp32=("stages.1.blocks.0", "stages.0.downsample.conv3/Conv")
    )
    converted = ncnn.to_ncnn(source, tmp_path)
    kept = [layer.outputs[0] for layer in read_param(converted.files[0].read_text()) if layer.number(31) == 3]
    assert "/stages.0/downsample/conv3/Conv_output_0" in kept
    assert any(name.startswith("/stages.1/blocks/blocks.0/ffn") for name in kept)
    assert not any("stages.2" in name or "stages.0/blocks" in name for name in kept)


def test_any_size_where_it_is_open(segmentation_open: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(segmentation_open.output, tmp_path / "open")
    report = build(copy, "ncnn")
    assert report.parity.passed
    assert {check.size for check in report.parity.checks} > {None}


def test_int8_is_refused_with_the_reason(inline: Callable[..., Run]) -> None:
    for name, reason in (("ncnn", "ncnn2table"), ("tflite", "ai-edge-quantizer")):
        run = inline(
            "export", "--format", name, "--precision", "int8", "--calibration", CALIBRATION_IMAGES, "--dry-run"
        )
        assert run.code == 2
        assert reason in run.error_line


def test_a_missing_pnnx_is_the_command(monkeypatch: pytest.MonkeyPatch, inline: Callable[..., Run]) -> None:
    monkeypatch.setattr(ncnn, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnavailableError, match=r"run: pip install --no-deps pnnx"):
        ncnn.check_pnnx(None)  # type: ignore[arg-type]
    run = inline("export", "--format", "ncnn", "--output", "b")
    assert run.code == 3
    assert "pip install --no-deps pnnx" in run.error_line


def test_what_pnnx_refuses_is_one_line(tmp_path: Path, with_ncnn: Path) -> None:
    with pytest.raises(StageFailed, match="conversion to ncnn failed: pnnx ended with") as caught:
        run_converter("ncnn", [ncnn._program(), "none.onnx"], str(tmp_path), tmp_path / "model.ncnn.bin")
    one_line(caught.value)
    with pytest.raises(StageFailed, match="true ended with 0: it said nothing"):
        run_converter("ncnn", ["true"], str(tmp_path), tmp_path / "model.ncnn.bin")


# --- LiteRT -----------------------------------------------------------------------------------------------------------


def weights_of(data: bytes, part: str) -> tuple[int, NDArray[np.float32]]:
    """Where the values of the first tensor whose name has a part are, and a copy of them."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data)
    interpreter.allocate_tensors()
    for tensor in interpreter.get_tensor_details():
        if part in tensor["name"] and tensor["shape"].size > 1 and tensor["dtype"] is np.float32:
            array = np.array(interpreter.get_tensor(tensor["index"]))
            if (at := data.find(array.tobytes())) >= 0:
                return at, array
    raise AssertionError(part)


def with_weights(data: bytes, part: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> bytes:
    at, array = weights_of(data, part)
    changed = np.ascontiguousarray(change(array)).tobytes()
    return data[:at] + changed + data[at + len(changed) :]


def without_dilation(data: bytes) -> bytes:
    """The first dilated convolution as a dense one, in a file that is written anew."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    for operator in model.subgraphs[0].operators:
        if getattr(operator.builtinOptions, "dilationHFactor", 1) > 1:
            operator.builtinOptions.dilationHFactor = operator.builtinOptions.dilationWFactor = 1
            break
    else:
        raise AssertionError("no dilated convolution")
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


LITERT_FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "weights of a convolution": lambda data: with_weights(data, "Conv2d_fc2", lambda array: array * np.float32(1.5)),
    "a swapped class": lambda data: with_weights(data, "Linear_head", lambda array: array[[*range(8), 9, 8]]),
    "a dilation": without_dilation,
    "truncated": lambda data: data[: len(data) // 2],
    "a changed byte": lambda data: with_weights(
        data, "Conv2d_conv3", lambda array: np.where(array == array.max(), np.float32(-3e4), array)
    ),
    "another file": lambda _: b"this is no model\n" * 40,
}


@pytest.mark.parametrize("fault", LITERT_FAULTS)
def test_faults_in_litert_are_caught(in_litert: Path, fault: str) -> None:
    pytest.importorskip("ai_edge_litert")
    spoil(in_litert, TFLITE, LITERT_FAULTS[fault])
    assert caught(in_litert, "litert")


def test_litert_comes_with_an_export(with_ncnn: Path) -> None:
    with pytest.raises(UsageError, match="format litert comes with an export"):
        build(with_ncnn, "tflite")


def test_litert_has_one_size() -> None:
    with pytest.raises(UsageError, match="format litert with open height and width"):
        dmformer.export(formats=["litert"], task="segmentation", open_size=True)


def test_a_missing_converter_is_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(litert.PYTHON, raising=False)
    monkeypatch.setattr(litert, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"litert-torch.*and set DMFORMER_LITERT_PYTHON="):
        dmformer.export(formats=["litert"], output=tmp_path / "b")
    monkeypatch.setenv(litert.PYTHON, str(tmp_path / "none"))
    with pytest.raises(UnavailableError, match="which cannot be run"):
        litert.check_converter(None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_converter_that_fails_is_one_line(tmp_path: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this interpreter in the place of the one that has litert-torch."""
    import sys

    monkeypatch.setenv(litert.PYTHON, sys.executable)
    source = ConversionSource(tmp_path / "none.onnx", "fp32", checkpoint, form=checkpoint.model)
    with pytest.raises(StageFailed, match=r"conversion to LiteRT failed: .*litert_torch"):
        litert.to_litert(source, tmp_path)


def test_rows_are_those_of_the_registry() -> None:
    assert registry.entry("tflite").format == "litert"
    assert registry.entry("ncnn").aliases == ()
