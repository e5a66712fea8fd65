"""PyTorch -> ONNX, by tracing.

PyTorch has two exporters. The network has no control flow that depends on data, so both give the same operators for
it, but the TorchScript one traces ``dmformer_s`` in about 2.5 s where the one of ``torch.export`` takes 16 to 20 s
(``benchmarks/exporters.py``), needs no onnxscript, keeps GlobalAveragePool whole, and writes no stack traces. It is
deprecated, so it is taken where the installed torch has it and it can write the network, and the other one, which needs
onnxscript, where not. Both are confined to this file, and what either writes is proven by the same checks.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import warnings
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import torch

from dmformer import __version__
from dmformer._optional import require
from dmformer.errors import StageFailed, first_line
from dmformer.graph import onnx_file
from dmformer.models.dmformer import outputs_by_name
from dmformer.process import printing_to_stderr
from dmformer.runtimes.inspector import module_path
from dmformer.task import INPUT_NAME

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from onnx import GraphProto
    from torch import nn

    from dmformer.models.checkpoint import Checkpoint

    _Way = Callable[[Checkpoint, nn.Module, torch.Tensor, Path], None]

OPSET = 20  # the first with Gelu as one operator; below it, the exporter writes its erf formula out

_SCOPES = "pkg.torch.onnx.name_scopes"  # under which torch.export's exporter says to which module a node belongs
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
    failed: list[str] = []
    for way in _ways():
        try:
            with (
                printing_to_stderr(),
                warnings.catch_warnings(),
                torch.inference_mode(way is _by_tracing),
                torch.no_grad(),
            ):
                warnings.simplefilter("ignore")
                way(checkpoint, model, example, destination)
            break
        except Exception as error:  # noqa: BLE001 - exporters raise whatever they meet
            failed.append(first_line(error))
    else:
        raise StageFailed(f"export to ONNX failed: {'; '.join(failed)}")
    exported = onnx_file.read(destination)
    _name_after_modules(exported.graph, {name for name, _ in model.named_modules()})
    onnx_file.write(exported, destination, onnx_metadata(checkpoint))


def _ways() -> list[_Way]:
    """Return the exporters that the installed torch has and can run, the preferred one first.

    Raises:
        UnavailableError: it has the one of ``torch.export`` alone, and onnxscript is not installed.
    """
    ways: list[_Way] = []
    if importlib.util.find_spec("torch.onnx.utils") is not None:  # the tracing exporter's
        ways.append(_by_tracing)
    if not ways:
        require("onnxscript", extra="export", purpose=f"export to ONNX with PyTorch {torch.__version__}")
    if importlib.util.find_spec("onnxscript") is not None:
        ways.append(_by_torch_export)
    return ways


def _by_tracing(checkpoint: Checkpoint, model: nn.Module, example: torch.Tensor, destination: Path) -> None:
    torch.onnx.export(
        model,
        (example,),
        str(destination),
        dynamo=False,
        opset_version=OPSET,
        input_names=[INPUT_NAME],
        output_names=list(checkpoint.config.output_names),
        dynamic_axes=_open_axes(checkpoint),
    )


def _by_torch_export(checkpoint: Checkpoint, model: nn.Module, example: torch.Tensor, destination: Path) -> None:
    sides = {axis: torch.export.Dim(name) for axis, name in _open_axes(checkpoint)[INPUT_NAME].items()}
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT_NAME],
        output_names=list(checkpoint.config.output_names),
        dynamic_shapes=(sides,),
        verbose=False,
    )
    assert program is not None
    program.save(str(destination), external_data=False)
    written = onnx_file.read(destination)
    _name_as_traced(written.graph)
    destination.write_bytes(written.SerializeToString())


def _open_axes(checkpoint: Checkpoint) -> dict[str, dict[int, str]]:
    """Return the name of each open axis of each input and output."""
    return {
        name: {axis: side for axis, side in enumerate(shape) if isinstance(side, str)}
        for name, shape in checkpoint.shapes.items()
    }


def _name_as_traced(graph: GraphProto) -> None:
    """Name nodes and tensors after their modules, as the tracing exporter does: ``/MODULE/OPERATOR_output_0``."""
    del graph.value_info[:]
    kept = {value.name for value in (*graph.output, *graph.input)}
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for node in graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "['', '']")
        module = ast.literal_eval(scopes)[-2:][0]  # before the name of the node itself
        node.name = f"/{module}/{node.op_type}" if module else f"/{node.op_type}"
        for place, name in enumerate(node.output):
            if name and name not in kept:
                title = f"{node.name}_{counts[node.name]}" if counts[node.name] else node.name
                names[name] = node.output[place] = f"{title}_output_{place}"
        counts[node.name] += 1
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)


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
