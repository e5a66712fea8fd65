"""The contract of a runtime: arrays by name in, arrays by name out, and nothing silent about what ran them.

A runtime is a context manager. Entering loads the artifact, leaving frees it; :meth:`Runtime.run` is legal only in
between, any number of times, with any batch size. A runtime never falls back to another device, provider or precision:
where it cannot have what was asked, entering raises.

``os.fork()`` copies an engine without its threads. A child process that used such a copy, or only freed it at its end,
would wait for them for good: there :meth:`Runtime.run` raises, and the copy is never freed.

An adapter has three classes: a :class:`Runtime`, the :class:`~dmformer.runtimes.inspector.Inspector` that looks inside
one that is open, and the :class:`~dmformer.runtimes.support.Support` that answers for the machine without an artifact.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np

from dmformer.errors import CheckFailed, DMFormerError, StageFailed, UsageError, first_line
from dmformer.files import OpenFile
from dmformer.machine import check_threads, usable_cores
from dmformer.process import Limited, engine_limit_s
from dmformer.task import STRIDES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Any

    from numpy.typing import NDArray
    from typing_extensions import Self

    from dmformer.runtimes.inspector import Inspector
    from dmformer.runtimes.support import Support
    from dmformer.runtimes.target import Target

    Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output. Dimensions are numbers, or names where they may vary from call to call."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Details:
    """What really executes, as read back from the engine after loading.

    Attributes:
        device: provider or device in the engine's own words.
        threads: how many the engine will use for one inference.
        version: of the engine.
    """

    device: str
    threads: int
    version: str


T = TypeVar("T")
_loaded: weakref.WeakSet[Runtime] = weakref.WeakSet()  # those that are open, whose copies a forked process has
_engines: list[object] = []  # parts of engines, beside the runtimes that are open


class Runtime(ABC):
    """Loads one artifact and runs it.

    Attributes:
        support: what the runtime can do on this machine.
        inspector: the class that looks inside an open runtime.
        turn: a lock for callers with several threads; held while one of them is in :meth:`run`.

    Args:
        path: the artifact's main file.
        files: all files of the artifact, open since they were checked; otherwise they are opened as they are loaded.
        threads: threads for one inference; ``None`` means all the cores that this process may use.
        precision: what the artifact was made for; the runtime refuses to run it in another, and entering refuses one
            that its ``support`` does not have.
        target: what a compiled artifact is tied to.
        taps: names of inner tensors that :meth:`run` gives beside the outputs, out of
            :meth:`Inspector.inner_tensors`; for finding faults, because they may keep the engine from fusing what is
            around them.
    """

    support: ClassVar[Support]
    inspector: ClassVar[type[Inspector]]

    def __init__(
        self,
        path: Path,
        *,
        files: Sequence[OpenFile] = (),
        threads: int | None = None,
        precision: str = "fp32",
        target: Target | None = None,
        taps: Sequence[str] = (),
    ) -> None:
        check_threads(threads)
        self.path = path
        self.files = tuple(files)
        self.threads = threads if threads is not None else usable_cores()
        self.precision = precision
        self.target = target
        self.taps = tuple(taps)
        self.turn = threading.Lock()
        self._running = Limited(f"{self.name} running {path.name}")
        self._open = False
        self._expected: dict[str, tuple[TensorSpec, np.dtype[Any]]] = {}
        self._forked = False
        self._checked: dict[str, tuple[Any, Any]] = {}  # shapes and types that were checked last

    @property
    def name(self) -> str:
        """The canonical name of the runtime."""
        return self.support.name

    @abstractmethod
    def load(self) -> None:
        """Read the artifact and get ready to run. Called by entering the context."""

    @abstractmethod
    def close(self) -> None:
        """Free everything, also after an error in :meth:`load`. Called by leaving the context."""

    def open_file(self, path: Path) -> OpenFile | None:
        """Return a file of the artifact, the one that was checked; ``None`` where the artifact has no such file.

        Raises:
            OSError: it cannot be read.
        """
        if not self.files:
            return OpenFile(path, links=True) if path.exists() else None
        return next((file for file in self.files if file.path == path), None)

    def main_file(self) -> OpenFile:
        """Return the file that the engine loads, as :meth:`open_file` does.

        Raises:
            StageFailed: there is no such file.
        """
        file = self.open_file(self.path)
        if file is None:
            raise StageFailed(f"{self.path}: no such file; expected an artifact for {self.name}")
        return file

    def check_unchanged(self, *files: OpenFile) -> None:
        """Check, after an engine has opened files by their paths, that these were the files which were checked.

        Raises:
            CheckFailed: one of them was written to, moved or exchanged in the meantime.
        """
        for file in (*files, *self.files):
            if not file.is_unchanged():
                raise CheckFailed(f"{file.path} changed while it was loaded; expected a file that stays: run it again")

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The arrays that :meth:`run` takes. Legal while open."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The arrays that :meth:`run` returns. Legal while open."""

    @property
    @abstractmethod
    def details(self) -> Details:
        """What executes, read back from the engine. Legal while open."""

    @abstractmethod
    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run on checked inputs; the arrays returned are the caller's to keep. Called by :meth:`run`."""

    @property
    def batches(self) -> tuple[int, int | None]:
        """Smallest and largest batch that the artifact takes; ``None`` is no bound."""
        return (1, None) if self.target is None else (self.target.min_batch, self.target.max_batch)

    @property
    def runs_after_fork(self) -> bool:
        """Whether a copy in a forked process answers: where the engine has no threads of its own."""
        return False

    @property
    def device_ns(self) -> int | None:
        """Nanoseconds that the last inference took on the device alone, without transfers; ``None`` on a CPU."""
        return None

    def inspect(self) -> Inspector:
        """Return what looks inside the loaded model. Legal while open."""
        return self.inspector(self)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run one inference.

        Args:
            inputs: an array for each of :attr:`inputs`, of its type and shape; not modified, not kept.

        Returns:
            A new array for each of :attr:`outputs`, the caller's to keep.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape.
            StageFailed: the runtime is not open, or was opened before this process was forked, or the engine failed.
        """
        if not self._open:
            self.check_open()
        if not self._same_as_checked(inputs):
            self.check_inputs(inputs)
            self._checked = {name: (array.shape, array.dtype) for name, array in inputs.items()}
        try:  # as engine_errors, which would cost a microsecond more
            with self._running:
                return self.infer(inputs)
        except DMFormerError:
            raise
        except Exception as error:
            raise self._failed("running", error) from error

    def check_open(self) -> None:
        """Refuse to go on where :meth:`run` is not legal.

        Raises:
            StageFailed: the runtime is not open, or was opened before this process was forked.
        """
        if self._forked:
            raise StageFailed(
                f"runtime {self.name} was loaded before this process ({os.getpid()}) was forked, and its threads "
                "stayed behind; expected it to be loaded in each worker, after the fork (gunicorn: without --preload)"
            )
        if not self._open:
            raise StageFailed(f"runtime {self.name} is not open; expected run() inside its 'with' block")

    def run_rows(
        self,
        inputs: Arrays,
        batch: int | None = None,
        keep: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run any number of rows in batches of one size, the last filled up with rows from the start.

        Args:
            inputs: rows for each of :attr:`inputs`.
            batch: the size; otherwise the largest that the rows fill and the artifact takes.
            keep: chooses what of each batch's outputs is returned, row by row; otherwise all is.

        Returns:
            An array for each output that was kept, with as many rows as ``inputs``; an inner tensor that has something
            else than rows in front is given as the engine has it.

        Raises:
            UsageError: as :meth:`run`.
            StageFailed: as :meth:`run`.
        """
        least, most = self.batches
        count = len(next(iter(inputs.values())))
        size = batch or min(max(count, least), most or count)
        parts: dict[str, list[NDArray[Any]]] = {}
        for start in range(0, count, size):
            rows = np.arange(start, start + size) % count
            given = {name: array[rows] for name, array in inputs.items()}
            # What is not kept is gone before the next batch runs.
            for name, array in keep(self.run(given)).items() if keep else self.run(given).items():
                parts.setdefault(name, []).append(array)
        # One batch is not copied: all inner tensors of a large image take a gigabyte.
        joined = {name: np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for name, arrays in parts.items()}
        filled = -(-count // size) * size
        return {name: array[:count] if array.shape[:1] == (filled,) else array for name, array in joined.items()}

    def __enter__(self) -> Self:
        if self.precision not in (taken := self.support.precisions):
            raise StageFailed(f"{self.name} cannot honour precision {self.precision!r}; expected {', '.join(taken)}")
        try:
            with self.engine_errors("loading"):
                self.load()
                self._check_taps()
                # Asking an engine for its inputs may take as long as a small network.
                self._expected = {spec.name: (spec, np.dtype(spec.dtype)) for spec in self.inputs}
        except BaseException:
            with suppress(Exception):  # what failed first is what is told
                self.close()
            raise
        self._checked = {}
        self._open = True
        self._forked = False
        _loaded.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open = False
        if self._forked:
            return
        _loaded.discard(self)
        if kind is None:
            self.close()
            return
        with suppress(Exception):
            self.close()

    def after_fork(self) -> None:
        """Give a copy up in the child of a fork, unless it has no threads of its own and none was in it."""
        held, self.turn = self.turn.locked(), threading.Lock()
        if held or not self.runs_after_fork:
            self._open, self._forked = False, True
            _never_free(self)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Hold :attr:`turn` for the block.

        Raises:
            StageFailed: another thread has been in the engine for longer than a call of it may take.
        """
        if not self.turn.acquire(timeout=engine_limit_s()):
            raise StageFailed(
                f"{self.name} has been running {self.path.name} for another thread for {engine_limit_s():.0f} s; "
                "expected an answer: the engine hangs, and ends with the process alone"
            )
        try:
            yield
        finally:
            self.turn.release()

    def _check_taps(self) -> None:
        shown = {spec.name for spec in self.outputs} if self.taps else set()
        if hidden := [name for name in self.taps if name not in shown]:
            raise StageFailed(f"{self.name} does not show tensor {hidden[0]!r}; expected one of its inner tensors")

    def _same_as_checked(self, inputs: Arrays) -> bool:
        """Compare names, shapes and types with those that were checked last: a check in a microsecond."""
        checked = self._checked
        if not checked or len(inputs) != len(checked):
            return False
        for name, array in inputs.items():
            if type(array) is not np.ndarray or checked.get(name) != (array.shape, array.dtype):
                return False
        return True

    def check_inputs(self, inputs: Arrays) -> None:
        """Refuse inputs that are not what :attr:`inputs` says. Legal while open.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape.
        """
        if inputs.keys() != self._expected.keys():
            raise UsageError(f"{self.name}: received inputs {sorted(inputs)}; expected {sorted(self._expected)}")
        for name, array in inputs.items():
            spec, dtype = self._expected[name]
            if not isinstance(array, np.ndarray):
                raise UsageError(f"{self.name}: input {name!r} is a {type(array).__name__}; expected a NumPy array")
            fits = array.ndim == len(spec.shape) and all(
                want == have for want, have in zip(spec.shape, array.shape, strict=True) if isinstance(want, int)
            )
            if not fits or array.dtype != dtype or 0 in array.shape:
                raise UsageError(
                    f"{self.name}: input {name!r} is {array.dtype} {array.shape}; expected {spec.dtype} {spec.shape}"
                )

    @contextmanager
    def engine_errors(self, doing: str) -> Iterator[None]:
        """Turn whatever the engine raises in the block into :class:`StageFailed`; ``doing`` is what failed."""
        try:
            with Limited(f"{self.name} {doing} {self.path.name}"):
                yield
        except DMFormerError:
            raise
        except Exception as error:
            raise self._failed(doing, error) from error

    def _failed(self, doing: str, error: Exception) -> StageFailed:
        """Put whatever an engine raised into one line of ours."""
        return StageFailed(f"{self.name} failed while {doing} {self.path.name}: {first_line(error)}")


def freed_here_alone(engine: T) -> T:
    """Pass on what belongs to an engine and outlives its runtimes, and has threads: a forked process never frees it."""
    _engines.append(engine)
    return engine


def _never_free(copied: object) -> None:
    """Keep a copy in a forked process alive to its very end: freeing it would wait for threads that are not there."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(copied))


def smallest_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return a small shape: one row; where height and width are open, maps of two by two at the last stage."""
    return tuple(
        size if isinstance(size, int) else (1 if axis == 0 else 2 * STRIDES[-1]) for axis, size in enumerate(spec.shape)
    )


def _give_copies_up() -> None:
    for engine in _engines:
        _never_free(engine)
    for runtime in list(_loaded):
        runtime.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_give_copies_up)


def symbolic(shape: list[Any] | tuple[Any, ...]) -> tuple[int | str, ...]:
    """Name the variable dimensions of an engine's shape: the first is ``batch``, the others ``dim`` and their index."""
    return tuple(
        size if isinstance(size, int) and size > 0 else ("batch" if axis == 0 else f"dim{axis}")
        for axis, size in enumerate(shape)
    )
