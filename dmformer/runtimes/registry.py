"""The one table of runtimes. A new runtime is a new row; see CONTRIBUTING.md."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmformer.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.files import OpenFile
    from dmformer.runtimes.base import Runtime
    from dmformer.runtimes.support import Support
    from dmformer.runtimes.target import Target


@dataclass(frozen=True)
class RuntimeEntry:
    """One runtime and the format that it reads.

    Attributes:
        name: canonical name of the runtime.
        aliases: other names that users may type, for the runtime and for its format.
        adapter: ``module:Class`` of the runtime.
        format: canonical name of the format.
        extra: the extra of this distribution that installs the engine.
    """

    name: str
    aliases: tuple[str, ...]
    adapter: str
    format: str
    extra: str


ENTRIES = (
    RuntimeEntry("torch", ("pytorch",), "dmformer.runtimes.torch:TorchRuntime", "torch", extra="export"),
    RuntimeEntry("onnxruntime", ("ort",), "dmformer.runtimes.onnxruntime:OnnxRuntime", "onnx", extra="onnxruntime"),
    RuntimeEntry("openvino", ("ov",), "dmformer.runtimes.openvino:OpenVinoRuntime", "openvino", extra="openvino"),
    RuntimeEntry("tensorrt", ("trt",), "dmformer.runtimes.tensorrt:TensorRtRuntime", "tensorrt", extra="tensorrt"),
    RuntimeEntry("ncnn", (), "dmformer.runtimes.ncnn:NcnnRuntime", "ncnn", extra="ncnn"),
    RuntimeEntry("litert", ("tflite",), "dmformer.runtimes.litert:LiteRtRuntime", "litert", extra="litert"),
)


def entry(name: str) -> RuntimeEntry:
    """Return the row of a runtime, by its name or an alias.

    Raises:
        UsageError: no such runtime.
    """
    for row in ENTRIES:
        if name.lower() in (row.name, *row.aliases):
            return row
    raise UsageError(f"unknown runtime {name!r}; expected one of {_choices('name')}")


def entry_of_format(name: str) -> RuntimeEntry:
    """Return the row of a format, by its name or an alias.

    Raises:
        UsageError: no such format.
    """
    for row in ENTRIES:
        if name.lower() in (row.format, row.name, *row.aliases):
            return row
    raise UsageError(f"unknown format {name!r}; expected one of {_choices('format')}")


def reader_of(format_name: str) -> RuntimeEntry | None:
    """Return the row that reads a manifest's format; ``None`` for a format that this version does not know."""
    return next((row for row in ENTRIES if row.format == format_name), None)


def adapter(row: RuntimeEntry) -> type[Runtime]:
    """Return the adapter's class; imports its module, not the engine."""
    module, _, name = row.adapter.partition(":")
    found: type[Runtime] = getattr(importlib.import_module(module), name)
    return found


def support(row: RuntimeEntry) -> Support:
    """Return what tells what the runtime can do on this machine."""
    return adapter(row).support


def inspect_artifact(format_name: str, files: Sequence[OpenFile], target: Target | None = None) -> None:
    """Look into the files of an artifact before an engine or a server does.

    Args:
        format_name: of the artifact; one that no runtime of this version reads is not looked into.
        files: all of an artifact, the one to load first.
        target: what the artifact is tied to, where it is compiled.

    Raises:
        CheckFailed: a file leads to one that is not among them, or contradicts the target.
        UsageError: a file is of another format, or damaged.
    """
    row = reader_of(format_name)
    if row is not None:
        support(row).inspect_files(files, target)


def available_adapter(row: RuntimeEntry) -> type[Runtime]:
    """Return the adapter's class, once its engine has been seen to load.

    Raises:
        UnavailableError: it cannot run on this machine; the message says why and what can.
    """
    status = support(row).probe()
    if not status.available:
        others = [other.name for other in ENTRIES if other is not row and support(other).probe().available]
        can = f"; what can run here: {', '.join(others)}" if others else ""
        raise UnavailableError(f"runtime {row.name} cannot run on this machine: {status.reason}{can}")
    return adapter(row)


def _choices(attribute: str) -> str:
    return ", ".join(" ".join([getattr(row, attribute), *_in_brackets(row.aliases)]) for row in ENTRIES)


def _in_brackets(names: tuple[str, ...]) -> list[str]:
    return [f"({', '.join(names)})"] if names else []
