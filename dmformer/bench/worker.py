"""What the process of one round of one configuration does."""

from __future__ import annotations

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
from dmformer.errors import StageFailed
from dmformer.serve.predictor import Predictor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dmformer.bench.measure import Ask
    from dmformer.bundle.reader import Bundle
    from dmformer.bundle.select import Choice
    from dmformer.runtimes.base import Runtime


class TimingOrder(msgspec.Struct, frozen=True, kw_only=True):
    """One round of one configuration to measure, or to profile.

    Attributes:
        bundle: its folder.
        manifest_sha256: of the bundle that is meant.
        configuration: what to time.
        images: files that are the input; without them the golden inputs are.
        duration_s: least time of the steady state, in seconds.
        least_calls: least number of timed calls.
        limit_s: bounds all calls together, loading included, from when the order arrives.
        prove_precision: whether to read back in which precision the layers run.
        brief: whether medians are enough.
    """

    bundle: str
    manifest_sha256: str
    configuration: Configuration
    images: tuple[str, ...]
    duration_s: float
    least_calls: int
    limit_s: float
    prove_precision: bool
    brief: bool = False

    def choice(self) -> Choice:
        """Return the artifact and its runtime, after making sure that the bundle is the one that was meant.

        Raises:
            StageFailed: the bundle is another one.
        """
        bundle = own_bundle(Path(self.bundle))  # the process that sent the order opened it under the policy
        if bundle.manifest_sha256 != self.manifest_sha256:
            raise StageFailed(
                f"manifest {bundle.manifest_sha256[:12]}…; expected {self.manifest_sha256[:12]}…: the bundle changed"
            )
        (choice,), _ = select(bundle, [self.configuration.runtime], [self.configuration.precision])
        return choice


def measure_configuration(order: TimingOrder) -> Measurement:
    """Measure one round."""
    deadline_s = time.perf_counter() + order.limit_s
    choice = order.choice()
    promised = choice.artifact.promised_share if order.prove_precision else None
    extent = Extent(order.duration_s, order.least_calls, deadline_s, order.brief)
    return measure(_streams(choice, order), extent, promised)


def profile_configuration(order: TimingOrder) -> Profile:
    """Find out where the time of an inference goes."""
    choice = order.choice()
    inputs = batches(_inputs(choice.bundle, order.images), order.configuration.batch)
    return profile(choice.runtime(order.configuration.threads), inputs)


def _streams(choice: Choice, order: TimingOrder) -> list[tuple[Runtime, Ask]]:
    wanted = order.configuration
    if wanted.mode == "end-to-end":
        predictor = Predictor(choice, wanted.threads, batch=wanted.batch)
        paths = [Path(image) for image in order.images]
        turns = cycle([paths[(start + row) % len(paths)] for row in range(wanted.batch)] for start in range(len(paths)))
        return [(predictor.runtime, lambda: predictor.predict(next(turns)))]
    inputs = _inputs(choice.bundle, order.images)
    name = choice.bundle.manifest.inputs[0].name
    runtimes = [choice.runtime(wanted.threads) for _ in range(wanted.streams)]
    return [(runtime, network_alone(runtime, name, inputs, wanted.batch)) for runtime in runtimes]


def _inputs(bundle: Bundle, images: tuple[str, ...]) -> NDArray[np.float32]:
    """What the network sees of the images, (N, C, H, W)."""
    if not images:
        return bundle.golden().inputs
    preprocessing = bundle.manifest.preprocessing
    return preprocessing.normalize(load_pixels([Path(image) for image in images], preprocessing))
