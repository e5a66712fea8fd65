"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dmformer._optional import require
from dmformer.errors import StageFailed, UsageError
from dmformer.files import utf8_path
from dmformer.machine import instructions, max_isa, on_arm, without_vnni
from dmformer.runtimes.base import Details, Runtime, TensorSpec, freed_here_alone, symbolic
from dmformer.runtimes.inspector import Inspector, Kernel, is_compute, precision_of
from dmformer.runtimes.support import Availability, Support

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dmformer.files import OpenFile
    from dmformer.runtimes.base import Arrays
    from dmformer.runtimes.target import Target


_DEVICE = "CPU"
# Without the hint OpenVINO may compute in bfloat16 on processors that have it.
_PRECISION_HINT = {"fp32": "f32", "fp16": "f16", "int8": "f32"}  # of what is floating point in the file
# A model that is compiled for one batch size saves the handling of shapes in each call, and has its own copy of the
# weights: nano 0.75 of the time for 10 MB and 0.2 s, DMFormer-S 0.96 for 150 MB and 1.1 s. docs/measurements.md
_FIXED_SIZES = 4
FIXED_MOST_BYTES = 32 << 20  # of weights


_IR = re.compile(rb"(\xef\xbb\xbf)?\s*<(\?xml|net)[\s>]")


def _import() -> Any:
    try:
        Path.home()
    except RuntimeError:  # its telemetry asks for a home as it is imported, and does without one that is no folder
        os.environ["HOME"] = os.devnull
    return require("openvino", extra="openvino", purpose="it")


@functools.cache
def core() -> Any:
    """OpenVINO's device plugins, loaded once for the process and never freed.

    The CPU plugin gives the thread another stack for signal handlers, and puts the former one back when it is freed.
    Two that are freed in the order of their making leave a stack that is gone (OpenVINO 2026.4): then the next signal
    that Python handles, like that of Ctrl-C, ends the process by SIGSEGV.
    """
    return freed_here_alone(_import().Core())  # its threads stay when the last runtime is closed


class OpenVinoSupport(Support):
    """OpenVINO's CPU plugin on this machine."""

    name = "openvino"
    precisions: ClassVar[tuple[str, ...]] = tuple(_PRECISION_HINT)
    package: ClassVar[tuple[str, ...]] = ("openvino", "openvino/_pyopenvino", "openvino/libs/*_cpu_plugin.*")
    # docs.openvino.ai, system requirements
    instructions: ClassVar[Mapping[str, tuple[str, ...]]] = {"x86_64": ("sse4_2",), "aarch64": ("asimd",)}

    def inspect_files(self, files: Sequence[OpenFile], target: Target | None = None) -> None:
        """Check that the first file is XML: OpenVINO takes ONNX and other formats too, whatever they are called."""
        del target
        if not _IR.match(files[0].data[:4096]):
            raise UsageError(f"{files[0].path} is damaged, or no OpenVINO IR; expected XML: export it again")

    def import_engine(self) -> Availability:
        """Load the CPU plugin as well, which is a library of its own."""
        version, devices = _import().__version__.split("-")[0], core().available_devices
        if _DEVICE not in devices:
            return Availability(False, version, f"this installation of openvino has no {_DEVICE} plugin")
        return Availability(True, version)

    def cannot_compute(self, precision: str) -> str | None:
        """Say where the CPU plugin has no float16 arithmetic, and that it has little of int8 on Arm."""
        if precision == "fp16" and not _has_float16():
            return "openvino has no float16 arithmetic on this processor, and computes in float32"
        if precision == "int8" and on_arm():
            return "openvino has int8 kernels for few layers on Arm, and computes the others in float32"
        return None

    def sums_in_float16(self) -> bool:
        """Say that the kernels for Arm add up in float16; those of x86 with float16 arithmetic do so in float32."""
        return on_arm() and self.cannot_compute("fp16") is None

    def saturates(self) -> str | None:
        """Say so on x86 without VNNI, where oneDNN adds pairs of products in 16 bits."""
        return without_vnni()

    def peak_gops(self, precision: str, threads: int) -> float | None:
        """Measure a pointwise convolution at int8, for which NumPy has no matrix product; the best of a few calls.

        uint8 activations and int8 weights, as a quantised network has them. The two casts of the activations are in the
        time; they are a thousandth of the arithmetic.
        """
        if precision != "int8":
            return None
        ov: Any = require("openvino", extra="openvino", purpose="the limit at int8")
        ops: Any = require("openvino.opset13", extra="openvino", purpose="the limit at int8")
        rng, calls, channels, size = np.random.default_rng(0), 8, 1024, 32
        entry = ops.parameter([1, channels, size, size], np.float32)
        least, most = np.float32(0), np.float32(255 / 256)
        quantised = ops.fake_quantize(entry, least, most, least, most, 256)
        weights = ops.constant(rng.integers(-127, 128, (channels, channels, 1, 1)).astype(np.int8))
        scale = ops.constant(np.full((channels, 1, 1, 1), 1 / 127, np.float32))
        scaled = ops.multiply(ops.convert(weights, "f32"), scale)
        product = ops.convolution(quantised, scaled, [1, 1], [0, 0], [0, 0], [1, 1])
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        request = ov.Core().compile_model(ov.Model([product], [entry]), _DEVICE, settings).create_infer_request()
        image = rng.random((1, channels, size, size), dtype=np.float32)
        request.infer({0: image})
        taken_s = []
        for _ in range(calls):
            before = time.perf_counter()
            request.infer({0: image}, share_inputs=True)
            taken_s.append(time.perf_counter() - before)
        return 2 * channels**2 * size**2 / min(taken_s) / 1e9


def _has_float16() -> bool:
    """Decide as the CPU plugin does (``precision_support.cpp``), which is asked where it is loaded already.

    Before that the instruction sets tell, but for processors with AVX-VNNI, of which Linux does not name the newest,
    and where oneDNN is held to fewer.
    """
    sets = instructions()
    if "openvino" not in sys.modules and sets and max_isa() is None:
        if sets & {"avx512_fp16", "asimdhp"}:
            return True
        if "avx_vnni" not in sets:
            return False
    return "FP16" in core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")


class OpenVinoInspector(Inspector):
    """Reads the compiled model, and the counters of one compiled to be profiled."""

    runtime: OpenVinoRuntime

    def inner_tensors(self) -> frozenset[str]:
        """Return the names that conversion kept from the ONNX file."""
        nodes = (node for node in self.runtime.source.get_ops() if node.get_type_name() != "Constant")
        ports = (port for node in nodes for port in node.outputs())
        return frozenset(name for port in ports for name in port.get_names())

    def read_layers(self) -> dict[str, int]:
        """Read the runtime model, in which each node after fusion has its type."""
        found: Counter[str] = Counter()
        for node in self.runtime.model.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if is_compute(info["layerType"].astype(str)):
                found[precision_of(info["runtimePrecision"].astype(str))] += 1
        return dict(found)

    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Read the counters of a second compilation, which count in whole microseconds.

        What took less than one in an inference counts as not executed there, and has 0.
        """
        sizes = {_batch(feed) for feed in feeds}
        fixed = self.runtime.fixed_for(sizes.pop()) if len(sizes) == 1 else None
        request = self.runtime.request(self.runtime.compile(fixed, PERF_COUNT=True))
        times: dict[tuple[str, str], list[int]] = {}
        for index, feed in enumerate(feeds):
            request.run(feed)
            for step in request.profiling_info:
                if step.status == step.Status.EXECUTED:  # else fused into another, or folded away
                    taken = times.setdefault((step.node_name, step.node_type), [0] * len(feeds))
                    taken[index] += round(step.real_time.total_seconds() * 1e9)
        return [Kernel(name, operator, tuple(taken)) for (name, operator), taken in times.items()]


class OpenVinoRuntime(Runtime):
    """Runs OpenVINO IR (``.xml`` with its ``.bin``), or ONNX, on the CPU plugin.

    A small network is compiled for batch 1 when it is loaded, and for each of the next few batch sizes when it is first
    asked for; those that come later share a model with an open batch, as all do in a large network.
    """

    support = OpenVinoSupport()
    inspector = OpenVinoInspector
    model: Any = None  # the first that was compiled
    _weights: NDArray[np.uint8] | None = None  # memory of the mapped file, which models point into and do not hold
    source: Any = None  # has the names; compiling may fold a cast away and leave its tensor with two

    def load(self) -> None:
        """Read the model and compile it, for batch 1 where it is small."""
        computed = "fp32" if self.support.cannot_compute(self.precision) else self.precision
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _PRECISION_HINT[computed],
            "INFERENCE_NUM_THREADS": self.threads,
        }
        self._core = core()  # lives as long as this, after a fork too
        file, weights = self.main_file(), self.open_file(self.path.with_suffix(".bin"))
        self.source = self._read(file, weights)
        known = {name for port in self.source.outputs for name in port.get_names()}
        self.source.add_outputs([name for name in self.taps if name not in known])
        self._most_fixed = _FIXED_SIZES if (weights or file).bytes <= FIXED_MOST_BYTES else 0
        self._requests: dict[int | None, _Request] = {}  # by batch size; None is an open batch
        self._request_for(1)

    def _read(self, file: OpenFile, weights: OpenFile | None) -> Any:
        """Read a model from what was checked: IR as it was mapped; ONNX, as bisection saves its cuts, by its path."""
        if not file.data[:16].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            model = self._core.read_model(str(utf8_path(self.path)))
            self.check_unchanged(file)
            return model
        if weights is None or not weights.data:
            return self._core.read_model(bytes(file.data), b"")
        self._weights = np.frombuffer(weights.data, np.uint8)
        return self._core.read_model(bytes(file.data), _import().Tensor(self._weights, shared_memory=True))

    def _request_for(self, batch: int) -> _Request:
        """Return what runs a batch size; compile it where nothing does yet."""
        fixed = self.fixed_for(batch)
        if fixed not in self._requests:
            model = self.compile(fixed)
            self.model = self.model or model
            self._requests[fixed] = self.request(model)
        return self._requests[fixed]

    def fixed_for(self, batch: int) -> int | None:
        """Return the batch size itself where it has, or may get, a model of its own; otherwise ``None``."""
        return batch if batch in self._requests or len(self._requests) < self._most_fixed else None

    def request(self, model: Any) -> _Request:
        """Return what runs a compiled model."""
        inputs = [port.get_any_name() for port in self.source.inputs]
        return _Request(model, inputs, [self._name(port) for port in self.source.outputs])

    def compile(self, batch: int | None, **settings: Any) -> Any:
        """Compile for a batch size, or for the batch of the file, on the device and at the precision asked for."""
        model = self.source
        if batch is not None:
            shapes = {port: port.get_partial_shape() for port in model.inputs}
            for shape in shapes.values():
                if shape[0].is_dynamic:
                    shape[0] = batch
            model = model.clone()
            model.reshape({port.get_any_name(): shape for port, shape in shapes.items()})
        compiled = core().compile_model(model, _DEVICE, {**self._settings, **settings})
        device, hint = _device(compiled), compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if (device, hint) != (_DEVICE, wanted := self._settings["INFERENCE_PRECISION_HINT"]):
            raise StageFailed(f"openvino compiled for {device} at {hint}; expected {_DEVICE} at {wanted}")
        return compiled

    def close(self) -> None:
        """Drop requests and models; OpenVINO frees them with their last reference."""
        self._requests = {}
        self.model = None
        self.source = None
        self._weights = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs."""
        return tuple(_spec(port, port.get_any_name()) for port in self.source.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs."""
        return tuple(_spec(port, self._name(port)) for port in self.source.outputs)

    @property
    def details(self) -> Details:
        """Device and threads that the compiled model reports."""
        return Details(
            device=_device(self.model),
            threads=int(self.model.get_property("INFERENCE_NUM_THREADS")),
            version=_import().__version__.split("-")[0],
        )

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the request of the batch size; the outputs are copied out of its buffers."""
        request = self._request_for(_batch(inputs))
        request.run(inputs)
        return request.outputs()

    def _name(self, port: Any) -> str:
        """Name an output; a tensor may have several names, and a tap is known by its own."""
        names = port.get_names()
        return str(next((tap for tap in self.taps if tap in names), port.get_any_name()))


class _Request:
    """Runs one compiled model on the request's own buffers.

    OpenVINO's ``infer(inputs)`` makes tensors of the arrays and a dictionary of the answers each time, 60 microseconds
    together, and works in the calling thread, which has no core of its own: with two threads on a busy machine half as
    fast. To ask for the buffers each time costs some more; where all shapes are fixed they stay.
    """

    def __init__(self, model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._request = model.create_infer_request()
        self._inputs = {name: index for index, name in enumerate(inputs)}
        self._outputs = {name: index for index, name in enumerate(outputs)}
        self._given: dict[str, NDArray[Any]] = {}
        self._taken: dict[str, NDArray[Any]] = {}
        if all(port.get_partial_shape().is_static for port in (*model.inputs, *model.outputs)):
            self._given = {name: self._request.get_input_tensor(at).data for name, at in self._inputs.items()}
            self._taken = self._answers()

    def run(self, inputs: Arrays) -> None:
        """Run one inference."""
        for name, array in inputs.items():
            buffer = self._given[name] if self._given else self._buffer(name, array.shape)
            if buffer.shape != array.shape:  # NumPy would repeat a single row
                raise StageFailed(f"input {name!r} of shape {array.shape}; expected {buffer.shape}")
            buffer[...] = array
        self._request.start_async()
        self._request.wait()

    def outputs(self) -> dict[str, NDArray[Any]]:
        """Return copies of the last answers."""
        return {name: buffer.copy() for name, buffer in (self._taken or self._answers()).items()}

    @property
    def profiling_info(self) -> Any:
        """The counters of the last inference."""
        return self._request.profiling_info

    def _buffer(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the buffer of an input, in a shape that is open in the model."""
        tensor = self._request.get_input_tensor(self._inputs[name])
        if tensor.data.shape != shape:  # OpenVINO's Shape takes 40 microseconds to compare
            tensor.shape = shape
        data: NDArray[Any] = tensor.data
        return data

    def _answers(self) -> dict[str, NDArray[Any]]:
        return {name: self._request.get_output_tensor(at).data for name, at in self._outputs.items()}


def _device(compiled: Any) -> str:
    return ", ".join(compiled.get_property("EXECUTION_DEVICES"))


def _batch(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))


def _spec(port: Any, name: str) -> TensorSpec:
    shape = [size.get_length() if size.is_static else -1 for size in port.get_partial_shape()]
    return TensorSpec(name, np.dtype(port.get_element_type().to_dtype()).name, symbolic(shape))
