"""TensorRT 10, 11 and TensorRT-RTX on an NVIDIA GPU, by ``cuda-bindings``."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dmformer.errors import CheckFailed, StageFailed, UnavailableError, UsageError
from dmformer.runtimes.base import Details, Runtime, TensorSpec, symbolic
from dmformer.runtimes.cuda import Buffer, Session, driver_missing, find_gpu
from dmformer.runtimes.inspector import Inspector, Kernel, is_compute, precision_of
from dmformer.runtimes.support import Availability, Support
from dmformer.runtimes.target import (
    AUTO,
    EngineLog,
    cannot_use_gpu,
    contradiction,
    installed_flavour_version,
    load_flavour,
    this_platform,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dmformer.files import OpenFile
    from dmformer.runtimes.base import Arrays
    from dmformer.runtimes.target import Target

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass
class _Captured:
    """A CUDA graph of one inference, for one shape."""

    shape: tuple[int, ...]
    graph: Any


class TensorRtSupport(Support):
    """TensorRT, in whichever flavour is installed, and the GPU of this machine."""

    name = "tensorrt"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")
    cannot_replay: ClassVar[str | None] = (
        "TensorRT needs an NVIDIA GPU, which cannot be emulated; verify it on the device"
    )

    def inspect_files(self, files: Sequence[OpenFile], target: Target | None = None) -> None:
        """Check what the plan says of itself against the manifest."""
        if target is not None and (wrong := contradiction(files[0].data, target)):
            raise CheckFailed(f"{files[0].path}: {wrong}; expected the plan that the manifest describes")

    def import_engine(self) -> Availability:
        """Import a flavour, and look for a GPU that it is for."""
        flavour, engine = load_flavour(AUTO)
        try:
            reason = cannot_use_gpu(flavour, engine, find_gpu())
        except UnavailableError as error:
            reason = str(error)
        return Availability(reason is None, engine.__version__, reason)

    def quick_probe(self) -> Availability:
        """Probe without importing engine and bindings where there is no driver for a GPU."""
        version, reason = installed_flavour_version(), driver_missing()
        return self.probe() if version is None or reason is None else Availability(False, version, reason)

    def cannot_load(self, target: Target | None) -> str | None:
        """Say which field of the target differs from this machine; the engine itself is not touched."""
        if target is None:
            return "the manifest does not say what the engine was built for; export or build it again"
        try:
            flavour, engine = load_flavour(target.flavour)
            gpu = find_gpu()
        except UnavailableError as error:
            return str(error)
        if engine.__version__ != target.version:
            return f"built with {flavour.title} {target.version}; here is {engine.__version__}: {_again(target)}"
        if this_platform() != target.platform:
            return f"built for {target.platform}; this is {this_platform()}: {_again(target)}"
        if gpu.compute_capability not in target.compute_capabilities:
            built = ", ".join(target.compute_capabilities)
            return f"built for SM {built}; this GPU ({gpu.name}) is SM {gpu.compute_capability}: {_again(target)}"
        return None


class TensorRtInspector(Inspector):
    """Asks TensorRT's inspector and profiler."""

    runtime: TensorRtRuntime

    def read_layers(self) -> dict[str, int]:
        """Read the precisions of kernels, counted by the ONNX layers that each came from."""
        return layers_by_precision(self._layers_with_nodes())

    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Time kernels by TensorRT's profiler.

        A kernel has the name of the ONNX node that it came from, the first one where it came from several.
        """
        sources = {layer["Name"]: nodes for layer, nodes in self._layers_with_nodes() if "Name" in layer}
        times: dict[str, list[int]] = {}
        base = self.runtime.trt.IProfiler

        class Profiler(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(round(ms * 1e6))

        self.runtime.infer_watched(feeds, Profiler())
        found = []
        for layer, taken in times.items():
            source = next(iter(sources.get(layer, [])), layer)
            found.append(Kernel(source, source.rpartition("/")[2], tuple(taken)))
        return found

    def _layers_with_nodes(self) -> list[tuple[dict[str, Any], list[str]]]:
        """Return what TensorRT's inspector tells of each kernel, and the ONNX nodes that it came from."""
        inspector = self.runtime.engine.create_engine_inspector()
        return layers_with_nodes(inspector.get_engine_information(self.runtime.trt.LayerInformationFormat.JSON))


class TensorRtRuntime(Runtime):
    """Runs a plan on the first GPU, in one stream; fixed shapes are replayed as a CUDA graph.

    ``threads`` has no meaning on a GPU; it is kept, so that reports of all runtimes look alike.
    """

    support = TensorRtSupport()
    inspector = TensorRtInspector
    _open_things: ExitStack | None = None
    engine: Any = None
    _context: Any = None
    _captured: _Captured | None = None
    _device_ns: int | None = None

    def load(self) -> None:
        """Check what the plan is tied to, deserialise it, and allocate memory for its largest batch."""
        if (reason := self.support.cannot_load(self.target)) is not None:
            raise UnavailableError(f"{self.path.name}: {reason}")
        assert self.target is not None
        plan = self.main_file().data
        if (wrong := contradiction(plan, self.target)) is not None:
            raise StageFailed(f"{self.path.name}: {wrong}; expected the plan that the manifest describes")
        _, engine = load_flavour(self.target.flavour)
        self.trt = engine
        self._gpu = find_gpu()
        self._open_things = ExitStack()
        self._cuda = self._open_things.enter_context(Session())
        self._log = EngineLog(engine)
        self._runtime = engine.Runtime(self._log.logger)
        self.engine = self._runtime.deserialize_cuda_engine(plan[:])
        if self.engine is None:
            raise StageFailed(f"the engine was not loaded: {self._log.last}")
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        specs = {name: self._spec(name) for name in names}
        reading = engine.TensorIOMode.INPUT
        self._inputs = tuple(specs[name] for name in names if self.engine.get_tensor_mode(name) == reading)
        self._outputs = tuple(specs[name] for name in names if self.engine.get_tensor_mode(name) != reading)
        self._buffers = {name: Buffer(self._cuda, self._most_bytes(spec)) for name, spec in specs.items()}
        self._context = self._new_context()
        self._before, self._after = self._cuda.event(), self._cuda.event()

    def close(self) -> None:
        """Wait for what is under way, free graph, context, engine and runtime in this order, then all memory."""
        open_things, self._open_things = self._open_things, None
        if open_things is None:
            return
        with open_things:
            try:
                with suppress(StageFailed):  # after an error every call fails; all must be freed all the same
                    self._cuda.wait()
                self._drop_graph()
            finally:
                self._context = None
                self.engine = None
                self._runtime = None
                self._device_ns = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The engine's inputs."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The engine's outputs."""
        return self._outputs

    @property
    def details(self) -> Details:
        """The GPU and the engine's version."""
        device = f"{self._gpu.name} (SM {self._gpu.compute_capability})"
        return Details(device=device, threads=self.threads, version=self.trt.__version__)

    @property
    def device_ns(self) -> int | None:
        """From events around the last inference, transfers left out."""
        return self._device_ns

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Copy in, run, copy out; the second inference of a shape records the CUDA graph that later ones replay."""
        ((name, array),) = inputs.items()
        assert self.target is not None
        least, most = self.target.min_batch, self.target.max_batch
        if not least <= len(array) <= most:
            raise UsageError(f"batch {len(array)}; the engine was built for {least} to {most}")
        captured = self._captured
        if captured is None or captured.shape != array.shape:
            self._drop_graph()
            captured = _Captured(array.shape, None)
            if not self._context.set_input_shape(name, array.shape):
                raise StageFailed(f"the engine refused shape {array.shape}: {self._log.last}")
        np.copyto(self._buffers[name].view(array.shape, array.dtype), array)
        self._cuda.copy_in(self._buffers[name], array.nbytes)
        if captured is self._captured and captured.graph is None:  # this shape has run before
            captured.graph = self._record()
        self._cuda.record(self._before)
        if captured.graph is None:
            self._execute()
        else:
            self._cuda.call("cudaGraphLaunch", captured.graph, self._cuda.stream)
        self._cuda.record(self._after)
        shapes = {spec.name: tuple(self._context.get_tensor_shape(spec.name)) for spec in self._outputs}
        for spec in self._outputs:
            size = math.prod(shapes[spec.name]) * np.dtype(spec.dtype).itemsize
            self._cuda.copy_out(self._buffers[spec.name], size)
        self._cuda.wait()
        self._captured = captured
        self._device_ns = self._cuda.between(self._before, self._after)
        return {
            spec.name: self._buffers[spec.name].view(shapes[spec.name], spec.dtype).copy() for spec in self._outputs
        }

    def infer_watched(self, feeds: Sequence[Arrays], profiler: Any) -> None:
        """Run inferences in a context of their own, which launches each kernel instead of replaying a graph.

        Args:
            feeds: checked inputs, one for each inference.
            profiler: TensorRT's, which is told about each layer.
        """
        kept, self._context = self._context, self._new_context()
        try:
            self._context.profiler = profiler
            for feed in feeds:
                self._drop_graph()
                self.infer(feed)
        finally:
            self._drop_graph()
            self._context = kept

    def _execute(self) -> None:
        if not self._context.execute_async_v3(int(self._cuda.stream)):
            raise StageFailed(f"the engine did not run: {self._log.last}")

    def _new_context(self) -> Any:
        """Make an execution context over the buffers.

        TensorRT-RTX is told to finish compiling a shape before it runs it. Its default compiles in the background and
        runs other kernels meanwhile, which a graph would keep for good.
        """
        strategies = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        settings = []
        if strategies is not None:
            config = self.engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            settings.append(config)
        context = self.engine.create_execution_context(*settings)
        if context is None:
            raise StageFailed(f"no execution context: {self._log.last}")
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.device):
                raise StageFailed(f"the engine refused the address of {name!r}: {self._log.last}")
        return context

    def _record(self) -> Any:
        """Record a CUDA graph of one inference at the shape that is set."""
        mode = self._cuda.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self._cuda.stream, mode)
        try:
            self._execute()
        except BaseException:
            with suppress(StageFailed):  # a capture that failed may leave no graph
                self._cuda.call("cudaGraphDestroy", self._cuda.call("cudaStreamEndCapture", self._cuda.stream))
            raise
        graph = self._cuda.call("cudaStreamEndCapture", self._cuda.stream)
        try:
            return self._cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda.call("cudaGraphDestroy", graph)

    def _drop_graph(self) -> None:
        captured, self._captured = self._captured, None
        if captured is not None and captured.graph is not None:
            self._cuda.call("cudaGraphExecDestroy", captured.graph)

    def _spec(self, name: str) -> TensorSpec:
        dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name))).name
        return TensorSpec(name, dtype, symbolic(tuple(self.engine.get_tensor_shape(name))))

    def _most_bytes(self, spec: TensorSpec) -> int:
        """Return the size of a tensor at the largest batch."""
        assert self.target is not None
        sizes = (size if isinstance(size, int) else self.target.max_batch for size in spec.shape)
        return math.prod(sizes) * np.dtype(spec.dtype).itemsize


def layers_with_nodes(information: str) -> list[tuple[dict[str, Any], list[str]]]:
    """Return the kernels in the JSON of TensorRT's inspector, each with the ONNX nodes that it came from."""
    layers = json.loads(information, strict=False).get("Layers", [])
    return [
        (layer, _ONNX_LAYER.findall(layer.get("Metadata", ""))) for layer in layers if isinstance(layer, dict)
    ]  # without detailed profiling a layer is a bare name


def layers_by_precision(layers: Sequence[tuple[dict[str, Any], list[str]]]) -> dict[str, int]:
    """Count compute layers by precision.

    A kernel counts once for each convolution or matrix product of the ONNX file that it came from, in the type of its
    first input.
    """
    found: Counter[str] = Counter()
    for layer, nodes in layers:
        if not layer.get("Inputs"):
            continue
        first = layer["Inputs"][0]
        type_name = str(first.get("Datatype") or first.get("Format/Datatype", "")).split()
        for node in nodes:
            if is_compute(node.rpartition("/")[2]) and type_name:
                found[precision_of(type_name[0])] += 1
    return dict(found)


def _again(target: Target) -> str:
    return "build it here: dmformer build" if target.flavour == "tensorrt" else "build or export it for this machine"
