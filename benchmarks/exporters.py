"""The two ONNX exporters of PyTorch on the same network: seconds, and what the graph consists of.

Usage: python benchmarks/exporters.py [ARCH]
The one built on torch.export needs the package onnxscript, which dmformer does not: pip install onnxscript
"""

from __future__ import annotations

import collections
import contextlib
import io
import sys
import tempfile
import time
import warnings
from pathlib import Path

import onnx
import torch

from dmformer.export.networks import random_checkpoint
from dmformer.graph.trace import OPSET


def main() -> None:
    """Print a line for each exporter."""
    arch = sys.argv[1] if len(sys.argv) > 1 else "dmformer_s"
    model = random_checkpoint(arch, {}, None, 0).model()
    example = (torch.zeros(2, 3, 224, 224),)
    for name, options in (
        ("tracing (TorchScript)", {"dynamo": False, "dynamic_axes": {"image": {0: "batch"}}}),
        ("torch.export (dynamo)", {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},)}),
    ):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "model.onnx"
            begun = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                torch.onnx.export(model, example, str(path), opset_version=OPSET, input_names=["image"], **options)
            seconds = time.perf_counter() - begun
            graph = onnx.load(path).graph
            operators = collections.Counter(node.op_type for node in graph.node)
        print(f"{arch}: {name}: {seconds:.1f} s, {len(graph.node)} nodes: {dict(operators.most_common())}")


if __name__ == "__main__":
    main()
