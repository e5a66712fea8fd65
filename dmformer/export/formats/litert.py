"""PyTorch -> LiteRT, by ``litert-torch`` in a Python of its own: it needs 2 GB that nothing else does.

The network is traced here by ``torch.export``; :mod:`dmformer.export.formats.litert_program` does the rest there. The
input stays (N, C, H, W): the converter puts one transposition at its beginning.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dmformer.errors import StageFailed, UnavailableError, UsageError, first_line
from dmformer.export.formats import Converted, run_converter
from dmformer.task import INPUT_NAME

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dmformer.export.formats import ConversionSource
    from dmformer.export.options import EngineOptions

PYTHON = "DMFORMER_LITERT_PYTHON"


def check_converter(engine: EngineOptions) -> None:
    """Make sure that a Python with ``litert-torch`` is there, as far as one sees without starting it.

    Raises:
        UnavailableError: there is none.
    """
    del engine
    _python()


def _python() -> str:
    """Return the Python that converts: the one that the environment names, or this one."""
    named = os.environ.get(PYTHON, "")
    if named and not os.access(named, os.X_OK):
        raise UnavailableError(f"{PYTHON}={named}, which cannot be run; expected a Python that has litert-torch")
    if named or find_spec("litert_torch") is not None:
        return named or sys.executable
    raise UnavailableError(
        "conversion to LiteRT needs the package 'litert-torch' (2 GB), which is not installed; run: python -m venv "
        "litert && litert/bin/pip install 'torch==2.13.*' 'litert-torch==0.10.*' ai-edge-quantizer, and set "
        f"{PYTHON}=litert/bin/python"
    )


def to_litert(source: ConversionSource, folder: Path) -> Converted:
    """Write ``model.tflite``, with weights in float16 at that precision, for one image of one size.

    Raises:
        StageFailed: ``torch.export`` or litert-torch failed.
        UnavailableError: there is no Python with litert-torch.
        UsageError: there is no network to start from.
    """
    python, path = _python(), folder / "model.tflite"
    if source.checkpoint is None or source.form is None:
        raise UsageError("format litert is made from a network in PyTorch; expected: dmformer export --format litert")
    shape = [1, *(int(size) for size in source.checkpoint.shapes[INPUT_NAME][1:])]
    with tempfile.TemporaryDirectory(prefix="dmformer-") as scratch:
        program, order, versions = (Path(scratch) / name for name in ("network.pt2", "order.json", "versions.json"))
        _trace(source.form(), shape, program)
        content = {
            "program": str(program),
            "shape": shape,
            "input": INPUT_NAME,
            "precision": source.precision,
            "output": str(path.resolve()),
            "versions": str(versions),
        }
        order.write_bytes(msgspec.json.encode(content))
        run_converter(
            "LiteRT", [python, str(Path(__file__).with_name("litert_program.py")), str(order)], scratch, versions
        )
        built_with = msgspec.json.decode(versions.read_bytes(), type=dict[str, str])
    return Converted((path,), built_with, engine_batch=1)


def _trace(form: nn.Module, shape: list[int], path: Path) -> None:
    """Trace a network whose input and outputs have the names of the exported formats."""
    import torch

    from dmformer.models.dmformer import outputs_by_name

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = form.eval()

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return outputs_by_name(self.network(image))

    try:
        torch.export.save(torch.export.export(Named(), (), {INPUT_NAME: torch.zeros(shape)}), path)
    except Exception as error:  # whatever a network of one's own raises
        raise StageFailed(f"conversion to LiteRT failed in torch.export: {first_line(error)}") from error
