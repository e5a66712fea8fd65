"""The flavours of TensorRT: one family of API under two module names."""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dmformer.errors import UnavailableError, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.runtimes.cuda import Gpu

AUTO = "auto"


@dataclass(frozen=True)
class Flavour:
    """One flavour.

    Attributes:
        name: as users and manifests have it.
        module: what is imported.
        said: how it is called in messages.
        install: what to do where it is missing.
    """

    name: str
    module: str
    said: str
    install: str


# In the order of preference of a machine that has a GPU: TensorRT proper measures the kernels that it chooses.
FLAVOURS = (
    Flavour(
        "tensorrt",
        "tensorrt",
        "TensorRT",
        "install NVIDIA's package (on a Jetson, JetPack has it), or use --flavour rtx",
    ),
    Flavour("rtx", "tensorrt_rtx", "TensorRT-RTX", "run: pip install 'dmformer[tensorrt]'"),
)


def load(name: str) -> tuple[Flavour, Any]:
    """A flavour and its module; ``auto`` is the first that loads.

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
            reasons.append(f"{flavour.said} {why}: {flavour.install}")
    raise UnavailableError("; ".join(reasons))


def installed_version() -> str | None:
    """The version of the first flavour that is installed, by its metadata: it is not imported, and may not load."""
    for flavour in FLAVOURS:
        with suppress(ImportError, ValueError, metadata.PackageNotFoundError):
            if find_spec(flavour.module) is not None:
                return metadata.version(flavour.module)
    return None


def rtx_targets(engine: Any) -> dict[str, Any]:
    """The compute capabilities that TensorRT-RTX builds for, like ``8.9``, oldest first: the engine's value by name."""
    names = [name for name in dir(engine.ComputeCapability) if name.startswith("SM")]
    names.sort(key=lambda name: int(name[2:]))
    return {f"{name[2:-1]}.{name[-1]}": getattr(engine.ComputeCapability, name) for name in names}


def not_for(flavour: Flavour, engine: Any, gpu: Gpu) -> str | None:
    """Why a flavour cannot work on a GPU; ``None`` where it can, as far as is known.

    TensorRT-RTX refuses the GPUs of data centres between those that it is for (seen on an H100), and takes whatever is
    newer than the newest that it knows.
    """
    if flavour.name != "rtx":
        return None
    known = list(rtx_targets(engine))
    newest = max(known, key=float)
    if gpu.compute_capability in known or float(gpu.compute_capability) > float(newest):
        return None
    return (
        f"{flavour.said} {engine.__version__} does not run on {gpu.name}, which is SM {gpu.compute_capability}; "
        f"it does on SM {', '.join(known)} and newer: use TensorRT there"
    )


def profiler(engine: Any, tell: Callable[[str, float], object]) -> Any:
    """A profiler that tells the name and the milliseconds of each layer of an inference.

    Args:
        engine: the flavour's module, whose ``IProfiler`` has to be the base.
        tell: called for each layer.
    """

    class Profiler(engine.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            engine.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            tell(layer_name, ms)

    return Profiler()


class Log:
    """What an engine says of warnings and errors, kept to be told when something fails.

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
