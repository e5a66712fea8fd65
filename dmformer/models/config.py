"""The configuration of a DMFormer: what the paper states, and everything that it leaves open.

No PyTorch is needed to read one; ``models/dmformer.py`` builds its network.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from dmformer.errors import UsageError
from dmformer.task import FEATURE_NAMES, OUTPUT_NAME, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from dmformer.models.dmformer import DMFormerBackbone


Norm = Literal["batch", "layer"]
Activation = Literal["relu", "gelu"]
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

    A norm is BatchNorm (``"batch"``), LayerNorm over the channels of each position (``"layer"``), or ``None``.

    Choices of this project, for the paper does not state them: all the others, their defaults included.

    Attributes:
        widths: channels C of each of the four stages.
        depths: blocks of each stage.
        num_classes: outputs of the classifier.
        in_channels: channels of the input image.
        stem_width: channels of the stem's first two convolutions; ``None`` means ``widths[0]``.
        stem_norms: the norm after each of the stem's three convolutions.
        stem_activations: ``"relu"``, ``"gelu"`` or ``None``, after each of these norms.
        stem_bias: whether the stem's convolutions have a bias.
        downsample_kernel: side of the convolutions of stride 2 between stages; one of 3 has a padding of 1.
        downsample_norm: the norm beside each of these convolutions.
        downsample_norm_last: it comes after the convolution, and not before it.
        block_norm: the norm before the attention and before the feed-forward network of each block.
        expansion: N, how many times the attention widens C before its depth-wise convolutions.
        kernel_sizes: side of each parallel depth-wise kernel, odd.
        dilations: dilation of each parallel depth-wise kernel.
        branch_bias: whether the depth-wise convolutions have a bias.
        attention_norm: the norm of the merged branches.
        branch_merge: the branches are added (``"sum"``) or stacked (``"concat"``).
        inner_residual: add the attention's input to the output of its ``reduce`` (X' = reduce(...) + X).
        gate_input: what the gate pools: the attention's input (``"x"``) or X' (``"x_prime"``).
        gate_reduction: the gate's hidden width is C divided by this; it must divide every width.
        gate_linear: whether the gate's two layers are linear ones, whose weights have two dimensions, and not 1x1
            convolutions: the same function.
        layer_scale: initial value of the per-channel scale on each residual branch; ``None`` builds none.
        layer_scale_dims: dimensions of that scale's tensor: 3, (C, 1, 1), or 1, (C,): the same function.
        ffn_ratios: hidden width of each stage's feed-forward network, as a multiple of C.
        ffn_kernel: side of a depth-wise convolution before the activation of the feed-forward network, odd; ``None``
            builds none.
        stage_norm: the norm after the last block of each stage.
        head_norm: the norm before the classifier.
        head_norm_pooled: it normalises the pooled features, and not the map that is pooled; for BatchNorm the same.
        batch_norm_eps: epsilon of every BatchNorm.
        layer_norm_eps: epsilon of every LayerNorm.
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
    stem_norms: tuple[Norm | None, Norm | None, Norm | None] = ("batch", "batch", "batch")
    stem_activations: tuple[Activation | None, Activation | None, Activation | None] = ("relu", "relu", None)
    stem_bias: bool = False
    downsample_kernel: Literal[2, 3] = 2
    downsample_norm: Norm | None = "batch"
    downsample_norm_last: bool = False
    block_norm: Norm = "batch"
    expansion: Count = 2
    kernel_sizes: Annotated[tuple[Count, ...], Meta(min_length=1)] = (3, 5, 7)
    dilations: Annotated[tuple[Count, ...], Meta(min_length=1)] = (1, 2, 3)
    branch_bias: bool = False
    attention_norm: Norm = "batch"
    branch_merge: Literal["sum", "concat"] = "sum"
    inner_residual: bool = True
    gate_input: Literal["x", "x_prime"] = "x"
    gate_reduction: Count = 4
    gate_linear: bool = False
    layer_scale: float | None = 1e-2
    layer_scale_dims: Literal[1, 3] = 3
    ffn_ratios: tuple[Positive, Positive, Positive, Positive] = (4.0, 4.0, 4.0, 4.0)
    ffn_kernel: Count | None = None
    stage_norm: Norm | None = None
    head_norm: Norm | None = "batch"
    head_norm_pooled: bool = False
    batch_norm_eps: Positive = 1e-5
    layer_norm_eps: Positive = 1e-5
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

    def has(self, norm: Norm) -> bool:
        """Return whether the network has a norm of this kind."""
        beside = (self.downsample_norm, self.block_norm, self.attention_norm, self.stage_norm, self.head_norm)
        return norm in (*self.stem_norms, *beside)

    def output_shapes(self, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of what the network gives for one image of so many pixels, without the batch."""
        if self.task == "classification":
            return ((self.num_classes,),)
        if self.task == "segmentation":
            return ((self.num_classes, height, width),)
        return tuple(zip(self.widths, self.stage_sides(height), self.stage_sides(width), strict=True))

    def stage_sides(self, side: int) -> tuple[int, ...]:
        """Return the side of each stage's map, in pixels, for an image of this side."""
        # The stem's convolutions of stride 2 round up, then down; those between stages down, with padding up.
        sides = [(side + 1) // 2 // 2]
        while len(sides) < len(self.widths):
            sides.append((sides[-1] + self.downsample_kernel - 2) // 2)
        return tuple(sides)

    @property
    def origin(self) -> None:
        """It is no network of somebody's own: ``models/dmformer.py`` defines it."""

    def build(self, state: Mapping[str, Tensor]) -> DMFormerBackbone:
        """The network of this configuration with these weights, which it does not share, in evaluation mode."""
        import torch

        from dmformer.models.dmformer import build_network

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
    if not all(math.isfinite(v) for v in (*c.ffn_ratios, c.batch_norm_eps, c.layer_norm_eps, c.layer_scale or 0.0)):
        yield "ffn_ratios, batch_norm_eps, layer_norm_eps or layer_scale is not finite; expected numbers"
    if any(k % 2 == 0 for k in c.kernel_sizes):
        yield f"kernel_sizes is {c.kernel_sizes}; expected odd sizes"
    if c.ffn_kernel is not None and c.ffn_kernel % 2 == 0:
        yield f"ffn_kernel is {c.ffn_kernel}; expected an odd size"
    if any(w % c.gate_reduction for w in c.widths):
        yield f"gate_reduction is {c.gate_reduction}; expected a divisor of every width of {c.widths}"
    if (c.task == "segmentation") != (c.decoder is not None):
        known = " or ".join(get_args(Decoder)) if c.task == "segmentation" else "none"
        yield f"decoder is {c.decoder} with task {c.task}; expected {known}"
    names = DECODER_WIDTHS[c.decoder] if c.decoder is not None else ()
    if len(c.decoder_widths) != len(names):
        yield f"{len(c.decoder_widths)} decoder_widths; expected {len(names)}: {', '.join(names) or 'no decoder'}"
