"""What this machine can run, and why not."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dmformer.bundle.select import caveat, preferred, saturation
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


class Finding(Struct, frozen=True, kw_only=True):
    """A runtime or package: usable, or why not and what to do.

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


class ArtifactFinding(Struct, frozen=True, kw_only=True):
    """A format at a precision that the bundle has, or that could be built from its ONNX.

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


class Diagnosis(Struct, frozen=True, kw_only=True):
    """Everything ``doctor`` found."""

    machine: dict[str, Any]
    runtimes: tuple[Finding, ...]
    tools: tuple[Finding, ...]
    artifacts: tuple[ArtifactFinding, ...] = ()


CannotBuild = Callable[[registry.RuntimeEntry, str], "str | None"]


def diagnose(bundle: Bundle | None = None, cannot_build: CannotBuild | None = None) -> Diagnosis:
    """Look at the machine, and at a bundle's artifacts; no artifact is loaded, nor an engine whose files are whole.

    Args:
        bundle: to look at.
        cannot_build: why a format at a precision cannot be built here from the bundle.
    """
    seen = {row.name: registry.support(row).quick_probe() for row in registry.ENTRIES}
    runtimes = tuple(
        Finding(
            name=name,
            available=status.available,
            version=status.version,
            reason=status.reason,
            untried=status.untried,
        )
        for name, status in seen.items()
    )
    artifacts = _artifacts(bundle, seen, cannot_build or (lambda *_: "not looked at")) if bundle is not None else ()
    tools = tuple(_tool(name, extra) for name, extra in _TOOLS.items())
    return Diagnosis(machine=describe_machine(), runtimes=runtimes, tools=tools, artifacts=artifacts)


def _tool(name: str, extra: str) -> Finding:
    try:
        return Finding(name=name, available=True, version=metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name=name, available=False, reason=f"not installed; run: pip install 'dmformer[{extra}]'")


def _artifacts(
    bundle: Bundle, seen: Mapping[str, Availability], cannot_build: CannotBuild
) -> tuple[ArtifactFinding, ...]:
    memory = available_memory()
    found: list[ArtifactFinding] = []

    def not_built(row: registry.RuntimeEntry, precision: str) -> str | None:
        if not seen[row.name].available:  # it is built with its own engine, and for this machine
            return seen[row.name].reason
        return cannot_build(row, precision)

    taken = preferred(bundle.manifest.artifacts, lambda row, artifact: _unfit(artifact, row, seen))
    chosen = None if taken is None else taken[1]
    for artifact in bundle.manifest.artifacts:
        row = registry.reader_of(artifact.format)
        unfit = _unfit(artifact, row, seen)
        if unfit is None and memory is not None and artifact.bytes > memory:
            unfit = f"its files have {artifact.bytes / 1e6:.0f} MB; {memory / 1e6:.0f} MB of memory are available"
        runs = unfit is None
        cannot = None if row is None or runs else not_built(row, artifact.precision)
        found.append(
            ArtifactFinding(
                format=artifact.format,
                precision=artifact.precision,
                runtime=row.name if row else None,
                held=True,
                runs=runs,
                reason=unfit or (_to_know(artifact, row, seen) if row else None),
                buildable=row is not None and not runs and cannot is None,
                not_buildable=cannot,
                chosen=artifact is chosen,
            )
        )
    held = {(finding.format, finding.precision) for finding in found}
    full_range = {artifact.precision: artifact.full_range for artifact in bundle.manifest.artifacts}
    for row in registry.ENTRIES:
        for precision, full in full_range.items():
            able = (row.format, precision) not in held and precision in registry.support(row).precisions
            if able and not_built(row, precision) is None:
                found.append(
                    ArtifactFinding(
                        format=row.format,
                        precision=precision,
                        runtime=row.name,
                        held=False,
                        runs=False,
                        reason=saturation(row, full),
                        buildable=True,
                    )
                )
    return tuple(found)


def _unfit(artifact: Artifact, row: registry.RuntimeEntry | None, seen: Mapping[str, Availability]) -> str | None:
    """Why an artifact does not run here."""
    if row is None:
        return "this version of dmformer has no runtime for it"
    if not seen[row.name].available:
        return seen[row.name].reason
    return registry.support(row).cannot_load(artifact.target)


def _to_know(artifact: Artifact, row: registry.RuntimeEntry, seen: Mapping[str, Availability]) -> str | None:
    """What is to be known of an artifact that runs: another precision, or an engine older than the one that made it."""
    built, here = artifact.built_with.get(row.name), seen[row.name].version
    found = caveat(row, artifact)
    if built and here and _numbers(here) < _numbers(built):
        older = f"made with {row.name} {built}; here is {here}, and older versions may not read what newer ones write"
        return f"{older}; {found}" if found else older
    return found


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]
