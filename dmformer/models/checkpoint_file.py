"""Read the weights out of a file, a folder or several files, by their content and whatever their names.

Read are ``.safetensors``, PyTorch's zip archives and the pickles before them, and both in shards with an index, as
Transformers writes them. What else is called a checkpoint is named and refused. No code of a file is run: pickles are
read as data by ``models/pickled.py``.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from dmformer.errors import UsageError, first_line
from dmformer.models.pickled import Pickled, members_of, read_archive, read_pickle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor  # noqa: TC004 - who asks for the names of the files alone need not have torch

METADATA_KEY = "dmformer"  # of a .safetensors file of this project
_HEAD = 512  # bytes that tell the kind of a file
_AGAIN = "copy or download it again"
_STATE_DICT = "expected a state dict: torch.save(model.state_dict(), FILE)"
# A tag, and text after it: the length that starts a .safetensors file can begin with the bytes " <" as well.
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z][\s -~]{8}")
_FOREIGN = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the weights themselves: git lfs pull"),
    (rb"(\.\./)*(\.git)?/annex/objects/", "a git-annex pointer, not the weights themselves: git annex get"),
    (rb"outs:\s*\n- ", "a DVC pointer, not the weights themselves: dvc pull"),
    (rb"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes them; {_STATE_DICT}"),
    (rb"model_checkpoint_path:", f"TensorFlow's list of checkpoints; {_STATE_DICT}"),
    (rb"(?s).{4}TFL3", f"a LiteRT (TensorFlow Lite) model; {_STATE_DICT}"),
    (rb"(?s).{4}ET\d\d", f"an ExecuTorch program; {_STATE_DICT}"),
    (rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]", f"an ONNX model; {_STATE_DICT}"),
    (rb"GGUF", f"a GGUF file; {_STATE_DICT}"),
    (rb"f?p?trt", f"a TensorRT engine; {_STATE_DICT}"),
    (rb"7767517\s", f"an ncnn network; {_STATE_DICT}"),
    (rb"\x93NUMPY", f"a NumPy array; {_STATE_DICT}"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "compressed: unpack it first"),
    (rb"(?s).{257}ustar", "a tar archive: unpack it; expected the file with the weights"),
)
_LEVELDB_END = bytes.fromhex("57fb808b247547db")  # of the .index of a TensorFlow checkpoint
_SHARD_OF_TENSORFLOW = re.compile(r".*\.data-\d{5}-of-\d{5}")
_PROGRAM = "a program of torch.export, which is a network by itself: export and verify take it as `weights` alone"
# What a zip archive is, by the end of the name of a file in it.
_ARCHIVES = (
    ("/constants.pkl", f"TorchScript, which is code; {_STATE_DICT}, or the network as torch.export.save writes it"),
    ("/archive_format", _PROGRAM),
    ("serialized_exported_program.json", _PROGRAM),
    ("model.weights.h5", f"a Keras model; {_STATE_DICT}"),
    (".npy", f"a NumPy archive; {_STATE_DICT}"),
    (".mlmodel", f"a Core ML model; {_STATE_DICT}"),
)
# What a folder is, by a file in it.
_FOLDERS = (
    ("data.pkl", "an unpacked PyTorch file: pack it again, zip -0 -r FILE.pth FOLDER beside it"),
    ("saved_model.pb", f"a TensorFlow SavedModel; {_STATE_DICT}"),
    (".metadata", "a distributed checkpoint: python -m torch.distributed.checkpoint.format_utils dcp_to_torch"),
    ("zero_to_fp32.py", "a DeepSpeed checkpoint: run the zero_to_fp32.py in it"),
)


class _Index(msgspec.Struct):
    """The index of a checkpoint in shards: the file of each tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class FileWeights:
    """What the files of a checkpoint hold.

    Attributes:
        state: float32 tensors by name.
        metadata: text under :data:`METADATA_KEY`, where there is one.
        sha256: SHA-256 of the file; of an index and its shards one after the other.
        notes: what was chosen, left out or converted, one sentence each.
    """

    state: dict[str, Tensor]
    metadata: str | None
    sha256: str
    notes: tuple[str, ...]


def read_weights(
    path: Path, own: Callable[[str], bool], key: str | None = None, integers: Callable[[str], bool] = lambda _: False
) -> FileWeights:
    """Read the weights of a network, however they were saved.

    Args:
        path: a file, the index of shards, or the folder of one.
        own: whether the network has a tensor of this name; it may know some of the names only.
        key: takes the weights under this key, where the file holds several; ``None`` takes averaged ones.
        integers: whether the network has whole numbers under this name, which stay what they are.

    Raises:
        UsageError: the file cannot be read or is something else; it holds no weights of dense, finite numbers, or
            several sets of them and nothing says which are to be taken.
    """
    from dmformer.models.state_dict import find_state, listed

    files = checkpoint_files(path)
    digest = hashlib.sha256()
    parts: list[tuple[Pickled, str | None]] = []
    for file in files:
        data = _read(file)
        digest.update(data)
        if len(files) == 1 or file != files[0]:  # and no index
            parts.append(_parse(data, file))
    pickled, metadata = parts[0] if len(files) == 1 else (_join(files, [part for part, _ in parts]), None)
    notes: list[str] = []
    state = find_state(pickled, own, title_of(path), key, notes, integers)
    if pickled.names:
        names = listed(sorted(pickled.names))
        notes.append(f"only tensors were loaded, not the classes and functions that the file names: {names}")
    return FileWeights(state, metadata, digest.hexdigest(), tuple(notes))


def title_of(path: Path) -> str:
    """Return what begins every message about a checkpoint."""
    return f"checkpoint {str(path)!r}"


def checkpoint_files(path: Path) -> tuple[Path, ...]:
    """Return the files that a checkpoint is in: the file itself, or an index and the shards that it names.

    Raises:
        UsageError: the folder has no index, or an index cannot be read or names files outside of its folder.
    """
    if path.is_dir():
        path = _index_in(path)
    if not path.name.endswith(".json"):
        return (path,)
    shards = sorted(set(_weight_map(path).values()))
    if wrong := [name for name in shards if name in ("", ".", "..") or re.search(r"[/\\:\x00]", name)]:
        raise UsageError(f"{title_of(path)} names the file {wrong[0]!r}; expected files beside it, without a folder")
    return (path, *(path.with_name(name) for name in shards))


def _index_in(folder: Path) -> Path:
    """Return the index in a folder; ``.safetensors`` before PyTorch's, where both are there."""
    title = title_of(folder)
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UsageError(f"{title} cannot be read: {error.strerror}; expected a file") from error
    indexes = [name for name in names if name.endswith(".index.json")]
    indexes = [name for name in indexes if name.endswith(".safetensors.index.json")] or indexes
    if len(indexes) == 1:
        return folder / indexes[0]
    for name, kind in _FOLDERS:
        if name in names:
            raise UsageError(f"{title} is a directory, {kind}")
    held = ", ".join(ascii(name)[1:-1] for name in (indexes or names)[:6]) or "nothing"
    raise UsageError(
        f"{title} is a directory; expected a file, or the folder of one index and its shards; in it: {held}"
    )


def _weight_map(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(_read(path), type=_Index).weight_map
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(
            f"{title_of(path)} is no index of shards ({first_line(error)}); expected a file with weights"
        ) from error


def _read(path: Path) -> bytes:
    """Read a file that is none of those that are named and refused."""
    title = title_of(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"{title} is a device or a pipe; expected a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{title} cannot be read: {error.strerror}; expected a file") from error
    if not data:
        raise UsageError(f"{title} is empty; expected weights: {_AGAIN}")
    if _PAGE.match(data):
        raise UsageError(f"{title} is an HTML or XML page, not weights: download it again")
    if data[8:9] == b"{":
        return data
    for pattern, kind in _FOREIGN:
        if re.match(pattern, data[:_HEAD]):
            raise UsageError(f"{title} is {kind}")
    if data.endswith(_LEVELDB_END) or _SHARD_OF_TENSORFLOW.fullmatch(path.name):
        raise UsageError(f"{title} is a part of a TensorFlow checkpoint; {_STATE_DICT}")
    return data


def _parse(data: bytes, path: Path) -> tuple[Pickled, str | None]:
    """Return what a file holds and, of this project's ``.safetensors``, its metadata."""
    title = title_of(path)
    if data[8:9] == b"{" or (path.suffix.lower() == ".safetensors" and data[:1] not in (b"P", b"\x80")):
        return _parse_safetensors(data, title)
    try:
        if data[:4] == b"PK\x03\x04":
            return _parse_archive(data, title), None
        if data[:1] == b"\x80":
            return read_pickle(data), None
    except UsageError:
        raise
    except Exception as error:  # damaged bytes raise whatever the code that they reach raises
        reason = ascii(first_line(error))[1:-1][:120]
        raise UsageError(f"{title} is truncated, damaged or no PyTorch checkpoint ({reason}): {_AGAIN}") from error
    raise UsageError(f"{title} is no checkpoint (it begins with {data[:8]!r}); {_STATE_DICT}, or {_AGAIN}")


def _parse_archive(data: bytes, title: str) -> Pickled:
    archive = zipfile.ZipFile(io.BytesIO(data))
    names = archive.namelist()
    for end, kind in _ARCHIVES:
        if any(name.endswith(end) for name in names):
            raise UsageError(f"{title} is {kind}")
    root = next((name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)), None)
    if root is None:
        raise UsageError(f"{title} is a zip archive without weights: unpack it; {_STATE_DICT}")
    unread = len(data)

    def read(name: str) -> bytes:
        nonlocal unread
        entry = archive.getinfo(root + name)
        unread -= entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or unread < 0:  # a small file could ask for any amount of memory
            raise zipfile.BadZipFile(f"{name} is compressed, or overlaps others")
        if entry.CRC == 0:  # PyTorch was told not to compute it
            del entry.CRC
        return archive.read(entry)

    if f"{root}byteorder" in names and read("byteorder") != b"little":
        raise UsageError(f"{title} was written on a big-endian machine; expected little-endian values")
    return read_archive(read)


def _parse_safetensors(data: bytes, title: str) -> tuple[Pickled, str | None]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state = load(data)
        # The format: the header's length as a little-endian u64, then the header in JSON.
        header = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, msgspec.DecodeError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UsageError(f"{title} is no whole .safetensors file ({first_line(error)}): {_AGAIN}") from error
    return Pickled(state, frozenset()), (header.get("__metadata__") or {}).get(METADATA_KEY)


def _join(files: tuple[Path, ...], shards: list[Pickled]) -> Pickled:
    """Return the tensors of all shards, each out of the one that the index names."""
    index, *others = files
    held = {file.name: members_of(shard.content) or {} for file, shard in zip(others, shards, strict=True)}
    content = {}
    for name, file in _weight_map(index).items():
        if name not in held[file]:
            raise UsageError(
                f"{title_of(index.with_name(file))} has no tensor {name!r}, which the index says it has: {_AGAIN}"
            )
        content[name] = held[file][name]
    return Pickled(content, frozenset().union(*(shard.names for shard in shards)))
