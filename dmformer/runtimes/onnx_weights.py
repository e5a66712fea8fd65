"""An ONNX file as onnxruntime takes it with less memory: its graph, and its weights left in the file.

onnxruntime reads a whole file, parses it into a second copy, and makes a third one for its kernels. Weights that are
kept in a file beside the graph ("external data") are mapped instead: dmformer_s peaks at 248 MB instead of 374 MB
(docs/measurements.md). Nothing says that it has to be another file: the graph made here names the extents of the
weights in the very file that it came from. Field numbers are those of onnx.proto3.

For the same reason a stranger's ONNX file may lead onnxruntime to any file of the machine. :func:`external_files` tells
which other files it names, without the onnx package: only the tags of the protocol buffer are walked, along the fields
that lead to tensors; the weights themselves are skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dmformer.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Mapping

    from dmformer.files import OpenFile


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
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
_OPERATOR = 4  # op_type of NodeProto
_COMPILED = b"EPContext"  # onnxruntime's node for what an execution provider compiled, in another file where it says so
_MOST_DEPTH = 100  # as protobuf's own parsers
_MOST_FIELDS = 2_000_000  # seconds of work; a network has some thousands
_ORT_FORMAT = b"ORTM"  # at byte 4: onnxruntime takes it for a file of its own format, whatever it is called


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


def external_files(file: OpenFile) -> set[str]:
    """Return the paths of other files that the tensors of an ONNX file name.

    Raises:
        CheckFailed: it has a node that is compiled code.
        UsageError: the file is no ONNX file.
    """
    data, path = file.data, file.path
    if not data:
        raise UsageError(f"{path} is empty; expected an ONNX file")
    if data[4:8] == _ORT_FORMAT:
        raise UsageError(f"{path} is of onnxruntime's own format; expected an ONNX file")
    try:
        return {location for start, end in _entries(file) for location in _location(data, start, end)}
    except (ValueError, IndexError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is damaged, or no ONNX file: {error}; export it again") from error


def _entries(file: OpenFile) -> Iterator[tuple[int, int]]:
    """Give start and end of each entry of each tensor's ``external_data``."""
    data = file.data
    waiting, seen = [("ModelProto", 0, len(data), 0)], 0
    while waiting:
        kind, start, end, depth = waiting.pop()
        for field, _, first, last in fields(data, start, end):
            seen += 1
            inner = FIELDS[kind].get(field)
            if seen > _MOST_FIELDS or depth > _MOST_DEPTH:
                raise ValueError(f"more than {_MOST_FIELDS} fields, or {_MOST_DEPTH} messages in one another")
            if kind == "NodeProto" and field == _OPERATOR and data[first:last] == _COMPILED:
                raise CheckFailed(f"{file.path}: has a node {_COMPILED.decode()}, compiled code; expected a network")
            if inner == _ENTRY:
                yield first, last
            elif inner is not None:
                waiting.append((inner, first, last, depth + 1))


def _location(data: mmap.mmap | bytes, start: int, end: int) -> set[str]:
    """Return the value of an entry whose key is ``location``; of a field that comes twice the last counts."""
    entry = {field: data[first:last].decode() for field, _, first, last in fields(data, start, end)}
    return {entry.get(2, "")} if entry.get(1) == "location" else set()
