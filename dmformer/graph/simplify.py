"""ONNX -> simplified ONNX, with onnxsim in a process of its own.

onnxsim is native code over the whole graph: a crash in it must not take the tool along. Run as a script, this file is
that process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dmformer.errors import StageFailed
from dmformer.process import Child

TIMEOUT_S = 900


class Simplifier(Child):
    """onnxsim's process; start it early, for its imports take seconds."""

    def __init__(self) -> None:
        super().__init__("dmformer.graph.simplify")

    def simplify(self, source: Path, destination: Path) -> None:
        """Write the simplified graph of ``source``; metadata is left to the caller. Legal once.

        Raises:
            StageFailed: onnxsim refused, crashed, or took longer than :data:`TIMEOUT_S` seconds.
        """
        try:
            self.work(json.dumps([str(source), str(destination)]).encode(), TIMEOUT_S)
        except StageFailed as error:
            raise StageFailed(f"simplification with onnxsim: {error}") from error


def _main() -> None:
    # onnxsim imports them where they are installed, for parts that are not used here; that takes seconds.
    sys.modules["torch"] = sys.modules["sympy"] = None  # type: ignore[assignment]
    import onnx
    import onnxsim

    source, destination = json.load(sys.stdin)
    # Its own numerical check draws random inputs; ours compares on the golden images.
    simplified, _ = onnxsim.simplify(onnx.load(source), check_n=0)
    Path(destination).write_bytes(simplified.SerializeToString(deterministic=True))


if __name__ == "__main__":
    _main()
