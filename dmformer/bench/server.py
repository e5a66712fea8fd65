"""Time a running server under load: latency and throughput by the number of clients that ask at once."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dmformer.bench import DEFAULT_DURATION_S
from dmformer.bench.load import LoadTarget, ask_alone, nearest, put_load
from dmformer.bench.statistics import Latency, latency
from dmformer.errors import CheckFailed, UsageError
from dmformer.machine import describe_machine
from dmformer.progress import silent
from dmformer.serve.client import LIMIT_S, ServerClient
from dmformer.serve.targets import find_models, request_rows
from dmformer.text import shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bench.load import LoadSamples
    from dmformer.bundle.reader import Bundle
    from dmformer.progress import Progress
    from dmformer.serve.targets import ServedTarget

CONCURRENCY = (1, 4, 16)
_MOST_CLIENTS = 256  # threads of one process
_BUSY = 0.8  # of a core: from here on the clients of one Python process wait for one another
_SAMPLES_KEPT = 10_000


class LoadRow(Struct, frozen=True, kw_only=True):
    """What a number of clients measured, each of which asks again as soon as it was answered.

    Attributes:
        model: that was asked, and its version.
        precision: of its artifact.
        concurrency: number of clients.
        answered: requests that were answered, of one image each.
        failed: requests that were not.
        errors: how often each failure happened.
        mixed_up: answers that are nearer to another image's than to their own.
        latency_ms: of the requests that were answered, as the clients saw it; ``null`` without any.
        throughput_ips: images answered in a second.
        wall_s: how long it took.
        client_cpu_ms: CPU time of a client's thread for each request: what of a latency is its own at the least.
        client_cores: CPU time of the clients over ``wall_s``: near 1 they are the limit, not the server.
        samples_ns: raw latencies; the first ten thousand.
    """

    model: str
    precision: str
    concurrency: int
    answered: int
    failed: int
    errors: dict[str, int]
    mixed_up: int
    latency_ms: Latency | None
    throughput_ips: float
    wall_s: float
    client_cpu_ms: float | None
    client_cores: float
    samples_ns: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """For people: what tells it from the other rows."""
        clients = "1 client" if self.concurrency == 1 else f"{self.concurrency} clients"
        return f"{self.model}, {clients}"


class LoadReport(Struct, frozen=True, kw_only=True):
    """A server under load.

    Attributes:
        url: of the server.
        server: its name and version.
        arch: of the bundle's network.
        environment: the machine of the clients.
        rows: one for each model and number of clients.
        duration_s: of each row.
        measured_at: when it began, in UTC.
        command: the command line, where there was one.
        notes: what else is to be known.
        partial: whether it was stopped before its end.
    """

    url: str
    server: str
    arch: str
    environment: dict[str, Any]
    rows: tuple[LoadRow, ...]
    duration_s: float
    measured_at: str
    command: str | None = None
    notes: tuple[str, ...] = ()
    partial: bool = False

    def check_rows(self) -> None:
        """Refuse a run in which a request failed, or an answer was another's.

        Raises:
            CheckFailed: there was one.
        """
        failed, mixed_up = sum(row.failed for row in self.rows), sum(row.mixed_up for row in self.rows)
        total = failed + sum(row.answered for row in self.rows)
        if failed:
            first = next(row for row in self.rows if row.errors)
            raise CheckFailed(f"{failed} of {total} requests failed; first, {first.title}: {next(iter(first.errors))}")
        if mixed_up:
            raise CheckFailed(f"{mixed_up} of {total} answers are nearer to another image's than to their own")


def bench_server(
    bundle: Bundle,
    url: str,
    *,
    model: str | None = None,
    concurrency: Sequence[int] = CONCURRENCY,
    duration_s: float = DEFAULT_DURATION_S,
    runtimes: Sequence[str] = (),
    precision: str | None = None,
    limit_s: float = LIMIT_S,
    command: str | None = None,
    stage: Progress = silent,
) -> LoadReport:
    """Time the models of a server that a bundle is behind, with its golden images as requests.

    Args:
        bundle: what should be served.
        url: of the server, as in ``http://localhost:8000`` or ``grpc://localhost:8001``.
        model: name of the model; otherwise all that are named as ``serve-layout`` names those of the bundle.
        concurrency: numbers of clients, one row each.
        duration_s: of each row.
        runtimes: names of runtimes whose artifacts are asked; otherwise all.
        precision: of the artifact behind ``model``, where neither its name nor its configuration says so.
        limit_s: seconds that one answer may take.
        command: the command line, for the report.
        stage: told about the run; it advances with each row.

    Raises:
        CheckFailed: a file of the bundle is not what the manifest says, a model takes or gives something else than the
            bundle, or all images get one answer.
        StageFailed: the model does not answer a single client, or not with numbers.
        UnavailableError: the server cannot be reached, or the model is not ready.
        UsageError: an argument cannot be used, or the server has no such model.
    """
    counts = list(dict.fromkeys(concurrency))
    if not counts or min(counts) < 1 or max(counts) > _MOST_CLIENTS:
        raise UsageError(f"`concurrency` {list(concurrency)}; expected numbers from 1 to {_MOST_CLIENTS}")
    if not 0 < duration_s < float("inf"):
        raise UsageError(f"`duration_s` {duration_s:g}; expected more than 0")
    golden, begun = bundle.golden(), datetime.now(timezone.utc)
    with ServerClient(url, limit_s) as client:
        server = client.metadata
        targets, reasons = find_models(bundle.manifest, client, model, runtimes, precision)
    rows: list[LoadRow] = []
    partial = False
    with stage(f"load on {url}", len(targets) * len(counts)) as advance:
        try:
            for target in targets:
                if target.mismatches:
                    raise CheckFailed(f"{target.title}: {'; '.join(target.mismatches)}")
                load = LoadTarget.of(target, url, request_rows(target.spec, golden), limit_s)
                alone = ask_alone(load)
                if [nearest(answer, alone) for answer in alone] != list(range(len(alone))):
                    raise CheckFailed(
                        f"{target.title} gives several images one answer; whose an answer is cannot be told"
                    )
                for count in counts:
                    rows.append(_row(target, count, put_load(load, count, duration_s=duration_s, alone=alone)))
                    advance()
        except KeyboardInterrupt:
            partial = True
    return LoadReport(
        url=url,
        server=shorten(f"{server.name} {server.version}"),
        arch=bundle.manifest.model.arch,
        environment=describe_machine(),
        rows=tuple(rows),
        duration_s=duration_s,
        measured_at=begun.isoformat(timespec="seconds"),
        command=command,
        notes=(*reasons, *_busy_clients(rows)),
        partial=partial,
    )


def _row(target: ServedTarget, count: int, samples: LoadSamples) -> LoadRow:
    answered, failed = len(samples.latencies_ns), sum(samples.errors.values())
    return LoadRow(
        model=target.title,
        precision=target.spec.artifact.precision,
        concurrency=count,
        answered=answered,
        failed=failed,
        errors=dict(samples.errors),
        mixed_up=samples.mixed_up,
        latency_ms=latency(samples.latencies_ns) if answered else None,
        throughput_ips=answered / samples.wall_s,
        wall_s=samples.wall_s,
        client_cpu_ms=1e3 * samples.cpu_s / (answered + failed) if answered + failed else None,
        client_cores=samples.cpu_s / samples.wall_s,
        samples_ns=tuple(samples.latencies_ns[:_SAMPLES_KEPT]),
    )


def _busy_clients(rows: Sequence[LoadRow]) -> list[str]:
    """Say where the clients may have been the limit."""
    return [
        f"{row.title}: the clients used {row.client_cores:.2f} cores of one Python process: they, not the server, may "
        "be the limit"
        for row in rows
        if row.client_cores > _BUSY
    ]
