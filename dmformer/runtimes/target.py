"""What a TensorRT engine is tied to: the flavour and version that built it, the GPUs that it runs on, the platform.

The manifest has it as a :class:`Target`, which decides whether an engine may be loaded here. A plan of TensorRT-RTX has
a header that says some of it again, read here without the engine. As observed in plans of TensorRT-RTX 1.7, not
documented: ``vtrt`` at byte 0, the size of the file as little-endian u64 at 16, four bytes of the version at 24, and at
32 a u32 in which each bit stands for a compute capability. A plan that does not start so (TensorRT 10 and 11) tells
nothing. The manifest is the authority; the header is a second opinion.
"""

from __future__ import annotations

import importlib
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct

from dmformer.errors import UnavailableError, UsageError, first_line
from dmformer.files import Sha256

if TYPE_CHECKING:
    import mmap

    from dmformer.runtimes.cuda import Gpu

AUTO = "auto"
# A pattern's $ alone would let a last line break pass.
ComputeCapability = Annotated[str, Meta(pattern=r"^[0-9]{1,2}\.[0-9]$(?!\n)")]
_Version = Annotated[str, Meta(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+_-]*$(?!\n)", max_length=64)]


class Target(Struct, frozen=True, kw_only=True):
    """Where an engine runs, and how it was built.

    Attributes:
        flavour: ``tensorrt`` (TensorRT 10 or 11) or ``rtx`` (TensorRT-RTX).
        version: of the package that built it, and that alone can load it.
        compute_capabilities: of the GPUs that it runs on, like ``8.9``.
        platform: operating system and processor, like ``linux-x86_64``.
        gpu: name of the GPU that it was built on; ``null`` where it was built ahead of time, without one.
        min_batch: smallest batch that it takes.
        opt_batch: the batch that it is tuned for.
        max_batch: largest batch that it takes.
        workspace_mb: most GPU memory that one layer may use besides its tensors, in MiB; ``null`` is no bound.
        build_s: seconds that the build took.
        onnx_sha256: of the ONNX file that it was built from.
    """

    flavour: Literal["tensorrt", "rtx"]
    version: _Version
    compute_capabilities: Annotated[tuple[ComputeCapability, ...], Meta(min_length=1)]
    platform: _Version
    gpu: str | None
    min_batch: Annotated[int, Meta(ge=1)]
    opt_batch: Annotated[int, Meta(ge=1)]
    max_batch: Annotated[int, Meta(ge=1)]
    workspace_mb: int | None
    build_s: float
    onnx_sha256: Sha256

    def __post_init__(self) -> None:
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise UsageError(
                f"batches {self.min_batch}, {self.opt_batch}, {self.max_batch} in the manifest; expected order"
            )


def this_platform() -> str:
    """Return operating system and processor of this machine, as a target has them."""
    return f"{platform.system()}-{platform.machine()}".lower()


def compute_capability(name: str) -> str:
    """Read ``sm89``, ``SM_89``, ``8.9`` or ``89`` as ``8.9``.

    Raises:
        UsageError: the name is no compute capability.
    """
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", name.strip().lower())
    if found is None:
        raise UsageError(f"target {name!r}; expected a compute capability, for instance sm89")
    return f"{int(found[1])}.{found[2]}"


_MAGIC = b"vtrt"
_LENGTH = 36
_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # by bit


@dataclass(frozen=True)
class Header:
    """What a plan of TensorRT-RTX says of itself."""

    bytes: int
    version: str
    compute_capabilities: tuple[str, ...]


def read_header(plan: mmap.mmap | bytes) -> Header | None:
    """Return the header of a plan; ``None`` where it has none of this kind."""
    data = plan[:_LENGTH]
    if len(data) < _LENGTH or not data.startswith(_MAGIC):
        return None
    mask = int.from_bytes(data[32:36], "little")
    return Header(
        bytes=int.from_bytes(data[16:24], "little"),
        version=".".join(str(part) for part in data[24:28]),
        compute_capabilities=tuple(name for bit, name in enumerate(_CAPABILITIES) if mask >> bit & 1),
    )


def contradiction(plan: mmap.mmap | bytes, target: Target) -> str | None:
    """Return in what a plan's header contradicts the manifest; ``None`` where it does not, or says nothing."""
    header = read_header(plan)
    if header is None:
        return "the plan does not start as one of TensorRT-RTX does" if target.flavour == "rtx" else None
    if header.bytes != len(plan):
        return f"the plan says that it has {header.bytes} bytes; it has {len(plan)}"
    if target.flavour != "rtx":
        return f"the plan is one of TensorRT-RTX; the manifest says {target.flavour}"
    # A version like 1.7.1.116 may have more digits in its package than its last byte holds.
    if header.version.split(".")[:3] != target.version.split(".")[:3]:
        return f"the plan says version {header.version}; the manifest says {target.version}"
    if set(header.compute_capabilities) != set(target.compute_capabilities):
        return (
            f"the plan says compute capabilities {', '.join(header.compute_capabilities)}; "
            f"the manifest says {', '.join(target.compute_capabilities)}"
        )
    return None


@dataclass(frozen=True)
class Flavour:
    """One of the two products of NVIDIA that build and run plans, with nearly the same API.

    Attributes:
        name: as users and manifests have it.
        module: the Python module to import.
        title: its name in messages.
        install: what to do where it is missing.
    """

    name: str
    module: str
    title: str
    install: str


# In the order of preference of a machine that has a GPU: TensorRT proper measures the kernels that it chooses.
FLAVOURS = (
    Flavour(
        "tensorrt",
        "tensorrt",
        "TensorRT",
        "install NVIDIA's package (on a Jetson, JetPack has it), or use `flavour` rtx",
    ),
    Flavour("rtx", "tensorrt_rtx", "TensorRT-RTX", "run: pip install 'dmformer[tensorrt]'"),
)


def load_flavour(name: str) -> tuple[Flavour, Any]:
    """Import a flavour's module; ``auto`` is the first flavour that loads.

    Raises:
        UnavailableError: it, or for ``auto`` every one, does not load here.
        UsageError: no such flavour.
    """
    wanted = [flavour for flavour in FLAVOURS if name in (flavour.name, AUTO)]
    if not wanted:
        raise UsageError(f"flavour {name!r}; expected {AUTO}, {' or '.join(flavour.name for flavour in FLAVOURS)}")
    reasons = []
    for flavour in wanted:
        try:
            module = importlib.import_module(flavour.module)
            if module.__version__ and module.Runtime:  # NVIDIA's stub on PyPI has neither
                return flavour, module
        except Exception as error:  # noqa: BLE001 - a stub or half an installation fails in ways of its own
            missing = isinstance(error, ModuleNotFoundError)
            why = "is not installed" if missing else f"does not load here ({first_line(error)})"
            reasons.append(f"{flavour.title} {why}: {flavour.install}")
    raise UnavailableError("; ".join(reasons))


def installed_flavour_version() -> str | None:
    """Return the version of the first flavour that is installed, by its metadata; it may not load."""
    for flavour in FLAVOURS:
        with suppress(ImportError, ValueError, metadata.PackageNotFoundError):
            if find_spec(flavour.module) is not None:
                return metadata.version(flavour.module)
    return None


def rtx_targets(engine: Any) -> dict[str, Any]:
    """Return what TensorRT-RTX builds for: its value for each compute capability, like ``8.9``, oldest first."""
    names = [name for name in dir(engine.ComputeCapability) if name.startswith("SM")]
    names.sort(key=lambda name: int(name[2:]))
    return {f"{name[2:-1]}.{name[-1]}": getattr(engine.ComputeCapability, name) for name in names}


def cannot_use_gpu(flavour: Flavour, engine: Any, gpu: Gpu) -> str | None:
    """Return why a flavour cannot work on a GPU; ``None`` where it can, as far as is known.

    TensorRT-RTX refuses the GPUs of data centres between those that it is for (seen on an H100), and takes whatever is
    newer than the newest that it knows.
    """
    if flavour.name != "rtx":
        return None
    listed = list(rtx_targets(engine))
    if gpu.compute_capability in listed or float(gpu.compute_capability) > max(map(float, listed)):
        return None
    return (
        f"{flavour.title} {engine.__version__} does not run on {gpu.name}, which is SM {gpu.compute_capability}; "
        f"it does on SM {', '.join(listed)} and newer: use TensorRT there"
    )


class EngineLog:
    """Keeps the errors that an engine logs, to be told when something fails.

    Args:
        engine: the flavour's module, whose ``ILogger`` has to be the base of a logger.
    """

    def __init__(self, engine: Any) -> None:
        self.errors: list[str] = []
        errors, severe = self.errors, (engine.ILogger.ERROR, engine.ILogger.INTERNAL_ERROR)

        class Logger(engine.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                engine.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in severe:
                    errors.append(" ".join(message.split()))

        self.logger = Logger()

    @property
    def last(self) -> str:
        """The last error, or that there was none."""
        return self.errors[-1] if self.errors else "it gave no reason"
