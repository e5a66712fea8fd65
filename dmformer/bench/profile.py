"""Where the time of an inference goes: by operator, by module of the network, and what is lost between the products."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from dmformer.bench.measure import batches
from dmformer.bench.plan import TimingOrder  # noqa: TC001 - the process reads its order by it
from dmformer.runtimes.inspector import is_compute, module_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dmformer.runtimes.base import Runtime
    from dmformer.runtimes.inspector import Kernel

CALLS = 20
_WARM_UP_CALLS = 5
OUTSIDE = "outside the stages"
_LAYOUT = ("reorder", "transpose", "reformat", "shuffle", "convert", "cast")
# Where the tensor does not change its place: what a kernel before or after could have done on the way.
_ELEMENTWISE = (
    "add", "mul", "sub", "div", "gelu", "erf", "relu", "sigmoid", "eltwise", "subgraph", "clip", "batchnorm",
    "layerscale", "quantize", "activation", "pointwise",
)  # fmt: skip


class Part(Struct, frozen=True, kw_only=True):
    """A module of the network: milliseconds of one inference, and of which parts (``dma``, ``ffn``, …) they consist."""

    ms: float
    parts: dict[str, float]


class Profile(Struct, frozen=True, kw_only=True):
    """Milliseconds of one inference, each the median over the profiled calls, by the engine's own profiler.

    Profilers slow small kernels down; shares are to be read, not sums.

    Attributes:
        calls: how many were profiled.
        kernels: how many steps an inference has after fusion.
        total_ms: of all kernels.
        operators: by the engine's name of the operator, largest first.
        modules: by stage of the network, in its order.
        layout_ms: of kernels that only move or convert values for another kernel.
        elementwise_ms: of sums, products and activations that were not fused into what comes before or after.
    """

    calls: int
    kernels: int
    total_ms: float
    operators: dict[str, float]
    modules: dict[str, Part]
    layout_ms: float
    elementwise_ms: float


def profile_configuration(order: TimingOrder) -> Profile:
    """Profile one configuration.

    Raises:
        CheckFailed: a file is not what the manifest says.
        StageFailed: the bundle is not the one that was meant, or the engine failed.
    """
    choice, row = order.choice(), order.configuration
    return profile_runtime(choice.runtime(row.threads), batches(order.inputs(choice.bundle), row.batch))


def profile_runtime(runtime: Runtime, inputs: Sequence[NDArray[np.float32]]) -> Profile:
    """Profile a runtime that is not open yet, on batches (N, C, H, W) in turns.

    Raises:
        StageFailed: the engine failed.
    """
    with runtime:
        name = runtime.inputs[0].name
        feeds = [{name: inputs[number % len(inputs)]} for number in range(_WARM_UP_CALLS + CALLS)]
        return summarise_kernels(runtime.inspect().kernels(feeds), CALLS)


def summarise_kernels(kernels: Sequence[Kernel], calls: int) -> Profile:
    """Sort kernels, in the order in which they ran, by operator and module; the last ``calls`` times of each count."""
    taken = [float(np.median(kernel.ns[-calls:])) / 1e6 for kernel in kernels]
    operators: defaultdict[str, float] = defaultdict(float)
    modules: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    layout = elementwise = 0.0
    for kernel, path, ms in zip(kernels, _paths(kernels), taken, strict=True):
        operators[kernel.operator] += ms
        stage, part = _place(path, kernel)
        modules[stage][part] += ms
        if _is(kernel, _LAYOUT):
            layout += ms
        elif _is(kernel, _ELEMENTWISE) and not is_compute(kernel.operator):
            elementwise += ms
    return Profile(
        calls=calls,
        kernels=len(kernels),
        total_ms=sum(taken),
        operators=_largest_first(operators),
        modules={
            stage: Part(ms=sum(parts.values()), parts=_largest_first(parts))
            for stage, parts in sorted(modules.items(), key=lambda item: _order(item[0]))
        },
        layout_ms=layout,
        elementwise_ms=elementwise,
    )


def _is(kernel: Kernel, words: Sequence[str]) -> bool:
    return any(word in kernel.operator.lower() for word in words)


def _paths(kernels: Sequence[Kernel]) -> list[str]:
    """The module of each kernel. A layout change has none of its own: it belongs to the kernel that it is made for.

    That is the next one; for onnxruntime's ReorderOutput the one before.
    """
    paths = ["" if _is(kernel, _LAYOUT) else kernel_module(kernel.name) for kernel in kernels]
    places = range(len(kernels))
    own = [place for place in places if not _is(kernels[place], _LAYOUT)]
    for place in set(places) - set(own):
        before = [other for other in own if other < place]
        after = [other for other in own if other > place]
        follows = kernels[place].operator == "ReorderOutput" or not after
        if before or after:
            paths[place] = paths[before[-1] if follows and before else after[0]]
    return paths


def kernel_module(name: str) -> str:
    """Return the module that a kernel computes, from its name; an empty string for what is outside of all modules.

    ``stages.0.blocks.0.dma.expand/Conv/WithoutBiases`` and ``/stages.0/blocks/blocks.0/dma/expand/Conv_output_0_nchwc``
    -> ``stages.0.blocks.0.dma.expand``: kernels are named after nodes, or, in onnxruntime, after what they give.
    """
    return module_path(name) if name.startswith("/") else name.partition("/")[0] if "/" in name else ""


def _place(path: str, kernel: Kernel) -> tuple[str, str]:
    """``stages.2.blocks.4.dma.expand`` -> ``stages.2`` and ``dma``; ``stages.2.downsample.conv`` -> ``downsample``."""
    first, *rest = path.split(".")
    if first != "stages" or not rest:
        # The last product may have the name of the output in the place of its own.
        return OUTSIDE, first or ("head" if is_compute(kernel.operator) else "pooling and sums")
    stage = f"{first}.{rest[0]}"
    inner = rest[3:] if rest[1:2] == ["blocks"] else rest[1:]
    return stage, inner[0] if inner else "residual sums"


def _order(stage: str) -> tuple[bool, int]:
    """Stages by their number, then what is outside of them."""
    number = stage.rpartition(".")[2]
    return stage == OUTSIDE, int(number) if number.isdecimal() else 0


def _largest_first(times: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: -item[1]))
