"""In which types a model's compute layers really ran: what an engine says of itself, against what was promised.

Engines convert quietly: a graph typed float16 or int8 may run in float32 where a kernel or the processor lacks the
type. So precision is read back from the loaded model, never taken from the file's name.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# Names of types, as engines write them, in ours; any other stays as it is.
_PRECISIONS = {
    **dict.fromkeys(("float", "float32", "f32"), "fp32"),
    **dict.fromkeys(("float16", "f16", "half"), "fp16"),
    **dict.fromkeys(("int8", "uint8", "i8", "u8"), "int8"),
}
_COMPUTING = ("conv", "gemm", "matmul", "fullyconnected")


def is_compute(operator: str) -> bool:
    """Whether an operator, by an engine's name for it, is a convolution or a matrix product of some kind."""
    name = operator.lower()
    return "convert" not in name and any(part in name for part in _COMPUTING)  # a cast in OpenVINO's words


def precision_of(type_name: str) -> str:
    """Our name of a type."""
    return _PRECISIONS.get(type_name.lower(), type_name)


def describe(layers: Mapping[str, int]) -> str:
    """``101 int8, 96 fp32``, most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in sorted(layers.items(), key=lambda item: -item[1]))


def shortfall(layers: Mapping[str, int], precision: str, promised: float) -> str | None:
    """Why layers do not keep a promise; ``None`` if they do.

    Args:
        layers: how many ran in each type.
        precision: the one promised.
        promised: least share of the layers that must run in it, 0..1.
    """
    total = sum(layers.values())
    if not total:
        return "the engine shows no compute layer"
    share = layers.get(precision, 0) / total
    # Half a layer of tolerance: engines count a classifier or drop a copy as they like.
    if share + 0.5 / total >= promised:
        return None
    return f"{precision} in {share:.0%} of {total} compute layers ({describe(layers)}); promised {promised:.0%}"


def module_path(scoped: str) -> str:
    """``/stages.2/blocks/blocks.0/dma/mix/Conv_output_0`` -> ``stages.2.blocks.0.dma.mix``.

    The exporter names an element of a sequence after the sequence as well, which is left out.
    """
    *scopes, _ = scoped.strip("/").split("/")
    pairs = itertools.pairwise([*scopes, ""])
    return ".".join(
        scope
        for scope, following in pairs
        if not (following.startswith(f"{scope}.") and following[len(scope) + 1 :].isdecimal())
    )
