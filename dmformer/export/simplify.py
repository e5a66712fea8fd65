"""ONNX -> simplified ONNX, with onnxsim in a process of its own.

onnxsim is native code over the whole graph: a crash in it must not take the tool along. Run as a script, this file is
that process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dmformer.errors import StageFailed
from dmformer.machine import child_command

TIMEOUT_S = 900


def simplify(source: Path, destination: Path) -> None:
    """Write the simplified graph of ``source``; metadata is left to the caller.

    Raises:
        StageFailed: onnxsim refused, crashed, or took longer than :data:`TIMEOUT_S` seconds.
    """
    command = [*child_command("dmformer.export.simplify"), str(source), str(destination)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise StageFailed(f"simplification did not end within {TIMEOUT_S} s") from error
    if done.returncode < 0:
        raise StageFailed(f"simplification crashed: onnxsim was ended by signal {-done.returncode}")
    if done.returncode > 0:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise StageFailed(f"simplification failed: {said[-1]}")


def _child(source: str, destination: str) -> None:
    import onnx
    import onnxsim

    # Its own numerical check draws random inputs; ours compares on the golden images.
    simplified, _ = onnxsim.simplify(onnx.load(source), check_n=0)
    Path(destination).write_bytes(simplified.SerializeToString(deterministic=True))


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2])
