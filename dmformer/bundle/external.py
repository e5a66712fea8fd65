"""Files that an ONNX file reads its weights from, found without the onnx package.

An ONNX file may keep tensors in other files ("external data", onnx.proto3: ``TensorProto.external_data``) and name
them by a path, which an engine opens on its own. So the path is looked at before an engine sees the file. Only the tags
of the protocol buffer are walked, along the fields that lead to tensors; the weights themselves are skipped.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from dmformer.errors import UsageError
from dmformer.runtimes.protobuf import fields

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ENTRY = "StringStringEntryProto"
# For each message of onnx.proto3 the fields that lead to a TensorProto: number, and the message in it.
FIELDS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto", 22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: _ENTRY},
}  # fmt: skip
_MOST_DEPTH = 100  # as protobuf's own parsers
_MOST_FIELDS = 2_000_000  # seconds of work; a network has some thousands


def external_files(path: Path) -> set[str]:
    """The paths that the tensors of an ONNX file name.

    Raises:
        UsageError: the file is no ONNX file.
    """
    if path.stat().st_size == 0:  # which cannot be mapped
        raise UsageError(f"{path} is empty; expected an ONNX file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return {location for start, end in _entries(data) for location in _location(data, start, end)}
        except (ValueError, IndexError) as error:
            raise UsageError(f"{path} is damaged, or no ONNX file: {error}; export it again") from error


def _entries(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Extents of the entries of every tensor's ``external_data``."""
    waiting, seen = [("ModelProto", 0, len(data), 0)], 0
    while waiting:
        kind, start, end, depth = waiting.pop()
        for field, _, first, last in fields(data, start, end):
            seen += 1
            inner = FIELDS[kind].get(field)
            if seen > _MOST_FIELDS or depth > _MOST_DEPTH:
                raise ValueError(f"more than {_MOST_FIELDS} fields, or {_MOST_DEPTH} messages in one another")
            if inner == _ENTRY:
                yield first, last
            elif inner is not None:
                waiting.append((inner, first, last, depth + 1))


def _location(data: mmap.mmap, start: int, end: int) -> set[str]:
    """The value of an entry whose key is ``location``; of a field that comes twice the last counts."""
    entry = {field: data[first:last].decode() for field, _, first, last in fields(data, start, end)}
    return {entry.get(2, "")} if entry.get(1) == "location" else set()
