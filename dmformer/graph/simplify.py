"""ONNX -> simplified ONNX, with onnxsim in a process of its own.

onnxsim is native code over the whole graph: a crash in it must not take the tool along.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dmformer._optional import require
from dmformer.errors import StageFailed
from dmformer.process import Child

TIMEOUT_S = 900


class Simplifier(Child):
    """onnxsim's process; start it early, for its imports take seconds."""

    def __init__(self) -> None:
        super().__init__("dmformer.graph.simplify:simplify_file", prepare="dmformer.graph.simplify:import_onnxsim")

    def simplify(self, source: Path, destination: Path) -> None:
        """Write the simplified graph of ``source``; metadata is left to the caller. Legal once.

        Raises:
            StageFailed: onnxsim refused, crashed, or took longer than :data:`TIMEOUT_S` seconds.
        """
        try:
            self.call((str(source), str(destination)), type(None), TIMEOUT_S)
        except StageFailed as error:
            raise StageFailed(f"simplification with onnxsim: {error}") from error


def import_onnxsim() -> None:
    """Import onnxsim into this process, without PyTorch and SymPy.

    onnxsim imports them where they are installed, for parts that are not used here; that takes seconds.
    """
    sys.modules["torch"] = sys.modules["sympy"] = None  # type: ignore[assignment]
    require("onnxsim", extra="export", purpose="simplification")


def simplify_file(order: tuple[str, str]) -> None:
    """Read the first file, write the simplified graph to the second."""
    import onnx

    onnxsim = require("onnxsim", extra="export", purpose="simplification")
    source, destination = order
    # onnxsim's own numerical check draws random inputs; ours compares on the golden images.
    simplified, _ = onnxsim.simplify(onnx.load(source), check_n=0)
    Path(destination).write_bytes(simplified.SerializeToString(deterministic=True))
