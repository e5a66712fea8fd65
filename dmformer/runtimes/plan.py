"""The header of a TensorRT-RTX plan, read without the engine.

As observed in plans of TensorRT-RTX 1.7, not documented: ``vtrt`` at byte 0, the size of the file as little-endian u64
at 16, four bytes of the version at 24, and at 32 a u32 in which each bit stands for a compute capability. A plan that
does not start so (TensorRT 10 and 11) tells nothing. The manifest is the authority; the header is a second opinion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.runtimes.target import Target

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
