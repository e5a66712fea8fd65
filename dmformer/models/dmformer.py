"""DMFormer: a vision backbone of dynamic multi-level attention.

Source: Wei et al., "DMFormer: Closing the Gap Between CNN and Vision Transformers", ICASSP 2023, arXiv:2209.07738.
Neither code nor weights were published with it. The file follows the paper's order: attention, block, stem and
downsampling, network, variants. What the paper leaves open is a field of ``DMFormerConfig`` (``models/config.py``),
whose docstring says which fields are the paper's and which are choices of this project. What other tasks put on the
stages is in ``models/segmentation.py``.

Shapes are written (N, C, H, W): batch, channels, height, width; E stands for the expanded channels N·C of the paper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmformer.errors import UsageError
from dmformer.models.config import DMFormerConfig
from dmformer.task import FEATURE_NAMES, OUTPUT_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dmformer.models.config import Activation, Decoder, Norm
    from dmformer.task import Task


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position (Ba et al., arXiv:1607.06450): (N, C, H, W) -> (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (N, C, H, W) -> (N, H, W, C) and back


def make_norm(kind: Norm, width: int, config: DMFormerConfig) -> nn.Module:
    """A norm of maps (N, C, H, W) of so many channels."""
    if kind == "layer":
        return ChannelNorm(width, eps=config.layer_norm_eps)
    return nn.BatchNorm2d(width, eps=config.batch_norm_eps)


def _activation(kind: Activation) -> nn.Module:
    return nn.ReLU() if kind == "relu" else nn.GELU()


class DynamicMultilevelAttention(nn.Module):
    """Dynamic Multi-level Attention: parallel depth-wise convolutions, weighted by an input-dependent gate.

    With m = ReLU(BN(merge_k(DWConv_k(expand(X))))), X' = reduce(m) + X and
    Attn = Sigmoid(FC(ReLU(FC(GAP(X))))), the output is Attn ⊗ Conv1x1(X') (the paper's formulas).

    Input and output: (N, C, H, W).
    """

    def __init__(self, width: int, config: DMFormerConfig) -> None:
        super().__init__()
        expanded = width * config.expansion
        merged = expanded * (len(config.kernel_sizes) if config.branch_merge == "concat" else 1)
        self.branch_merge = config.branch_merge
        self.inner_residual = config.inner_residual
        self.gate_input = config.gate_input
        self.expand = nn.Conv2d(width, expanded, 1)
        self.branches = nn.ModuleList(
            _depthwise(expanded, k, d, bias=config.branch_bias)
            for k, d in zip(config.kernel_sizes, config.dilations, strict=True)
        )
        self.norm = make_norm(config.attention_norm, merged, config)
        self.reduce = nn.Conv2d(merged, width, 1)
        self.project = nn.Conv2d(width, width, 1)
        self.gate = Gate(width, config)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        expanded = self.expand(x)  # (N, C, H, W) -> (N, E, H, W)
        levels = [branch(expanded) for branch in self.branches]
        if self.branch_merge == "concat":
            merged = torch.cat(levels, dim=1)  # (N, E, H, W) per branch -> (N, branches * E, H, W)
        else:
            merged = levels[0]
            for level in levels[1:]:
                merged = merged + level
        x_prime = self.reduce(F.relu(self.norm(merged)))  # (N, E or branches * E, H, W) -> (N, C, H, W)
        if self.inner_residual:
            x_prime = x_prime + x
        attention = self.gate(x_prime if self.gate_input == "x_prime" else x)
        return attention * self.project(x_prime)


def _depthwise(width: int, kernel: int, dilation: int = 1, *, bias: bool = True) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(width, width, kernel, padding=padding, dilation=dilation, groups=width, bias=bias)


class Gate(nn.Module):
    """V = ReLU(FC(GAP(X))), Attn = Sigmoid(FC(V)), with 1x1 convolutions or linear layers as FCs.

    Input and output: (N, C, H, W) and (N, C, 1, 1).
    """

    def __init__(self, width: int, config: DMFormerConfig) -> None:
        super().__init__()
        hidden = width // config.gate_reduction
        self.fc1: nn.Conv2d | nn.Linear = (
            nn.Linear(width, hidden) if config.gate_linear else nn.Conv2d(width, hidden, 1)
        )
        self.fc2: nn.Conv2d | nn.Linear = (
            nn.Linear(hidden, width) if config.gate_linear else nn.Conv2d(hidden, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1), each value between 0 and 1."""
        pooled = F.adaptive_avg_pool2d(x, 1)  # (N, C, H, W) -> (N, C, 1, 1)
        linear = isinstance(self.fc1, nn.Linear)
        attention = torch.sigmoid(self.fc2(F.relu(self.fc1(pooled.flatten(1) if linear else pooled))))
        return attention[:, :, None, None] if linear else attention


class FeedForward(nn.Module):
    """1x1 convolution, GELU (the exact one, by erf), 1x1 convolution: (N, C, H, W) -> (N, C, H, W).

    Some configurations have a depth-wise convolution before the GELU (Wang et al., "PVT v2", arXiv:2106.13797).
    """

    def __init__(self, width: int, ratio: float, kernel: int | None) -> None:
        super().__init__()
        hidden = max(1, round(width * ratio))
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.depthwise: nn.Module | None = None if kernel is None else _depthwise(hidden, kernel)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.fc2(self.act(apply_module(self.depthwise, self.fc1(x))))


def apply_module(module: nn.Module | None, x: Tensor) -> Tensor:
    """What a module gives, or its input where the configuration has none or the deploy form has folded it away."""
    return x if module is None else module(x)


class LayerScale(nn.Module):
    """A learned scale per channel (Touvron et al., "Going deeper with Image Transformers", arXiv:2103.17239)."""

    def __init__(self, width: int, init: float, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width, 1, 1)[:dims], init))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x * (self.gamma if self.gamma.ndim == 3 else self.gamma[:, None, None])


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv:1603.09382): drops whole samples of a residual branch while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); the identity outside training."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """x + γ₁·DMA(Norm(x)), then x + γ₂·FFN(Norm(x)): (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, width: int, ffn_ratio: float, drop_path: float, config: DMFormerConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config.block_norm, width, config)
        self.dma = DynamicMultilevelAttention(width, config)
        self.norm2 = make_norm(config.block_norm, width, config)
        self.ffn = FeedForward(width, ffn_ratio, config.ffn_kernel)
        scale, dims = config.layer_scale, config.layer_scale_dims
        self.scale1 = nn.Identity() if scale is None else LayerScale(width, scale, dims)
        self.scale2 = nn.Identity() if scale is None else LayerScale(width, scale, dims)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.drop_path(self.scale1(self.dma(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.ffn(self.norm2(x))))


class Stem(nn.Sequential):
    """7x7 stride 2, 3x3 stride 1, then a non-overlapping 2x2 stride 2: (N, 3, H, W) -> (N, C, H/4, W/4).

    Kernels and strides are the paper's; the norms and activations after the convolutions are ours.
    """

    def __init__(self, config: DMFormerConfig) -> None:
        hidden, width, bias = config.stem_channels, config.widths[0], config.stem_bias
        super().__init__()
        convolutions = (
            nn.Conv2d(config.in_channels, hidden, 7, stride=2, padding=3, bias=bias),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=bias),
            nn.Conv2d(hidden, width, 2, stride=2, bias=bias),
        )
        after = zip(convolutions, config.stem_norms, config.stem_activations, strict=True)
        for index, (convolution, norm, activation) in enumerate(after, 1):
            self.add_module(f"conv{index}", convolution)
            if norm is not None:
                self.add_module(f"norm{index}", make_norm(norm, convolution.out_channels, config))
            if activation is not None:
                self.add_module(f"act{index}", _activation(activation))


class Downsample(nn.Sequential):
    """A convolution of stride 2, with a norm before or after it: (N, C, H, W) -> (N, C', H/2, W/2)."""

    def __init__(self, width_in: int, width_out: int, config: DMFormerConfig) -> None:
        super().__init__()
        kernel, last = config.downsample_kernel, config.downsample_norm_last
        layers: dict[str, nn.Module] = {"conv": nn.Conv2d(width_in, width_out, kernel, 2, padding=kernel - 2)}
        if config.downsample_norm is not None:
            norm = make_norm(config.downsample_norm, width_out if last else width_in, config)
            layers = {**layers, "norm": norm} if last else {"norm": norm, **layers}
        for name, layer in layers.items():
            self.add_module(name, layer)


class Stage(nn.Module):
    """Downsampling (the stem, for the first stage), blocks at one resolution, and a norm in some configurations."""

    def __init__(self, index: int, drop_paths: list[float], config: DMFormerConfig) -> None:
        super().__init__()
        width = config.widths[index]
        if index == 0:
            self.downsample: nn.Module = Stem(config)
        else:
            self.downsample = Downsample(config.widths[index - 1], width, config)
        self.blocks = nn.Sequential(*(Block(width, config.ffn_ratios[index], rate, config) for rate in drop_paths))
        self.norm: nn.Module | None = None if config.stage_norm is None else make_norm(config.stage_norm, width, config)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C, H/4, W/4) for the first stage, (N, C, H/2, W/2) for the others."""
        return apply_module(self.norm, self.blocks(self.downsample(x)))


class DMFormerBackbone(nn.Module):
    """The four stages: what every task has in common.

    Input: (N, in_channels, H, W), float, normalised as the checkpoint's preprocessing says; H and W of at least 32.
    """

    def __init__(self, config: DMFormerConfig) -> None:
        super().__init__()
        self.config = config
        blocks = sum(config.depths)
        rates = iter(config.drop_path * index / max(1, blocks - 1) for index in range(blocks))
        self.stages = nn.ModuleList(
            Stage(index, [next(rates) for _ in range(depth)], config) for index, depth in enumerate(config.depths)
        )

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The four stage maps: (N, in_channels, H, W) -> (N, widths[i], H/s, W/s) for s of 4, 8, 16, 32."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class DMFormer(DMFormerBackbone):
    """The backbone with its classifier: norm, global average pool (or the pool first), linear layer.

    Output: logits (N, num_classes).
    """

    def __init__(self, config: DMFormerConfig) -> None:
        super().__init__(config)
        self.norm = None if config.head_norm is None else make_norm(config.head_norm, config.widths[-1], config)
        self.head = nn.Linear(config.widths[-1], config.num_classes)
        self.apply(init_weights_)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        x = self.forward_features(x)[-1]
        if self.config.head_norm_pooled:
            x = apply_module(self.norm, F.adaptive_avg_pool2d(x, 1))  # (N, C, H, W) -> (N, C, 1, 1)
        else:
            x = F.adaptive_avg_pool2d(apply_module(self.norm, x), 1)
        logits: Tensor = self.head(x.flatten(1))  # (N, C, 1, 1) -> (N, C)
        return logits


def init_weights_(module: nn.Module) -> None:
    """Draw a layer's initial weights; for ``nn.Module.apply``."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=(2.0 / module.weight[0].numel()) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# S and L: names and stage layout are the paper's, widths and depths are ours. T and nano are ours altogether.
_CLASSIFIERS: dict[str, DMFormerConfig] = {
    "dmformer_nano": DMFormerConfig(widths=(16, 32, 64, 128), depths=(1, 1, 2, 1)),
    "dmformer_t": DMFormerConfig(widths=(32, 64, 160, 256), depths=(2, 2, 6, 2)),
    "dmformer_s": DMFormerConfig(widths=(64, 128, 320, 512), depths=(3, 3, 10, 3)),
    "dmformer_l": DMFormerConfig(widths=(64, 128, 320, 512), depths=(3, 4, 24, 3)),
}


def _segmenter(backbone: str, decoder: Decoder, *widths: int) -> DMFormerConfig:
    """ADE20K's 150 classes on the stages of a classification variant."""
    return replace(_CLASSIFIERS[backbone], task="segmentation", num_classes=150, decoder=decoder, decoder_widths=widths)


# S with either decoder is what the paper trained on ADE20K; the decoders' widths are their usual ones. nano is ours.
VARIANTS: dict[str, DMFormerConfig] = {
    **_CLASSIFIERS,
    "dmformer_nano_fpn": _segmenter("dmformer_nano", "fpn", 64, 32),
    "dmformer_nano_upernet": _segmenter("dmformer_nano", "upernet", 48),
    "dmformer_s_fpn": _segmenter("dmformer_s", "fpn", 256, 128),
    "dmformer_s_upernet": _segmenter("dmformer_s", "upernet", 512),
}


def list_models(task: Task | None = None) -> list[str]:
    """Names that :func:`create_model` takes, or those of one task; of a task, the smallest network first."""
    return [name for name, config in VARIANTS.items() if task in (None, config.task)]


def variant_config(name: str, **overrides: Any) -> DMFormerConfig:
    """The configuration of a named variant, with fields replaced by ``overrides``.

    Raises:
        UsageError: no such variant, no such field, or a value out of its range.
    """
    name = name.lower()
    if name not in VARIANTS:
        raise UsageError(f"unknown architecture {name!r}; expected one of {', '.join(VARIANTS)}")
    return DMFormerConfig.from_dict({**VARIANTS[name].to_dict(), **overrides})


def build_network(config: DMFormerConfig) -> DMFormerBackbone:
    """A freshly initialised network of the configuration's task, in training mode."""
    if config.task == "classification":
        return DMFormer(config)
    from dmformer.models.segmentation import DMFormerFeatures, DMFormerSegmenter  # that file builds on this one

    return DMFormerSegmenter(config) if config.task == "segmentation" else DMFormerFeatures(config)


# Options of a configuration that leave nothing but the stages.
FEATURES_ONLY: Mapping[str, Any] = {"task": "features", "decoder": None, "decoder_widths": ()}


def outputs_by_name(result: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> dict[str, Tensor]:
    """What a network of any task gives, under the names of the exported formats; one of somebody's own has names."""
    if isinstance(result, Tensor):
        return {OUTPUT_NAME: result}
    if isinstance(result, dict):
        return result
    return dict(zip(FEATURE_NAMES, result, strict=True))


def create_model(name: str, **overrides: Any) -> DMFormerBackbone:
    """A freshly initialised network, in training mode.

    Args:
        name: one of :func:`list_models`.
        **overrides: fields of :class:`DMFormerConfig`, for instance ``num_classes=10``, or ``task="features"`` for a
            backbone that gives its stages' maps.

    Raises:
        UsageError: no such variant, no such field, or a value out of its range.
    """
    return build_network(variant_config(name, **overrides))
