"""PyTorch -> ONNX, by tracing.

PyTorch has two exporters. The network has no control flow that depends on data, so both give the same operators for
it, but the TorchScript one traces ``dmformer_s`` in about 2.5 s where the one of ``torch.export`` takes 16 to 20 s
(``benchmarks/exporters.py``), needs no onnxscript, keeps GlobalAveragePool whole, and writes no stack traces. It is
deprecated, so its use is confined to this file and torch's version is bounded in pyproject.toml.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import msgspec
import torch

from dmformer import __version__
from dmformer._optional import require
from dmformer.errors import StageFailed, first_line
from dmformer.graph import onnx_file
from dmformer.models.dmformer import outputs_by_name
from dmformer.runtimes.inspector import module_path
from dmformer.task import INPUT_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import GraphProto
    from torch import nn

    from dmformer.models.checkpoint import Checkpoint

OPSET = 20  # the first with Gelu as one operator; below it, the exporter writes its erf formula out

_TRACED_BATCH = 2  # tracing at 1 could bake a squeeze in


def trace(checkpoint: Checkpoint, model: nn.Module, destination: Path) -> None:
    """Write the network as ONNX: float32, (batch, C, H, W) -> what its task gives, with the batch left open.

    Height and width are left open too where the checkpoint says so.

    Args:
        checkpoint: what the file says of itself.
        model: the network, in its training form or in its deploy form for the checkpoint's side; used up.
        destination: the file.

    Nodes are named ``MODULE/OPERATOR``, for instance ``stages.2.blocks.4.dma.expand/Conv``.

    Raises:
        StageFailed: the exporter failed.
        UnavailableError: onnx is not installed.
    """
    require("onnx", extra="export", purpose="export to ONNX")
    size = checkpoint.preprocessing.image_size
    example = torch.zeros(_TRACED_BATCH, checkpoint.config.in_channels, size, size)
    model.register_forward_hook(lambda _module, _given, result: tuple(outputs_by_name(result).values()))
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                str(destination),
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=list(checkpoint.config.output_names),
                dynamic_axes={
                    name: {axis: side for axis, side in enumerate(shape) if isinstance(side, str)}
                    for name, shape in checkpoint.shapes.items()
                },
            )
    except Exception as error:
        raise StageFailed(f"export to ONNX failed: {first_line(error)}") from error
    exported = onnx_file.read(destination)
    _name_after_modules(exported.graph, {name for name, _ in model.named_modules()})
    onnx_file.write(exported, destination, onnx_metadata(checkpoint))


def onnx_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What every ONNX file says of itself."""
    return {
        "dmformer.version": __version__,
        "dmformer.arch": checkpoint.arch,
        "dmformer.config": msgspec.json.encode(checkpoint.config.to_dict(), order="sorted").decode(),
        "dmformer.classes": msgspec.json.encode(checkpoint.classes).decode(),
        "dmformer.preprocessing": msgspec.json.encode(checkpoint.preprocessing, order="sorted").decode(),
        "dmformer.checkpoint_sha256": checkpoint.sha256 or "",
        "torch.version": torch.__version__,
        "onnx.version": require("onnx", extra="export", purpose="export to ONNX").__version__,
    }


def _name_after_modules(graph: GraphProto, modules: set[str]) -> None:
    """The exporter's ``/stages.2/blocks/blocks.4/dma/expand/Conv`` -> ``stages.2.blocks.4.dma.expand/Conv``.

    A node whose module has no name of its own in the network belongs to the nearest one around it that has.
    """
    taken: set[str] = set()
    for node in graph.node:
        if re.fullmatch(r"Identity_\d+", node.name):  # stands for a parameter that equals another one
            module, operator = node.output[0].rpartition(".")[0], "Identity_" + node.output[0].rpartition(".")[2]
        else:
            module, operator = module_path(node.name), node.name.rpartition("/")[2]
        while module not in modules:
            module = module.rpartition(".")[0]
        name, count = f"{module}/{operator}", 0
        while name in taken:
            count += 1
            name = f"{module}/{operator}_{count}"
        taken.add(name)
        node.name = name
