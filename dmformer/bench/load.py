"""Requests to a server by several clients at once, each waiting for its answer before it asks again (a closed loop).

The clients are threads of this process, each with a connection of its own, so that what a client itself costs is the
CPU time of its thread while it asks. Nothing is left out: a request that failed is counted by what failed, and every
answer is compared with what the same row was answered alone, in a sample of its values; one that is nearer to another
row's answer was mixed up, and one that is not finite is a failure.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmformer.errors import DMFormerError, StageFailed, UnavailableError
from dmformer.serve.client import LIMIT_S, ServerClient, TensorMetadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.serve.targets import ServedTarget

    Outputs = dict[str, NDArray[Any]]

_WARM_UP = 5  # requests of each client before the time is taken
_MOST_COMPARED = 4096  # values of an output
_PAUSE_S = 0.02  # after a failure, so that a server that is not there is not asked thousands of times


@dataclass(frozen=True)
class LoadTarget:
    """What is asked, and with what.

    Attributes:
        url: of the server.
        model: its name.
        version: of the model; empty for the server's choice.
        given: its input.
        rows: what is sent, one a request.
        outputs: names of those that are wanted.
        limit_s: seconds that one answer may take.
    """

    url: str
    model: str
    version: str
    given: TensorMetadata
    rows: NDArray[Any]
    outputs: Sequence[str]
    limit_s: float = LIMIT_S

    @classmethod
    def of(cls, target: ServedTarget, url: str, rows: NDArray[Any], limit_s: float = LIMIT_S) -> LoadTarget:
        """Return a model of a server with the outputs of its bundle as those that are wanted.

        Args:
            target: the model, whose only input takes the rows.
            url: of the server.
            rows: what is sent, one a request.
            limit_s: seconds that one answer may take.
        """
        outputs = [output.name for output in target.spec.manifest.outputs]
        return cls(url, target.model, target.version, target.metadata.inputs[0], rows, outputs, limit_s)

    def ask(self, client: ServerClient, row: int) -> Outputs:
        """Send one row, and return the answer."""
        return client.infer(self.model, self.given, self.rows[row : row + 1], self.outputs, self.version)

    def connect(self) -> ServerClient:
        """Return a connection, not yet entered."""
        return ServerClient(self.url, self.limit_s)


@dataclass
class LoadSamples:
    """What came of a load.

    Attributes:
        latencies_ns: of the requests that were answered.
        errors: how often each failure happened.
        mixed_up: answers that are nearer to another row's than to their own.
        wall_s: from the first request to the last answer.
        cpu_s: CPU time of the clients' threads while they asked.
    """

    latencies_ns: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    mixed_up: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


class _Load:
    """A load under way; its clients are threads that begin together.

    Args:
        target: what is asked.
        concurrency: number of clients.
        requests: how many; otherwise until :attr:`ends` is set.
        alone: the answer to each row where nobody else asks.
        seen: told the row and the answer, by several threads.
    """

    def __init__(
        self,
        target: LoadTarget,
        concurrency: int,
        requests: int | None,
        alone: Sequence[Outputs] | None,
        seen: Callable[[int, Outputs], object],
    ) -> None:
        self.target, self.requests, self.alone, self.seen = target, requests, alone, seen
        self.samples, self.failures = LoadSamples(), list[BaseException]()
        self.start, self.ends = threading.Barrier(concurrency + 1), threading.Event()
        self._numbers, self._lock = itertools.count(), threading.Lock()

    def run_client(self) -> None:
        """Connect, warm up, wait for the others, and ask until the end."""
        try:
            with self.target.connect() as client:
                for row in range(_WARM_UP):
                    with suppress(StageFailed):  # the requests that count say why
                        self.target.ask(client, row % len(self.target.rows))
                self.start.wait()
                self._ask_on(client)
        except threading.BrokenBarrierError:
            return
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            self.failures.append(error)
            self.start.abort()

    def _ask_on(self, client: ServerClient) -> None:
        while not self.ends.is_set():
            number = next(self._numbers)
            if self.requests is not None and number >= self.requests:
                return
            row = number % len(self.target.rows)
            begun, cpu = time.perf_counter_ns(), time.thread_time_ns()
            answer, failure = None, ""
            try:
                answer = self.target.ask(client, row)
            except DMFormerError as error:
                failure = str(error)
            taken, used = time.perf_counter_ns() - begun, time.thread_time_ns() - cpu
            failure = failure or _not_finite(answer or {}) or ""
            with self._lock:
                self.samples.cpu_s += used / 1e9
                self.samples.errors.update([failure] if failure else [])
            if answer is None or failure:
                time.sleep(_PAUSE_S)
                continue
            wrong = self.alone is not None and nearest(answer, self.alone) != row
            self.seen(row, answer)
            with self._lock:
                self.samples.latencies_ns.append(taken)
                self.samples.mixed_up += wrong


def put_load(
    target: LoadTarget,
    concurrency: int,
    *,
    duration_s: float | None = None,
    requests: int | None = None,
    alone: Sequence[Outputs] | None = None,
    seen: Callable[[int, Outputs], object] = lambda _row, _answer: None,
) -> LoadSamples:
    """Send requests by several clients at once.

    Args:
        target: what is asked.
        concurrency: number of clients.
        duration_s: for how long; with ``requests`` whichever ends first.
        requests: how many, but for those that warm up.
        alone: the answer to each row where nobody else asks, with which every answer is compared.
        seen: told the row and the answer, by several threads.

    Returns:
        Latencies, failures and costs.

    Raises:
        UnavailableError: the server cannot be reached at all, or this machine starts no more threads.
    """
    load = _Load(target, concurrency, requests, alone, seen)
    threads = [threading.Thread(target=load.run_client, daemon=True) for _ in range(concurrency)]
    try:
        for thread in threads:
            thread.start()
        with suppress(threading.BrokenBarrierError):
            load.start.wait()
        begun = time.monotonic()
        for thread in threads:
            thread.join(None if duration_s is None else max(0.0, begun + duration_s - time.monotonic()))
    except RuntimeError as error:
        raise UnavailableError(f"`concurrency` {concurrency}: {error}; expected fewer clients") from error
    finally:  # whoever waits for a client that never began goes on
        load.ends.set()
        load.start.abort()
    for thread in threads:
        thread.join()
    if load.failures:
        raise load.failures[0]
    load.samples.wall_s = time.monotonic() - begun
    return load.samples


def ask_alone(target: LoadTarget) -> list[Outputs]:
    """Return the answer to each row, asked one after another.

    Raises:
        StageFailed: a row was not answered, or by what is not finite.
        UnavailableError: the server cannot be reached.
    """
    with target.connect() as client:
        answers = [target.ask(client, row) for row in range(len(target.rows))]
    for answer in answers:
        if reason := _not_finite(answer):
            raise StageFailed(f"{target.url}, model {target.model}: {reason}")
    return answers


def nearest(answer: Outputs, alone: Sequence[Outputs]) -> int:
    """Return the number of the row whose answer alone is nearest to an answer; -1 where shapes differ or NaN is there.

    Args:
        answer: of one row.
        alone: of every row.
    """
    distances = [max(_distance(array, own[name]) for name, array in answer.items()) for own in alone]
    return int(np.argmin(distances)) if np.isfinite(distances).any() else -1


def _not_finite(answer: Outputs) -> str | None:
    """Say which output is not finite in its sample; ``None`` where each is."""
    broken = (
        name for name, array in answer.items() if array.dtype.kind == "f" and not np.isfinite(_sample(array)).all()
    )
    return next((f"output {name!r} is NaN or infinite; expected numbers" for name in broken), None)


def _distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the largest difference in a sample; infinite where shapes differ or a value is not finite."""
    if one.shape != other.shape:
        return np.inf
    distance = float(np.abs(_sample(one).astype(np.float64) - _sample(other)).max())
    return distance if np.isfinite(distance) else np.inf


def _sample(array: NDArray[Any]) -> NDArray[Any]:
    """Return values of an array, the same ones of each of its size: maps of millions would keep the clients busy."""
    return array.reshape(-1)[_places(array.size)] if array.size > _MOST_COMPARED else array.reshape(-1)


@functools.lru_cache(maxsize=16)
def _places(size: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(0).integers(0, size, _MOST_COMPARED))
