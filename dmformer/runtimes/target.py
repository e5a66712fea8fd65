"""What a compiled engine is tied to: the part of a manifest that decides whether it may be loaded here."""

from __future__ import annotations

import platform
import re
from typing import Annotated, Literal

from msgspec import Meta, Struct

from dmformer.errors import UsageError

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
