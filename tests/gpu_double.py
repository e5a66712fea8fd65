"""A double of a GPU: the parts of ``tensorrt`` and ``cuda.bindings.runtime`` that the TensorRT runtime uses.

It is no emulation. It computes through onnxruntime, and it is strict about the protocol: work on a stream happens when
the stream is waited for, pointers must be alive and large enough, addresses and shapes must be set before a run, and
whatever is not freed stays in :attr:`Device.alive`. A plan of the double is :data:`MAGIC` and the ONNX file itself.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.runtimes.target import Target, this_platform

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

MAGIC = b"plan of the double\n"
VERSION = "10.9.0.34"


class Code(enum.Enum):
    cudaSuccess = 0  # noqa: N815 - as CUDA has it
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815
    cudaErrorIllegalAddress = 700  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class MemcpyKind(enum.Enum):
    cudaMemcpyHostToDevice = 1  # noqa: N815
    cudaMemcpyDeviceToHost = 2  # noqa: N815


class CaptureMode(enum.Enum):
    cudaStreamCaptureModeThreadLocal = 1  # noqa: N815


@dataclass
class Device:
    """The GPU's state.

    Attributes:
        alive: what was made and not yet freed: kind by handle.
        calls: names of the calls of CUDA and of TensorRT's run, in order.
        failing: calls of CUDA that fail: name to the code that they give.
        count: how many GPUs there are.
    """

    alive: dict[int, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    failing: dict[str, Code] = field(default_factory=dict)
    count: int = 1
    driver: int = 13000
    name: str = "NVIDIA Double"
    capability: tuple[int, int] = (8, 9)
    loaded: int = 0
    memory: dict[int, Any] = field(default_factory=dict)
    queues: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    capturing: list[Callable[[], None]] | None = None
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    clock: float = 0.0
    events: dict[int, float] = field(default_factory=dict)
    _next: int = 1

    def handle(self, kind: str) -> int:
        self._next += 1
        self.alive[self._next] = kind
        return self._next

    def take(self, kind: str, size: int) -> int:
        block = ctypes.create_string_buffer(size)
        address = ctypes.addressof(block)
        self.memory[address] = block
        self.alive[address] = kind
        return address

    def free(self, handle: int, kind: str) -> None:
        if self.alive.get(handle) != kind:
            raise Refused(Code.cudaErrorInvalidValue)
        del self.alive[handle]
        self.memory.pop(handle, None)

    def block(self, address: int, kind: str, size: int) -> Any:
        if self.alive.get(address) != kind or ctypes.sizeof(self.memory[address]) < size:
            raise Refused(Code.cudaErrorIllegalAddress)
        return self.memory[address]

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        if self.alive.get(stream) != "stream":
            raise Refused(Code.cudaErrorInvalidValue)
        (self.queues[stream] if self.capturing is None else self.capturing).append(work)


class Stream:
    """CUDA's handle of a stream: no number, but it has one, which is what TensorRT takes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __int__(self) -> int:
        return self.number


class Refused(Exception):
    """A call of the double was wrong."""

    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


class Cuda:
    """``cuda.bindings.runtime``."""

    cudaError_t = Code  # noqa: N815
    cudaMemcpyKind = MemcpyKind  # noqa: N815
    cudaStreamCaptureMode = CaptureMode  # noqa: N815

    def __init__(self, device: Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        body = getattr(_Calls, name)

        def call(*arguments: Any) -> Any:
            self._device.calls.append(name)
            if name in self._device.failing:
                return (self._device.failing[name],) + ((None,) if "Create" in name or "Malloc" in name else ())
            try:
                result = body(self._device, *arguments)
            except Refused as error:
                return (error.code, None)
            return (Code.cudaSuccess,) if result is None else (Code.cudaSuccess, result)

        return call


class _Calls:
    """The calls, with the device in the place of ``self``."""

    @staticmethod
    def cudaGetDeviceCount(device: Device) -> int:  # noqa: N802
        return device.count

    @staticmethod
    def cudaDriverGetVersion(device: Device) -> int:  # noqa: N802
        return device.driver

    @staticmethod
    def cudaRuntimeGetVersion(_device: Device) -> int:  # noqa: N802
        return 13000

    @staticmethod
    def cudaGetDeviceProperties(device: Device, _number: int) -> Any:  # noqa: N802
        major, minor = device.capability
        return SimpleNamespace(name=device.name.encode(), major=major, minor=minor)

    @staticmethod
    def cudaMalloc(device: Device, size: int) -> int:  # noqa: N802
        return device.take("device", size)

    @staticmethod
    def cudaMallocHost(device: Device, size: int) -> int:  # noqa: N802
        return device.take("host", size)

    @staticmethod
    def cudaFree(device: Device, address: int) -> None:  # noqa: N802
        device.free(address, "device")

    @staticmethod
    def cudaFreeHost(device: Device, address: int) -> None:  # noqa: N802
        device.free(address, "host")

    @staticmethod
    def cudaStreamCreate(device: Device) -> Stream:  # noqa: N802
        stream = Stream(device.handle("stream"))
        device.queues[stream.number] = []
        return stream

    @staticmethod
    def cudaStreamDestroy(device: Device, stream: Stream) -> None:  # noqa: N802
        if device.queues[stream.number] and "cudaStreamSynchronize" not in device.failing:
            raise Refused(Code.cudaErrorInvalidValue)  # work is under way
        device.free(stream.number, "stream")

    @staticmethod
    def cudaStreamSynchronize(device: Device, stream: Stream) -> None:  # noqa: N802
        work, device.queues[stream.number] = device.queues[stream.number], []
        for step in work:
            step()

    @staticmethod
    def cudaMemcpyAsync(  # noqa: N802
        device: Device, destination: int, source: int, size: int, kind: MemcpyKind, stream: Stream
    ) -> None:
        into, out_of = ("device", "host") if kind is MemcpyKind.cudaMemcpyHostToDevice else ("host", "device")
        device.block(destination, into, size)
        device.block(source, out_of, size)
        device.enqueue(stream.number, lambda: ctypes.memmove(destination, source, size) and None)

    @staticmethod
    def cudaEventCreate(device: Device) -> int:  # noqa: N802
        return device.handle("event")

    @staticmethod
    def cudaEventDestroy(device: Device, event: int) -> None:  # noqa: N802
        device.free(event, "event")

    @staticmethod
    def cudaEventRecord(device: Device, event: int, stream: Stream) -> None:  # noqa: N802
        def mark() -> None:
            device.clock += 0.25
            device.events[event] = device.clock

        device.enqueue(stream.number, mark)

    @staticmethod
    def cudaEventElapsedTime(device: Device, first: int, second: int) -> float:  # noqa: N802
        return device.events[second] - device.events[first]

    @staticmethod
    def cudaStreamBeginCapture(device: Device, _stream: Stream, mode: CaptureMode) -> None:  # noqa: N802
        if device.capturing is not None or not isinstance(mode, CaptureMode):
            raise Refused(Code.cudaErrorInvalidValue)
        device.capturing = []

    @staticmethod
    def cudaStreamEndCapture(device: Device, _stream: Stream) -> int:  # noqa: N802
        if device.capturing is None:
            raise Refused(Code.cudaErrorStreamCaptureInvalidated)
        graph = device.handle("graph")
        device.graphs[graph], device.capturing = device.capturing, None
        return graph

    @staticmethod
    def cudaGraphInstantiate(device: Device, graph: int, _flags: int) -> int:  # noqa: N802
        made = device.handle("graph exec")
        device.graphs[made] = device.graphs[graph]
        return made

    @staticmethod
    def cudaGraphDestroy(device: Device, graph: int) -> None:  # noqa: N802
        device.free(graph, "graph")

    @staticmethod
    def cudaGraphExecDestroy(device: Device, graph: int) -> None:  # noqa: N802
        device.free(graph, "graph exec")

    @staticmethod
    def cudaGraphLaunch(device: Device, graph: int, stream: Stream) -> None:  # noqa: N802
        if device.alive.get(graph) != "graph exec":
            raise Refused(Code.cudaErrorInvalidValue)
        for step in device.graphs[graph]:
            device.enqueue(stream.number, step)


class ILogger:
    """The base that a logger must have."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IProfiler:
    """The base that a profiler must have."""


class Context:
    """An execution context: addresses and shapes first, then runs."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] | None = None
        self.profiler: Any = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self.engine.device.alive.get(address) != "device":
            return False
        self.addresses[name] = address
        return name in self.engine.names

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return name == self.engine.names[0] and self.shape[1:] == tuple(self.engine.get_tensor_shape(name))[1:]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.shape is not None
        return self.shape if name == self.engine.names[0] else (self.shape[0], *self.engine.get_tensor_shape(name)[1:])

    def execute_async_v3(self, stream: int) -> bool:
        device = self.engine.device
        device.calls.append("execute_async_v3")
        if type(stream) is not int:
            raise TypeError("execute_async_v3(): incompatible function arguments")
        if self.shape is None or set(self.addresses) != set(self.engine.names) or self.engine.refuses:
            return False
        shape, (entry, *outputs) = self.shape, self.engine.names

        def compute() -> None:
            if self.profiler is not None:
                for layer in json.loads(self.engine.create_engine_inspector().get_engine_information(None))["Layers"]:
                    self.profiler.report_layer_time(layer["Name"], 0.25)
            size = 4 * int(np.prod(shape))
            block = device.block(self.addresses[entry], "device", size)
            rows = np.frombuffer(block, np.float32, size // 4).reshape(shape)
            for name, answer in zip(outputs, self.engine.session.run(None, {entry: rows}), strict=True):
                target = device.block(self.addresses[name], "device", answer.nbytes)
                ctypes.memmove(target, np.ascontiguousarray(answer).ctypes.data, answer.nbytes)

        device.enqueue(stream, compute)
        return True


class Engine:
    """An engine: onnxruntime in disguise."""

    refuses = False

    def __init__(self, device: Device, onnx: bytes) -> None:
        import onnxruntime

        self.device = device
        self.onnx = onnx
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.names = [tensor.name for tensor in self.tensors]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == self.names[0] else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return self.tensors[self.names.index(name)].type

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[self.names.index(name)].shape)

    def create_execution_context(self) -> Context:
        return Context(self)

    def create_engine_inspector(self) -> Any:
        def told(_format: object) -> str:
            import onnx

            nodes = [node.name for node in onnx.load_from_string(self.onnx).graph.node]
            layers = [
                {"Name": f"kernel_{i}", "Inputs": [{"Datatype": "Float"}], "Metadata": f"[ONNX Layer: {name}]"}
                for i, name in enumerate(nodes)
            ]
            return json.dumps({"Layers": layers})

        return SimpleNamespace(get_engine_information=told)


class TensorRt:
    """``tensorrt``, as far as running goes."""

    __name__ = "tensorrt"
    __version__ = VERSION
    ILogger = ILogger
    IProfiler = IProfiler
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self, device: Device) -> None:
        self._device = device

    @staticmethod
    def nptype(name: str) -> Any:
        return {"tensor(float)": np.float32}[name]

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        def deserialize(data: bytes) -> Engine | None:
            self._device.loaded += 1
            why = "no plan of the double"
            if data.startswith(MAGIC):
                try:
                    return Engine(self._device, data.removeprefix(MAGIC))
                except Exception as error:  # noqa: BLE001 - as the real one: a message, and nothing
                    why = str(error)
            told = f"Serialization assertion failed:\n version tag does not match. {why}"
            logger.log(ILogger.ERROR, told)
            return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


def install(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Device:
    """Put the double in the place of a GPU with TensorRT 10."""
    import importlib

    device = Device(**settings)
    doubles = {"tensorrt": TensorRt(device), "cuda.bindings.runtime": Cuda(device)}
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: doubles.get(name) or real(name, *rest))
    for module in ("cuda", "tensorrt"):
        monkeypatch.setattr(f"dmformer.runtimes.{module}.driver_missing", lambda: None)
    return device


class CopyingContext(Context):
    """On a real GPU, in the place of TensorRT: each output is the first values of each image, copied on the stream."""

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names

    def execute_async_v3(self, stream: int) -> bool:
        from cuda.bindings import runtime

        assert self.shape is not None
        entry, *outputs = self.engine.names
        pitch = 4 * int(np.prod(self.shape[1:]))
        for name in outputs:
            width = 4 * self.get_tensor_shape(name)[1]
            kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            target, source = self.addresses[name], self.addresses[entry]
            copied = (target, width, source, pitch, width, self.shape[0], kind, stream)
            if runtime.cudaMemcpy2DAsync(*copied) != (runtime.cudaError_t.cudaSuccess,):
                return False
        return True


def install_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the double in the place of TensorRT 10 alone: memory, streams, events and graphs are the GPU's."""
    import importlib

    def create(engine: Engine) -> CopyingContext:
        return CopyingContext(engine)

    monkeypatch.setattr(Engine, "create_execution_context", create)
    double, real = TensorRt(Device()), importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *rest: double if name == "tensorrt" else real(name, *rest)
    )


def plan_of(onnx: Path, folder: Path, **fields: Any) -> tuple[Path, Target]:
    """A plan of the double, and the target that a manifest would have."""
    from dmformer.files import hash_file

    path = folder / "model.plan"
    path.write_bytes(MAGIC + onnx.read_bytes())
    known = {
        "flavour": "tensorrt",
        "version": VERSION,
        "compute_capabilities": ("8.9",),
        "platform": this_platform(),
        "gpu": "NVIDIA Double",
        "min_batch": 1,
        "opt_batch": 1,
        "max_batch": 8,
        "workspace_mb": None,
        "build_s": 1.0,
        "onnx_sha256": hash_file(onnx)[0],
    }
    return path, Target(**{**known, **fields})
