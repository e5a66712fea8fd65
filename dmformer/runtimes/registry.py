"""The table of runtimes. A new runtime is a new row; see CONTRIBUTING.md."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmformer.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from dmformer.runtimes.base import Runtime


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
    RuntimeEntry(
        name="torch",
        aliases=("pytorch",),
        adapter="dmformer.runtimes.torch:TorchRuntime",
        format="torch",
        extra="export",
    ),
    RuntimeEntry(
        name="onnxruntime",
        aliases=("ort",),
        adapter="dmformer.runtimes.onnxruntime:OnnxRuntime",
        format="onnx",
        extra="onnxruntime",
    ),
    RuntimeEntry(
        name="openvino",
        aliases=("ov",),
        adapter="dmformer.runtimes.openvino:OpenVinoRuntime",
        format="openvino",
        extra="openvino",
    ),
    RuntimeEntry(
        name="tensorrt",
        aliases=("trt",),
        adapter="dmformer.runtimes.tensorrt:TensorRtRuntime",
        format="tensorrt",
        extra="tensorrt",
    ),
)


def entry(name: str) -> RuntimeEntry:
    """The row of a runtime, by its name or an alias.

    Raises:
        UsageError: no such runtime.
    """
    for row in ENTRIES:
        if name.lower() in (row.name, *row.aliases):
            return row
    raise UsageError(f"unknown runtime {name!r}; expected one of {_choices('name')}")


def entry_of_format(name: str) -> RuntimeEntry:
    """The row of a format, by its name or an alias.

    Raises:
        UsageError: no such format.
    """
    for row in ENTRIES:
        if name.lower() in (row.format, row.name, *row.aliases):
            return row
    raise UsageError(f"unknown format {name!r}; expected one of {_choices('format')}")


def reader_of(format_name: str) -> RuntimeEntry | None:
    """The row that reads a manifest's format; ``None`` for a format that this version does not know."""
    return next((row for row in ENTRIES if row.format == format_name), None)


def adapter(row: RuntimeEntry) -> type[Runtime]:
    """The adapter's class; imports its module, not the engine."""
    module, _, name = row.adapter.partition(":")
    found: type[Runtime] = getattr(importlib.import_module(module), name)
    return found


def available_adapter(row: RuntimeEntry) -> type[Runtime]:
    """The adapter's class, once its engine has been seen to load.

    Raises:
        UnavailableError: it cannot run on this machine; the message says why and what can.
    """
    kind = adapter(row)
    status = kind.probe()
    if not status.available:
        others = [other.name for other in ENTRIES if other is not row and adapter(other).probe().available]
        can = f"; what can run here: {', '.join(others)}" if others else ""
        raise UnavailableError(f"runtime {row.name} cannot run on this machine: {status.reason}{can}")
    return kind


def _choices(attribute: str) -> str:
    return ", ".join(f"{getattr(row, attribute)} ({', '.join(row.aliases)})" for row in ENTRIES)
