"""The process that one round of one configuration runs in: a job in by standard input, a file out."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from dmformer.bench.measure import Measurement, measure
from dmformer.bundle.reader import own_bundle
from dmformer.bundle.select import select
from dmformer.errors import DMFormerError, StageFailed


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One round to measure, and where to write the answer."""

    bundle: str
    manifest_sha256: str
    runtime: str
    precision: str
    batch: int
    threads: int
    duration_s: float
    least_calls: int
    prove_precision: bool
    answer: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement, or the line that says why there is none."""

    measurement: Measurement | None = None
    error: str | None = None


def run(job: Job) -> Measurement:
    """Measure, after making sure that the bundle is the one that was meant."""
    bundle = own_bundle(Path(job.bundle))  # the process that sent the job opened it under the policy
    if bundle.manifest_sha256 != job.manifest_sha256:
        raise StageFailed(
            f"manifest {bundle.manifest_sha256[:12]}…; expected {job.manifest_sha256[:12]}…: the bundle changed"
        )
    (choice,), _ = select(bundle, [job.runtime], [job.precision])
    promised = choice.artifact.promised_share if job.prove_precision else None
    inputs = bundle.golden().inputs
    return measure(choice.runtime(job.threads), inputs, job.batch, job.duration_s, job.least_calls, promised)


def main() -> None:
    """Read the job, measure, write the answer."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        answer = Answer(measurement=run(job))
    except DMFormerError as error:
        answer = Answer(error=str(error))
    Path(job.answer).write_bytes(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
