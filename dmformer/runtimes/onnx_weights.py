"""An ONNX file as onnxruntime takes it with less memory: its graph, and its weights left in the file.

onnxruntime reads a whole file, parses it into a second copy, and makes a third one for its kernels. Weights that are
kept in a file beside the graph ("external data") are mapped instead. Nothing says that it has to be another file: the
graph made here names the extents of the weights in the very file that it came from. Field numbers are those of
onnx.proto3.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from dmformer.runtimes.protobuf import Field, of_bytes, of_number, rewritten

if TYPE_CHECKING:
    from pathlib import Path

_GRAPH, _INITIALIZER = 7, 5  # of ModelProto; of GraphProto
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 9, 13, 14, 1  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
LEAST_BYTES = 1 << 16  # a page is mapped as a whole, and shapes must be readable in the graph


def without_weights(path: Path) -> bytes | None:
    """The model, in which each large initializer says where in the file it is; ``None`` where there is none.

    The engine looks for it in the file's folder.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no ONNX file; also :class:`IndexError`.
    """
    found = False

    def initializer(data: mmap.mmap, tensor: Field) -> bytes:
        def elsewhere(raw: Field) -> bytes | None:
            nonlocal found
            if raw.last - raw.first < LEAST_BYTES:
                return None
            found = True
            where = {"location": path.name, "offset": raw.first, "length": raw.last - raw.first}
            entries = (
                of_bytes(_EXTERNAL_DATA, of_bytes(_KEY, key.encode()) + of_bytes(_VALUE, str(value).encode()))
                for key, value in where.items()
            )
            return b"".join([*entries, of_number(_DATA_LOCATION, _EXTERNAL)])

        return of_bytes(_INITIALIZER, rewritten(data, tensor.first, tensor.last, {_RAW_DATA: elsewhere}))

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:

        def graph(whole: Field) -> bytes:
            inner = rewritten(data, whole.first, whole.last, {_INITIALIZER: lambda tensor: initializer(data, tensor)})
            return of_bytes(_GRAPH, inner)

        model = rewritten(data, 0, len(data), {_GRAPH: graph})
    return model if found else None
