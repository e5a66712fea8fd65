"""What a network does with its weights: each operator that takes some of them, in the order in which they run.

They are seen below PyTorch's modules and functions, where it calls its kernels, so that it does not matter how a
network is written: with modules or functions, under whatever names, in whatever order these were registered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmformer.models.state_dict import COUNTER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

# What moves values, and computes none.
_MOVING = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "unsqueeze"),
    *("squeeze", "clone", "contiguous", "detach", "alias", "_to_copy", "copy", "lift_fresh"),
}
# What a DMFormer may be written with. None of these depends on which of two values is larger but relu, so that two
# networks of them that agree on random weights and images agree everywhere.
_SMOOTH = {
    *("convolution", "addmm", "mm", "bmm", "native_layer_norm", "native_batch_norm"),
    *(
        "_native_batch_norm_legit_no_training",
        "_batch_norm_no_update",
        "relu",
        "gelu",
        "erf",
        "sigmoid",
        "exp",
        "mul",
        "add",
        "sub",
        "rsub",
    ),
    *("div", "pow", "sqrt", "rsqrt", "reciprocal", "neg", "mean", "sum", "var", "var_mean", "square"),
    *("_adaptive_avg_pool2d", "avg_pool2d", "cat", "stack", "slice", "select", "split", "split_with_sizes", "unbind"),
    *("constant_pad_nd", "empty", "zeros", "zeros_like", "empty_like", "fill", "scalar_tensor", "as_strided"),
}
_LARGEST_EPS = 0.1


@dataclass
class WeightUse:
    """An operator that takes weights.

    Attributes:
        kind: a letter.
            C: convolution over more than one position. D: depth-wise convolution.
            P: linear map of the channels of each position. G: the same, of pooled features.
            N: norm of maps. n: norm of pooled features. M: product with a value for each channel. A: such a sum.
            r: ReLU. g: GELU; neither takes weights. ?: whatever a DMFormer does not have.
        names: the tensors, by the names that PyTorch's modules give them.
        shape: of the weight, (O, I, k, k), (O, I) or (C,).
        dilation: of a convolution.
        eps: of a norm.
        norm: which, of a norm.
    """

    kind: str
    names: dict[str, str]
    shape: tuple[int, ...] = ()
    stride: int = 1
    dilation: int = 1
    eps: float = 0.0
    norm: str = ""


def weight_uses(network: nn.Module, images: Tensor) -> tuple[list[WeightUse], set[str]]:
    """Run a network, and return what it does with its weights, and operators that no DMFormer has.

    Args:
        network: in evaluation mode.
        images: (N, C, H, W), N above 1, so large that maps have more than one position.
    """
    recorder = _Recorder(network.state_dict(), len(images))
    with torch.no_grad(), recorder:
        network(images)
    return recorder.uses, recorder.foreign


class _Recorder(TorchDispatchMode):
    """Sees every operator that PyTorch runs."""

    def __init__(self, state: Mapping[str, Tensor], batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.uses: list[WeightUse] = []
        self.foreign: set[str] = set()
        self.names = {_values(tensor): name for name, tensor in state.items() if not name.endswith(COUNTER)}
        self.copies: list[Tensor] = []  # kept alive, for their memory tells them apart
        self.added = 0.0  # the last number that was added to a tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it takes."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        operator = name.rstrip("_") if not name.startswith("__") else name
        arguments = (argument.name for argument in func._schema.arguments)  # noqa: SLF001 - there is no other way
        given = dict(zip(arguments, args, strict=False)) | (kwargs or {})
        held = {argument: self.names[_values(value)] for argument, value in given.items() if self._is_weight(value)}
        if operator in _MOVING:
            if held and isinstance(result, Tensor):
                self.copies.append(result)
                self.names.setdefault(_values(result), next(iter(held.values())))
        elif operator == "slice" and self._is_weight(result):
            pass  # all of it, as weight[:, None, None] takes
        elif operator not in _SMOOTH:
            self.foreign.add(operator)
        else:
            self._note(operator, given, held, result)
        return result

    def _is_weight(self, value: object) -> bool:
        return isinstance(value, Tensor) and _values(value) in self.names

    def _note(self, operator: str, given: dict[str, Any], held: dict[str, str], result: Any) -> None:
        listed = [one for value in given.values() if isinstance(value, (list, tuple)) for one in value]
        linear = operator in ("mm", "addmm", "bmm", "convolution")
        if any(map(self._is_weight, listed)) or (linear and not held):
            self.uses.append(WeightUse("?", {}))  # weights that are stacked or computed
        elif operator in ("relu", "gelu"):
            self.uses.append(WeightUse(operator[0], {}) if not held else WeightUse("?", held))
        elif operator == "add" and isinstance(given.get("other"), float) and 0 < given["other"] < _LARGEST_EPS:
            self.added = given["other"]
        elif held:
            made = self._use(operator, given, held, result)
            if made is not None:
                self.uses.append(made)

    def _use(self, operator: str, given: dict[str, Any], held: dict[str, str], result: Any) -> WeightUse | None:
        """Return what an operator does with weights; ``None`` where it completes the one before it."""
        if operator == "convolution":
            return self._convolution(given, held, result)
        if operator in ("mm", "addmm", "bmm") and "mat2" in held:
            names = {"weight": held.pop("mat2")} | ({"bias": held["self"]} if operator == "addmm" and held else {})
            *_, inner, outer = given["mat2"].shape
            return WeightUse("G" if result.numel() == self.batch * outer else "P", names, (outer, inner))
        if "norm" in operator:
            kind = "layer" if operator == "native_layer_norm" else "batch"
            width = given["input"].shape[-1 if kind == "layer" else 1]
            return self._norm(held, given["input"].numel() // width, width, given["eps"], kind)
        if operator in ("add", "mul") and len(held) == 1:
            (name,) = held.values()
            width = given["other" if "other" in held else "self"].numel()
            return self._product(name, width, result) if operator == "mul" else self._sum(name, width, result)
        return WeightUse("?", held)

    def _product(self, name: str, width: int, result: Tensor) -> WeightUse:
        return WeightUse("m" if result.numel() == width * self.batch else "M", {"gamma": name}, (width,))

    def _sum(self, name: str, width: int, result: Tensor) -> WeightUse | None:
        """Take a sum for the bias of a linear map before it, or for the end of a LayerNorm that is written out."""
        last = self.uses[-1] if self.uses else WeightUse("?", {})
        if last.kind in "CDPG" and "bias" not in last.names and width == last.shape[0]:
            last.names["bias"] = name
            return None
        if last.kind in "Mm":
            names = {"weight": self.uses.pop().names["gamma"], "bias": name}
            return self._norm(names, result.numel() // width, width, self.added, "layer")
        return WeightUse("A", {"bias": name}, (width,))

    def _norm(self, names: dict[str, str], positions: int, width: int, eps: float, norm: str) -> WeightUse:
        return WeightUse("n" if positions == self.batch else "N", names, (width,), eps=eps, norm=norm)

    def _convolution(self, given: dict[str, Any], held: dict[str, str], result: Tensor) -> WeightUse:
        names = {name: value for name, value in held.items() if name in ("weight", "bias")}
        shape, groups = tuple(given["weight"].shape), given["groups"]
        square = len(shape) == 4 and len({*shape[2:]}) == len({*given["dilation"]}) == len({*given["stride"]}) == 1
        if "input" in held or "weight" not in held or given["transposed"] or not square:
            return WeightUse("?", names)
        stride, dilation = given["stride"][0], given["dilation"][0]
        if groups > 1:
            kind = "D" if groups == shape[0] and shape[1] == 1 and stride == 1 else "?"
        elif shape[2] > 1:
            kind = "C"
        else:
            kind = "?" if stride > 1 else "G" if result.numel() == self.batch * shape[0] else "P"
        return WeightUse(kind, names, shape, stride, dilation)


def _values(tensor: Tensor) -> tuple[int, int, int]:
    """Return what stands for the values that a tensor shows, however it is shaped."""
    count = math.prod(side for side, step in zip(tensor.shape, tensor.stride(), strict=True) if step or side == 1)
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), count
