"""ONNX -> TensorRT engine. Imports neither torch nor onnx: a device builds from the ONNX file of its bundle.

Parser and builder are native code that may crash or run out of memory, so they run in a process of their own
(:func:`build_engine`), which writes files, and a line for each step into a pipe. One path serves TensorRT 10, 11 and
TensorRT-RTX: the network is strongly typed, precision is what the ONNX file says.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import msgspec

from dmformer.errors import StageFailed, UnavailableError
from dmformer.export.formats import Converted
from dmformer.files import OpenFile, hash_file
from dmformer.process import STOP_S, Child
from dmformer.runtimes.cuda import Gpu, find_gpu
from dmformer.runtimes.target import (
    AUTO,
    EngineLog,
    Flavour,
    Target,
    contradiction,
    load_flavour,
    rtx_targets,
    this_platform,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dmformer.export.formats import ConversionSource
    from dmformer.export.options import EngineOptions
    from dmformer.progress import Advance, Progress

PLAN = "model.plan"
TIMING_CACHE = "timing.cache"
_LIMIT_S = 3600.0  # on a small device a build that times its kernels takes many minutes


class EngineOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What to build. Paths are absolute; ``progress`` is a file descriptor that the building process inherits."""

    onnx: str
    plan: str
    timing_cache: str
    flavour: str
    targets: tuple[str, ...]
    min_batch: int
    opt_batch: int
    max_batch: int
    workspace_mb: int | None
    progress: int


class EngineResult(msgspec.Struct, frozen=True, kw_only=True):
    """What built the engine, and in how many seconds."""

    flavour: Literal["tensorrt", "rtx"]
    version: str
    build_s: float


def check_buildable(options: EngineOptions) -> None:
    """Make sure that an engine can be built on this machine; nothing is built.

    Raises:
        UnavailableError: the flavour is not installed, it needs a GPU or a target, or has no such target.
        UsageError: no such flavour.
    """
    _aim(options)


def _aim(options: EngineOptions) -> tuple[tuple[str, ...], Gpu | None]:
    """The compute capabilities to build for, and the GPU of this machine where it is the one that is built for."""
    flavour, engine = load_flavour(_flavour(options))
    if options.targets and flavour.name != "rtx":
        raise UnavailableError(
            f"{flavour.title} builds for the GPU of its machine only; expected no `targets`, or `flavour` rtx"
        )
    gpu = None
    if not options.targets:
        try:
            gpu = find_gpu()
        except UnavailableError as error:
            ahead = "name the GPU to build for, for instance `targets` sm89"
            if flavour.name != "rtx":
                ahead = "build on the device itself (dmformer build), or use `flavour` rtx with `targets` sm89"
            raise UnavailableError(f"{flavour.title} builds for the GPU of its machine: {error}; {ahead}") from error
    targets = (gpu.compute_capability,) if gpu else tuple(options.targets)
    if flavour.name == "rtx":
        _capabilities(engine, flavour, targets)
    return targets, gpu


def to_tensorrt(source: ConversionSource, folder: Path) -> Converted:
    """Write ``model.plan``, and beside it the timing cache where the flavour has one.

    The batch may be anything within the bounds of ``source.engine``; the precision is that of the ONNX file.

    Raises:
        StageFailed: parser or builder refused, crashed or took too long.
        UnavailableError: the flavour is not installed, or cannot build what was asked on this machine.
        UsageError: no such flavour.
    """
    options = source.engine
    targets, gpu = _aim(options)
    plan, cache = folder / PLAN, folder / TIMING_CACHE
    engine = _build(source, targets, plan, cache)
    target = Target(
        flavour=engine.flavour,
        version=engine.version,
        compute_capabilities=targets,
        platform=this_platform(),
        gpu=gpu.name if gpu else None,
        min_batch=options.min_batch,
        opt_batch=options.opt_batch,
        max_batch=options.max_batch,
        workspace_mb=options.workspace_mb,
        build_s=round(engine.build_s, 3),
        onnx_sha256=hash_file(source.onnx)[0],
    )
    if wrong := contradiction(OpenFile(plan).data, target):
        raise StageFailed(f"the engine that was built is not what was asked for: {wrong}")
    package = "tensorrt" if target.flavour == "tensorrt" else "tensorrt-rtx"
    if target.flavour == "rtx":
        cache.unlink(missing_ok=True)  # of another flavour's build
    files = (plan, cache) if cache.exists() else (plan,)
    return Converted(files, {package: target.version}, target)


def _flavour(options: EngineOptions) -> str:
    """Only TensorRT-RTX builds for other machines' GPUs."""
    return "rtx" if options.targets and options.flavour == AUTO else options.flavour


def _build(source: ConversionSource, targets: tuple[str, ...], plan: Path, cache: Path) -> EngineResult:
    options = source.engine
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8", errors="replace") as progress:
        try:
            child = Child("dmformer.export.formats.tensorrt:build_engine", inherit=(writing,))
        finally:
            os.close(writing)
        order = EngineOrder(
            onnx=str(source.onnx.absolute()),
            plan=str(plan.absolute()),
            timing_cache=str(cache.absolute()),
            flavour=_flavour(options),
            targets=targets,
            min_batch=options.min_batch,
            opt_batch=options.opt_batch,
            max_batch=options.max_batch,
            workspace_mb=options.workspace_mb,
            progress=writing,
        )
        watcher = threading.Thread(target=_watch, args=(progress, source.stage, source.precision), daemon=True)
        with child:
            watcher.start()
            try:
                result = child.call(order, EngineResult, _LIMIT_S)
            except StageFailed as error:
                hint = "; it usually is memory: bound it with `workspace_mb`" if "SIGKILL" in str(error) else ""
                raise StageFailed(f"building a TensorRT engine at {source.precision}: {error}{hint}") from error
        watcher.join(STOP_S)  # the pipe ends with the process, and those that it may have started
    return result


def _watch(lines: Iterable[str], stage: Progress, precision: str) -> None:
    """Turn the lines of a build into stages, one for each outermost phase."""
    with ExitStack() as phases:
        advance: Advance | None = None
        for line in lines:
            kind, _, rest = line.rstrip("\n").partition(" ")
            if kind == "start":
                steps, _, name = rest.partition(" ")
                phases.close()
                advance = phases.enter_context(stage(f"tensorrt {precision}: {name.lower()}", int(steps) or None))
            elif kind == "step" and advance is not None:
                advance()
            elif kind == "end":
                phases.close()
                advance = None


# --- in the process that builds ---------------------------------------------------------------------------------------


def build_engine(order: EngineOrder) -> EngineResult:
    """Parse the ONNX file, build the engine, write the plan.

    Raises:
        StageFailed: the parser or the builder refused.
        UnavailableError: the flavour, a target or a GPU is not there.
    """
    flavour, engine = load_flavour(order.flavour)
    log = EngineLog(engine)
    builder = engine.Builder(log.logger)
    network = builder.create_network(strongly_typed(engine))
    parser = engine.OnnxParser(network, log.logger)
    if not parser.parse(Path(order.onnx).read_bytes()):
        raise StageFailed("; ".join(complaints(parser)) or f"the ONNX file was not parsed: {log.last}")
    config = builder.create_builder_config()
    config.profiling_verbosity = engine.ProfilingVerbosity.DETAILED
    if order.workspace_mb is not None:
        config.set_memory_pool_limit(engine.MemoryPoolType.WORKSPACE, order.workspace_mb << 20)
    _add_profile(builder, config, network, order)
    if flavour.name == "rtx":  # which would build for nearly all GPUs
        capabilities = _capabilities(engine, flavour, order.targets)
        config.num_compute_capabilities = len(order.targets)
        for index, target in enumerate(order.targets):
            config.set_compute_capability(capabilities[target], index)
    cache = use_timing_cache(config, Path(order.timing_cache)) if flavour.name == "tensorrt" else None
    with os.fdopen(order.progress, "w", encoding="utf-8") as progress:
        config.progress_monitor = _monitor(engine, progress)
        begun = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        taken = time.perf_counter() - begun
    if plan is None:
        raise StageFailed(f"{flavour.title} built nothing: {with_advice(log.last)}")
    Path(order.plan).write_bytes(memoryview(plan))
    if cache is not None:
        Path(order.timing_cache).write_bytes(memoryview(cache.serialize()))
    name: Literal["tensorrt", "rtx"] = "rtx" if flavour.name == "rtx" else "tensorrt"
    return EngineResult(flavour=name, version=engine.__version__, build_s=taken)


def strongly_typed(engine: Any) -> int:
    """Flags of a strongly typed network: TensorRT 10 needs the flag; 11 and TensorRT-RTX know no other network."""
    flags = getattr(engine, "NetworkDefinitionCreationFlag", None)
    flag = getattr(flags, "STRONGLY_TYPED", None)
    return 0 if flag is None or engine.__name__ != "tensorrt" else 1 << int(flag)


def complaints(parser: Any) -> list[str]:
    """The parser's errors, each with the ONNX node and the torch module that it came from."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = error.node_name()
        module, _, _ = node.rpartition("/")
        where = f"ONNX node {node!r} ({error.node_operator()}) of torch module {module!r}: " if node else ""
        found.append(f"{where}{' '.join(error.desc().split())}")
    return found


def with_advice(message: str) -> str:
    """Return a builder's error message, with what to do about it where that is known."""
    if "Turing" in message or "SM75" in message:
        return f"{message}; leave `targets` sm75 out, or build it at fp16"
    if "memory" in message.lower():
        return f"{message}; bound it with `workspace_mb`, or free memory"
    return message


def _add_profile(builder: Any, config: Any, network: Any, order: EngineOrder) -> None:
    """One optimisation profile: the batch is dynamic within its bounds."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        row = tuple(tensor.shape)[1:]
        profile.set_shape(
            tensor.name, *((batch, *row) for batch in (order.min_batch, order.opt_batch, order.max_batch))
        )
    config.add_optimization_profile(profile)


def _capabilities(engine: Any, flavour: Flavour, targets: tuple[str, ...]) -> dict[str, Any]:
    """The compute capabilities that can be built for ahead of time: the engine's value by name.

    Raises:
        UnavailableError: a target is not among them.
    """
    capabilities = rtx_targets(engine)
    for target in targets:
        if target not in capabilities:
            able = ", ".join(capabilities)
            raise UnavailableError(
                f"{flavour.title} {engine.__version__} builds nothing for compute capability {target}; it can for "
                f"{able}; for others build on the device itself with TensorRT: dmformer build"
            )
    return capabilities


def use_timing_cache(config: Any, path: Path) -> Any:
    """The timing cache of an earlier build, or an empty one: a cache of another GPU or version is refused."""
    for content in (path.read_bytes() if path.exists() else b"", b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _monitor(engine: Any, progress: TextIO) -> Any:
    """Writes ``start NUMBER NAME``, ``step`` and ``end`` for the outermost phases of a build."""

    class Monitor(engine.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            engine.IProgressMonitor.__init__(self)
            self.outermost: str | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost = name
                say(f"start {steps} {name}")

        def step_complete(self, name: str, _step: int) -> bool:
            if name == self.outermost:
                say("step")
            return True

        def phase_finish(self, name: str) -> None:
            if name == self.outermost:
                say("end")

    def say(line: str) -> None:
        progress.write(line + "\n")
        progress.flush()

    return Monitor()
