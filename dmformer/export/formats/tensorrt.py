"""ONNX -> TensorRT engine. Imports neither torch nor onnx: a device builds from the ONNX file of its bundle."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dmformer.errors import StageFailed, UnavailableError
from dmformer.export.formats import Converted
from dmformer.export.formats.tensorrt_build import KINDS, Answer, Order, known_targets
from dmformer.files import hash_file
from dmformer.process import Child
from dmformer.runtimes.cuda import Gpu, find_gpu
from dmformer.runtimes.target import AUTO, Target, contradiction, load_flavour, this_platform

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dmformer.export.formats import ConversionSource, EngineOptions
    from dmformer.progress import Advance, Progress

PLAN = "model.plan"
TIMING_CACHE = "timing.cache"
_LIMIT_S = 3600.0  # on a small device a build that times its kernels takes many minutes


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
            f"{flavour.title} builds for the GPU of its machine only; expected no --target, or --flavour rtx"
        )
    gpu = None
    if not options.targets:
        try:
            gpu = find_gpu()
        except UnavailableError as error:
            ahead = "name the GPU to build for, for instance --target sm89"
            if flavour.name != "rtx":
                ahead = "build on the device itself (dmformer build), or use --flavour rtx with --target sm89"
            raise UnavailableError(f"{flavour.title} builds for the GPU of its machine: {error}; {ahead}") from error
    targets = (gpu.compute_capability,) if gpu else options.targets
    if flavour.name == "rtx":
        known_targets(engine, flavour, targets)
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
    with tempfile.TemporaryDirectory(prefix="dmformer-") as scratch:
        answer = _built(source, targets, plan, cache, Path(scratch) / "answer.json")
    if answer.error is not None:
        raise KINDS[answer.kind](answer.error)
    assert answer.flavour is not None
    assert answer.version is not None
    target = Target(
        flavour=answer.flavour,
        version=answer.version,
        compute_capabilities=targets,
        platform=this_platform(),
        gpu=gpu.name if gpu else None,
        min_batch=options.min_batch,
        opt_batch=options.opt_batch,
        max_batch=options.max_batch,
        workspace_mb=options.workspace_mb,
        build_s=round(answer.build_s, 3),
        onnx_sha256=hash_file(source.onnx)[0],
    )
    if wrong := contradiction(plan, target):
        raise StageFailed(f"the engine that was built is not what was asked for: {wrong}")
    package = "tensorrt" if target.flavour == "tensorrt" else "tensorrt-rtx"
    if target.flavour == "rtx":
        cache.unlink(missing_ok=True)  # of another flavour's build
    files = (plan, cache) if cache.exists() else (plan,)
    return Converted(files, {package: target.version}, target)


def _flavour(options: EngineOptions) -> str:
    """Only TensorRT-RTX builds for other machines' GPUs."""
    return "rtx" if options.targets and options.flavour == AUTO else options.flavour


def _built(source: ConversionSource, targets: tuple[str, ...], plan: Path, cache: Path, answer: Path) -> Answer:
    options = source.engine
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8", errors="replace") as progress:
        try:
            child = Child("dmformer.export.formats.tensorrt_build", inherit=(writing,))
        finally:
            os.close(writing)
        order = Order(
            onnx=str(source.onnx.absolute()),
            plan=str(plan.absolute()),
            timing_cache=str(cache.absolute()),
            answer=str(answer),
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
                child.work(msgspec.json.encode(order), _LIMIT_S)
            except StageFailed as error:
                hint = "; it usually is memory: bound it with --workspace" if "SIGKILL" in str(error) else ""
                raise StageFailed(f"building a TensorRT engine at {source.precision}: {error}{hint}") from error
        watcher.join()  # the pipe ends with the process
    return msgspec.json.decode(answer.read_bytes(), type=Answer)


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
