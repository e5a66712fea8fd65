"""ONNX -> OpenVINO IR."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dmformer._optional import require
from dmformer.errors import StageFailed, first_line
from dmformer.export.formats import Converted, versions
from dmformer.process import Limited

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.export.formats import ConversionSource


def to_openvino(source: ConversionSource, folder: Path) -> Converted:
    """Write ``model.xml`` and ``model.bin``, in the precision of the ONNX file.

    OpenVINO's own default is to store float32 weights as float16; here precision is what was asked for.

    Raises:
        StageFailed: OpenVINO refused the graph.
        UnavailableError: openvino is not installed.
    """
    ov = require("openvino", extra="openvino", purpose="export to openvino")
    path = folder / "model.xml"
    try:
        with Limited(f"openvino converting {source.onnx.name}"):
            model = ov.Core().read_model(str(source.onnx))
            _name_by_position(model)
            ov.save_model(model, str(path), compress_to_fp16=False)
    except Exception as error:  # names that are no text, too
        raise StageFailed(f"conversion to OpenVINO failed: {_cause(error)}") from error
    return Converted((path, path.with_suffix(".bin")), versions("openvino"))


def _cause(error: Exception) -> str:
    """Return the line that says why a node was refused, which OpenVINO puts after places in its own source."""
    node = re.search(r"validating ONNX node '<Node\((\w+)\): ([^>]*)>'", str(error))
    if node is None:
        return first_line(error)
    reason = [line for line in str(error).splitlines() if line.strip() and not line.startswith(("Summary", "--"))][-1]
    return f"{node[1]} {node[2]}: {reason.strip()}"


def _name_by_position(model: Any) -> None:
    """Name what the ONNX file does not: OpenVINO numbers such nodes over the whole process, so bytes would differ."""
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}_{index}")
