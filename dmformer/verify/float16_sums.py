"""Convolutions and matrix products that add up in float16, as Arm's float16 arithmetic does.

A kernel of onnxruntime, OpenVINO or ncnn there keeps one sum for each value that it gives, in a register of float16,
and rounds it after each product (FMLA: the product itself is not rounded). On x86, and on Arm without that arithmetic,
products of float16 numbers are added up in float32, and only the result is rounded. How far the two are apart grows
with the number of products, and is several times the error of float16 itself.

What is computed here is about what kernels with one sum for each output do; those that keep several sums, or add up in
blocks, mostly round less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def convolve(given: list[Tensor], attributes: dict[str, Any]) -> Tensor | None:
    """Compute ONNX's Conv of two dimensions with sums in float16: (N, C, H, W) -> (N, O, H', W'); ``None`` for others.

    Args:
        given: input, weight (O, C / groups, k, l), and perhaps a bias (O); their values fit in float16.
        attributes: of the node.
    """
    import torch
    from torch.nn import functional as F

    x, weight, bias = given[0], given[1], given[2] if len(given) > 2 else None
    if weight.ndim != 4 or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    groups, (down, right) = attributes.get("group", 1), attributes.get("strides", [1, 1])
    (row_step, column_step), (top, left, bottom, end) = (
        attributes.get("dilations", [1, 1]),
        attributes.get("pads", [0] * 4),
    )
    rows, columns = weight.shape[2:]
    padded = F.pad(x, (left, end, top, bottom)).half().permute(0, 2, 3, 1).contiguous()  # (N, C, H, W) -> (N, H, W, C)
    height = (padded.shape[1] - row_step * (rows - 1) - 1) // down + 1
    width = (padded.shape[2] - column_step * (columns - 1) - 1) // right + 1
    # (O, C / groups, k, l) -> (k, l, C / groups, groups, O / groups)
    taps = weight.half().reshape(groups, -1, *weight.shape[1:]).permute(3, 4, 2, 0, 1).contiguous()
    total = torch.zeros(len(x), height, width, groups, taps.shape[-1], dtype=torch.float16)
    if bias is not None:
        total += bias.half().reshape(groups, -1)
    for image, sums in zip(padded, total, strict=True):  # one by one, so that sums stay in the processor's cache
        by_group = image.unflatten(-1, (groups, -1))
        for row in range(rows):
            for column in range(columns):
                window = by_group[row * row_step :: down, column * column_step :: right][:height, :width]
                for channel, tap in enumerate(taps[row, column]):
                    sums.addcmul_(window[..., channel, None], tap)
    return total.flatten(3).permute(0, 3, 1, 2).to(x.dtype)


def multiply(given: list[Tensor], _attributes: dict[str, Any]) -> Tensor | None:
    """Compute ONNX's MatMul of matrices with sums in float16: (..., M, K) and (..., K, N) -> (..., M, N)."""
    import torch

    left, right = (tensor.half() for tensor in given)
    if left.ndim < 2 or right.ndim < 2:
        return None
    stacked = np.broadcast_shapes(tuple(left.shape[:-2]), tuple(right.shape[:-2]))
    total = torch.zeros(*stacked, left.shape[-2], right.shape[-1], dtype=torch.float16)
    for at in range(left.shape[-1]):
        total.addcmul_(left[..., at : at + 1], right[..., at : at + 1, :])
    return total.to(given[0].dtype)
