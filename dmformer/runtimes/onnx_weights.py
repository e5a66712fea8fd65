"""An ONNX file as onnxruntime takes it with less memory: its graph, and its weights left in the file.

onnxruntime reads a whole file, parses it into a second copy, and makes a third one for its kernels. Weights that are
kept in a file beside the graph ("external data") are mapped instead. Nothing says that it has to be another file: the
graph made here names the extents of the weights in the very file that it came from. Field numbers are those of
onnx.proto3.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    """A field that holds bytes: its number, where its tag begins, and where its value begins and ends."""

    number: int
    tag: int
    first: int
    last: int


def fields(data: mmap.mmap | bytes, at: int, end: int) -> Iterator[Field]:
    """Each field of a message that holds bytes (a message, a text, an array); the others are stepped over.

    Raises:
        IndexError: the data ends within a number.
        ValueError: this is no message.
    """
    while at < end:
        begins = at
        tag, at = _varint(data, at, most=5)
        if tag >> 32 or tag >> 3 == 0:
            raise ValueError(f"a field cannot have the tag {tag}")
        kind, length = tag & 7, 0
        if kind == _VARINT:
            _, at = _varint(data, at, most=10)
        elif kind == _BYTES:
            length, at = _varint(data, at, most=5)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:  # groups, which ONNX does not have
            raise ValueError(f"a field cannot be of kind {kind}")
        if at + length > end:
            raise ValueError("a field ends after its message")
        if kind == _BYTES:
            yield Field(tag >> 3, begins, at, at + length)
        at += length


def rewritten(data: mmap.mmap, at: int, end: int, change: Mapping[int, Callable[[Field], bytes | None]]) -> bytes:
    """A message with some of its fields in other words.

    Args:
        data: holds the message.
        at: where it begins.
        end: where it ends.
        change: by number, what takes the place of a field, its tag included; ``None`` leaves it as it is.
    """
    parts = []
    for field in fields(data, at, end):
        new = change[field.number](field) if field.number in change else None
        if new is not None:
            parts += [data[at : field.tag], new]
            at = field.last
    return b"".join([*parts, data[at:end]])


def of_bytes(number: int, value: bytes) -> bytes:
    """A field that holds bytes."""
    return _as_varint(number << 3 | _BYTES) + _as_varint(len(value)) + value


def of_number(number: int, value: int) -> bytes:
    """A field that holds a number which is not negative."""
    return _as_varint(number << 3 | _VARINT) + _as_varint(value)


def _varint(data: mmap.mmap | bytes, at: int, most: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * most, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


def _as_varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


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
