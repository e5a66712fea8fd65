"""The GPU of this machine, its memory and its streams, by ``cuda-bindings``: no PyTorch on a device."""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.errors import StageFailed, UnavailableError, first_line

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as NVIDIA's driver has it.
        compute_capability: like ``8.9``.
    """

    name: str
    compute_capability: str


def bindings() -> Any:
    """Import the runtime API of ``cuda-bindings``.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise UnavailableError(
            f"GPUs need the package 'cuda-bindings' ({first_line(error)}); run: pip install 'dmformer[tensorrt]'"
        ) from error


def driver_missing() -> str | None:
    """Return why there is no NVIDIA driver here; ``None`` where there is one, or this system is not known.

    Takes a millisecond; the bindings take longer to import.
    """
    import ctypes

    name = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}.get(sys.platform)
    try:
        if name is not None:
            ctypes.CDLL(name)
    except OSError as error:
        return f"no NVIDIA GPU with a driver here ({first_line(error)})"
    return None


def find_gpu() -> Gpu:
    """Find the first GPU.

    Raises:
        UnavailableError: there is none, or no driver for it.
    """
    if (reason := driver_missing()) is not None:
        raise UnavailableError(reason)
    cuda = bindings()
    try:
        code, count = cuda.cudaGetDeviceCount()
    except Exception as error:
        raise UnavailableError(f"no NVIDIA GPU: {first_line(error)}") from error
    if code != cuda.cudaError_t.cudaSuccess or count == 0:
        raise UnavailableError(_why_no_gpu(cuda, code.name))
    try:
        properties = checked(cuda, "cudaGetDeviceProperties", cuda.cudaGetDeviceProperties(0))
    except StageFailed as error:
        raise UnavailableError(f"the NVIDIA GPU does not answer: {error}") from error
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(name.rstrip("\0"), f"{properties.major}.{properties.minor}")


def _why_no_gpu(cuda: Any, code: str) -> str:
    """Say that there is no driver, or one that is older than the bindings."""
    _, driver = cuda.cudaDriverGetVersion()  # like 12060; 0 where there is none
    _, bound = cuda.cudaRuntimeGetVersion()
    if driver and driver // 1000 < bound // 1000:
        return (
            f"the NVIDIA driver is for CUDA {driver // 1000}, and cuda-bindings for {bound // 1000}; "
            f"run: pip install 'cuda-bindings<{driver // 1000 + 1}'"
        )
    return f"no NVIDIA GPU with a driver here ({code})"


def checked(cuda: Any, call: str, result: Any) -> Any:
    """Return the result of a call of the CUDA runtime, without its error code.

    Raises:
        StageFailed: the code is not success.
    """
    code, *rest = result
    if code != cuda.cudaError_t.cudaSuccess:
        raise StageFailed(f"CUDA: {call} failed with {code.name}")
    return rest[0] if len(rest) == 1 else tuple(rest)


class Buffer:
    """Memory of the device with pinned memory of the host beside it, both of ``size`` bytes."""

    def __init__(self, session: Session, size: int) -> None:
        self.size = size
        self.device = int(session.allocate("cudaMalloc", "cudaFree", size))
        self.host = int(session.allocate("cudaMallocHost", "cudaFreeHost", size))

    def view(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return the pinned memory as an array, which is valid as long as the session is open."""
        import ctypes

        count = int(np.prod(shape))
        size = count * np.dtype(dtype).itemsize
        if size > self.size:
            raise StageFailed(f"an array of {shape} {np.dtype(dtype)} does not fit into a buffer of {self.size} bytes")
        return np.frombuffer((ctypes.c_byte * size).from_address(self.host), dtype, count).reshape(shape)


class Session:
    """One stream and whatever is allocated; leaving the context frees all, the last first, also after an error."""

    def __init__(self) -> None:
        self.cuda = bindings()
        self._frees = ExitStack()
        self.stream: Any = None

    def __enter__(self) -> Self:
        try:
            self.stream = self.call("cudaStreamCreate")
            self._frees.callback(self.call, "cudaStreamDestroy", self.stream)
        except BaseException:
            self._frees.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._frees.close()
        self.stream = None

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the CUDA runtime.

        Raises:
            StageFailed: it reports an error.
        """
        return checked(self.cuda, name, getattr(self.cuda, name)(*arguments))

    def allocate(self, take: str, give_back: str, size: int) -> Any:
        """Allocate memory that is freed with the session; ``size`` in bytes."""
        pointer = self.call(take, size)
        self._frees.callback(self.call, give_back, pointer)
        return pointer

    def event(self) -> Any:
        """Create an event, for times on the device."""
        event = self.call("cudaEventCreate")
        self._frees.callback(self.call, "cudaEventDestroy", event)
        return event

    def copy_in(self, buffer: Buffer, size: int) -> None:
        """Copy from host to device, on the stream; ``size`` in bytes."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", buffer.device, buffer.host, size, kind, self.stream)

    def copy_out(self, buffer: Buffer, size: int) -> None:
        """Copy from device to host, on the stream; ``size`` in bytes."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", buffer.host, buffer.device, size, kind, self.stream)

    def record(self, event: Any) -> None:
        """Mark a moment of the stream."""
        self.call("cudaEventRecord", event, self.stream)

    def wait(self) -> None:
        """Wait until the stream has done all that was asked."""
        self.call("cudaStreamSynchronize", self.stream)

    def between(self, first: Any, second: Any) -> int:
        """Return the nanoseconds between two recorded events."""
        return round(float(self.call("cudaEventElapsedTime", first, second)) * 1e6)
