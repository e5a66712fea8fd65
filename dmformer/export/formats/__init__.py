"""The table of formats: how the files of each are made, and from what; with the two that need no engine to make."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmformer.errors import StageFailed, UsageError, first_line
from dmformer.export.options import EngineOptions
from dmformer.progress import Progress, silent
from dmformer.runtimes import registry
from dmformer.runtimes.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence  # noqa: TC004 - only the names of types

    from torch import nn  # noqa: TC004 - as above

    from dmformer.models.checkpoint import Checkpoint  # noqa: TC004 - it imports torch, which a device has not
    from dmformer.runtimes.registry import RuntimeEntry

_LONGEST_S = 1800


@dataclass(frozen=True)
class ConversionSource:
    """What a converter may start from.

    Attributes:
        onnx: the verified ONNX file at the wanted precision.
        precision: its name.
        checkpoint: where it came from; ``None`` on a device, which has the ONNX file alone.
        engine: for formats that are compiled.
        stage: told about each step, by a converter that takes long.
        float32: the verified ONNX file in float32, for converters that reduce it themselves; ``None`` where there is
            none, as on a device whose bundle has it not.
        kept_in_fp32: blocks or nodes that stay in float32.
        form: makes the network in the form that was traced; ``None`` on a device.
    """

    onnx: Path
    precision: str
    checkpoint: Checkpoint | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    stage: Progress = silent
    float32: Path | None = None
    kept_in_fp32: tuple[str, ...] = ()
    form: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class Converted:
    """What a converter wrote.

    Attributes:
        files: with the one to load first.
        built_with: packages that made them, with their versions.
        target: what they are tied to, where they are compiled.
        engine_batch: rows that the engine takes at once; ``None`` is any number.
    """

    files: tuple[Path, ...]
    built_with: dict[str, str]
    target: Target | None = None
    engine_batch: int | None = None


@dataclass(frozen=True)
class Converter:
    """How one format is made.

    Attributes:
        function: ``module:function`` that makes it: source and an existing, empty folder in, files out.
        check: ``module:function`` that makes sure that what ``function`` needs is on this machine, besides the runtime.
        compiled: whether it is compiled for one machine, on machines that need not be able to run it; what is not is
            verified in its runtime, which has to be there.
        from_onnx: whether the ONNX file is enough to make it, as on a device; what is not comes with an export.
        open_size: whether it can be made for images of any height and width.
    """

    function: str
    check: str | None = None
    compiled: bool = False
    from_onnx: bool = True
    open_size: bool = True


CONVERTERS = {
    "torch": Converter("dmformer.export.formats:to_torch", from_onnx=False),
    "onnx": Converter("dmformer.export.formats:to_onnx"),
    "openvino": Converter("dmformer.export.formats.openvino:to_openvino"),
    "tensorrt": Converter(
        "dmformer.export.formats.tensorrt:to_tensorrt",
        check="dmformer.export.formats.tensorrt:check_buildable",
        compiled=True,
        open_size=False,
    ),
    "ncnn": Converter("dmformer.export.formats.ncnn:to_ncnn", check="dmformer.export.formats.ncnn:check_pnnx"),
    "litert": Converter(
        "dmformer.export.formats.litert:to_litert",
        check="dmformer.export.formats.litert:check_converter",
        from_onnx=False,
        open_size=False,
    ),
}


def _function(named: str) -> Callable[..., Any]:
    module, _, name = named.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def convert(row: RuntimeEntry, source: ConversionSource, folder: Path) -> Converted:
    """Make the files of a format in an existing, empty folder.

    Raises:
        StageFailed: the converter failed.
        UnavailableError: a package that it needs is not installed, or this machine cannot make the format.
    """
    converted: Converted = _function(CONVERTERS[row.format].function)(source, folder)
    return converted


def is_compiled(row: RuntimeEntry) -> bool:
    """Whether a format is compiled for one machine, on machines that need not be able to run it."""
    return CONVERTERS[row.format].compiled


def is_from_onnx(row: RuntimeEntry) -> bool:
    """Whether the ONNX file is all that a format is made from."""
    return CONVERTERS[row.format].from_onnx


def check_convertible(row: RuntimeEntry, engine: EngineOptions) -> None:
    """Make sure that a format can be made on this machine; nothing is made.

    Raises:
        UnavailableError: it cannot, or what was made could not be checked.
    """
    converter = CONVERTERS[row.format]
    if not converter.compiled:
        registry.available_adapter(row)  # what is made is verified in its runtime
    if converter.check is not None:
        _function(converter.check)(engine)


def check_size(row: RuntimeEntry, open_size: bool) -> None:
    """Make sure that a format can be had at an open height and width.

    Raises:
        UsageError: its files are made for one size.
    """
    if open_size and not CONVERTERS[row.format].open_size:
        raise UsageError(
            f"format {row.format} with open height and width, where its files have a fixed one; expected an export "
            "without `open_size`"
        )


def check_from_onnx(row: RuntimeEntry) -> None:
    """Make sure that a format can be made from an ONNX file, as on a device.

    Raises:
        UsageError: it comes with an export.
    """
    if row.format == "onnx" or not is_from_onnx(row):
        raise UsageError(f"format {row.format} comes with an export; expected one that is built from ONNX")


def run_converter(title: str, command: Sequence[str], folder: str, written: Path) -> None:
    """Run another program that converts, without this one's path of packages.

    Args:
        title: of the format.
        command: the program and its arguments.
        folder: to run it in.
        written: a file that it writes where it succeeds.

    Raises:
        StageFailed: it could not be started, failed, wrote nothing, or took longer than half an hour.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LONGEST_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StageFailed(f"conversion to {title} failed: {first_line(error)}") from error
    if done.returncode or not written.is_file():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["it said nothing"]
        raise StageFailed(
            f"conversion to {title} failed: {Path(command[0]).name} ended with {done.returncode}: {lines[-1]}"
        )


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of distributions."""
    return {package: importlib.metadata.version(package) for package in packages}


def to_onnx(source: ConversionSource, folder: Path) -> Converted:
    """The verified ONNX file itself."""
    path = folder / "model.onnx"
    shutil.copyfile(source.onnx, path)
    return Converted((path,), versions("torch", "onnx", "onnxsim"))


def to_torch(source: ConversionSource, folder: Path) -> Converted:
    """The checkpoint as ``.safetensors``, for the reference runtime."""
    from dmformer.models.checkpoint import save_checkpoint

    if source.checkpoint is None:
        raise UsageError("format torch is made from a checkpoint; expected: dmformer export --format torch")
    path = folder / "model.safetensors"
    save_checkpoint(path, source.checkpoint)
    return Converted((path,), versions("torch", "safetensors"))
