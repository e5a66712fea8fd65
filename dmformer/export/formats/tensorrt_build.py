"""The process that builds an engine: an order in by standard input, files and a line for each step out.

Parser and builder are native code that may crash or run out of memory, so nothing else runs beside them. One path
serves TensorRT 10, 11 and TensorRT-RTX: the network is strongly typed, precision is what the ONNX file says.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec

from dmformer.errors import DMFormerError, StageFailed, UnavailableError, UsageError, first_line
from dmformer.runtimes.target import EngineLog, Flavour, load_flavour, rtx_targets


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to build. Paths are absolute; ``progress`` is a file descriptor that this process inherits."""

    onnx: str
    plan: str
    timing_cache: str
    answer: str
    flavour: str
    targets: tuple[str, ...]
    min_batch: int
    opt_batch: int
    max_batch: int
    workspace_mb: int | None
    progress: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Who built it and in how many seconds, or the line that says why nothing was, and the kind of failure."""

    flavour: Literal["tensorrt", "rtx"] | None = None
    version: str | None = None
    build_s: float = 0.0
    error: str | None = None
    kind: Literal["stage", "unavailable", "usage"] = "stage"


KINDS: dict[str, type[DMFormerError]] = {"stage": StageFailed, "unavailable": UnavailableError, "usage": UsageError}


def build(order: Order, progress: TextIO) -> Answer:
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
    config.progress_monitor = monitor(engine, progress)
    add_profile(builder, config, network, order)
    if flavour.name == "rtx":
        aim(engine, config, flavour, order.targets)
    cache = use_timing_cache(config, Path(order.timing_cache)) if flavour.name == "tensorrt" else None
    begun = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    taken = time.perf_counter() - begun
    if plan is None:
        raise StageFailed(f"{flavour.title} built nothing: {explained(log.last)}")
    Path(order.plan).write_bytes(memoryview(plan))
    if cache is not None:
        Path(order.timing_cache).write_bytes(memoryview(cache.serialize()))
    return Answer(
        flavour="rtx" if flavour.name == "rtx" else "tensorrt",
        version=engine.__version__,
        build_s=taken,
    )


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


def explained(message: str) -> str:
    """A builder's error, with what to do where that is known."""
    if "Turing" in message or "SM75" in message:
        return f"{message}; leave --target sm75 out, or build it at fp16"
    if "memory" in message.lower():
        return f"{message}; bound it with --workspace, or free memory"
    return message


def add_profile(builder: Any, config: Any, network: Any, order: Order) -> None:
    """One optimisation profile: the batch is dynamic within its bounds."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        row = tuple(tensor.shape)[1:]
        profile.set_shape(
            tensor.name, *((batch, *row) for batch in (order.min_batch, order.opt_batch, order.max_batch))
        )
    config.add_optimization_profile(profile)


def aim(engine: Any, config: Any, flavour: Flavour, targets: tuple[str, ...]) -> None:
    """Set the GPUs that TensorRT-RTX builds for; without, it would build for nearly all."""
    known = known_targets(engine, flavour, targets)
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(known[target], index)


def known_targets(engine: Any, flavour: Flavour, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The compute capabilities that can be built for ahead of time: the engine's value by name.

    Raises:
        UnavailableError: one that is wanted is not among them.
    """
    known = rtx_targets(engine)
    for target in wanted:
        if target not in known:
            able = ", ".join(known)
            raise UnavailableError(
                f"{flavour.title} {engine.__version__} builds nothing for compute capability {target}; it can for "
                f"{able}; for others build on the device itself with TensorRT: dmformer build"
            )
    return known


def use_timing_cache(config: Any, path: Path) -> Any:
    """The timing cache of an earlier build, or an empty one: a cache of another GPU or version is refused."""
    for content in (path.read_bytes() if path.exists() else b"", b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def monitor(engine: Any, progress: TextIO) -> Any:
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


def main() -> None:
    """Read the order, build, write the answer."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    with os.fdopen(order.progress, "w", encoding="utf-8") as progress:
        try:
            answer = build(order, progress)
        except DMFormerError as error:
            kind = next(name for name, kind in KINDS.items() if isinstance(error, kind))
            answer = msgspec.convert({"error": str(error), "kind": kind}, Answer)
        except Exception as error:  # noqa: BLE001 - whatever native code raises becomes one line
            answer = Answer(error=f"{type(error).__name__}: {first_line(error)}")
    Path(order.answer).write_bytes(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
