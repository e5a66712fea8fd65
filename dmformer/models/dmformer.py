"""DMFormer: a vision backbone of dynamic multi-level attention.

Source: Wei et al., "DMFormer: Closing the Gap Between CNN and Vision Transformers", ICASSP 2023, arXiv:2209.07738.
Neither code nor weights were published with it. The file follows the paper's order: attention, block, stem and
downsampling, network, variants. What the paper leaves open is a field of :class:`DMFormerConfig`, and its docstring
says which fields are the paper's and which are choices of this project. What other tasks put on the stages is
in ``models/segmentation.py``.

Shapes are written (N, C, H, W): batch, channels, height, width; E stands for the expanded channels N·C of the paper.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional as F

from dmformer.errors import UsageError
from dmformer.task import FEATURE_NAMES, OUTPUT_NAME, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


Decoder = Literal["fpn", "upernet"]
DECODER_WIDTHS: dict[str, tuple[str, ...]] = {"fpn": ("pyramid", "head"), "upernet": ("all convolutions",)}

_BLOCK = re.compile(r"stages\.\d+\.(?:downsample|blocks\.\d+)|decoder\.\w+(?:\.\d+)?")

Count = Annotated[int, Meta(ge=1, le=65536)]
Depth = Annotated[int, Meta(ge=1, le=1024)]
Positive = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class DMFormerConfig:
    """Everything that shapes the network.

    Stated by the paper: four stages at strides 4, 8, 16 and 32; the stem's kernels and strides; ``kernel_sizes`` with
    ``dilations``; the 1x1 convolutions around them, BatchNorm and ReLU; the gate's two fully connected layers.

    Choices of this project, for the paper does not state them: all the others, their defaults included.

    Attributes:
        widths: channels C of each of the four stages.
        depths: blocks of each stage.
        num_classes: outputs of the classifier.
        in_channels: channels of the input image.
        stem_width: channels of the stem's first two convolutions; ``None`` means ``widths[0]``.
        expansion: N, how many times the attention widens C before its depth-wise convolutions.
        kernel_sizes: side of each parallel depth-wise kernel, odd.
        dilations: dilation of each parallel depth-wise kernel.
        branch_merge: the branches are added (``"sum"``) or stacked (``"concat"``).
        inner_residual: add the attention's input to the output of its ``reduce`` (X' = reduce(...) + X).
        gate_input: what the gate pools: the attention's input (``"x"``) or X' (``"x_prime"``).
        gate_reduction: the gate's hidden width is C divided by this; it must divide every width.
        layer_scale: initial value of the per-channel scale on each residual branch; ``None`` builds none.
        ffn_ratios: hidden width of each stage's feed-forward network, as a multiple of C.
        batch_norm_eps: epsilon of every BatchNorm.
        drop_path: largest stochastic-depth rate, reached linearly at the last block. Training only.
        task: what follows the stages: a classifier, a decoder that labels every pixel, or nothing (their four maps).
        decoder: Semantic FPN (``"fpn"``) or UPerNet (``"upernet"``) for segmentation, ``None`` otherwise.
        decoder_widths: channels of the decoder: of the pyramid and of the head (Semantic FPN), or of all its
            convolutions (UPerNet); empty where there is no decoder.
        decoder_dropout: share of channels dropped before the last convolution of a decoder. Training only.
    """

    widths: tuple[Count, Count, Count, Count] = (64, 128, 320, 512)
    depths: tuple[Depth, Depth, Depth, Depth] = (3, 3, 10, 3)
    num_classes: Count = 1000
    in_channels: Literal[1, 3] = 3
    stem_width: Count | None = None
    expansion: Count = 2
    kernel_sizes: Annotated[tuple[Count, ...], Meta(min_length=1)] = (3, 5, 7)
    dilations: Annotated[tuple[Count, ...], Meta(min_length=1)] = (1, 2, 3)
    branch_merge: Literal["sum", "concat"] = "sum"
    inner_residual: bool = True
    gate_input: Literal["x", "x_prime"] = "x"
    gate_reduction: Count = 4
    layer_scale: float | None = 1e-2
    ffn_ratios: tuple[Positive, Positive, Positive, Positive] = (4.0, 4.0, 4.0, 4.0)
    batch_norm_eps: Positive = 1e-5
    drop_path: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    task: Task = "classification"
    decoder: Decoder | None = None
    decoder_widths: tuple[Count, ...] = ()
    decoder_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        if problems := list(_config_problems(self)):
            raise UsageError(f"model configuration: {'; '.join(problems)}")

    @property
    def stem_channels(self) -> int:
        """Channels of the stem's first two convolutions."""
        return self.widths[0] if self.stem_width is None else self.stem_width

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what the network gives, in order."""
        return FEATURE_NAMES if self.task == "features" else (OUTPUT_NAME,)

    def output_shapes(self, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of what the network gives for one image of so many pixels, without the batch."""
        if self.task == "classification":
            return ((self.num_classes,),)
        if self.task == "segmentation":
            return ((self.num_classes, height, width),)
        # The stem's convolutions of stride 2 round up, then down; those between stages down.
        rows, columns = (height + 1) // 2 // 2, (width + 1) // 2 // 2
        return tuple((channels, rows >> index, columns >> index) for index, channels in enumerate(self.widths))

    @property
    def origin(self) -> None:
        """It is no network of somebody's own: this file defines it."""

    def build(self, state: Mapping[str, Tensor]) -> DMFormerBackbone:
        """The network of this configuration with these weights, which it does not share, in evaluation mode."""
        with torch.device("meta"):  # initial weights, which take a second to draw, would only be overwritten
            model = build_network(self)
        counters = {
            name: torch.zeros(value.shape, dtype=value.dtype)
            for name, value in model.state_dict().items()
            if name.endswith(".num_batches_tracked")
        }
        weights = {name: tensor.clone() for name, tensor in state.items()}
        model.load_state_dict(counters | weights, assign=True)
        return model.eval()

    def block_of(self, node: str) -> str | None:
        """The block that an ONNX node belongs to, by its name: a block of a stage, or a part of the decoder."""
        found = _BLOCK.match(node)
        return found.group() if found else None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types; :meth:`from_dict` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DMFormerConfig:
        """The configuration of a dictionary of JSON types.

        Raises:
            UsageError: a key is no field of the configuration, or a value is not of its type or range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            shown = ", ".join(ascii(name)[1:-1] for name in unknown)  # one line, whatever a file's metadata holds
            raise UsageError(f"model configuration: unknown field {shown}; known: {', '.join(known)}")
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, UsageError):  # from __post_init__, wrapped by msgspec
                raise error.__cause__ from None
            raise UsageError(f"model configuration: {error}") from error


def _config_problems(c: DMFormerConfig) -> Iterator[str]:
    """What the fields' types and ranges cannot express."""
    if len(c.kernel_sizes) != len(c.dilations):
        yield f"{len(c.kernel_sizes)} kernel_sizes but {len(c.dilations)} dilations; expected as many"
    if not all(math.isfinite(v) for v in (*c.ffn_ratios, c.batch_norm_eps, c.layer_scale or 0.0)):
        yield "ffn_ratios, batch_norm_eps or layer_scale is not finite; expected numbers"
    if any(k % 2 == 0 for k in c.kernel_sizes):
        yield f"kernel_sizes is {c.kernel_sizes}; expected odd sizes"
    if any(w % c.gate_reduction for w in c.widths):
        yield f"gate_reduction is {c.gate_reduction}; expected a divisor of every width of {c.widths}"
    if (c.task == "segmentation") != (c.decoder is not None):
        known = " or ".join(get_args(Decoder)) if c.task == "segmentation" else "none"
        yield f"decoder is {c.decoder} with task {c.task}; expected {known}"
    names = DECODER_WIDTHS[c.decoder] if c.decoder is not None else ()
    if len(c.decoder_widths) != len(names):
        yield f"{len(c.decoder_widths)} decoder_widths; expected {len(names)}: {', '.join(names) or 'no decoder'}"


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
            nn.Conv2d(expanded, expanded, k, padding=d * (k // 2), dilation=d, groups=expanded, bias=False)
            for k, d in zip(config.kernel_sizes, config.dilations, strict=True)
        )
        self.norm = nn.BatchNorm2d(merged, eps=config.batch_norm_eps)
        self.reduce = nn.Conv2d(merged, width, 1)
        self.project = nn.Conv2d(width, width, 1)
        self.gate = Gate(width, config.gate_reduction)

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


class Gate(nn.Module):
    """V = ReLU(FC(GAP(X))), Attn = Sigmoid(FC(V)), with the FCs as 1x1 convolutions: (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // reduction, 1)
        self.fc2 = nn.Conv2d(width // reduction, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1), each value between 0 and 1."""
        pooled = F.adaptive_avg_pool2d(x, 1)  # (N, C, H, W) -> (N, C, 1, 1)
        return torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))


class FeedForward(nn.Module):
    """1x1 convolution, GELU (the exact one, by erf), 1x1 convolution: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = max(1, round(width * ratio))
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned scale per channel (Touvron et al., "Going deeper with Image Transformers", arXiv:2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width, 1, 1), init))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x * self.gamma


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
    """x + γ₁·DMA(BN(x)), then x + γ₂·FFN(BN(x)): (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, width: int, ffn_ratio: float, drop_path: float, config: DMFormerConfig) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width, eps=config.batch_norm_eps)
        self.dma = DynamicMultilevelAttention(width, config)
        self.norm2 = nn.BatchNorm2d(width, eps=config.batch_norm_eps)
        self.ffn = FeedForward(width, ffn_ratio)
        scale = config.layer_scale
        self.scale1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.scale2 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.drop_path(self.scale1(self.dma(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.ffn(self.norm2(x))))


class Stem(nn.Sequential):
    """7x7 stride 2, 3x3 stride 1, then a non-overlapping 2x2 stride 2: (N, 3, H, W) -> (N, C, H/4, W/4).

    Kernels and strides are the paper's; the BatchNorm after each convolution and the ReLU between them are ours.
    """

    def __init__(self, config: DMFormerConfig) -> None:
        hidden, width, eps = config.stem_channels, config.widths[0], config.batch_norm_eps
        super().__init__()
        self.add_module("conv1", nn.Conv2d(config.in_channels, hidden, 7, stride=2, padding=3, bias=False))
        self.add_module("norm1", nn.BatchNorm2d(hidden, eps=eps))
        self.add_module("act1", nn.ReLU())
        self.add_module("conv2", nn.Conv2d(hidden, hidden, 3, padding=1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(hidden, eps=eps))
        self.add_module("act2", nn.ReLU())
        self.add_module("conv3", nn.Conv2d(hidden, width, 2, stride=2, bias=False))
        self.add_module("norm3", nn.BatchNorm2d(width, eps=eps))


class Downsample(nn.Sequential):
    """BatchNorm, then a 2x2 convolution of stride 2: (N, C, H, W) -> (N, C', H/2, W/2)."""

    def __init__(self, width_in: int, width_out: int, eps: float) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(width_in, eps=eps))
        self.add_module("conv", nn.Conv2d(width_in, width_out, 2, stride=2))


class Stage(nn.Module):
    """Downsampling (the stem, for the first stage), then blocks at one resolution."""

    def __init__(self, index: int, drop_paths: list[float], config: DMFormerConfig) -> None:
        super().__init__()
        width = config.widths[index]
        if index == 0:
            self.downsample: nn.Module = Stem(config)
        else:
            self.downsample = Downsample(config.widths[index - 1], width, config.batch_norm_eps)
        self.blocks = nn.Sequential(*(Block(width, config.ffn_ratios[index], rate, config) for rate in drop_paths))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C, H/4, W/4) for the first stage, (N, C, H/2, W/2) for the others."""
        return self.blocks(self.downsample(x))


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
    """The backbone with its classifier: BatchNorm, global average pool, linear layer.

    Output: logits (N, num_classes).
    """

    def __init__(self, config: DMFormerConfig) -> None:
        super().__init__(config)
        self.norm = nn.BatchNorm2d(config.widths[-1], eps=config.batch_norm_eps)
        self.head = nn.Linear(config.widths[-1], config.num_classes)
        self.apply(init_weights_)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        x = self.norm(self.forward_features(x)[-1])
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, C, H, W) -> (N, C)
        logits: Tensor = self.head(pooled)
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
