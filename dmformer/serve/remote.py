"""A model behind a server, asked as a runtime is asked: so it is held to what a runtime on a device is held to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from dmformer.errors import StageFailed
from dmformer.runtimes.base import Details, Runtime, TensorSpec, symbolic
from dmformer.runtimes.inspector import Inspector
from dmformer.runtimes.support import Availability, Support
from dmformer.serve.client import DTYPES, LIMIT_S, ModelMetadata, ServerClient, TensorMetadata
from dmformer.text import shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dmformer.files import OpenFile
    from dmformer.runtimes.base import Arrays
    from dmformer.runtimes.target import Target

SERVER = "server"  # in the place of a runtime's name


class _ServerSupport(Support):
    """Any precision may be behind a server; nothing of it is on this machine."""

    name = SERVER
    precisions = ("fp32", "fp16", "int8")

    def import_engine(self) -> Availability:
        return Availability(True)

    def inspect_files(self, files: Sequence[OpenFile], target: Target | None = None) -> None:
        del files, target


class _ServerInspector(Inspector):
    """A server shows nothing of what is inside."""

    def read_layers(self) -> NoReturn:
        raise StageFailed("a server does not show in which precision layers run")

    def read_kernels(self, feeds: Sequence[Arrays]) -> NoReturn:
        del feeds
        raise StageFailed("a server does not show its kernels")


class ServedModel(Runtime):
    """One version of a model of a server; entering connects to it.

    Args:
        url: of the server.
        model: its name.
        version: of the model.
        precision: of the artifact that should be there.
        outputs: names of those that are wanted; otherwise all.
        max_batch: the largest batch that the server takes; ``None`` where it does not say.
        limit_s: seconds that one answer may take.
    """

    support: ClassVar[Support] = _ServerSupport()
    inspector = _ServerInspector

    def __init__(
        self,
        url: str,
        model: str,
        version: str = "",
        *,
        precision: str = "fp32",
        outputs: Sequence[str] = (),
        max_batch: int | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:
        super().__init__(Path(model), threads=1, precision=precision)
        self.url, self.model, self.version = url, model, version
        self._wanted, self._max_batch, self._limit_s = tuple(outputs), max_batch, limit_s
        self._client: ServerClient | None = None
        self._metadata = ModelMetadata("")

    def load(self) -> None:
        """Connect, and ask what the model takes and gives."""
        client = ServerClient(self.url, self._limit_s)
        self._client = client.__enter__()
        self._metadata = client.model(self.model, self.version)

    def close(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.__exit__(None, None, None)
            self._client = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the server says that the model takes."""
        return tuple(map(_spec, self._metadata.inputs))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the server says that the model gives, of what is wanted."""
        wanted = self._wanted or [one.name for one in self._metadata.outputs]
        return tuple(_spec(one) for one in self._metadata.outputs if one.name in wanted)

    @property
    def details(self) -> Details:
        """Where it runs: at which address, in which version of the server; threads are the server's own affair."""
        assert self._client is not None
        server = self._client.metadata
        return Details(device=self.url, threads=0, version=shorten(f"{server.name} {server.version}"))

    @property
    def batches(self) -> tuple[int, int | None]:
        """What the server takes at once."""
        rows = next((one.shape[0] for one in self._metadata.inputs if one.shape), -1)
        return (1, self._max_batch) if rows < 0 else (rows, rows)

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Ask the server."""
        assert self._client is not None
        (given,) = self._metadata.inputs
        wanted = self._wanted or [one.name for one in self._metadata.outputs]
        return self._client.infer(self.model, given, inputs[given.name], wanted, self.version)


def _spec(tensor: TensorMetadata) -> TensorSpec:
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None:
        name, datatype = shorten(repr(tensor.name)), shorten(tensor.datatype)
        raise StageFailed(f"tensor {name} is of type {datatype}; expected {', '.join(DTYPES)}")
    return TensorSpec(tensor.name, dtype, symbolic(list(tensor.shape)))
