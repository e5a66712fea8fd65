"""Infer the configuration of a network from the names and shapes of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmformer.errors import UsageError
from dmformer.models.config import DMFormerConfig
from dmformer.models.dmformer import VARIANTS

if TYPE_CHECKING:
    from torch import Tensor

    from dmformer.models.config import Norm

# Fields that leave no trace in names and shapes, yet change what the network computes.
HIDDEN_FIELDS = (
    "dilations", "gate_input", "inner_residual", "batch_norm_eps",
    "stem_activations", "head_norm_pooled", "layer_norm_eps",
)  # fmt: skip


def variant_name(config: DMFormerConfig) -> str | None:
    """Return the variant with these widths, depths and decoder; ``None`` where it is none of them.

    A backbone alone (task ``features``) has the name of the classifier that it comes from.
    """

    def shape(of: DMFormerConfig) -> tuple[object, ...]:
        return of.widths, of.depths, of.decoder, of.decoder_widths

    return next((name for name, variant in VARIANTS.items() if shape(variant) == shape(config)), None)


def infer_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the fields of :class:`DMFormerConfig` that names and shapes determine: all but :data:`HIDDEN_FIELDS`.

    Raises:
        UsageError: the tensors are not a DMFormer's; the message has the first name that is missing.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        return _infer(shapes)
    except KeyError as error:
        raise UsageError(
            f"the checkpoint is no DMFormer: it has no tensor {error.args[0]!r}; "
            f"received {', '.join(ascii(name)[1:-1] for name in list(shapes)[:4])}, …"
        ) from error
    except (IndexError, ZeroDivisionError) as error:
        raise UsageError("the checkpoint is no DMFormer: its tensors have the names, but not the shapes") from error


def _infer(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    depths = [0, 0, 0, 0]
    for stage in range(4):
        while any(name.startswith(f"stages.{stage}.blocks.{depths[stage]}.") for name in shapes):
            depths[stage] += 1
    widths = [shapes[f"stages.{stage}.blocks.0.norm1.weight"][0] for stage in range(4)]
    attention = "stages.0.blocks.0.dma"
    kernel_sizes: list[int] = []
    while (branch := f"{attention}.branches.{len(kernel_sizes)}.weight") in shapes:
        kernel_sizes.append(shapes[branch][-1])
    expanded = shapes[f"{attention}.expand.weight"][0]
    merged = shapes[f"{attention}.reduce.weight"][1]
    stem = shapes["stages.0.downsample.conv1.weight"]
    gate, scale = shapes[f"{attention}.gate.fc1.weight"], shapes.get("stages.0.blocks.0.scale1.gamma")
    config = {
        "widths": widths,
        "depths": depths,
        **_infer_head(shapes),
        "in_channels": stem[1],
        "stem_width": None if stem[0] == widths[0] else stem[0],
        "stem_norms": [_infer_norm(shapes, f"stages.0.downsample.norm{index}") for index in (1, 2, 3)],
        "stem_bias": "stages.0.downsample.conv1.bias" in shapes,
        **_infer_downsample(shapes),
        "block_norm": _infer_norm(shapes, "stages.0.blocks.0.norm1"),
        "expansion": expanded // widths[0],
        "kernel_sizes": kernel_sizes,
        "branch_bias": f"{attention}.branches.0.bias" in shapes,
        "attention_norm": _infer_norm(shapes, f"{attention}.norm"),
        "branch_merge": "sum" if merged == expanded else "concat",
        "gate_reduction": widths[0] // gate[0],
        "gate_linear": len(gate) == 2,
        "layer_scale": None if scale is None else DMFormerConfig.layer_scale,
        "layer_scale_dims": DMFormerConfig.layer_scale_dims if scale is None else len(scale),
        "ffn_ratios": [shapes[f"stages.{i}.blocks.0.ffn.fc1.weight"][0] / widths[i] for i in range(4)],
        "ffn_kernel": shapes.get("stages.0.blocks.0.ffn.depthwise.weight", (None,))[-1],
        "stage_norm": _infer_norm(shapes, "stages.0.norm"),
    }
    if len(kernel_sizes) != len(DMFormerConfig.kernel_sizes):
        config["dilations"] = list(range(1, len(kernel_sizes) + 1))  # the default's pattern, carried on
    return config


def _infer_norm(shapes: dict[str, tuple[int, ...]], name: str) -> Norm | None:
    if f"{name}.weight" not in shapes:
        return None
    return "batch" if f"{name}.running_mean" in shapes else "layer"


def _infer_downsample(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer the convolutions between stages; a norm of as many channels as both sides have comes first."""
    name = "stages.{}.downsample"
    norms = [shapes.get(f"{name.format(stage)}.norm.weight") for stage in (1, 2, 3)]
    before = [(shapes[f"{name.format(stage)}.conv.weight"][1],) for stage in (1, 2, 3)]
    return {
        "downsample_kernel": shapes["stages.1.downsample.conv.weight"][-1],
        "downsample_norm": _infer_norm(shapes, "stages.1.downsample.norm"),
        "downsample_norm_last": norms[0] is not None and norms != before,
    }


def _infer_head(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer what follows the stages: task, classes and decoder."""
    if "decoder.fuse.conv.weight" in shapes:
        widths = [shapes["decoder.fuse.conv.weight"][0]]
    elif "decoder.levels.0.conv0.conv.weight" in shapes:
        widths = [shapes["decoder.smooth.0.weight"][0], shapes["decoder.levels.0.conv0.conv.weight"][0]]
    elif any(name.startswith(("head.", "norm.")) for name in shapes):
        return {"num_classes": shapes["head.weight"][0], "head_norm": _infer_norm(shapes, "norm")}
    else:
        return {"task": "features"}
    return {
        "task": "segmentation",
        "num_classes": shapes["decoder.classifier.conv.weight"][0],
        "decoder": "upernet" if len(widths) == 1 else "fpn",
        "decoder_widths": widths,
    }
