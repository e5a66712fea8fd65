"""DMFormers as others may have written them: no two lay out their modules, norms and gates alike, and none as ours.

Each takes a *twist*: with one it has the same tensors, and computes something that no DMFormer does.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTHS, DEPTHS = (8, 12, 16, 20), (1, 2, 1, 1)
CLASSES = 5


def pooled(x: Tensor, twist: str) -> Tensor:
    """(N, C, H, W) -> (N, C)."""
    return x.amax((2, 3)) if twist == "max pool" else x.mean((2, 3))


def activated(x: Tensor, twist: str) -> Tensor:
    """GELU, or what resembles it."""
    if twist == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if twist == "tanh" else "none")


def rectified(x: Tensor, twist: str) -> Tensor:
    """ReLU, or one that ends at so large a value that usual images do not show it."""
    return x.clamp(0, 1e4) if twist == "clamp" else F.relu(x)


class Functional(nn.Module):
    """Nothing but tensors and functions, registered from the last to the first; LayerNorm is written out.

    Scales are (1, C, 1, 1), the pointwise layers are matrices on (N, H, W, C), and a tensor is there for nothing.
    """

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.twist = twist
        shapes = dict(self.layout())
        self.w = nn.ParameterDict({name: nn.Parameter(torch.zeros(shapes[name])) for name in reversed(shapes)})

    def layout(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape."""
        yield from (("s0w", (6, 3, 7, 7)), ("s0b", (6,)), ("s1w", (6, 6, 3, 3)), ("s1b", (6,)), ("s2w", (8, 6, 2, 2)))
        yield from (("s0g", (6,)), ("s0o", (6,)), ("s1g", (6,)), ("s1o", (6,)), ("unused", (3, 3)))
        for stage, width in enumerate(WIDTHS):
            if stage:
                before = WIDTHS[stage - 1]
                yield from ((f"d{stage}g", (before,)), (f"d{stage}o", (before,)))
                yield from ((f"d{stage}w", (width, before, 3, 3)), (f"d{stage}b", (width,)))
            for block in range(DEPTHS[stage]):
                for name, shape in {
                    "in": (2 * width, width), "k3": (2 * width, 1, 3, 3), "k5": (2 * width, 1, 5, 5),
                    "og": (2 * width,),
                    "oo": (2 * width,), "out": (width, 2 * width), "val": (width, width), "q1": (width // 2, width),
                    "q2": (width, width // 2), "ga": (1, width, 1, 1), "gb": (1, width, 1, 1), "up": (3 * width, width),
                    "upb": (3 * width,), "dn": (width, 3 * width), "dnb": (width,), "ag": (width,), "ao": (width,),
                    "bg": (width,), "bo": (width,), "q1b": (width // 2,), "outb": (width,),
                }.items():  # fmt: skip
                    yield f"{stage}_{block}_{name}", shape
        yield from (("hw", (CLASSES, WIDTHS[-1])), ("hb", (CLASSES,)), ("hg", (WIDTHS[-1],)), ("ho", (WIDTHS[-1],)))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm over channels of (N, C, H, W)."""
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.w[f"{name}g"][:, None, None] * scaled + self.w[f"{name}o"][:, None, None]

    def mix(self, x: Tensor, name: str) -> Tensor:
        """A linear map of the channels of (N, C, H, W)."""
        mixed = x.permute(0, 2, 3, 1) @ self.w[name].t()
        return (mixed + self.w[f"{name}b"] if f"{name}b" in self.w else mixed).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, CLASSES)."""
        w, twist = self.w, self.twist
        x = F.gelu(self.norm(F.conv2d(x, w["s0w"], w["s0b"], 2, 3), "s0"))
        x = F.gelu(self.norm(F.conv2d(x, w["s1w"], w["s1b"], 1, 1), "s1"))
        x = F.conv2d(x, w["s2w"], None, 2)
        for stage, width in enumerate(WIDTHS):
            if stage:
                x = F.conv2d(self.norm(x, f"d{stage}"), w[f"d{stage}w"], w[f"d{stage}b"], 2, 1)
            for block in range(DEPTHS[stage]):
                p = f"{stage}_{block}_"
                y = self.norm(x, f"{p}a")
                gate = F.linear(rectified(F.linear(pooled(y, twist), w[f"{p}q1"], w[f"{p}q1b"]), twist), w[f"{p}q2"])
                wide = self.mix(y, f"{p}in")
                reach = 4 if twist == "dilation" and stage == 3 else 3
                far = F.conv2d(wide, w[f"{p}k5"], None, padding=2 * reach, dilation=reach, groups=2 * width)
                wide = far + F.conv2d(wide, w[f"{p}k3"], None, padding=2, dilation=2, groups=2 * width)
                inner = self.mix(F.relu(self.norm(wide, f"{p}o")), f"{p}out") + (x if twist == "residual" else y)
                x = x + w[f"{p}ga"] * (self.mix(inner, f"{p}val") * gate.sigmoid()[:, :, None, None])
                x = x + w[f"{p}gb"] * self.mix(activated(self.mix(self.norm(x, f"{p}b"), f"{p}up"), twist), f"{p}dn")
        return F.linear(self.norm(x, "h").flatten(2).mean(-1), w["hw"], w["hb"])


class Fused(nn.Module):
    """A whole block in one class, with the gate first; branches are stacked, the gate looks at X', one channel in."""

    def __init__(self, width: int, twist: str) -> None:
        super().__init__()
        self.twist = twist
        self.ffn = nn.ModuleDict({"b": nn.Conv2d(2 * width, width, 1), "a": nn.Conv2d(width, 2 * width, 1, bias=False)})
        self.excite = nn.Sequential(nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1))
        self.pw = nn.ModuleList(
            [nn.Conv2d(width, width, 1), nn.Conv2d(9 * width, width, 1), nn.Conv2d(width, 3 * width, 1)]
        )
        self.dw = nn.ModuleDict(
            {f"k{side}": nn.Conv2d(3 * width, 3 * width, side, padding="same", dilation=reach, groups=3 * width)
             for side, reach in ((7, 3), (5, 1), (3, 2))}
        )  # fmt: skip
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels, eps=1e-3) for channels in (width, 9 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.pw[2](self.bns[0](x))
        y = torch.cat([branch(y) for branch in self.dw.values()], 1)
        y = self.pw[1](rectified(self.bns[1](y), self.twist))
        if self.twist == "residual":
            y = y + x
        gate = torch.sigmoid(self.excite(pooled(y, self.twist)[:, :, None, None]))
        x = x + self.pw[0](y) * gate
        return x + self.ffn["b"](activated(self.ffn["a"](self.bns[2](x)), self.twist))


class Stacked(nn.Module):
    """Stages in a dictionary from the last to the first; BatchNorm everywhere but in the head, and no layer scale."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.classifier = nn.Conv2d(WIDTHS[-1], CLASSES, 1)
        self.body = nn.ModuleDict()
        for stage in reversed(range(4)):
            blocks = [Fused(WIDTHS[stage], twist) for _ in range(DEPTHS[stage])]
            if stage:
                down = nn.Sequential(
                    nn.BatchNorm2d(WIDTHS[stage - 1], eps=1e-3), nn.Conv2d(WIDTHS[stage - 1], WIDTHS[stage], 2, 2)
                )
            else:
                layers = [nn.Conv2d(1, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(inplace=True)]
                layers += [nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(inplace=True)]
                down = nn.Sequential(*layers, nn.Conv2d(8, 8, 2, 2, bias=False), nn.BatchNorm2d(8, eps=1e-3))
            self.body[f"level{stage}"] = nn.Sequential(down, *blocks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 1, H, W) -> {"logits": (N, CLASSES)}."""
        for stage in range(4):
            x = self.body[f"level{stage}"](x)
        return {"logits": self.classifier(F.adaptive_avg_pool2d(x, 1)).flatten(1)}


class Tokens(nn.Module):
    """A block in the manner of ConvNeXt: LayerNorm and linear layers on (N, H, W, C), and scales (C,)."""

    def __init__(self, width: int, twist: str) -> None:
        super().__init__()
        self.twist = twist
        self.gamma = nn.Parameter(torch.ones(width))
        self.ln, self.ln2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.pwconv0, self.reduce, self.value = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.near, self.far = (nn.Conv2d(width, width, 3, padding=r, dilation=r, groups=width) for r in (1, 2))
        self.bn = nn.BatchNorm2d(width)
        self.gate = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Sigmoid())
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        y = self.ln(x)
        maps = self.pwconv0(y).permute(0, 3, 1, 2)
        maps = rectified(self.bn(self.near(maps) + self.far(maps)), self.twist)
        inner = self.reduce(maps.permute(0, 2, 3, 1)) + (x if self.twist == "residual" else y)
        gate = self.gate(pooled(y.permute(0, 3, 1, 2), self.twist))[:, None, None]
        x = x + self.gamma * self.value(inner) * gate
        return x + self.gamma2 * self.pwconv2(activated(self.pwconv1(self.ln2(x)), self.twist))


class ChannelsLast(nn.Module):
    """Four stages of :class:`Tokens`, with the classifier's LayerNorm after the pool."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 2, 2)
        )
        self.stem_norm = nn.LayerNorm(8, eps=1e-6)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Tokens(width, twist) for _ in range(depth)))
            for width, depth in zip(WIDTHS, DEPTHS, strict=True)
        )
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in itertools.pairwise(WIDTHS))
        self.norm, self.head = nn.LayerNorm(WIDTHS[-1], eps=1e-6), nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, CLASSES)."""
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1))
        for stage, blocks in enumerate(self.stages):
            if stage:
                x = self.down[stage - 1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = blocks(x)
        return self.head(self.norm(x.mean((1, 2))))


# What each is, but for widths, depths and classes.
KINDS: dict[type[nn.Module], dict[str, Any]] = {
    Functional: {
        "stem_width": 6, "stem_norms": ("layer", "layer", None), "stem_activations": ("gelu", "gelu", None),
        "stem_bias": True, "downsample_kernel": 3, "downsample_norm": "layer", "block_norm": "layer",
        "kernel_sizes": (3, 5), "dilations": (2, 3), "attention_norm": "layer", "gate_reduction": 2,
        "gate_linear": True, "ffn_ratios": (3.0, 3.0, 3.0, 3.0), "head_norm": "layer", "layer_norm_eps": 1e-6,
    },
    Stacked: {
        "in_channels": 1, "expansion": 3, "kernel_sizes": (7, 5, 3), "dilations": (3, 1, 2), "branch_bias": True,
        "branch_merge": "concat", "inner_residual": False, "gate_input": "x_prime", "layer_scale": None,
        "ffn_ratios": (2.0, 2.0, 2.0, 2.0), "head_norm": None, "batch_norm_eps": 1e-3,
    },
    ChannelsLast: {
        "stem_norms": (None, None, "layer"), "stem_bias": True, "downsample_norm": None, "block_norm": "layer",
        "expansion": 1, "kernel_sizes": (3, 3), "dilations": (1, 2), "branch_bias": True, "gate_reduction": 1,
        "gate_linear": True, "layer_scale_dims": 1, "head_norm": "layer", "head_norm_pooled": True,
        "layer_norm_eps": 1e-6,
    },
}  # fmt: skip


def trained(kind: type[nn.Module] = Functional, twist: str = "", scale: float | None = None) -> nn.Module:
    """A network with seeded weights, as training might leave them; its layer scales all of one value, if given."""
    model, draw = kind(twist), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=draw)
                is_scale = "gamma" in name or name.endswith(("_ga", "_gb"))
                matrix = tensor.ndim > 1 and not is_scale
                tensor.copy_(noise * (len(tensor) / tensor.numel()) ** 0.5 if matrix else 1 + 0.2 * noise)
                if name.endswith(("running_var", "_ga", "_gb")) or "gamma" in name:
                    tensor.abs_()
                if is_scale and scale is not None:
                    tensor.fill_(scale)
    return model.eval()


def functional() -> nn.Module:
    """What ``--module`` names."""
    return trained(Functional)


def stacked() -> nn.Module:
    """What ``--module`` names."""
    return trained(Stacked)
