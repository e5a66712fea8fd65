"""What this machine can run, and why not."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dmformer.bundle.select import cannot_run
from dmformer.machine import describe_machine
from dmformer.runtimes import registry

if TYPE_CHECKING:
    from dmformer.bundle.reader import Bundle

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
    """A runtime or package: usable, or why not and what to do."""

    name: str
    available: bool
    version: str | None = None
    reason: str | None = None


class ArtifactFinding(Struct, frozen=True, kw_only=True):
    """An artifact: whether it runs here; the reason says why not, or in what else than its precision."""

    format: str
    precision: str
    runtime: str | None
    runs: bool
    reason: str | None = None


class Diagnosis(Struct, frozen=True, kw_only=True):
    """Everything ``doctor`` found."""

    machine: dict[str, Any]
    runtimes: tuple[Finding, ...]
    tools: tuple[Finding, ...]
    artifacts: tuple[ArtifactFinding, ...] = ()


def diagnose(bundle: Bundle | None = None) -> Diagnosis:
    """Look at the machine, and at a bundle's artifacts; nothing is loaded but the engines' own modules."""
    runtimes = []
    for row in registry.ENTRIES:
        status = registry.adapter(row).probe()
        runtimes.append(
            Finding(name=row.name, available=status.available, version=status.version, reason=status.reason)
        )
    artifacts = _artifacts(bundle) if bundle is not None else ()
    tools = tuple(_tool(name, extra) for name, extra in _TOOLS.items())
    return Diagnosis(machine=describe_machine(), runtimes=tuple(runtimes), tools=tools, artifacts=artifacts)


def _tool(name: str, extra: str) -> Finding:
    try:
        return Finding(name=name, available=True, version=metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name=name, available=False, reason=f"not installed; run: pip install 'dmformer[{extra}]'")


def _artifacts(bundle: Bundle) -> tuple[ArtifactFinding, ...]:
    found = []
    for artifact in bundle.manifest.artifacts:
        row = registry.reader_of(artifact.format)
        unfit = cannot_run(row, artifact) if row else "this version of dmformer has no runtime for it"
        instead = registry.adapter(row).cannot_compute(artifact.precision) if row and unfit is None else None
        found.append(
            ArtifactFinding(
                format=artifact.format,
                precision=artifact.precision,
                runtime=row.name if row else None,
                runs=unfit is None,
                reason=unfit or instead,
            )
        )
    return tuple(found)
