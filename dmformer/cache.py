"""Results of work, kept by the content of everything that they were made from.

    entries/KEY     what was made, when, and the SHA-256 of its value and of each of its files
    objects/SHA     values and files, each once, named after their SHA-256

KEY is the digest of the work's name and inputs, of every file of this package, the versions of whatever takes part, and
the machine: a change in any of them finds nothing. Files and arrays count by their content. An object is used only
after it was hashed again; what is damaged is removed and made anew. Any number of processes may work in one cache.

``DMFORMER_CACHE`` names another folder than the user's own, or none at all where it is empty;
``DMFORMER_CACHE_LIMIT_MB`` says how large it may grow: what was not used for longest goes first.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from dmformer.errors import UsageError
from dmformer.files import Sha256, decode_json, hash_file, hash_pieces, open_regular, read_bounded, read_pieces
from dmformer.machine import describe_processor, usable_cores
from dmformer.names import check_name
from dmformer.ownership import exposure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

FOLDER = "DMFORMER_CACHE"
LIMIT_MB = "DMFORMER_CACHE_LIMIT_MB"
_DEFAULT_LIMIT_MB = 4096
_LOCK_S = 60.0
_MOST_ENTRY_BYTES = 16 << 20
_PACKAGES = (
    "numpy", "pillow", "msgspec", "safetensors", "torch", "onnx", "onnxsim", "onnxruntime", "openvino", "tensorrt",
    "tensorrt-rtx", "cuda-bindings", "ncnn", "pnnx",
    "ai-edge-litert", "litert-torch", "ai-edge-quantizer",
)  # fmt: skip


class CacheEntry(Struct, frozen=True, kw_only=True):
    """What ``entries/KEY`` holds.

    Attributes:
        what: the work, for people.
        made: when, in UTC, as in RFC 3339.
        value: SHA-256 of the value.
        objects: sizes in bytes of everything that the entry needs, its value too, by SHA-256.
    """

    what: str
    made: str
    value: Sha256
    objects: dict[Sha256, int]

    @property
    def bytes(self) -> int:
        """Size of all that it needs; entries may share objects."""
        return sum(self.objects.values())


class _StoredFile(Struct, frozen=True):
    """How a value has a file: its path below the root, and the object that is its content."""

    path: str
    sha256: Sha256


class _StoredArray(Struct, frozen=True):
    """How a value has an array."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Listed(Struct, frozen=True, kw_only=True):
    """An entry of a cache's report: its size in bytes, when it was made and when it was last used (UTC, RFC 3339)."""

    what: str
    bytes: int
    made: str
    used: str


class CacheReport(Struct, frozen=True, kw_only=True):
    """What a cache holds, and how large it may grow; ``bytes`` counts what entries share once."""

    folder: str
    bytes: int
    limit_bytes: int
    entries: tuple[Listed, ...]


class Cached(Struct, frozen=True, kw_only=True):
    """Work that was done earlier, on this machine, with the same inputs and versions; its result was taken then.

    Attributes:
        what: the work.
        made: when it was done, in UTC, as in RFC 3339.
    """

    what: str
    made: str


class Cache:
    """Results of work in a folder, which is made with the first entry; without a folder all work is always done.

    Attributes:
        folder: where results are kept; ``None`` for a cache that finds nothing and keeps nothing.
        limit_bytes: how large the folder may grow.
        taken: work that was not done, because its result was there.
        trouble: why results could not be kept, where they could not.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = _DEFAULT_LIMIT_MB << 20) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.taken: list[Cached] = []
        self.trouble: str | None = None
        self._surroundings: str | None = None

    def get_or_make(
        self,
        what: str,
        inputs: object,
        kind: type[T],
        make: Callable[[], T],
        root: Path,
        sound: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """Return what ``make`` gives, or gave for the same inputs.

        Args:
            what: name of the work.
            inputs: everything that it depends on but the machine and the versions: what msgspec encodes, paths of files
                and arrays. Paths count by what is in the files.
            kind: type of the value: what msgspec decodes, paths of files below ``root``, and arrays.
            make: does the work.
            root: the folder in which the value's files are, or are put.
            sound: whether a value may be kept.
        """
        key = self.key(what, inputs)
        kept = self.find(key, kind, root)
        if kept is not None:
            return kept
        value = make()
        if sound(value) and self.key(what, inputs) == key:  # otherwise a file has changed while the work was done
            self.keep(key, what, value, root)
        return value

    def digest(self, value: object) -> str:
        """Return the SHA-256 of a value, to stand for it among inputs where it would be hashed more than once."""
        return "" if self.folder is None else digest(value)

    def key(self, what: str, inputs: object) -> str:
        """Return what stands for a piece of work: the digest of its name, its inputs, the versions and the machine.

        It is empty, and stands for nothing, where there is no folder.
        """
        if self.folder is None:
            return ""
        if self._surroundings is None:
            self._surroundings = digest(surroundings())
        return digest([what, self._surroundings, inputs])

    def holds(self, key: str) -> bool:
        """Whether there is an entry; whether it is undamaged is not known before :meth:`find`."""
        return bool(key) and (self._entries / key).is_file()

    def find(self, key: str, kind: type[T], root: Path) -> T | None:
        """Return a value, its files written below ``root``; ``None`` where there is none, or a damaged one."""
        if not key:
            return None
        written: list[Path] = []
        try:
            entry = _read_entry(self._entries / key)
            data = _read_object(self._objects / entry.value)

            def decode(wanted: type, raw: Any) -> Any:
                if wanted is not Path:
                    array = msgspec.convert(raw, _StoredArray)
                    return np.frombuffer(array.data, array.dtype).reshape(array.shape).copy()
                stored = msgspec.convert(raw, _StoredFile)
                check_name(stored.path)
                destination = root / stored.path
                destination.parent.mkdir(parents=True, exist_ok=True)
                written.append(destination)
                _copy_object(self._objects / stored.sha256, destination)
                return destination

            value = _decode_value(data, kind, decode)
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # not there, or not any more, or not for us
            _remove(written)
            return None
        except _Damaged as error:
            _remove([*written, self._entries / key, *(self._objects / sha256 for sha256 in error.args)])
            return None
        except BaseException:
            _remove(written)
            raise
        with suppress(OSError):  # of a cache that may be read only
            os.utime(self._entries / key)
        self.taken.append(Cached(what=entry.what, made=entry.made))
        return value

    def keep(self, key: str, what: str, value: object, root: Path) -> None:
        """Keep a value and its files; a cache that cannot be written is no failure: ``trouble`` says why."""
        if not key:
            return
        objects: dict[str, int] = {}
        try:
            with self._locked():

                def encode(part: Any) -> Any:
                    if not isinstance(part, Path):
                        array = np.ascontiguousarray(part)
                        return {"dtype": array.dtype.str, "shape": part.shape, "data": array.tobytes()}
                    sha256, size = self._adopt(part)
                    objects[sha256] = size
                    return {"path": part.relative_to(root).as_posix(), "sha256": sha256}

                try:
                    data = msgspec.msgpack.encode(value, enc_hook=encode)
                    sha256 = hashlib.sha256(data).hexdigest()
                    objects[sha256] = len(data)
                    self._write(self._objects / sha256, data)
                    entry = CacheEntry(what=what, made=_utc(datetime.now(timezone.utc)), value=sha256, objects=objects)
                    content = msgspec.json.encode(entry)
                    self._write(self._entries / key, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                finally:  # objects of an entry that could not be written would fill a full disk for good
                    self._evict(key)
        except OSError as error:
            self.trouble = f"{error.strerror or error}: {str(self.folder)!r}"

    def report(self) -> CacheReport:
        """What it holds, the last used first."""
        found = sorted(self._whole_entries(), key=lambda pair: -pair[1])
        objects = {sha256: size for _, _, entry in found for sha256, size in entry.objects.items()}
        return CacheReport(
            folder=str(self.folder),
            bytes=sum(objects.values()),
            limit_bytes=self.limit_bytes,
            entries=tuple(
                Listed(
                    what=entry.what,
                    bytes=entry.bytes,
                    made=entry.made,
                    used=_utc(datetime.fromtimestamp(used, timezone.utc)),
                )
                for _, used, entry in found
            ),
        )

    def clear(self) -> None:
        """Remove everything."""
        if self.folder is not None and self.folder.is_dir():
            with self._locked():
                shutil.rmtree(self._entries, ignore_errors=True)
                shutil.rmtree(self._objects, ignore_errors=True)

    @property
    def _entries(self) -> Path:
        assert self.folder is not None
        return self.folder / "entries"

    @property
    def _objects(self) -> Path:
        assert self.folder is not None
        return self.folder / "objects"

    def _locked(self) -> Any:
        """Against another process that removes what this one is about to need."""
        from filelock import FileLock

        assert self.folder is not None
        _make_private(self.folder)
        return FileLock(self.folder / "lock", timeout=_LOCK_S)

    def _adopt(self, path: Path) -> tuple[str, int]:
        """Copy a file in; return its SHA-256 and size."""
        sha256, size = hash_file(path)
        if not (self._objects / sha256).exists():
            with self._put(self._objects / sha256) as new:
                shutil.copyfile(path, new)
        return sha256, size

    def _write(self, path: Path, data: bytes) -> None:
        with self._put(path) as new:
            new.write_bytes(data)

    @contextmanager
    def _put(self, path: Path) -> Iterator[Path]:
        """Give a path to write to, which becomes ``path`` when the block ends without an error."""
        for folder in (self._objects, self._entries):
            _make_private(folder)
            folder.chmod(0o700)  # versions before made them as other folders
        new = self._objects / f"new-{secrets.token_hex(8)}"
        try:
            yield new
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)

    def _whole_entries(self) -> Iterator[tuple[Path, float, CacheEntry]]:
        """Path, time of the last use in seconds, and content of each entry that can be read."""
        for path in sorted(self._entries.glob("*")):
            with suppress(FileNotFoundError, _Damaged):
                yield path, path.stat().st_mtime, _read_entry(path)

    def _evict(self, newest: str) -> None:
        """Entries that were not used for longest, until the rest is within the limit; and objects of no entry."""
        found = sorted(self._whole_entries(), key=lambda pair: (pair[0].name == newest, pair[1]), reverse=True)
        kept: dict[str, int] = {}
        for path, _, entry in found:
            together = kept | entry.objects
            if sum(together.values()) > self.limit_bytes:
                path.unlink()
            else:
                kept = together
        for path in self._objects.glob("*"):
            if path.name not in kept:
                path.unlink()


def open_cache() -> Cache:
    """Return the cache that the environment names, or else the user's own.

    Raises:
        UsageError: the limit in the environment is no number.
    """
    import platformdirs

    named = os.environ.get(FOLDER)
    if named is not None and not named:
        return Cache()
    limit = os.environ.get(LIMIT_MB, str(_DEFAULT_LIMIT_MB))
    if not limit.isdecimal():
        raise UsageError(f"{LIMIT_MB} is {limit!r}; expected a whole number of MiB")
    try:
        folder = Path(named) if named else platformdirs.user_cache_path("dmformer")
    except RuntimeError:  # a user without a home
        nowhere = Cache()
        nowhere.trouble = f"there is no home folder for it; {FOLDER} names another"
        return nowhere
    if reason := _untrusted(folder):
        distrusted = Cache()
        distrusted.trouble = reason
        return distrusted
    return Cache(folder, int(limit) << 20)


def _untrusted(folder: Path) -> str | None:
    """Say why what is in a cache's folder may be somebody else's; ``None`` where it is this user's, or not there."""
    for part in (folder, folder / "entries", folder / "objects"):
        if os.path.lexists(part):
            try:
                reason = exposure(part)
            except OSError as error:
                reason = error.strerror
            if reason:
                return (
                    f"{str(part)!r}: {reason}; expected a folder that is yours alone (chmod go-w), or another {FOLDER}"
                )
    return None


def _make_private(folder: Path) -> None:
    """Make a folder that is there for this user alone; those above it are made as usual."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _open_object(path: Path) -> IO[bytes]:
    """Open an object, which is a regular file and no link."""
    try:
        return open_regular(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise
    except OSError as error:
        raise _Damaged(path.name) from error


def surroundings() -> dict[str, Any]:
    """What every result depends on beside its inputs: this package's files, versions, and the machine."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    root = Path(__file__).parent
    files = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {
        "package": [(path.relative_to(root).as_posix(), path) for path in files],
        "python": platform.python_version(),
        "versions": found,
        "machine": [describe_processor(), platform.platform(), usable_cores()],
    }


def digest(value: object) -> str:
    """SHA-256 of a value: what msgspec encodes, paths by the content of their files, and arrays."""

    def encode(part: Any) -> Any:
        if isinstance(part, Path):
            return hash_file(part)[0]
        array = np.ascontiguousarray(part)
        if array.dtype == object:
            raise TypeError(f"{type(part).__name__} has no content that could be hashed")
        return [array.dtype.str, part.shape, hashlib.sha256(array.data).hexdigest()]

    return hashlib.sha256(msgspec.msgpack.encode(value, enc_hook=encode, order="deterministic")).hexdigest()


class _Damaged(Exception):
    """An entry, or the object that the argument names, is not what was written."""


def _decode_value(data: bytes, kind: type[T], decode: Callable[[type, Any], Any]) -> T:
    """Decode a value, which somebody who can write to the cache may have made."""
    try:
        return msgspec.msgpack.decode(data, type=kind, dec_hook=decode)
    except (_Damaged, OSError):
        raise
    except (msgspec.DecodeError, RecursionError, ValueError, TypeError, LookupError) as error:
        cause = error.__cause__  # msgspec wraps what a hook raises
        if isinstance(cause, (_Damaged, OSError)):
            raise cause from None
        raise _Damaged from error


def _copy_object(path: Path, destination: Path) -> None:
    """Copy an object, and make sure that it has the SHA-256 that it is named after."""
    with _open_object(path) as file, _create(destination) as copy:
        if hash_pieces(read_pieces(file), copy.write)[0] != path.name:
            raise _Damaged(path.name)


def _create(path: Path) -> IO[bytes]:
    """Open a file to be written anew, which may be there already and is no link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _read_object(path: Path) -> bytes:
    with _open_object(path) as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != path.name:
        raise _Damaged(path.name)
    return data


def _read_entry(path: Path) -> CacheEntry:
    """Read an entry.

    Raises:
        FileNotFoundError: there is none.
        _Damaged: it is not what was written.
    """
    try:
        sha256, _, content = read_bounded(path, _MOST_ENTRY_BYTES).partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() == sha256:
            return decode_json(content, CacheEntry)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise
    except (OSError, msgspec.DecodeError) as error:
        raise _Damaged from error
    raise _Damaged


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _utc(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
