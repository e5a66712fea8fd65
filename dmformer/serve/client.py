"""A client of the Open Inference Protocol: Triton, OpenVINO Model Server, KServe and MLServer speak it.

It is NVIDIA's ``tritonclient``, over HTTP or gRPC, with an end to every wait and with errors of one line. What is asked
goes in the binary form where the server has it (its extension ``binary_tensor_data``; always over gRPC), and as JSON
otherwise.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from dmformer._optional import require
from dmformer.errors import DMFormerError, StageFailed, UnavailableError, UsageError, first_line
from dmformer.text import shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self

LIMIT_S = 60.0  # that one answer may take
_SCHEMES = {"http": False, "https": True, "grpc": False, "grpcs": True}  # whether they are encrypted
# NumPy's names of the protocol's types.
DTYPES = {"FP32": "float32", "FP16": "float16", "INT32": "int32", "INT64": "int64", "BYTES": "object"}
_BINARY, _INDEX, _CONFIG = "binary_tensor_data", "model_repository", "model_configuration"
T = TypeVar("T")


class ServerMetadata(Struct, frozen=True):
    """What a server says of itself: its name, its version and the extensions of the protocol that it has."""

    name: str
    version: str = ""
    extensions: tuple[str, ...] = ()


class TensorMetadata(Struct, frozen=True):
    """An input or output of a served model: the protocol's name of its type, and -1 for what may vary."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(Struct, frozen=True):
    """What a server says of a model."""

    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorMetadata, ...] = ()
    outputs: tuple[TensorMetadata, ...] = ()


class ModelConfiguration(Struct, frozen=True):
    """What is used of Triton's configuration of a model; the largest batch is 0 where it makes none."""

    max_batch_size: int = 0
    parameters: dict[str, dict[str, str]] = {}

    def parameter(self, name: str) -> str | None:
        """Return a parameter; ``None`` where there is none."""
        return self.parameters.get(name, {}).get("string_value")


class IndexEntry(Struct, frozen=True):
    """A model of a server's repository."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class UnknownModel(StageFailed):
    """The server has no model, or no version of it, of that name."""


class ServerClient:
    """A connection to a server; a context manager, used by one thread.

    Attributes:
        metadata: what the server says of itself, once the context was entered.

    Args:
        url: ``http://HOST:PORT``, ``https://…``, ``grpc://HOST:PORT`` or ``grpcs://…``.
        limit_s: seconds that one answer may take.

    Raises:
        UnavailableError: the package that speaks the protocol is not installed; on entering, the server cannot be
            reached or does not speak the protocol.
        UsageError: it is no such address.
    """

    def __init__(self, url: str, limit_s: float = LIMIT_S) -> None:
        scheme, self._address = _parse_address(url)
        if not 0 < limit_s < float("inf"):
            raise UsageError(f"`limit_s` {limit_s:g}; expected seconds above 0")
        self.url, self.limit_s = url, limit_s
        self._encrypted = _SCHEMES[scheme]
        self._grpc = scheme.startswith("grpc")
        self._binary = True
        self.metadata = ServerMetadata("")
        # First what tritonclient needs, for it hides which part is missing.
        kind, needed = ("grpc", "grpc") if self._grpc else ("http", "geventhttpclient")
        require(needed, extra="serving", purpose="`server`")
        self._library: Any = require(f"tritonclient.{kind}", extra="serving", purpose="`server`")
        self._client: Any = None
        self._models: dict[tuple[str, str], ModelMetadata] = {}  # by name and version: what answers have to be

    def __enter__(self) -> Self:
        arguments: dict[str, Any] = {"url": self._address, "ssl": self._encrypted}
        if not self._grpc:
            arguments |= {"connection_timeout": self.limit_s, "network_timeout": self.limit_s}
            _end_quietly()
        self._client = self._ask("connecting", lambda: self._library.InferenceServerClient(**arguments))
        try:
            self.metadata = self._metadata("its metadata", "get_server_metadata", ServerMetadata)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            if isinstance(error, StageFailed):
                raise UnavailableError(f"{error}; expected a server of the Open Inference Protocol") from error
            raise
        self._binary = self._grpc or self._has(_BINARY)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(Exception):
            self._client.close()

    def models(self) -> tuple[IndexEntry, ...] | None:
        """Return the models of the server's repository; ``None`` where it does not list them.

        Raises:
            UnavailableError: it says that it lists them, and does not.
        """
        if not self._has(_INDEX):
            return None
        try:
            return self._metadata("its models", "get_model_repository_index", tuple[IndexEntry, ...], "models")
        except StageFailed as error:
            raise UnavailableError(str(error)) from error

    def model(self, name: str, version: str = "") -> ModelMetadata:
        """Return what the server says of a model.

        Raises:
            StageFailed: it has none of that name (:class:`UnknownModel`), or it is not ready.
        """
        what = f"model {shorten(name)}"
        found = self._metadata(what, "get_model_metadata", ModelMetadata, None, name, version)
        self._models[name, version] = found
        return found

    def configuration(self, name: str) -> ModelConfiguration | None:
        """Return Triton's configuration of a model; ``None`` where the server has no such thing."""
        if not self._has(_CONFIG):
            return None
        what = f"the configuration of {shorten(name)}"
        return self._metadata(what, "get_model_config", ModelConfiguration, "config", name)

    def infer(
        self, model: str, given: TensorMetadata, rows: NDArray[Any], outputs: Sequence[str], version: str = ""
    ) -> dict[str, NDArray[Any]]:
        """Ask a model; every answer is held to what the server says of the model, for which it is asked once.

        Args:
            model: its name.
            given: its input.
            rows: of the input's type; objects of ``bytes`` for ``BYTES``.
            outputs: names of those that are wanted.
            version: of the model; otherwise the server chooses.

        Returns:
            An array for each of the outputs, of the type and shape that the server declares, with as many rows as were
            sent.

        Raises:
            StageFailed: the server refused, did not answer in time, or answered something else.
        """
        binary = {} if self._grpc else {"binary_data": self._binary}
        limit = {"client_timeout": self.limit_s} if self._grpc else {}

        def ask() -> dict[str, NDArray[Any]]:
            tensor = self._library.InferInput(given.name, list(rows.shape), given.datatype)
            tensor.set_data_from_numpy(rows, **binary)
            wanted = [self._library.InferRequestedOutput(name, **binary) for name in outputs]
            result = self._client.infer(model, [tensor], model_version=version, outputs=wanted, **limit)
            answer = {name: _array(result, name) for name in outputs}
            for name, array in answer.items():
                if name in declared:
                    _check_declared(array, declared[name], len(rows))
            return answer

        try:
            metadata = self._models.get((model, version)) or self.model(model, version)
            declared = {one.name: one for one in metadata.outputs}
            return self._ask(f"model {shorten(model)}", ask)
        except UnavailableError as error:  # it was there before
            raise StageFailed(str(error)) from error

    def _has(self, extension: str) -> bool:
        return any(one.startswith(extension) for one in self.metadata.extensions)

    def _metadata(self, what: str, method: str, kind: type[T], part: str | None = None, *arguments: str) -> T:
        """Call a method of the client that returns JSON, and return it as a type; gRPC wraps it in ``part``."""
        options = {"as_json": True, "client_timeout": self.limit_s} if self._grpc else {}

        def ask() -> T:
            content = getattr(self._client, method)(*arguments, **options)
            if self._grpc and part is not None:
                content = content.get(part, [])
            return msgspec.convert(content, kind, strict=False)  # gRPC's JSON has numbers as texts

        return self._ask(what, ask)

    def _ask(self, what: str, ask: Callable[[], T]) -> T:
        """Call the library; whatever it raises becomes one line."""
        deadline: Any = self._deadline()
        try:
            with deadline:
                return ask()
        except DMFormerError as error:
            raise type(error)(f"{self.url}, {what}: {error}") from error
        except Exception as error:
            raise self._failed(what, error) from error
        except BaseException as error:
            if error is not deadline:
                raise
            raise self._no_answer(what) from error

    def _deadline(self) -> AbstractContextManager[Any]:
        """Bound a block as a whole: a server that sends a byte now and then would never end otherwise.

        What ends the block is no ``Exception``, which the library would take for a failure of one of several addresses.
        """
        if self._grpc:  # which has a deadline itself
            return nullcontext()
        import gevent

        timeout: AbstractContextManager[Any] = gevent.Timeout(self.limit_s)
        return timeout

    def _failed(self, what: str, error: Exception) -> DMFormerError:
        """Put what the library raised into one line."""
        where = f"{self.url}, {what}"
        from_library = hasattr(error, "debug_details")
        status = str(error.status() or "") if hasattr(error, "status") else ""
        status = "" if status == "None" else status  # as gRPC's client writes that there is none
        said = error.message() if hasattr(error, "message") else first_line(error)
        late = isinstance(error, TimeoutError) or (not status and "timed out" in str(said))
        if late or "DEADLINE_EXCEEDED" in status:
            return self._no_answer(what)
        if isinstance(error, OSError) or "UNAVAILABLE" in status:
            return UnavailableError(
                f"{self.url} cannot be reached ({shorten(said)}); expected a server that runs there"
            )
        if not status and from_library:
            return StageFailed(f"{where}: NVIDIA's client refuses: {shorten(said)}")
        unknown = status == "404" or "NOT_FOUND" in status or (status == "400" and "unknown model" in str(said))
        kind = UnknownModel if unknown else StageFailed
        foreign = error.debug_details() if from_library and not self._grpc else None  # type: ignore[attr-defined]
        if not status or foreign is not None:
            shown = said if foreign is None else f"status {status}, {foreign}"
            return kind(f"{where}: the answer is not of the protocol ({shorten(shown)})")
        return kind(f"{where}: the server refuses: {shorten(said)} (status {shorten(status)})")

    def _no_answer(self, what: str) -> StageFailed:
        return StageFailed(f"{self.url}, {what}: no answer within {self.limit_s:g} s; `limit_s` allows more")


def _array(result: Any, name: str) -> NDArray[Any]:
    """Return an output of an answer.

    Raises:
        StageFailed: the answer has none, or one whose content is not what its shape says.
    """
    try:
        found: NDArray[Any] | None = result.as_numpy(name)
    except ValueError as error:
        said = shorten(first_line(error))
        if "size 0 into shape" in said:
            wanted = said.rpartition("shape ")[2]
            raise StageFailed(
                f"output {name!r} is empty; expected {wanted}: in Triton's Python backend that is NumPy 2 with a stub "
                "that was built for NumPy 1"
            ) from error
        raise StageFailed(f"output {name!r} cannot be read: {said}") from error
    if found is None:
        raise StageFailed(f"no output {name!r} in the answer")
    return found


def _check_declared(array: NDArray[Any], declared: TensorMetadata, rows: int) -> None:
    """Refuse an output that is not what the server says of it.

    Raises:
        StageFailed: it has another type, rank or fixed side, or another number of rows than was sent.
    """
    expected = (rows, *declared.shape[1:]) if declared.shape else ()
    fits = len(array.shape) == len(expected) and all(
        side in (-1, got) for side, got in zip(expected, array.shape, strict=True)
    )
    if not fits or str(array.dtype) != DTYPES.get(declared.datatype, str(array.dtype)):
        raise StageFailed(
            f"output {shorten(repr(declared.name))} is {array.dtype} {shorten(array.shape)}; expected "
            f"{shorten(declared.datatype)} {shorten(list(expected))}"
        )


def _parse_address(url: str) -> tuple[str, str]:
    """Return the scheme of an address and what follows it: host, port and path.

    Raises:
        UsageError: it is no address of a server; what may be a password is not repeated.
    """
    expected = "expected http://HOST:PORT, https://HOST:PORT, grpc://HOST:PORT or grpcs://HOST:PORT"
    if "@" in url:
        raise UsageError(f"`server` names a user, which no server of the protocol asks for; {expected}")
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        fits = bool(host) and parts.port != 0  # reading the port checks it
    except ValueError:
        fits = False
    if not fits or parts.scheme not in _SCHEMES or {"?", "#"} & set(url) or not url.isprintable() or " " in url:
        raise UsageError(f"`server` {shorten(repr(url))}; {expected}")
    return parts.scheme, f"{parts.netloc}{parts.path}".rstrip("/")


def _end_quietly() -> None:
    """Let Ctrl-C end this thread's wait without a word of gevent's own, whose loop prints what it does not expect."""
    import gevent

    hub = gevent.get_hub()
    if KeyboardInterrupt not in hub.NOT_ERROR:
        hub.NOT_ERROR += (KeyboardInterrupt,)
