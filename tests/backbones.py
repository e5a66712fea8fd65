"""Backbones that nobody here wrote: Hugging Face's, small, from configurations, with weights that can be heard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 64
_CLASSES = {"num_labels": 10}

# Class of the configuration and of the network, and what makes it small.
BACKBONES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "convnext": (
        "ConvNextConfig", "ConvNextForImageClassification", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    ),
    "convnextv2": (
        "ConvNextV2Config", "ConvNextV2ForImageClassification", {"hidden_sizes": [8, 16, 24, 32],
         "depths": [1, 1, 2, 1]}
    ),
    "swin": (
        "SwinConfig", "SwinForImageClassification",
        {"image_size": SIZE, "patch_size": 4, "embed_dim": 12, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "swinv2": (
        "Swinv2Config", "Swinv2ForImageClassification",
        {"image_size": SIZE, "patch_size": 4, "embed_dim": 12, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "resnet": (
        "ResNetConfig", "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]},
    ),
    "segformer": (
        "SegformerConfig", "SegformerForImageClassification",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 3, 4],
         "decoder_hidden_size": 16},
    ),
    "poolformer": (
        "PoolFormerConfig", "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "layer_scale_init_value": 0.5},
    ),
    "regnet": (
        "RegNetConfig", "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "groups_width": 8},
    ),
    "mobilenetv1": ("MobileNetV1Config", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}),
    "mobilenetv2": ("MobileNetV2Config", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25}),
    "efficientnet": (
        "EfficientNetConfig", "EfficientNetForImageClassification",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": SIZE, "hidden_dim": 320},
    ),
    "pvt": (
        "PvtConfig", "PvtForImageClassification",
        {"image_size": SIZE, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
         "num_attention_heads": [1, 2, 3, 4]},
    ),
    "pvtv2": (
        "PvtV2Config", "PvtV2ForImageClassification",
        {"image_size": SIZE, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1],
         "num_attention_heads": [1, 2, 3, 4]},
    ),
    "vit": (
        "ViTConfig", "ViTForImageClassification",
        {"image_size": SIZE, "patch_size": 16, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
         "intermediate_size": 48},
    ),
    "dinov2": (
        "Dinov2Config", "Dinov2ForImageClassification",
        {"image_size": SIZE, "patch_size": 16, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
         "mlp_ratio": 2},
    ),
    "bit": (
        "BitConfig", "BitForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "num_groups": 4},
    ),
    "focalnet": (
        "FocalNetConfig", "FocalNetForImageClassification",
        {"image_size": SIZE, "embed_dim": 12, "depths": [1, 1, 2], "hidden_sizes": [12, 24, 48],
         "focal_levels": [2, 2, 2],
         "focal_windows": [3, 3, 3]},
    ),
    "mobilevit": (
        "MobileViTConfig", "MobileViTForImageClassification",
        {"image_size": SIZE, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40]},
    ),
    "mobilevitv2": (
        "MobileViTV2Config", "MobileViTV2ForImageClassification",
        {"image_size": SIZE, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
    ),
    "levit": (
        "LevitConfig", "LevitForImageClassification",
        {"image_size": SIZE, "hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "num_attention_heads": [2, 3, 4],
         "key_dim": [8, 8, 8]},
    ),
    "cvt": (
        "CvtConfig", "CvtForImageClassification",
        {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    ),
    "hgnetv2": (
        "HGNetV2Config", "HGNetV2ForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "stem_channels": [3, 8, 16],
         "stage_in_channels": [16, 16, 24, 32], "stage_mid_channels": [8, 8, 16, 16],
         "stage_out_channels": [16, 24, 32, 40], "stage_num_blocks": [1, 1, 1, 1], "depths": [1, 1, 1, 1]},
    ),
    "convnext maps": (
        "ConvNextConfig", "ConvNextBackbone",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3",
         "stage4"]},
    ),
    "segformer masks": (
        "SegformerConfig", "SegformerForSemanticSegmentation",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4],
         "decoder_hidden_size": 16},
    ),
}  # fmt: skip


def backbone(name: str) -> nn.Module:
    """Build one of them, always the same."""
    import transformers

    config, network, small = BACKBONES[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, network)(getattr(transformers, config)(**_CLASSES, **small))
    return audible_(model)


def audible_(model: nn.Module, seed: int = 3) -> nn.Module:
    """Overwrite every weight with a seeded one that can be heard in the answer, and measure what BatchNorm needs."""
    draw = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, spread: float) -> Tensor:
        return torch.randn(like.shape, generator=draw) * spread

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.squeeze().ndim >= 2:
                weight.copy_(normal(weight, (1.7 / weight[0].numel()) ** 0.5))
            elif "bias" in name:
                weight.copy_(normal(weight, 0.2))
            else:
                weight.copy_(torch.rand(weight.shape, generator=draw) * 0.8 + 0.4)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        model(torch.randn(16, 3, SIZE, SIZE, generator=draw))
    return model.eval()
