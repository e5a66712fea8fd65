"""What a compiled engine is tied to: the part of a manifest that decides whether it may be loaded here.

The header of a TensorRT-RTX plan, read without the engine.

As observed in plans of TensorRT-RTX 1.7, not documented: ``vtrt`` at byte 0, the size of the file as little-endian u64
at 16, four bytes of the version at 24, and at 32 a u32 in which each bit stands for a compute capability. A plan that
does not start so (TensorRT 10 and 11) tells nothing. The manifest is the authority; the header is a second opinion.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct

from dmformer.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


ComputeCapability = Annotated[str, Meta(pattern=r"^[0-9]{1,2}\.[0-9]$")]


class Target(Struct, frozen=True, kw_only=True):
    """Where an engine runs, and how it was built.

    Attributes:
        flavour: ``tensorrt`` (TensorRT 10 or 11) or ``rtx`` (TensorRT-RTX).
        version: of the package that built it, and that alone can load it.
        compute_capabilities: of the GPUs that it runs on, like ``8.9``.
        platform: operating system and processor, like ``linux-x86_64``.
        gpu: name of the GPU that it was built on; ``null`` where it was built ahead of time, without one.
        min_batch: smallest batch that it takes.
        opt_batch: the batch that it is tuned for.
        max_batch: largest batch that it takes.
        workspace_mb: most GPU memory that one layer may use besides its tensors, in MiB; ``null`` is no bound.
        build_s: seconds that the build took.
        onnx_sha256: of the ONNX file that it was built from.
    """

    flavour: Literal["tensorrt", "rtx"]
    version: str
    compute_capabilities: Annotated[tuple[ComputeCapability, ...], Meta(min_length=1)]
    platform: str
    gpu: str | None
    min_batch: Annotated[int, Meta(ge=1)]
    opt_batch: Annotated[int, Meta(ge=1)]
    max_batch: Annotated[int, Meta(ge=1)]
    workspace_mb: int | None
    build_s: float
    onnx_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

    def __post_init__(self) -> None:
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise UsageError(
                f"batches {self.min_batch}, {self.opt_batch}, {self.max_batch} in the manifest; expected order"
            )


def this_platform() -> str:
    """Operating system and processor of this machine, as a target has them."""
    return f"{platform.system()}-{platform.machine()}".lower()


def compute_capability(name: str) -> str:
    """``sm89``, ``SM_89``, ``8.9`` or ``89`` -> ``8.9``.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", name.strip().lower())
    if found is None:
        raise UsageError(f"target {name!r}; expected a compute capability, for instance sm89")
    return f"{int(found[1])}.{found[2]}"


_MAGIC = b"vtrt"
_LENGTH = 36
_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # by bit


@dataclass(frozen=True)
class Header:
    """What a plan says of itself."""

    bytes: int
    version: str
    compute_capabilities: tuple[str, ...]


def read_header(path: Path) -> Header | None:
    """The header; ``None`` where the file has none of this kind."""
    with path.open("rb") as file:
        data = file.read(_LENGTH)
    if len(data) < _LENGTH or not data.startswith(_MAGIC):
        return None
    mask = int.from_bytes(data[32:36], "little")
    return Header(
        bytes=int.from_bytes(data[16:24], "little"),
        version=".".join(str(part) for part in data[24:28]),
        compute_capabilities=tuple(name for bit, name in enumerate(_CAPABILITIES) if mask >> bit & 1),
    )


def contradiction(path: Path, target: Target) -> str | None:
    """In what a plan's header contradicts the manifest; ``None`` where it does not, or says nothing."""
    header = read_header(path)
    if header is None:
        return "the plan does not start as one of TensorRT-RTX does" if target.flavour == "rtx" else None
    size = path.stat().st_size
    if header.bytes != size:
        return f"the plan says that it has {header.bytes} bytes; it has {size}"
    if target.flavour != "rtx":
        return f"the plan is one of TensorRT-RTX; the manifest says {target.flavour}"
    # A version like 1.7.1.116 may have more digits in its package than its last byte holds.
    if header.version.split(".")[:3] != target.version.split(".")[:3]:
        return f"the plan says version {header.version}; the manifest says {target.version}"
    if set(header.compute_capabilities) != set(target.compute_capabilities):
        return (
            f"the plan says compute capabilities {', '.join(header.compute_capabilities)}; "
            f"the manifest says {', '.join(target.compute_capabilities)}"
        )
    return None
