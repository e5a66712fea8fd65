"""Looking inside a loaded model: in which types its layers run, where its time goes, what its inner tensors are called.

Engines convert quietly: a graph typed float16 or int8 may run in float32 where a kernel or the processor lacks the
type. So precision is read back from the loaded model, never taken from the file's name.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dmformer.runtimes.base import Arrays, Runtime

# Names of types, as engines write them, in ours; any other stays as it is.
_PRECISIONS = {
    **dict.fromkeys(("float", "float32", "f32"), "fp32"),
    **dict.fromkeys(("float16", "f16", "half"), "fp16"),
    **dict.fromkeys(("int8", "uint8", "i8", "u8"), "int8"),
}
_COMPUTING = ("conv", "gemm", "matmul", "fullyconnected")


@dataclass(frozen=True)
class Kernel:
    """One step of an inference, as the engine runs it: after fusion, with the layout changes that it put in.

    Attributes:
        name: in the engine's words; that of the ONNX node it came from where the engine keeps it.
        operator: in the engine's words.
        ns: nanoseconds that it took, one for each inference.
    """

    name: str
    operator: str
    ns: tuple[int, ...]


class Inspector(ABC):
    """Shows the inside of one open runtime; legal as long as that is open. :meth:`Runtime.inspect` makes it."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def layers(self) -> dict[str, int]:
        """Count the compute layers of the loaded model by the precision in which they run, as the engine shows it.

        May take as long as loading.

        Raises:
            StageFailed: the engine failed.
        """
        with self.runtime.engine_errors("showing the layers of"):
            return self.read_layers()

    @abstractmethod
    def read_layers(self) -> dict[str, int]:
        """Do the work of :meth:`layers`, with the engine's own errors."""

    def kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Time each kernel by the engine's own profiler, in the order in which kernels ran.

        May load the model once more, because profilers slow down what they watch.

        Args:
            feeds: what :meth:`Runtime.run` takes, one for each inference.

        Raises:
            UsageError: a feed is not what the runtime takes.
            StageFailed: the engine failed.
        """
        for feed in feeds:
            self.runtime.check_inputs(feed)
        with self.runtime.engine_errors("profiling"):
            return self.read_kernels(feeds)

    @abstractmethod
    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Do the work of :meth:`kernels` on checked feeds, with the engine's own errors."""

    def inner_tensors(self) -> frozenset[str]:
        """Return the names that a runtime's ``taps`` may hold; empty where the engine shows no inner tensors."""
        return frozenset()


def is_compute(operator: str) -> bool:
    """Return whether an operator, by an engine's name for it, is a convolution or a matrix product of some kind."""
    name = operator.lower()
    return "convert" not in name and any(part in name for part in _COMPUTING)  # a cast in OpenVINO's words


def precision_of(type_name: str) -> str:
    """Return our name of an engine's type."""
    return _PRECISIONS.get(type_name.lower(), type_name)


def describe_layers(layers: Mapping[str, int]) -> str:
    """Write counts of layers as ``101 int8, 96 fp32``, most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in sorted(layers.items(), key=lambda item: -item[1]))


def shortfall(layers: Mapping[str, int], precision: str, promised: float) -> str | None:
    """Return why layers do not keep a promise; ``None`` if they do.

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
    return f"{precision} in {share:.0%} of {total} compute layers ({describe_layers(layers)}); promised {promised:.0%}"


def module_path(scoped: str) -> str:
    """Turn ``/stages.2/blocks/blocks.0/dma/mix/Conv_output_0`` into ``stages.2.blocks.0.dma.mix``.

    The exporter names an element of a sequence after the sequence as well, which is left out.
    """
    *scopes, _ = scoped.strip("/").split("/")
    pairs = itertools.pairwise([*scopes, ""])
    return ".".join(
        scope
        for scope, following in pairs
        if not (following.startswith(f"{scope}.") and following[len(scope) + 1 :].isdecimal())
    )
