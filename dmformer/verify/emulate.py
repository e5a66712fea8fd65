"""A reduced precision emulated in PyTorch: layers rounded as the precision rounds them, arithmetic in float32.

It owes nothing to the graph at that precision or to the tool that made it, so its error against float64 is a measure
for both. What lies between layers (additions, pools) is not rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

# Steps of a symmetric int8 scale on each side of zero, by the bits that it uses, as onnxruntime's quantiser has them.
_STEPS: dict[int | None, int] = {8: 127, 7: 64}


def round_layers_(
    model: nn.Module,
    precision: str,
    layers: Collection[str],
    peaks: Mapping[str, float],
    exact: Collection[str] = (),
    weight_bits: int | None = None,
) -> None:
    """Make a network answer as it does at ``fp16`` or ``int8``, in place.

    Args:
        model: any.
        precision: in float16 every module rounds its output and the layers their weights; in int8 the layers round
            their weights, one scale for each output channel, and their inputs, one scale each.
        layers: names of the convolutions and linear layers that compute in it.
        peaks: for int8, how far the input of each layer reaches.
        exact: names of modules that stay in float32.
        weight_bits: for int8, how many bits the weights use.
    """
    import torch

    modules = dict(model.named_modules())
    with torch.no_grad():
        if precision == "fp16":
            _round_to_float16(model, {name: modules[name] for name in layers}, {modules[name] for name in exact})
        else:
            _round_to_int8({name: modules[name] for name in layers}, peaks, weight_bits)


def input_peaks(model: nn.Module, layers: Collection[str], batches: Iterable[NDArray[np.float32]]) -> dict[str, float]:
    """The largest absolute value in the input of each layer named, over batches of images (n, C, H, W)."""
    import torch

    peaks = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def look(_module: nn.Module, given: tuple[Tensor]) -> None:
            peaks[name] = max(peaks[name], float(given[0].abs().max()))

        return look

    watching = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        with torch.inference_mode():
            for batch in batches:
                model(torch.from_numpy(batch))
    finally:
        for hook in watching:
            hook.remove()
    return peaks


def _round_to_float16(model: nn.Module, layers: dict[str, nn.Module], exact: set[nn.Module]) -> None:
    for layer in layers.values():
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(parameter.half())
    for module in model.modules():
        computes = next(module.parameters(recurse=False), None) is not None
        rounded = module in layers.values() if computes else module not in exact
        if next(module.children(), None) is None and rounded:
            module.register_forward_hook(lambda _module, _inputs, output: output.half().float())


def _round_to_int8(layers: dict[str, nn.Module], peaks: Mapping[str, float], weight_bits: int | None) -> None:
    import torch

    for name, layer in layers.items():
        weight: Tensor = layer.get_parameter("weight")
        largest = weight.flatten(1).abs().amax(1)[:, None, None, None]  # (O, I, k, k)
        weight.copy_(quantized(weight, largest, weight_bits))
        peak = torch.tensor(peaks[name])
        layer.register_forward_pre_hook(lambda _module, given, peak=peak: (quantized(given[0], peak),))


def quantized(values: Tensor, peak: Tensor, bits: int | None = 8) -> Tensor:
    """Values rounded to the steps of a symmetric integer scale that reaches up to ``peak``, one or one for each row."""
    import torch

    steps = _STEPS[bits]
    scale = torch.clamp(peak / steps, min=torch.finfo(torch.float32).tiny)
    return (values / scale).round().clamp(-steps - 1, steps) * scale
