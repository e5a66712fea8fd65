"""A DMFormer as somebody else may have written it, in the manner of VAN: names, norms and scales are not ours.

Stages are called ``patch_embed1``, ``block1``, ``norm1`` and so on; a block owns its layer scales, where ours is a
module; features are normed as sequences; the feed-forward network has a depth-wise convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS, DEPTHS = (8, 16, 24, 32), (1, 2, 1, 1)


class Attention(nn.Module):
    """Three depth-wise levels, and a gate of linear layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        self.levels = nn.ModuleList(
            nn.Conv2d(2 * dim, 2 * dim, side, padding=reach * (side // 2), dilation=reach, groups=2 * dim)
            for side, reach in ((3, 1), (5, 2), (7, 3))
        )
        self.bn = nn.BatchNorm2d(2 * dim)
        self.relu = nn.ReLU(inplace=True)
        self.proj_out = nn.Conv2d(2 * dim, dim, 1)
        self.value = nn.Conv2d(dim, dim, 1)
        self.gate = nn.Sequential(nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, dim), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        wide = self.proj_in(x)
        wide = sum(level(wide) for level in self.levels)
        inner = self.proj_out(self.relu(self.bn(wide))) + x
        return self.value(inner) * self.gate(x.mean((2, 3)))[:, :, None, None]


class FeedForward(nn.Module):
    """1x1, depth-wise 3x3, GELU, 1x1, with one dropout that is used twice."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.depthwise = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.drop(self.fc2(self.drop(self.act(self.depthwise(self.fc1(x))))))


class Block(nn.Module):
    """Two residual branches, each with a scale that belongs to the block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.BatchNorm2d(dim), Attention(dim)
        self.norm2, self.mlp = nn.BatchNorm2d(dim), FeedForward(dim)
        self.gamma1 = nn.Parameter(torch.full((dim, 1, 1), 0.01))
        self.gamma2 = nn.Parameter(torch.full((dim, 1, 1), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class OwnDMFormer(nn.Module):
    """Four stages; gives logits, or a dictionary of the stages' maps."""

    def __init__(self, num_classes: int = 10, features: bool = False) -> None:
        super().__init__()
        before = 3
        for index, (dim, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), 1):
            side, stride = (7, 4) if index == 1 else (3, 2)
            down = nn.Sequential(nn.Conv2d(before, dim, side, stride, side // 2), nn.BatchNorm2d(dim))
            setattr(self, f"patch_embed{index}", down)
            setattr(self, f"block{index}", nn.ModuleList(Block(dim) for _ in range(depth)))
            setattr(self, f"norm{index}", nn.LayerNorm(dim))
            before = dim
        self.head = None if features else nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """(N, 3, H, W) -> (N, num_classes), or (N, C, H/s, W/s) by name."""
        maps = {}
        for index in range(1, len(WIDTHS) + 1):
            x = getattr(self, f"patch_embed{index}")(x)
            for block in getattr(self, f"block{index}"):
                x = block(x)
            batch, dim, height, width = x.shape
            x = getattr(self, f"norm{index}")(x.flatten(2).transpose(1, 2))
            x = x.transpose(1, 2).reshape(batch, dim, height, width)
            maps[f"stage{index}"] = x
        return maps if self.head is None else self.head(x.mean((2, 3)))


def build(num_classes: int = 10) -> nn.Module:
    """A network of which every part can be heard in the answer, with statistics that were measured; always the same."""
    return lively(OwnDMFormer(num_classes))


def lively(model: nn.Module, seed: int = 3) -> nn.Module:
    """Overwrite all weights with seeded ones, and measure what BatchNorm needs."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                spread = (1.7 / module.weight[0].numel()) ** 0.5
                module.weight.copy_(torch.randn(module.weight.shape, generator=draw) * spread)
                module.bias.copy_(torch.randn(module.bias.shape, generator=draw) * 0.2)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=draw) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=draw) * 0.2)
                module.momentum = None
            elif isinstance(module, Block):
                module.gamma1.copy_(torch.rand(module.gamma1.shape, generator=draw) * 0.4 + 0.3)
                module.gamma2.copy_(torch.rand(module.gamma2.shape, generator=draw) * 0.4 + 0.3)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # it draws from a generator that is not ours
        model(torch.randn(16, 3, 64, 64, generator=draw))
    return model.eval()
