"""Layer by layer: every module of the network in PyTorch against the tensor that stands for it in an artifact.

Outputs alone hide a fault in a layer that matters little for the images at hand; the layer itself does not. Tensors
keep the name that the exporter gave them (``/stages.2/blocks/blocks.4/ffn/act/Gelu_output_0``) through simplification
and conversion, and that leads to the module (``stages.2.blocks.4.ffn.act``).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.errors import DMFormerError, UnavailableError
from dmformer.runtimes.inspector import module_path
from dmformer.verify.compare import TENSOR_FACTORS, Comparison, Limit, largest_difference, largest_value
from dmformer.verify.localize.search import error_limits, nearest_to_limit
from dmformer.verify.reference import in_double
from dmformer.verify.report import Check, as_check

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from dmformer.runtimes.base import Runtime

_LEAST_SHOWN = 0.8  # of the layers; what has no tensor of its own (identities, what was folded) is not missed


class ModuleTruth:
    """What each layer of a network gives for a few images, in float64, and how far it may be from that in float32.

    Args:
        model: the network in the form that was traced.
        rows: images, (N, C, H, W).
    """

    def __init__(self, model: nn.Module, rows: NDArray[np.float32]) -> None:
        self.rows = rows
        single = _layer_outputs(model, rows)
        self.truth: dict[str, NDArray[np.float32]] = {}
        peaks: dict[str, float] = {}
        errors: dict[str, float] = {}

        def compare(name: str, exact: NDArray[np.float64]) -> None:
            """What is kept is rounded to float32: all layers in float64 take gigabytes at 512 pixels."""
            if name in single:
                peaks[name] = largest_value(exact)
                errors[name] = largest_difference(single.pop(name), exact)
                self.truth[name] = exact.astype(np.float32)

        _watch_layers(in_double(model), rows.astype(np.float64), compare)
        self.limits = error_limits(peaks, errors, TENSOR_FACTORS["fp32"])
        modules = dict(model.named_modules())
        self._fused_after = {
            name: following
            for name, following in itertools.pairwise(self.truth)
            if type(modules[following]).__name__ in ("BatchNorm2d", "LayerScale")
        }

    def check(self, runtime: Callable[[tuple[str, ...]], Runtime]) -> Check | str:
        """A row for an artifact in float32: its layers against the network's; or why they cannot be compared.

        Args:
            runtime: makes the runtime, not yet open, that shows the inner tensors named.
        """
        plain = runtime(())
        try:
            with plain:
                tensors = self._tensors(plain.inspect().inner_tensors())
            if len(tensors) < _LEAST_SHOWN * len(self.truth):
                return f"layers in {plain.name}: {len(tensors)} of {len(self.truth)} can be seen"
            with runtime(tuple(tensors)) as opened:
                (name,) = (spec.name for spec in opened.inputs)
                answered = opened.run_rows({name: self.rows}, opened.batches[0])
        except UnavailableError as error:
            return f"layers in {plain.name}: {error}"
        except DMFormerError as error:
            return as_check("layers", plain.name, "fp32", len(self.rows), Comparison(False, reason=str(error)))
        return self._compare(plain.name, {module: answered[tensor] for tensor, module in tensors.items()})

    def _tensors(self, inner: frozenset[str]) -> dict[str, str]:
        """The module that each tensor stands for.

        The exporter and the simplifier fold a norm or a layer scale into the convolution before it, whose tensor then
        stands for that.
        """
        found = {name: module for name in sorted(inner) if (module := module_path(name)) in self.truth}
        shown = set(found.values())
        fused = {module: after for module, after in self._fused_after.items() if after not in shown}
        return {name: fused.get(module, module) for name, module in found.items()}

    def _compare(self, runtime: str, shown: dict[str, NDArray[Any]]) -> Check:
        apart = {name: largest_difference(shown[name], truth) for name, truth in self.truth.items() if name in shown}
        module = nearest_to_limit(apart, self.limits)
        beyond = [name for name, distance in apart.items() if not distance <= self.limits[name]]
        reason = None
        if beyond:
            module = beyond[0]
            reason = (
                f"{len(beyond)} of {len(shown)} layers differ, the first is module {module}: by {apart[module]:.3g}, "
                f"limit {self.limits[module]:.3g}"
            )
        factor, count = TENSOR_FACTORS["fp32"], len(self.rows)
        source = f"{factor:g} x float32 noise of module {module} in PyTorch, {count} images"
        limit = Limit(self.limits[module], source)
        distance = apart[module]
        comparison = Comparison(not beyond, max_abs=distance if np.isfinite(distance) else None, reason=reason)
        return as_check("layers", runtime, "fp32", count, comparison, limit)


def _layer_outputs(model: nn.Module, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What each module without children gives, in the order in which they run; those that run twice are left out."""
    found: dict[str, NDArray[Any]] = {}
    repeated: set[str] = set()

    def keep(name: str, output: NDArray[Any]) -> None:
        if name in found:
            repeated.add(name)
        found[name] = output.copy()

    _watch_layers(model, rows, keep)
    return {name: output for name, output in found.items() if name not in repeated}


def _watch_layers(model: nn.Module, rows: NDArray[Any], told: Callable[[str, NDArray[Any]], None]) -> None:
    """Run a network, and tell the name and the output of each module without children."""
    import torch

    def tell(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, _given, output: told(name, output.numpy())

    hooks = [
        module.register_forward_hook(tell(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        with torch.inference_mode():
            model(torch.from_numpy(rows))
    finally:
        for hook in hooks:
            hook.remove()
