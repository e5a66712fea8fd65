"""Look into the files of an artifact, by its format and whatever they are called, before an engine or a server does.

Engines choose by content or by name what they take a file for, and read further files that it names or that lie beside
it. So each file is seen to be of the format that was declared, and to lead to no file but those that were checked.

An ONNX file may keep tensors in other files ("external data", onnx.proto3: ``TensorProto.external_data``) and name them
by a path. Those paths are looked at without the onnx package: only the tags of the protocol buffer are walked, along
the fields that lead to tensors; the weights themselves are skipped.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from dmformer.errors import CheckFailed, UsageError, first_line
from dmformer.names import check_name
from dmformer.runtimes.onnx_weights import fields
from dmformer.runtimes.target import contradiction

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Sequence

    from dmformer.files import OpenFile
    from dmformer.runtimes.target import Target

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
_IR = re.compile(rb"(\xef\xbb\xbf)?\s*<(\?xml|net)[\s>]")
_MOST_HEADER = 100 << 20  # of safetensors, as its own parser has it


def inspect_artifact(format_name: str, files: Sequence[OpenFile], target: Target | None = None) -> None:
    """See that the files of an artifact are of its format, and that an engine is led to no other file by them.

    Args:
        format_name: of the artifact; one that no runtime of this version reads is not looked into.
        files: all of them, the one to load first.
        target: what the artifact is tied to, where it is compiled.

    Raises:
        CheckFailed: the main file leads to a file that is not among them, or contradicts the target.
        UsageError: the main file is of another format, or damaged.
    """
    inspect = _INSPECTIONS.get(format_name)
    if inspect is not None:
        inspect(files, target)


def _inspect_onnx(files: Sequence[OpenFile], _: Target | None) -> None:
    main, *others = files
    beside = {file.path for file in others}
    for location in sorted(external_files(main)):
        try:
            check_name(location)
        except UsageError:
            inside = False
        else:
            inside = main.path.parent.joinpath(*PurePosixPath(location).parts) in beside
        if not inside:
            raise CheckFailed(
                f"{main.path}: keeps weights in {location!r}, which is no file of this artifact in the manifest; "
                "expected its weights inside"
            )


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


def _inspect_openvino(files: Sequence[OpenFile], _: Target | None) -> None:
    """OpenVINO takes other formats too, ONNX among them, whatever the file is called."""
    if not _IR.match(files[0].data[:4096]):
        raise UsageError(f"{files[0].path} is damaged, or no OpenVINO IR; expected XML: export it again")


def _inspect_torch(files: Sequence[OpenFile], _: Target | None) -> None:
    """PyTorch's checkpoints come as pickles and as lists of other files as well, which are not taken."""
    main = files[0]
    length = int.from_bytes(main.data[:8], "little")
    reason = f"a header of {length} bytes in a file of {main.bytes}"
    if 2 <= length <= min(_MOST_HEADER, main.bytes - 8):
        try:
            msgspec.json.decode(main.data[8 : 8 + length], type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = first_line(error)
        else:
            return
    raise UsageError(f"{main.path} is damaged, or no .safetensors file: {reason}; export it again")


def _inspect_tensorrt(files: Sequence[OpenFile], target: Target | None) -> None:
    if target is not None and (wrong := contradiction(files[0].data, target)):
        raise CheckFailed(f"{files[0].path}: {wrong}; expected the plan that the manifest describes")


_INSPECTIONS: dict[str, Callable[[Sequence[OpenFile], Target | None], None]] = {
    "onnx": _inspect_onnx,
    "openvino": _inspect_openvino,
    "tensorrt": _inspect_tensorrt,
    "torch": _inspect_torch,
}
