"""Pickles read as data: nothing that they name is imported, and nothing that they ask for is called.

A pickle is a small program: it names functions and classes, and says with which arguments to call them. Here each name
becomes a :class:`StandIn`, an inert class that remembers the name, and each call an instance of it that remembers the
arguments. What training scripts keep beside the weights (``argparse.Namespace``, objects of Lightning, mmengine or
OmegaConf, NumPy scalars, paths) is therefore read without its packages and without their code. Tensors are stand-ins
as well, until :func:`to_tensor` makes those that are wanted out of the bytes of the file, with sizes and offsets
checked.

Formats: PyTorch's ``torch/serialization.py`` (the zip archive of 1.6 and later, and the sequence of pickles before
it) and Python's ``pickle.py``.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor  # noqa: TC004 - nothing of torch is needed to know which files a checkpoint has
    from typing_extensions import Self

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# How PyTorch and NumPy say that they rebuild an array.
_ARRAY = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|numpy\.(_?core|core)\.(multiarray\._reconstruct|numeric\._frombuffer)"
)
_PLAIN_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_STORAGE = re.compile(r"torch\.(?:cuda\.)?(\w+)Storage")
_STORAGE_TYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128", "QInt8": "int8", "QUInt8": "uint8", "QInt32": "int32",
    "QUInt4x2": "uint8", "QUInt2x4": "uint8",
}  # fmt: skip
# Names that are understood, so that nothing of what they stand for is lost.
_UNDERSTOOD = re.compile(
    r"collections\.(OrderedDict|defaultdict)|(builtins|__builtin__)\.(set|dict|list|bytearray|complex)|torch\.\w+|torch\.storage\.\w+|_codecs\.encode|numpy\.(ndarray|dtype)"
    rf"|{'|'.join(map(re.escape, _PLAIN_CLASSES))}|{_ARRAY.pattern}"
)


class StandIn:
    """What a pickle calls for, not called: an instance is a call of ``path``, a subclass the name itself.

    Attributes:
        path: module and name, as the pickle has them; they were not imported.
        args: arguments of the call.
        state: what the object's attributes were to become.
        entries: what was put in by key, where it is a mapping.
        elements: what was appended, where it is a sequence or a set.
    """

    __slots__ = ("args", "elements", "entries", "state")
    path = ""

    def __new__(cls, *args: Any, **_: Any) -> Self:
        """Remember the arguments by position; nothing that is made here has others."""
        call = super().__new__(cls)
        call.args, call.state, call.entries, call.elements = args, None, {}, []
        return call

    args: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]
    elements: list[Any]

    def __init__(self, *args: Any, **keywords: Any) -> None: ...

    def __call__(self, *args: Any, **keywords: Any) -> StandIn:
        """Stand for a call of what a call returned."""
        return _named(f"{self.path}()")(*args, **keywords)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, element: Any) -> None:
        """Remember an element; pickles of lists and of sets put them in one by one."""
        self.elements.append(element)

    add = append


@dataclass
class Storage:
    """Bytes of the file that tensors lie in.

    Attributes:
        dtype: name of the type of its values; ``None`` where the tensors tell.
        read: returns the bytes.
        values: a tensor of the bytes, once one was made; tensors that share a storage share it.
    """

    dtype: str | None
    read: Callable[[], bytes]
    values: Tensor | None = field(default=None, repr=False)


class NotDenseError(Exception):
    """The entry is no array of numbers that the file holds one by one; the message says what it is."""


def _named(path: str) -> type[StandIn]:
    return type("StandIn", (StandIn,), {"path": path, "__slots__": ()})


class _Unpickler(pickle._Unpickler):  # noqa: SLF001 - C's allots memory by numbers in the file
    """Python's unpickler, with inert names."""

    def __init__(self, file: io.BytesIO, storage: Callable[[str | None, str, int], Any], names: set[str]) -> None:
        super().__init__(file, encoding="latin1")
        self._storage, self._names, self._classes = storage, names, dict[str, type[StandIn]]()

    def find_class(self, module: str, name: str, /) -> Any:
        path = f"{module}.{name}"
        if not _UNDERSTOOD.fullmatch(path):
            self._names.add(path)
        return self._classes.setdefault(path, _named(path))

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"extension code {code}")

    def persistent_load(self, pid: Any, /) -> Any:
        match pid:
            case ("module", cls, *_):  # a class with its source, before PyTorch 1.6
                return cls
            case ("storage", type() as cls, key, _, int(count), *views) if issubclass(cls, StandIn):
                kind = _STORAGE.fullmatch(cls.path)
                if not any(views) and (kind or cls.path == "torch.storage.UntypedStorage"):
                    dtype = _STORAGE_TYPES.get(kind[1], kind[1]) if kind else None
                    return self._storage(dtype, str(key), count)
        raise pickle.UnpicklingError("a storage of a kind that PyTorch does not write")


@dataclass(frozen=True)
class Pickled:
    """What a pickle holds.

    Attributes:
        content: built of Python's own containers, numbers and texts, and of stand-ins.
        names: functions and classes that the pickle asks for, beyond those that rebuild arrays; none was imported.
    """

    content: Any
    names: frozenset[str]


def read_archive(read: Callable[[str], bytes]) -> Pickled:
    """Read PyTorch's zip archive.

    Args:
        read: returns the file in the archive that has this name.

    Raises:
        Exception: of any kind, where the archive is damaged: the code that reads damaged bytes may raise anything.
    """
    names: set[str] = set()
    storages: dict[str, Storage] = {}

    def storage(dtype: str | None, key: str, _: int) -> Storage:
        if key not in storages:
            storages[key] = Storage(dtype, functools.partial(read, f"data/{key}"))
        return storages[key]

    content = _Unpickler(io.BytesIO(read("data.pkl")), storage, names).load()
    return Pickled(content, frozenset(names))


def read_pickle(data: bytes) -> Pickled:
    """Read a plain pickle, or the sequence of pickles and storages that PyTorch wrote before 1.6.

    Raises:
        Exception: of any kind, where the data are damaged: the code that reads damaged bytes may raise anything.
    """
    file, names = io.BytesIO(data), set[str]()
    storages: dict[str, tuple[Storage, int]] = {}

    def storage(dtype: str | None, key: str, count: int) -> Storage:
        return storages.setdefault(key, (Storage(dtype, bytes), count))[0]

    def load() -> Any:
        return _Unpickler(file, storage, names).load()

    content = load()
    if content != LEGACY_MAGIC:
        return Pickled(content, frozenset(names))
    if (protocol := load()) != _LEGACY_PROTOCOL:
        raise pickle.UnpicklingError(f"protocol {protocol}")
    if load().get("little_endian") is not True:
        raise pickle.UnpicklingError("written on a big-endian machine")
    content = load()
    view = memoryview(data)
    for key in load():
        stored, count = storages[str(key)]
        length = int.from_bytes(file.read(8), "little") * (1 if stored.dtype is None else _dtype(stored.dtype).itemsize)
        part = view[file.tell() : file.tell() + length]
        if length < count or len(part) < length:
            raise EOFError("storages end early")
        stored.read = part.tobytes
        file.seek(length, io.SEEK_CUR)
    return Pickled(content, frozenset(names))


def is_array(value: Any) -> bool:
    """Return whether the value is a tensor or an array that was not made yet."""
    return isinstance(value, StandIn) and _ARRAY.fullmatch(value.path) is not None


def to_tensor(value: StandIn) -> Tensor:
    """Make the tensor that a stand-in is for, out of the bytes of the file.

    Raises:
        NotDenseError: it is sparse, quantised, without values, of a subclass, or no tensor at all.
        Exception: of any other kind, where the arguments make no tensor.
    """
    name, args = value.path.rpartition(".")[2], value.args
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return to_tensor(args[0])
    if name == "_rebuild_from_type_v2":
        function, cls, arguments = args[:3]
        if cls.path not in _PLAIN_CLASSES:
            raise NotDenseError(f"a tensor subclass, {cls.path}")
        return to_tensor(function(*arguments))
    if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        storage, offset, size, stride, *rest = args
        dtype = rest[2].path.removeprefix("torch.") if name.endswith("v3") else None
        return _tensor_in(storage, dtype, offset, size, stride)
    if name == "_reconstruct":
        _, shape, dtype, fortran, data = value.state
        return _tensor_of_array(data, dtype, shape, "F" if fortran else "C")
    if name == "_frombuffer":
        return _tensor_of_array(*args)
    kinds = {
        "_rebuild_sparse_tensor": "a sparse tensor",
        "_rebuild_qtensor": "a quantised tensor",
        "_rebuild_meta_tensor_no_storage": "a tensor without values (device meta)",
        "_rebuild_nested_tensor": "a nested tensor",
        "_rebuild_wrapper_subclass": "a tensor subclass",
    }
    layout = args[0].args[0] if name == "_rebuild_sparse_tensor" else value.path
    raise NotDenseError(f"{kinds.get(name, 'no tensor')}, {layout}")


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise NotDenseError(f"a tensor of type {name}")
    return dtype


def _tensor_in(storage: Any, dtype: str | None, offset: int, size: Any, stride: Any) -> Tensor:
    """Return the view of a storage; PyTorch checks that it stays inside."""
    import torch

    if isinstance(storage, StandIn) and storage.path == "torch.storage._load_from_bytes":  # in a plain pickle
        storage = read_pickle(_bytes_in(storage.args[0])).content
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    if storage.values is None:
        copied = bytearray(storage.read())
        storage.values = torch.frombuffer(copied, dtype=torch.uint8) if copied else torch.empty(0, dtype=torch.uint8)
    values = storage.values.view(_dtype(dtype or storage.dtype or "uint8"))
    return values.as_strided(size, stride, offset)


def _tensor_of_array(data: Any, dtype: Any, shape: Any, order: str) -> Tensor:
    """Return a NumPy array as a tensor."""
    import numpy as np
    import torch

    code = dtype.args[0]
    if not re.fullmatch(r"[biuf][1248]|c8|c16", code):
        raise NotDenseError(f"an array of {code}")
    byte_order = dtype.state[1] if dtype.state and dtype.state[1] in ("<", ">") else ""
    array = np.frombuffer(_bytes_in(data), dtype=byte_order + code).reshape(shape, order="F" if order == "F" else "C")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _bytes_in(value: Any) -> bytes:
    """Return bytes, which a pickle may hold as a text to be encoded."""
    if isinstance(value, StandIn) and value.path == "_codecs.encode":
        return str(value.args[0]).encode("latin1")
    return bytes(memoryview(value))


def members_of(value: Any) -> Mapping[Any, Any] | None:
    """Return what an object of a pickle holds by name; ``None`` where it is no container.

    A network that was pickled whole gives what its ``state_dict`` would: parameters, those buffers that are kept, and
    the modules inside it. Of other objects, their entries or attributes are returned; of lists, by position, those
    elements that are no plain values.
    """
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        containers = (Mapping, list, tuple, StandIn)
        return {str(index): element for index, element in enumerate(value) if isinstance(element, containers)}
    if not isinstance(value, StandIn) or is_array(value):
        return None
    if is_module(value):
        dropped = value.state.get("_non_persistent_buffers_set", ())
        dropped = dropped.args[0] if isinstance(dropped, StandIn) and dropped.args else dropped
        buffers = {name: buffer for name, buffer in _pairs(value, "_buffers") if name not in dropped}
        members = {**dict(_pairs(value, "_parameters")), **buffers, **dict(_pairs(value, "_modules"))}
        return {name: member for name, member in members.items() if member is not None}
    entries = value.entries or (dict(value.args[0]) if value.path == "collections.OrderedDict" and value.args else None)
    return entries or (value.state if isinstance(value.state, dict) else None)


def is_module(value: Any) -> bool:
    """Return whether the value is a network or a part of one that was pickled with its code."""
    return (
        isinstance(value, StandIn) and isinstance(value.state, dict) and {"_parameters", "_modules"} <= {*value.state}
    )


def _pairs(module: StandIn, name: str) -> list[tuple[Any, Any]]:
    return list((members_of(module.state.get(name)) or {}).items())
