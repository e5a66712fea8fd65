"""Examine a machine: which runtimes and artifacts it can run, which it cannot, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dmformer.bundle.select import caveat, first_runnable, saturation_risk
from dmformer.machine import available_memory, describe_machine
from dmformer.runtimes import registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dmformer.bundle.manifest import Artifact
    from dmformer.bundle.reader import Bundle
    from dmformer.runtimes.support import Availability

# Distributions that no runtime stands for, and the extra that installs each.
_TOOLS = {
    "onnx": "export",
    "onnxsim": "export",
    "safetensors": "export",
    "scikit-learn": "train",
    "tensorrt-rtx": "tensorrt",
    "cuda-bindings": "tensorrt",
    "cryptography": "signing",
}


class Component(Struct, frozen=True, kw_only=True):
    """A runtime or a package on this machine: usable, or why not and what to do.

    Attributes:
        name: of the runtime, or of the package.
        available: whether it can be used here.
        version: installed.
        reason: why it cannot be used.
        untried: what was taken on trust; ``null`` where a runtime was tried, and for packages, which are not.
    """

    name: str
    available: bool
    version: str | None = None
    reason: str | None = None
    untried: str | None = None


class ArtifactStatus(Struct, frozen=True, kw_only=True):
    """What this machine can do with a format at a precision that a bundle has, or that can be built from its ONNX.

    Attributes:
        format: canonical name.
        precision: canonical name.
        runtime: what reads it; ``null`` where this version knows none.
        held: whether the bundle has it.
        runs: whether it runs here, as it is.
        reason: why not, or what is to be known where it does.
        buildable: whether it can be built here.
        not_buildable: why not.
        chosen: whether ``--runtime auto`` takes it.
    """

    format: str
    precision: str
    runtime: str | None
    held: bool
    runs: bool
    reason: str | None = None
    buildable: bool = False
    not_buildable: str | None = None
    chosen: bool = False


class MachineReport(Struct, frozen=True, kw_only=True):
    """What ``doctor`` writes as JSON: the machine, its runtimes and packages, and a bundle's artifacts on it."""

    machine: dict[str, Any]
    runtimes: tuple[Component, ...]
    tools: tuple[Component, ...]
    artifacts: tuple[ArtifactStatus, ...] = ()


CannotBuild = Callable[[registry.RuntimeEntry, str], "str | None"]


def examine_machine(bundle: Bundle | None = None, cannot_build: CannotBuild | None = None) -> MachineReport:
    """Examine the machine, and a bundle's artifacts on it; neither an artifact nor an undamaged engine is loaded.

    Args:
        bundle: whose artifacts are examined.
        cannot_build: says why a format at a precision cannot be built here from the bundle.
    """
    statuses = {row.name: registry.support(row).quick_probe() for row in registry.ENTRIES}
    runtimes = tuple(
        Component(
            name=name,
            available=status.available,
            version=status.version,
            reason=status.reason,
            untried=status.untried,
        )
        for name, status in statuses.items()
    )
    artifacts = _artifacts(bundle, statuses, cannot_build or (lambda *_: "not looked at")) if bundle is not None else ()
    tools = tuple(_tool(name, extra) for name, extra in _TOOLS.items())
    return MachineReport(machine=describe_machine(), runtimes=runtimes, tools=tools, artifacts=artifacts)


def _tool(name: str, extra: str) -> Component:
    try:
        return Component(name=name, available=True, version=metadata.version(name))
    except metadata.PackageNotFoundError:
        return Component(name=name, available=False, reason=f"not installed; run: pip install 'dmformer[{extra}]'")


def _artifacts(
    bundle: Bundle, statuses: Mapping[str, Availability], cannot_build: CannotBuild
) -> tuple[ArtifactStatus, ...]:
    memory = available_memory()
    examined: list[ArtifactStatus] = []

    def not_built(row: registry.RuntimeEntry, precision: str) -> str | None:
        if not statuses[row.name].available:  # it is built with its own engine, and for this machine
            return statuses[row.name].reason
        return cannot_build(row, precision)

    first = first_runnable(bundle.manifest.artifacts, lambda row, artifact: _unfit(artifact, row, statuses))
    chosen = None if first is None else first[1]
    for artifact in bundle.manifest.artifacts:
        row = registry.reader_of(artifact.format)
        unfit = _unfit(artifact, row, statuses)
        if unfit is None and memory is not None and artifact.bytes > memory:
            unfit = f"its files have {artifact.bytes / 1e6:.0f} MB; {memory / 1e6:.0f} MB of memory are available"
        runs = unfit is None
        cannot = None if row is None or runs else not_built(row, artifact.precision)
        examined.append(
            ArtifactStatus(
                format=artifact.format,
                precision=artifact.precision,
                runtime=row.name if row else None,
                held=True,
                runs=runs,
                reason=unfit or (_caveats(artifact, row, statuses) if row else None),
                buildable=row is not None and not runs and cannot is None,
                not_buildable=cannot,
                chosen=artifact is chosen,
            )
        )
    held = {(artifact.format, artifact.precision) for artifact in bundle.manifest.artifacts}
    full_range = {artifact.precision: artifact.full_range for artifact in bundle.manifest.artifacts}
    for row in registry.ENTRIES:
        for precision, full in full_range.items():
            able = (row.format, precision) not in held and precision in registry.support(row).precisions
            if able and not_built(row, precision) is None:
                examined.append(
                    ArtifactStatus(
                        format=row.format,
                        precision=precision,
                        runtime=row.name,
                        held=False,
                        runs=False,
                        reason=saturation_risk(row, full),
                        buildable=True,
                    )
                )
    return tuple(examined)


def _unfit(artifact: Artifact, row: registry.RuntimeEntry | None, statuses: Mapping[str, Availability]) -> str | None:
    """Say why an artifact does not run here; ``None`` where it does."""
    if row is None:
        return "this version of dmformer has no runtime for it"
    if not statuses[row.name].available:
        return statuses[row.name].reason
    return registry.support(row).cannot_load(artifact.target)


def _caveats(artifact: Artifact, row: registry.RuntimeEntry, statuses: Mapping[str, Availability]) -> str | None:
    """Say what a user should know of an artifact that runs: its :func:`caveat`, or that a newer engine made it."""
    built, here = artifact.built_with.get(row.name), statuses[row.name].version
    other = caveat(row, artifact)
    if built and here and _numbers(here) < _numbers(built):
        older = f"made with {row.name} {built}; here is {here}, and older versions may not read what newer ones write"
        return f"{older}; {other}" if other else older
    return other


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]
