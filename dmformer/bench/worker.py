"""The process that one round of one configuration runs in: a job in by standard input, a file out."""

from __future__ import annotations

import sys
import time
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dmformer.bench.measure import Extent, Measurement, batches, measure, network_alone
from dmformer.bench.plan import Configuration
from dmformer.bench.profile import Profile, profile
from dmformer.bundle.reader import own_bundle
from dmformer.bundle.select import select
from dmformer.data.images import load_pixels
from dmformer.errors import DMFormerError, StageFailed
from dmformer.serve.predictor import Predictor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dmformer.bench.measure import Ask
    from dmformer.bundle.reader import Bundle
    from dmformer.bundle.select import Choice
    from dmformer.runtimes.base import Runtime


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One round to measure or to profile, and where to write the answer.

    ``images`` are files; without them the golden inputs are used. ``limit_s`` bounds all calls together, loading
    included, from the start of the process.
    """

    bundle: str
    manifest_sha256: str
    configuration: Configuration
    images: tuple[str, ...]
    duration_s: float
    least_calls: int
    limit_s: float
    prove_precision: bool
    profile: bool
    answer: str
    brief: bool = False


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, or the line that says why there is none."""

    measurement: Measurement | None = None
    profile: Profile | None = None
    error: str | None = None


def run(job: Job) -> Answer:
    """Measure or profile, after making sure that the bundle is the one that was meant."""
    deadline_s = time.perf_counter() + job.limit_s
    bundle = own_bundle(Path(job.bundle))  # the process that sent the job opened it under the policy
    if bundle.manifest_sha256 != job.manifest_sha256:
        raise StageFailed(
            f"manifest {bundle.manifest_sha256[:12]}…; expected {job.manifest_sha256[:12]}…: the bundle changed"
        )
    wanted = job.configuration
    (choice,), _ = select(bundle, [wanted.runtime], [wanted.precision])
    if job.profile:
        made = batches(_inputs(bundle, job.images), wanted.batch)
        return Answer(profile=profile(choice.runtime(wanted.threads), made))
    promised = choice.artifact.promised_share if job.prove_precision else None
    extent = Extent(job.duration_s, job.least_calls, deadline_s, job.brief)
    return Answer(measurement=measure(_streams(choice, job), extent, promised))


def _streams(choice: Choice, job: Job) -> list[tuple[Runtime, Ask]]:
    wanted = job.configuration
    if wanted.mode == "end-to-end":
        predictor = Predictor(choice, wanted.threads, batch=wanted.batch)
        paths = [Path(image) for image in job.images]
        turns = cycle([paths[(start + row) % len(paths)] for row in range(wanted.batch)] for start in range(len(paths)))
        return [(predictor.runtime, lambda: predictor.predict(next(turns)))]
    inputs = _inputs(choice.bundle, job.images)
    name = choice.bundle.manifest.inputs[0].name
    runtimes = [choice.runtime(wanted.threads) for _ in range(wanted.streams)]
    return [(runtime, network_alone(runtime, name, inputs, wanted.batch)) for runtime in runtimes]


def _inputs(bundle: Bundle, images: tuple[str, ...]) -> NDArray[np.float32]:
    """What the network sees of the images, (N, C, H, W)."""
    if not images:
        return bundle.golden().inputs
    preprocessing = bundle.manifest.preprocessing
    return preprocessing.normalize(load_pixels([Path(image) for image in images], preprocessing))


def main() -> None:
    """Read the job, measure, write the answer."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        answer = run(job)
    except DMFormerError as error:
        answer = Answer(error=str(error))
    Path(job.answer).write_bytes(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
