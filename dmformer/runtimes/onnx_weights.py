"""An ONNX file as onnxruntime takes it with less memory: its graph, and its weights left in the file.

onnxruntime reads a whole file, parses it into a second copy, and makes a third one for its kernels. Weights that are
kept in a file beside the graph ("external data") are mapped instead: dmformer_s peaks at 248 MB instead of 374 MB
(docs/measurements.md). Nothing says that it has to be another file: the graph made here names the extents of the
weights in the very file that it came from. Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Mapping

    from dmformer.files import OpenFile


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    """Where in a message a field is that holds bytes: its number, and where its tag, its value and the rest begin."""

    number: int
    tag: int
    first: int
    last: int


def fields(data: mmap.mmap | bytes, at: int, end: int) -> Iterator[Field]:
    """Find each field of a message that holds bytes (a message, a text, an array); step over the others.

    Raises:
        IndexError: the data ends within a number.
        ValueError: this is no message.
    """
    while at < end:
        begins = at
        tag, at = read_varint(data, at, most=5)
        if tag >> 32 or tag >> 3 == 0:
            raise ValueError(f"a field cannot have the tag {tag}")
        kind, length = tag & 7, 0
        if kind == _VARINT:
            _, at = read_varint(data, at, most=10)
        elif kind == _BYTES:
            length, at = read_varint(data, at, most=5)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:  # groups, which ONNX does not have
            raise ValueError(f"a field cannot be of kind {kind}")
        if at + length > end:
            raise ValueError("a field ends after its message")
        if kind == _BYTES:
            yield Field(tag >> 3, begins, at, at + length)
        at += length


def rewrite(data: mmap.mmap | bytes, message: Field, replace: Mapping[int, Callable[[Field], bytes | None]]) -> bytes:
    """Return the value of a message with some of its fields replaced.

    Args:
        data: holds the message.
        message: where in the data it is.
        replace: by number, what takes the place of a field, its tag included; ``None`` leaves it as it is.
    """
    parts, at = [], message.first
    for field in fields(data, at, message.last):
        new = replace[field.number](field) if field.number in replace else None
        if new is not None:
            parts += [data[at : field.tag], new]
            at = field.last
    return b"".join([*parts, data[at : message.last]])


def bytes_field(number: int, value: bytes) -> bytes:
    """Encode a field that holds bytes."""
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value


def number_field(number: int, value: int) -> bytes:
    """Encode a field that holds a number which is not negative."""
    return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)


def read_varint(data: mmap.mmap | bytes, at: int, most: int) -> tuple[int, int]:
    """Read a number of at most so many bytes; gives it, and where it ends."""
    value = 0
    for shift in range(0, 7 * most, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


def _encode_varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


_GRAPH, _INITIALIZER = 7, 5  # of ModelProto; of GraphProto
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 9, 13, 14, 1  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
LEAST_BYTES = 1 << 16  # a page is mapped as a whole, and shapes must be readable in the graph


def refer_to_weights(file: OpenFile) -> bytes | None:
    """Return the model, in which each large initializer says where in the file its weights are.

    The engine looks for the file in its folder. ``None`` where there is no large initializer.

    Raises:
        ValueError: it is no ONNX file; also :class:`IndexError`.
    """
    data, referred = file.data, False

    def reference(raw: Field) -> bytes | None:
        nonlocal referred
        if raw.last - raw.first < LEAST_BYTES:
            return None
        referred = True
        where = {"location": file.path.name, "offset": raw.first, "length": raw.last - raw.first}
        entries = (
            bytes_field(_EXTERNAL_DATA, bytes_field(_KEY, key.encode()) + bytes_field(_VALUE, str(value).encode()))
            for key, value in where.items()
        )
        return b"".join([*entries, number_field(_DATA_LOCATION, _EXTERNAL)])

    def initializer(tensor: Field) -> bytes:
        return bytes_field(_INITIALIZER, rewrite(data, tensor, {_RAW_DATA: reference}))

    def graph(message: Field) -> bytes:
        return bytes_field(_GRAPH, rewrite(data, message, {_INITIALIZER: initializer}))

    model = rewrite(data, Field(0, 0, 0, len(data)), {_GRAPH: graph})
    return model if referred else None
