"""Semantic segmentation: a decoder that labels every pixel from the four stage maps; and the maps alone.

Two decoders, each by its paper and in the widths that the field uses (those of mmsegmentation's configurations):

- Semantic FPN: the semantic branch of Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019,
  arXiv:1901.02446, on the pyramid of Lin et al., arXiv:1612.03144. 256 channels in the pyramid, 128 in the branch.
- UPerNet: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, arXiv:1807.10221: pyramid
  pooling (Zhao et al., arXiv:1612.01105) on the last map with bins 1, 2, 3 and 6, then a pyramid whose levels are
  fused. 512 channels. The auxiliary classifier that is often trained beside it is not part of it here.

Choices of this project: the decoders read the stage maps as the last blocks left them; each decoder gives logits at a
quarter of the input's resolution, which are interpolated bilinearly (``align_corners`` false) to the whole, so that the
class of a pixel is the largest of its logits and nothing is left to do outside the network.

Sides must be multiples of 32: then every map is exactly twice as large as the next, every factor of interpolation is a
constant, and the same graph holds at every size.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmformer.errors import UsageError
from dmformer.models.dmformer import DMFormerBackbone, init_weights_
from dmformer.task import STRIDES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.models.config import DMFormerConfig

POOL_BINS = (1, 2, 3, 6)


class Upsample(nn.Module):
    """Interpolation by a constant factor: (N, C, H, W) -> (N, C, factor * H, factor * W)."""

    def __init__(self, factor: int, mode: str = "bilinear") -> None:
        super().__init__()
        self.factor, self.mode = factor, mode

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, factor * H, factor * W)."""
        corners = False if self.mode == "bilinear" else None
        return F.interpolate(x, scale_factor=float(self.factor), mode=self.mode, align_corners=corners)


class ConvNormReLU(nn.Sequential):
    """Convolution that keeps the size, BatchNorm, ReLU: (N, C, H, W) -> (N, C', H, W)."""

    def __init__(self, width_in: int, width_out: int, size: int, eps: float) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(width_in, width_out, size, padding=size // 2, bias=False))
        self.add_module("norm", nn.BatchNorm2d(width_out, eps=eps))
        self.add_module("act", nn.ReLU())


class PixelClassifier(nn.Sequential):
    """Dropout of whole channels, then a 1x1 convolution: (N, C, H, W) -> logits (N, classes, H, W)."""

    def __init__(self, width: int, config: DMFormerConfig) -> None:
        super().__init__()
        self.add_module("dropout", nn.Dropout2d(config.decoder_dropout))
        self.add_module("conv", nn.Conv2d(width, config.num_classes, 1))


class SemanticFPN(nn.Module):
    """Four stage maps -> logits at the resolution of the first: (N, classes, H/4, W/4).

    A pyramid (1x1 convolution of each map, plus the level above, enlarged; then a 3x3 convolution), each level of
    which is brought to stride 4 by 3x3 convolutions, each followed by enlargement; their sum is classified.
    """

    def __init__(self, config: DMFormerConfig) -> None:
        super().__init__()
        pyramid, head = config.decoder_widths
        self.lateral = nn.ModuleList(nn.Conv2d(width, pyramid, 1) for width in config.widths)
        self.above = nn.ModuleList(Upsample(2, "nearest") for _ in config.widths[:-1])
        self.smooth = nn.ModuleList(nn.Conv2d(pyramid, pyramid, 3, padding=1) for _ in config.widths)
        self.levels = nn.ModuleList(
            _to_first_level(doublings, pyramid, head, config.batch_norm_eps) for doublings in range(len(STRIDES))
        )
        self.classifier = PixelClassifier(head, config)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (N, widths[i], H/s, W/s), s of 4, 8, 16, 32 -> (N, classes, H/4, W/4)."""
        pyramid = [lateral(features) for lateral, features in zip(self.lateral, maps, strict=True)]
        for index in reversed(range(len(pyramid) - 1)):
            pyramid[index] = pyramid[index] + self.above[index](pyramid[index + 1])
        total: Tensor | None = None
        for smooth, level, features in zip(self.smooth, self.levels, pyramid, strict=True):
            brought = level(smooth(features))  # (N, pyramid, H/s, W/s) -> (N, head, H/4, W/4)
            total = brought if total is None else total + brought
        logits: Tensor = self.classifier(total)
        return logits


def _to_first_level(doublings: int, pyramid: int, head: int, eps: float) -> nn.Sequential:
    """One convolution at stride 4; below it, as many convolutions and enlargements by 2 as it takes to get there."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(max(1, doublings)):
        layers[f"conv{index}"] = ConvNormReLU(pyramid if index == 0 else head, head, 3, eps)
        if doublings:
            layers[f"up{index}"] = Upsample(2)
    return nn.Sequential(layers)


class PyramidPool(nn.Module):
    """Averages over bins by bins regions, 1x1 convolution, enlarged again: (N, C, H, W) -> (N, C', H, W)."""

    def __init__(self, bins: int, width_in: int, width_out: int, eps: float) -> None:
        super().__init__()
        self.bins = bins
        self.mix = ConvNormReLU(width_in, width_out, 1, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W)."""
        pooled = self.mix(pool_bins(x, self.bins))  # (N, C, H, W) -> (N, C', bins, bins)
        return F.interpolate(pooled, size=x.shape[2:], mode="bilinear", align_corners=False)


def pool_bins(x: Tensor, bins: int) -> Tensor:
    """What ``adaptive_avg_pool2d(x, bins)`` computes, as two matrix products: (N, C, H, W) -> (N, C, bins, bins).

    ONNX has no adaptive pooling, and the exporters write one only for sizes that are fixed and divisible.
    """
    if bins == 1:
        return F.adaptive_avg_pool2d(x, 1)
    rows, columns = _bin_weights(x, 2, bins), _bin_weights(x, 3, bins)
    return rows @ x @ columns.transpose(0, 1)  # (bins, H) (N, C, H, W) (W, bins) -> (N, C, bins, bins)


def _bin_weights(x: Tensor, dimension: int, bins: int) -> Tensor:
    """Averaging over bin i, from floor(i·L/bins) up to ceil((i+1)·L/bins), of a side of length L: (bins, L)."""
    length = x.shape[dimension]
    position, index = torch.arange(length, device=x.device), torch.arange(bins, device=x.device)
    # Whole numbers, none negative: division cuts off, so that adding bins - 1 before it rounds up.
    first = (index * length).div(bins, rounding_mode="trunc")[:, None]
    end = ((index + 1) * length + (bins - 1)).div(bins, rounding_mode="trunc")[:, None]
    inside = ((position >= first) & (position < end)).to(x.dtype)
    return inside / (end - first).to(x.dtype)


class UPerNet(nn.Module):
    """Four stage maps -> logits at the resolution of the first: (N, classes, H/4, W/4).

    Pyramid pooling on the last map; a pyramid from there down; its levels, enlarged to the first, fused by a 3x3
    convolution and classified.
    """

    def __init__(self, config: DMFormerConfig) -> None:
        super().__init__()
        (width,), eps, last = config.decoder_widths, config.batch_norm_eps, config.widths[-1]
        self.pools = nn.ModuleList(PyramidPool(bins, last, width, eps) for bins in POOL_BINS)
        self.bottleneck = ConvNormReLU(last + len(POOL_BINS) * width, width, 3, eps)
        self.lateral = nn.ModuleList(ConvNormReLU(below, width, 1, eps) for below in config.widths[:-1])
        self.above = nn.ModuleList(Upsample(2) for _ in config.widths[:-1])
        self.smooth = nn.ModuleList(ConvNormReLU(width, width, 3, eps) for _ in config.widths[:-1])
        self.to_first = nn.ModuleList(Upsample(stride // STRIDES[0]) for stride in STRIDES[1:])
        self.fuse = ConvNormReLU(len(config.widths) * width, width, 3, eps)
        self.classifier = PixelClassifier(width, config)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (N, widths[i], H/s, W/s), s of 4, 8, 16, 32 -> (N, classes, H/4, W/4)."""
        last = maps[-1]
        top = self.bottleneck(torch.cat([last, *(pool(last) for pool in self.pools)], dim=1))
        pyramid = [lateral(features) for lateral, features in zip(self.lateral, maps[:-1], strict=True)]
        pyramid.append(top)  # each (N, width, H/s, W/s)
        for index in reversed(range(len(pyramid) - 1)):
            pyramid[index] = pyramid[index] + self.above[index](pyramid[index + 1])
        levels = [smooth(features) for smooth, features in zip(self.smooth, pyramid[:-1], strict=True)]
        enlarged = [up(level) for up, level in zip(self.to_first, [*levels[1:], top], strict=True)]
        logits: Tensor = self.classifier(self.fuse(torch.cat([levels[0], *enlarged], dim=1)))
        return logits


DECODERS: dict[str, type[SemanticFPN | UPerNet]] = {"fpn": SemanticFPN, "upernet": UPerNet}


class DMFormerSegmenter(DMFormerBackbone):
    """The backbone with a decoder: a class for every pixel.

    Input: (N, in_channels, H, W), H and W multiples of 32. Output: logits (N, num_classes, H, W).
    """

    def __init__(self, config: DMFormerConfig) -> None:
        super().__init__(config)
        assert config.decoder is not None  # the configuration sees to it
        self.decoder = DECODERS[config.decoder](config)
        self.up = Upsample(STRIDES[0])
        self.apply(init_weights_)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W).

        Raises:
            UsageError: a side is no multiple of 32.
        """
        check_sides(x)
        logits: Tensor = self.up(self.decoder(self.forward_features(x)))
        return logits


class DMFormerFeatures(DMFormerBackbone):
    """The backbone alone, for a head of somebody else's.

    Output: the four stage maps, (N, widths[i], H/s, W/s) for s of 4, 8, 16, 32, as the last block of each stage left
    them (no norm).
    """

    def __init__(self, config: DMFormerConfig) -> None:
        super().__init__(config)
        self.apply(init_weights_)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, in_channels, H, W) -> four maps."""
        return tuple(self.forward_features(x))


def check_sides(x: Tensor) -> None:
    """Refuse an image whose sides are no multiples of the last stage's stride.

    Raises:
        UsageError: a side is no multiple of 32.
    """
    if torch.onnx.is_in_onnx_export():  # the exporter warns of comparisons, and sides may stay open
        return
    height, width = x.shape[2:]
    if height % STRIDES[-1] or width % STRIDES[-1]:
        raise UsageError(f"image of {height}x{width} pixels; expected sides that are multiples of {STRIDES[-1]}")
