"""The deploy form: the same function with everything linear folded, for inference only.

Source of the algebra: at inference a BatchNorm is s·x + t per channel, with s = weight / sqrt(var + eps) and
t = bias - s·mean (Ioffe and Szegedy, arXiv:1502.03167), and a linear map of a linear map is one linear map.

1. Stem: the s of a BatchNorm after a convolution scales its kernels; t becomes its bias.
2. Downsampling, and the first norms of a block: the s of a BatchNorm before a convolution without padding scales the
   kernels' input channels; the kernels' sum times t joins the bias. With padding the borders would be wrong: before a
   convolution of 3x3 the norm stays. After a convolution it folds as in the stem.
3. The BatchNorm over the merged branches scales each depth-wise kernel; its t is one bias (each branch's own, where
   they are stacked).
4. ``reduce`` R, then ``project`` P: P·(R·m + r + y) + p = (P·R)·m + P·y + (P·r + p), with the inner residual
   y = s·x + t. So ``mix`` on m and ``skip`` on x are enough, and the map between R and P is never made.
5. The pool commutes with 1x1 convolutions: F·GAP(R·m + r + y) + f = (F·R)·GAP(m) + (F·s)·GAP(x) + (F·(r + t) + f).
6. Layer scales: the first scales ``mix`` and ``skip`` (the gate multiplies per channel as well, so they commute), the
   second the last convolution of the feed-forward network.
7. The last BatchNorm goes through the average pool into the classifier.
8. A LayerNorm divides by what it measures, and stays; so does a norm between stages. A linear layer of pooled features
   becomes the 1x1 convolution that it is.
9. Segmentation: in a decoder each BatchNorm follows a convolution, as in the stem. Dropout goes.

One more rewrite holds at one image size only: taps of a dilated kernel that never meet anything but padding are cut.

The form is a copy of the network in which modules keep their names: convolutions are replaced; norms, layer scales and
dropout are removed. They leave no ``nn.Identity`` behind: four of fifteen leaves of a block would be identities, which
would be timed, rounded and compared as layers are, and the comparison layer by layer wants a tensor for 80 % of them.
Only the attention and the block have classes of their own here.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmformer.models.dmformer import DMFormer, DMFormerBackbone, LayerScale, apply_module
from dmformer.models.segmentation import ConvNormReLU, PixelClassifier

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dmformer.models.dmformer import Block, DynamicMultilevelAttention, FeedForward, Stage


class DeployGate(nn.Module):
    """Sigmoid(FC(ReLU(FC(...)))) of pooled maps: of the block's input x, of the merged branches m, or of both."""

    def __init__(self, fc1: nn.Conv2d | None, fc1_merged: nn.Conv2d | None, fc2: nn.Conv2d) -> None:
        super().__init__()
        self.fc1, self.fc1_merged, self.fc2 = fc1, fc1_merged, fc2

    def forward(self, x: Tensor, merged: Tensor) -> Tensor:
        """Maps x (N, C, H, W) and m (N, M, H, W) -> (N, C, 1, 1), each value between 0 and 1."""
        parts = [
            layer(F.adaptive_avg_pool2d(source, 1))  # (N, C or M, H, W) -> (N, C or M, 1, 1) -> (N, C / r, 1, 1)
            for layer, source in ((self.fc1, x), (self.fc1_merged, merged))
            if layer is not None
        ]
        return torch.sigmoid(self.fc2(F.relu(sum(parts[1:], parts[0]))))


class DeployAttention(nn.Module):
    """Gate ⊗ (mix(m) + skip(x)), with m = ReLU(merge_k(DWConv_k(expand(x)))): (N, C, H, W) -> (N, C, H, W).

    ``skip`` is there with an inner residual only, and ``norm`` where the merged branches have one that does not fold.
    """

    def __init__(
        self,
        expand: nn.Conv2d,
        branches: Iterable[nn.Conv2d],
        concat: bool,
        norm: nn.Module | None,
        mix: nn.Conv2d,
        skip: nn.Conv2d | None,
        gate: DeployGate,
    ) -> None:
        super().__init__()
        self.expand = expand
        self.branches = nn.ModuleList(branches)
        self.concat, self.norm = concat, norm
        self.mix, self.skip, self.gate = mix, skip, gate

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        expanded = self.expand(x)  # (N, C, H, W) -> (N, E, H, W)
        levels = [branch(expanded) for branch in self.branches]
        # (N, E, H, W) per branch -> (N, E or branches * E, H, W)
        merged = torch.cat(levels, dim=1) if self.concat else sum(levels[1:], levels[0])
        merged = F.relu(apply_module(self.norm, merged))
        mixed = self.mix(merged)  # (N, E or branches * E, H, W) -> (N, C, H, W)
        if self.skip is not None:
            mixed = mixed + self.skip(x)
        return self.gate(x, merged) * mixed


class DeployBlock(nn.Module):
    """x + DMA(x), then x + FFN(x), each after a norm where that does not fold: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(
        self, norm1: nn.Module | None, dma: DeployAttention, norm2: nn.Module | None, ffn: FeedForward
    ) -> None:
        super().__init__()
        self.norm1, self.dma, self.norm2, self.ffn = norm1, dma, norm2, ffn

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.dma(apply_module(self.norm1, x))
        return x + self.ffn(apply_module(self.norm2, x))


@torch.no_grad()
def deploy(model: nn.Module, image_size: int | None = None) -> DMFormerBackbone:
    """Return the deploy form of a network, which is left as it is.

    Everything is folded in float64; the result has the type of the network's weights.

    Args:
        model: a DMFormer of any configuration.
        image_size: side of the input in pixels; the result is then right for this size only, and has shorter kernels
            where they reach beyond the last stages' maps.
    """
    assert isinstance(model, DMFormerBackbone)
    dtype = next(model.parameters()).dtype
    form = copy.deepcopy(model).double()
    sides = [None] * len(form.stages) if image_size is None else form.config.stage_sides(image_size)
    for module, side in zip(form.stages, sides, strict=True):
        stage = cast("Stage", module)
        _fold_downsample(stage.downsample)
        stage.blocks = nn.Sequential(*(_block(cast("Block", block), side) for block in stage.blocks))
    for module in list(form.modules()):
        if isinstance(module, ConvNormReLU):
            conv = cast("nn.Conv2d", module.conv)
            module.conv = _filter(conv).then(_affine(cast("nn.BatchNorm2d", module.norm))).as_conv(conv)
            del module.norm
        elif isinstance(module, PixelClassifier):
            del module.dropout
    if isinstance(form, DMFormer) and isinstance(form.norm, nn.BatchNorm2d):
        scale, shift = _affine(form.norm)
        form.head.bias.add_(form.head.weight @ shift)
        form.head.weight.mul_(scale)
        form.norm = None
    return form.to(dtype).eval()


class Affine(NamedTuple):
    """The map s·x + t, with one value of s and of t for each channel."""

    scale: Tensor
    shift: Tensor


class Filter(NamedTuple):
    """What a convolution computes: weight (O, I, k, k) and bias (O,)."""

    weight: Tensor
    bias: Tensor

    def then(self, affine: Affine) -> Filter:
        """The affine map of the convolution's result."""
        return Filter(self.weight * affine.scale[:, None, None, None], self.bias * affine.scale + affine.shift)

    def of(self, affine: Affine) -> Filter:
        """The convolution of an affine map; legal without padding only."""
        added = (self.weight * affine.shift[:, None, None]).sum((1, 2, 3))
        return Filter(self.weight * affine.scale[:, None, None], self.bias + added)

    def of_filter(self, inner: Filter) -> Filter:
        """The 1x1 convolution of a 1x1 convolution: (O, M, 1, 1) of (M, I, 1, 1)."""
        outer = self.weight[:, :, 0, 0]
        weight = outer @ inner.weight[:, :, 0, 0]
        return Filter(weight[:, :, None, None], self.bias + outer @ inner.bias)

    def as_conv(self, like: nn.Module, *, bias: bool = True) -> nn.Conv2d:
        """A module with the stride, dilation and groups of another, and as much padding as keeps the size."""
        if not isinstance(like, nn.Conv2d):
            like = nn.Conv2d(1, 1, 1, device="meta")  # a linear layer has none of them
        out_channels, in_channels, size, _ = self.weight.shape
        made = nn.Conv2d(
            in_channels * like.groups,
            out_channels,
            size,
            stride=like.stride[0],
            padding=int(like.padding[0]) if size == like.kernel_size[0] else like.dilation[0] * (size // 2),
            dilation=like.dilation[0],
            groups=like.groups,
            bias=bias,
            device="meta",  # initial values would be drawn from the global generator
        )
        tensors = {"weight": self.weight, "bias": self.bias} if bias else {"weight": self.weight}
        # Giving a meta tensor memory, as skip_init does, imports SymPy: a second.
        made.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
        return made


def _affine(norm: nn.BatchNorm2d) -> Affine:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return Affine(scale, norm.bias - scale * norm.running_mean)


def _split(norm: nn.Module, width: int) -> tuple[Affine, nn.Module | None]:
    """What of a norm folds, for so many channels, and what stays: all of a BatchNorm, and none of a LayerNorm."""
    if isinstance(norm, nn.BatchNorm2d):
        return _affine(norm), None
    like = next(norm.parameters())
    return Affine(like.new_ones(width), like.new_zeros(width)), norm


def _filter(layer: nn.Module) -> Filter:
    weight, bias = cast("Tensor", layer.weight), cast("Tensor | None", layer.bias)
    if isinstance(layer, nn.Linear):
        weight = weight[:, :, None, None]
    return Filter(weight, weight.new_zeros(len(weight)) if bias is None else bias)


def _layer_scale(module: nn.Module, like: nn.Conv2d) -> Affine:
    gamma = module.gamma.flatten() if isinstance(module, LayerScale) else torch.ones_like(like.weight[:, 0, 0, 0])
    return Affine(gamma, torch.zeros_like(gamma))


def _fold_downsample(layers: nn.Module) -> None:
    """Fold each BatchNorm into the convolution before it, or into one after it that has no padding."""
    names = [name for name, _ in layers.named_children()]
    for name in [name for name in names if isinstance(getattr(layers, name), nn.Conv2d)]:
        conv, norm_name = getattr(layers, name), name.replace("conv", "norm")
        norm = getattr(layers, norm_name, None)
        follows = norm is not None and names.index(norm_name) > names.index(name)
        if isinstance(norm, nn.BatchNorm2d) and (follows or conv.padding == (0, 0)):
            folded = _filter(conv).then(_affine(norm)) if follows else _filter(conv).of(_affine(norm))
            setattr(layers, name, folded.as_conv(conv))
            delattr(layers, norm_name)


def _block(block: Block, side: int | None) -> DeployBlock:
    ffn = block.ffn
    width = ffn.fc2.out_channels
    (affine1, norm1), (affine2, norm2) = _split(block.norm1, width), _split(block.norm2, width)
    scale1 = _layer_scale(block.scale1, block.dma.project)
    ffn.fc1 = _filter(ffn.fc1).of(affine2).as_conv(ffn.fc1)
    ffn.fc2 = _filter(ffn.fc2).then(_layer_scale(block.scale2, ffn.fc2)).as_conv(ffn.fc2)
    return DeployBlock(norm1, _attention(block.dma, affine1, scale1, side), norm2, ffn)


def _attention(dma: DynamicMultilevelAttention, norm: Affine, scale: Affine, side: int | None) -> DeployAttention:
    mix, skip = _of_x_prime(dma.project, dma, norm)
    return DeployAttention(
        expand=_filter(dma.expand).of(norm).as_conv(dma.expand),
        branches=_branches(dma, side),
        concat=dma.branch_merge == "concat",
        norm=None if isinstance(dma.norm, nn.BatchNorm2d) else dma.norm,
        mix=mix.then(scale).as_conv(dma.project),
        skip=skip.then(scale).as_conv(dma.project, bias=False) if skip is not None else None,
        gate=_gate(dma, norm),
    )


def _of_x_prime(layer: nn.Module, dma: DynamicMultilevelAttention, norm: Affine) -> tuple[Filter, Filter | None]:
    """A 1x1 convolution of X' = R·m + r [+ y] as one of m, with all the bias, and one of x, with none."""
    of_merged = _filter(layer).of_filter(_filter(dma.reduce))
    if not dma.inner_residual:
        return of_merged, None
    of_x = _filter(layer).of(norm)
    constant = of_merged.bias + of_x.bias - _filter(layer).bias  # the layer's own bias is in both
    return Filter(of_merged.weight, constant), Filter(of_x.weight, torch.zeros_like(constant))


def _gate(dma: DynamicMultilevelAttention, norm: Affine) -> DeployGate:
    fc1, fc2 = dma.gate.fc1, _filter(dma.gate.fc2).as_conv(dma.gate.fc2)
    if dma.gate_input == "x":
        return DeployGate(_filter(fc1).of(norm).as_conv(fc1), None, fc2)
    of_merged, of_x = _of_x_prime(fc1, dma, norm)
    on_x = of_x.as_conv(fc1, bias=False) if of_x is not None else None
    return DeployGate(on_x, of_merged.as_conv(fc1), fc2)


def _branches(dma: DynamicMultilevelAttention, side: int | None) -> list[nn.Conv2d]:
    """Depth-wise kernels with the norm's scale in them, and one bias: of the first alone, where they are added up."""
    concat = dma.branch_merge == "concat"
    norm, count = _split(dma.norm, dma.reduce.in_channels)[0], len(dma.branches)
    parts = [Affine(*pair) for pair in zip(*(t.chunk(count) for t in norm), strict=True)] if concat else [norm] * count
    filters = [_filter(branch) for branch in dma.branches]
    if not concat:
        total = torch.stack([each.bias for each in filters]).sum(0)
        filters = [Filter(each.weight, total) for each in filters]
    made = []
    for index, (branch, inner, part) in enumerate(zip(dma.branches, filters, parts, strict=True)):
        conv = cast("nn.Conv2d", branch)
        folded = inner.then(part)
        if side is not None:
            folded = Filter(_reached(folded.weight, conv.dilation[0], side), folded.bias)
        made.append(folded.as_conv(conv, bias=concat or index == 0))
    return made


def _reached(weight: Tensor, dilation: int, side: int) -> Tensor:
    """The taps (O, 1, k, k) of a centred kernel that meet more of a map of ``side`` by ``side`` than its padding."""
    middle = weight.shape[-1] // 2
    reach = min(middle, (side - 1) // dilation)
    return weight[:, :, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
