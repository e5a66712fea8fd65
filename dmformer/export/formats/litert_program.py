"""A traced PyTorch program -> LiteRT; run as a file by the Python that has ``litert-torch``, and imports no dmformer.

    python litert_program.py ORDER.json

ORDER.json has: ``program``, a file of ``torch.export.save``; ``shape`` and ``input``, of its argument; ``precision``;
``output``, the file to write; ``versions``, where the versions of the packages that did it are written.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def _convert(order: dict[str, Any]) -> None:
    """Write the ``.tflite`` file."""
    import litert_torch
    import torch

    module = torch.export.load(order["program"]).module()
    example = {order["input"]: torch.zeros(order["shape"])}
    litert_torch.convert(module, sample_kwargs=example).export(order["output"])
    packages = ["litert-torch", "torch"]
    if order["precision"] == "fp16":
        _store_in_half(Path(order["output"]))
        packages.append("ai-edge-quantizer")
    Path(order["versions"]).write_text(json.dumps({name: metadata.version(name) for name in packages}), "utf-8")


def _store_in_half(path: Path) -> None:
    """Keep the weights in float16, to be expanded when the file is loaded."""
    from ai_edge_quantizer import qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    reduce = quantizer.Quantizer(str(path))
    reduce.update_quantization_recipe(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        algorithm_key=AlgorithmName.FLOAT_CASTING,
    )
    reduce.quantize().export_model(str(path), overwrite=True)


if __name__ == "__main__":
    _convert(json.loads(Path(sys.argv[1]).read_text("utf-8")))
