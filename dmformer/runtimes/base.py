"""The contract of a runtime: arrays by name in, arrays by name out, and nothing silent about what ran them.

A runtime is a context manager. Entering loads the artifact, leaving frees it; :meth:`Runtime.run` is legal only in
between, any number of times, with any batch size. A runtime never falls back to another device, provider or precision:
where it cannot have what was asked, entering raises.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dmformer.errors import DMFormerError, StageFailed, UsageError, first_line
from dmformer.machine import check_threads, instructions, usable_cores
from dmformer.runtimes.installed import whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Any

    from numpy.typing import NDArray
    from typing_extensions import Self

    from dmformer.runtimes.target import Target

    Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output. Dimensions are numbers, or names where they may vary from call to call."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Availability:
    """Whether a runtime can work on this machine: its version, or why not and what to do.

    ``untried`` says what was taken on trust, where something was.
    """

    available: bool
    version: str | None = None
    reason: str | None = None
    untried: str | None = None


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


@dataclass(frozen=True)
class Kernel:
    """One step of an inference, as the engine runs it: after fusion, with the layout changes that it put in.

    Attributes:
        name: in the engine's words; that of the ONNX node it came from where the engine keeps it.
        operator: in the engine's words.
        ns: nanoseconds that it took, one for each inference.
    """

    name: str
    operator: str
    ns: tuple[int, ...]


class Runtime(ABC):
    """Loads one artifact and runs it.

    Args:
        path: the artifact's main file.
        threads: threads for one inference; ``None`` means all the cores that this process may use.
        precision: what the artifact was made for; the runtime refuses to run it in another, and entering refuses one
            that is not among its ``precisions``.
        target: what a compiled artifact is tied to.
        taps: names of inner tensors that :meth:`run` gives beside the outputs, out of :meth:`inner_tensors`; for
            finding faults, because they may keep the engine from fusing what is around them.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    # Arguments of :func:`dmformer.runtimes.installed.whole`; without them :meth:`look` imports the engine.
    package: ClassVar[tuple[str, ...]] = ()
    # By processor, instruction sets without which the engine cannot start, in Linux's names.
    instructions: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        precision: str = "fp32",
        target: Target | None = None,
        taps: Sequence[str] = (),
    ) -> None:
        check_threads(threads)
        self.path = path
        self.threads = threads if threads is not None else usable_cores()
        self.precision = precision
        self.target = target
        self.taps = tuple(taps)
        self._open = False
        self._like: dict[str, tuple[Any, Any]] = {}  # shapes and types that were checked last

    @classmethod
    @abstractmethod
    def probe(cls) -> Availability:
        """Whether the engine is installed and loads here. Does not raise."""

    @classmethod
    def look(cls) -> Availability:
        """As :meth:`probe`, but an engine whose files are whole is not imported. Does not raise."""
        missing = sorted(set(cls.instructions.get(platform.machine().lower(), ())) - instructions())
        if missing and instructions():  # importing it could end this process
            return Availability(False, reason=f"{cls.name} needs {', '.join(missing)}, which this processor has not")
        version = whole(*cls.package) if cls.package else None
        if version is not None:
            return Availability(True, version, untried="its libraries are whole; it was not loaded")
        return cls.probe()

    @abstractmethod
    def load(self) -> None:
        """Read the artifact and get ready to run. Called by entering the context."""

    @abstractmethod
    def close(self) -> None:
        """Free everything, also after an error in :meth:`load`. Called by leaving the context."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What :meth:`run` takes. Legal while open."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What :meth:`run` gives. Legal while open."""

    @property
    @abstractmethod
    def details(self) -> Details:
        """What executes, read back from the engine. Legal while open."""

    @classmethod
    def cannot_compute(cls, precision: str) -> str | None:
        """Why this runtime has no arithmetic of a precision on this machine, in which it still runs artifacts of it.

        ``None`` where it has. Such an artifact is computed in float32: slower, not wrong, and to be said aloud.
        """
        del precision
        return None

    @classmethod
    def saturates(cls) -> str | None:
        """Why sums of products with int8 weights of 8 bits may saturate in this engine on this machine.

        ``None`` where they do not. Such answers are wrong, not slow; weights of 7 bits are right everywhere.
        """
        return None

    @classmethod
    def peak_gops(cls, precision: str, threads: int) -> float | None:
        """What the engine attains at a precision on a large, regular product, in 10^9 operations a second.

        ``None`` where NumPy's matrix product serves as the limit (float32), and where nothing is known. A multiply and
        an add are two operations.
        """
        del precision, threads
        return None

    @classmethod
    def cannot_load(cls, target: Target | None) -> str | None:
        """Why an artifact with this target cannot run on this machine; ``None`` where it can, as far as is known.

        Takes less than a second and loads nothing.
        """
        del target
        return None

    def inner_tensors(self) -> frozenset[str]:
        """Names that ``taps`` may hold; empty where the engine shows nothing of its inside. Legal while open."""
        return frozenset()

    @property
    def batches(self) -> tuple[int, int | None]:
        """Smallest and largest batch that the artifact takes; ``None`` is no bound."""
        return (1, None) if self.target is None else (self.target.min_batch, self.target.max_batch)

    @property
    def device_ns(self) -> int | None:
        """Nanoseconds that the last inference took on the device alone, without transfers; ``None`` on a CPU."""
        return None

    def layers(self) -> dict[str, int]:
        """In which precision each compute layer of the loaded model runs, counted, as the engine shows it.

        Legal while open; may take as long as loading. :mod:`dmformer.runtimes.layers` says what it is good for.

        Raises:
            StageFailed: the engine failed.
        """
        with self._engine_errors("showing the layers of"):
            return self.read_layers()

    @abstractmethod
    def read_layers(self) -> dict[str, int]:
        """Called by :meth:`layers`."""

    def kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Where the time of an inference goes, by the engine's own profiler, in the order in which kernels ran.

        Legal while open; may load the model once more, because profilers slow down what they watch.

        Args:
            feeds: what :meth:`run` takes, one for each inference.

        Raises:
            StageFailed: the engine failed.
        """
        for feed in feeds:
            self._check(feed)
        with self._engine_errors("profiling"):
            return self.read_kernels(feeds)

    @abstractmethod
    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Called by :meth:`kernels` with checked feeds."""

    @abstractmethod
    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run on checked inputs; the arrays returned are the caller's to keep. Called by :meth:`run`."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """One inference.

        Args:
            inputs: an array for each of :attr:`inputs`, of its type and shape; not modified, not kept.

        Returns:
            A new array for each of :attr:`outputs`, the caller's to keep.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape.
            StageFailed: the runtime is not open, or the engine failed.
        """
        if not self._open:
            raise StageFailed(f"runtime {self.name} is not open; expected run() inside its 'with' block")
        if not self._like_before(inputs):
            self._check(inputs)
            self._like = {name: (array.shape, array.dtype) for name, array in inputs.items()}
        try:
            return self.infer(inputs)
        except DMFormerError:
            raise
        except Exception as error:
            raise self._failed("running", error) from error

    def run_rows(
        self,
        inputs: Arrays,
        batch: int | None = None,
        keep: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """:meth:`run` for any number of rows, in batches of one size, the last filled up from the start.

        Args:
            inputs: rows for each of :attr:`inputs`.
            batch: the size; otherwise the largest that the rows fill and the artifact takes.
            keep: what of each batch's outputs is given, row by row; otherwise all.
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
        return {
            name: (np.concatenate(arrays) if len(arrays) > 1 else arrays[0])[:count] for name, arrays in parts.items()
        }

    def __enter__(self) -> Self:
        if self.precision not in self.precisions:
            raise StageFailed(
                f"{self.name} cannot honour precision {self.precision!r}; expected {', '.join(self.precisions)}"
            )
        try:
            with self._engine_errors("loading"):
                self.load()
                self._check_taps()
        except BaseException:
            with suppress(Exception):  # what failed first is what is told
                self.close()
            raise
        # Asking an engine for its inputs may take as long as a small network.
        self._expected = {spec.name: (spec, np.dtype(spec.dtype)) for spec in self.inputs}
        self._like = {}
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open = False
        if kind is None:
            self.close()
            return
        with suppress(Exception):
            self.close()

    def _check_taps(self) -> None:
        given = {spec.name for spec in self.outputs} if self.taps else set()
        if missing := [name for name in self.taps if name not in given]:
            raise StageFailed(f"{self.name} does not show tensor {missing[0]!r}; expected one of its inner tensors")

    def _like_before(self, inputs: Arrays) -> bool:
        """Whether inputs have the names, shapes and types of those that were checked last: a check in a microsecond."""
        like = self._like
        if not like or len(inputs) != len(like):
            return False
        for name, array in inputs.items():
            if type(array) is not np.ndarray or like.get(name) != (array.shape, array.dtype):
                return False
        return True

    def _check(self, inputs: Arrays) -> None:
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
    def _engine_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except DMFormerError:
            raise
        except Exception as error:
            raise self._failed(doing, error) from error

    def _failed(self, doing: str, error: Exception) -> StageFailed:
        """Whatever an engine raises, as one line of ours."""
        return StageFailed(f"{self.name} failed while {doing} {self.path.name}: {first_line(error)}")


def symbolic(shape: list[Any] | tuple[Any, ...]) -> tuple[int | str, ...]:
    """A shape with its variable dimensions named: the first is ``batch``, the others by their index."""
    return tuple(
        size if isinstance(size, int) and size > 0 else ("batch" if axis == 0 else f"dim{axis}")
        for axis, size in enumerate(shape)
    )
