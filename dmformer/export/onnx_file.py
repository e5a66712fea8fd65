"""ONNX files as this project writes them: deterministic bytes, our metadata, nothing of the machine that made them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmformer._optional import require

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from onnx import ModelProto


def read(path: Path) -> ModelProto:
    """Parse an ONNX file."""
    onnx = require("onnx", extra="export", purpose="export to ONNX")
    model: ModelProto = onnx.load(path)
    return model


def metadata(model: ModelProto) -> dict[str, str]:
    """What a model says of itself."""
    return {entry.key: entry.value for entry in model.metadata_props}


def write(model: ModelProto, path: Path, says: Mapping[str, str]) -> None:
    """Check the model against the ONNX specification and write it with this metadata, and no other.

    Exporters and simplifiers leave stack traces, file paths and logs in documentation strings and metadata.
    """
    onnx = require("onnx", extra="export", purpose="export to ONNX")
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    model.graph.doc_string = ""
    model.doc_string = ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted(says.items())))
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
