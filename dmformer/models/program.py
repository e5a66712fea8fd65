"""A program of ``torch.export`` (``.pt2``) as a network: no code of anybody's is needed, and none is run.

The archive holds the graph as JSON and the weights as plain bytes, but ``torch.export.load`` takes more than these:
pickles (sample inputs, weights of unusual layouts, objects), compiled libraries, expressions and guards that it
evaluates as Python, and the name of any function below ``torch`` as an operator. So the archive is written anew before
it is loaded, without what is not needed, and refused where something else is left than tensors and operators of
PyTorch's own.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from dmformer.errors import UsageError, first_line
from dmformer.models.checkpoint_file import title_of
from dmformer.models.dmformer import outputs_by_name

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram

_MODEL = re.compile(r"models/[^/]+\.json")
_CONFIG = re.compile(r"data/(weights|constants)/[^/]+_config\.json")
_SAMPLES = re.compile(r"data/sample_inputs/[^/]+")
# Operators of a graph: PyTorch's own, and arithmetic with sizes.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.sym_(int|float|max|min|not|sum)|"
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
)
# What an expression of a size may name; it is evaluated as Python.
_EXPRESSION = re.compile(
    r"(\b(s|u)\d+\b|'(s|u)\d+'|\b(Symbol|Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilToInt|"
    r"ModularIndexing|positive|nonnegative|integer|True|False)\b|[\d\s+*/(),=-])*"
)
_IMPORTS = ("__enum__", "default_factory_module")  # in the description of what it returns: Python would import modules
_WITHOUT_PICKLES = "expected tensors and operators of PyTorch's alone, which nothing has to be run for"
_SAME = 1e-4  # of the largest answer: sums of float32 in another order
_OPEN_BATCH = "torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))"


@dataclass(frozen=True)
class Program:
    """A network out of a program.

    Attributes:
        network: modules of the names that the exported network had, in float32.
        channels: of the image that it takes.
        image_size: side of that image in pixels; ``None`` where the program leaves it open.
    """

    network: torch.nn.Module
    channels: int
    image_size: int | None


def is_program(path: Path) -> bool:
    """Return whether a file is a program of ``torch.export``, by its content."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    ends = ("/archive_format", "serialized_exported_program.json")
    return any(name.endswith(ends) for name in names)


def load_program(path: Path) -> Program:
    """Load a program without running anything that it holds.

    Raises:
        UsageError: it cannot be read, holds more than tensors and operators of PyTorch's own, takes something else than
            one batch of images, or cannot take batches of another size.
    """
    title = title_of(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        safe = _safe_archive(entries, title)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(io.BytesIO(safe))
            batch, channels, image_size = _input(program, title)
            network = _opened(program, batch, channels, image_size, title) if batch else torch.export.unflatten(program)
    except UsageError:
        raise
    except Exception as error:  # damaged bytes raise whatever the code that they reach raises
        raise UsageError(
            f"{title} is a program of torch.export that PyTorch {torch.__version__} cannot load "
            f"({first_line(error)[:200]}); expected one that gives tensors, tuples or dictionaries, saved by "
            "torch.export.save of this version or one before it"
        ) from error
    for module in network.modules():
        graph, graph_module = getattr(module, "graph", None), getattr(module, "graph_module", None)
        if isinstance(graph, torch.fx.Graph):
            _keep_sizes_open(graph)
        for node in graph.nodes if isinstance(graph, torch.fx.Graph) else ():
            node.meta.clear()  # what the trace left here cannot be copied
        if graph_module is not None:
            graph_module.meta.clear()
    return Program(network, channels, image_size)


def _opened(program: ExportedProgram, batch: int, channels: int, image_size: int | None, title: str) -> torch.nn.Module:
    """Return the network of a program for one batch size, with the batch open: ``torch.export`` fixes it unless told.

    Shapes that the program computes to, and that begin with a multiple of its batch, take their first side from the
    other sides instead. That this is the same network is seen by asking both.

    Raises:
        UsageError: it is not, or cannot be asked with other batches.
    """
    fixed, size = program.module(), image_size or 64
    images = torch.rand((2 * batch + 1, channels, size, size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [fixed(images[:batch]), fixed(images[batch : 2 * batch])]
    from_images = {node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs}
    for node in program.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        if from_images.intersection(node.all_input_nodes):
            from_images.add(node)
            node.args = tuple(_open_shape(one, shape, batch) for one in node.args)
    network = torch.export.unflatten(program)
    network.check_input_constraints = False
    answers = [outputs_by_name(part) for part in parts]
    expected = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
    try:
        with torch.no_grad():
            whole, alone = (outputs_by_name(network(images[:rows])) for rows in (2 * batch + 1, 1))
        same = all(
            len(whole[name]) == len(images)
            and _is_close(whole[name][: 2 * batch], truth)
            and _is_close(alone[name], truth[:1])
            for name, truth in expected.items()
        )
    except (RuntimeError, IndexError, TypeError):
        same = False
    if not same:
        raise UsageError(f"{title} takes batches of {batch} alone; expected an open batch size: {_OPEN_BATCH}")
    return network


def _open_shape(argument: Any, shape: tuple[int, ...], batch: int) -> Any:
    """Return a shape that is the result's with its first side open, where that is a multiple of the batch."""
    if not isinstance(argument, (list, tuple)) or len(argument) != len(shape) or not shape or shape[0] % batch:
        return argument
    same = all(given in (side, -1) for given, side in zip(argument, shape, strict=True))
    return [-1, *shape[1:]] if same else argument


def _is_close(found: torch.Tensor, truth: torch.Tensor) -> bool:
    return found.shape == truth.shape and bool((found - truth).abs().max() <= _SAME * truth.abs().max())


def _keep_sizes_open(graph: torch.fx.Graph) -> None:
    """Let what computes with sizes ask the tensors for them by PyTorch's own functions, in place.

    Operators called directly turn sizes into plain numbers, which a trace takes for constants.
    """
    for node in graph.nodes:
        operator = node.target
        if operator is torch.ops.aten.sym_size.int:
            node.target = torch.Tensor.size
        elif hasattr(operator, "overloadpacket") and any(map(_is_size, node.all_input_nodes)):
            name = operator.overloadpacket.__name__
            node.target = getattr(torch.Tensor, name, None) or getattr(torch, name, operator)


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _safe_archive(entries: dict[str, bytes], title: str) -> bytes:
    """Return the archive with what a network needs, and nothing that has to be run.

    Raises:
        UsageError: there is something else in it.
    """
    models = [name for name in entries if _MODEL.fullmatch(name)]
    if any(name.startswith("data/aotinductor/") for name in entries):
        raise UsageError(f"{title} is a compiled program (AOTInductor), which is code; expected torch.export.save's")
    if len(models) != 1:
        raise UsageError(
            f"{title} is a program of torch.export with {len(models)} networks as PyTorch writes them from 2.8 on; "
            "expected one: load it where it was made, and torch.export.save it with a newer PyTorch"
        )
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)  # noqa: SLF001 - the layout that torch.export reads
    for name, data in entries.items():
        kept = data
        if _CONFIG.fullmatch(name):
            _check_config(msgspec.json.decode(data), title)
        elif name in models:
            kept = msgspec.json.encode(_safe_graph(msgspec.json.decode(data), title))
        elif _SAMPLES.fullmatch(name):
            kept = b""  # a pickle that nothing needs
        elif name.startswith((".data/", "extra/")) or name in ("byteorder", "version"):  # the writer has its own
            continue
        elif name.endswith(".pt"):
            raise UsageError(f"{title} holds the pickle {name!r}; {_WITHOUT_PICKLES}")
        writer.write_record(name, kept, len(kept))
    writer.write_end_of_file()
    return buffer.getvalue()


def _check_config(config: Any, title: str) -> None:
    """Refuse tensors that are pickled, and constants that are no tensors."""
    for name, payload in config["config"].items():
        kind = str(payload["path_name"])
        if payload["use_pickle"] or not kind.startswith(("weight_", "tensor_")):
            raise UsageError(f"{title} holds a pickled object, {name!r}; {_WITHOUT_PICKLES}")


def _safe_graph(value: Any, title: str) -> Any:
    """Return a graph's JSON on the CPU and without guards, which are Python; refuse what else would be run."""
    if isinstance(value, list):
        return [_safe_graph(one, title) for one in value]
    if isinstance(value, str) and any(name in value for name in _IMPORTS):
        raise UsageError(f"{title} gives an object of a class of its own; expected tensors, tuples and dictionaries")
    if not isinstance(value, dict):
        return value
    if "target" in value and "inputs" in value and not _OPERATOR.fullmatch(str(value["target"])):
        raise UsageError(f"{title} has the operator {value['target']}; {_WITHOUT_PICKLES}")
    if not _EXPRESSION.fullmatch(str(value.get("expr_str", ""))):
        raise UsageError(f"{title} has a size {str(value['expr_str'])[:80]!r}; expected arithmetic with sizes")
    if value.keys() == {"type", "index"} and value["type"] == "cuda":
        return {"type": "cpu", "index": None}
    safe = {name: _safe_graph(one, title) for name, one in value.items()}
    if "guards_code" in safe:
        safe["guards_code"] = []
    if isinstance(metadata := safe.get("metadata"), dict):
        safe["metadata"] = {name: text for name, text in metadata.items() if name == "nn_module_stack"}
    return safe


def _input(program: ExportedProgram, title: str) -> tuple[int | None, int, int | None]:
    """Return size (``None`` where it is open), channels and side of the one image batch that a program takes."""
    names = program.graph_signature.user_inputs
    given = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [tuple(one.shape) for one in given if isinstance(one, torch.Tensor)]
    if len(names) != 1 or len(shapes) != 1 or len(shapes[0]) != 4:
        raise UsageError(f"{title} takes {len(names)} inputs; expected one, a batch of images (N, C, H, W)")
    batch, channels, *sides = (side if isinstance(side, int) else None for side in shapes[0])
    if channels is None or len({*sides}) != 1:
        raise UsageError(
            f"{title} takes images {shapes[0]}; expected as many rows as columns, and channels that are set"
        )
    return batch, channels, sides[0]
