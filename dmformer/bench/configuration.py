"""What is timed: an artifact, and how it is asked."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Mode = Literal["compute", "end-to-end", "throughput"]
MODES: tuple[Mode, ...] = ("compute", "end-to-end", "throughput")


class Configuration(Struct, frozen=True, kw_only=True):
    """One row of a report.

    Attributes:
        runtime: canonical name.
        precision: of the artifact.
        batch: rows in each call.
        threads: for one inference.
        mode: ``compute`` runs the network alone; ``end-to-end`` begins with an image file and ends with classes:
            decode, resize, normalise, run, softmax; ``throughput`` keeps several streams busy.
        streams: calls that are under way at once, each in a copy of the model of its own.
        artifact_sha256: what is timed; another artifact under the same name is refused.
    """

    runtime: str
    precision: str
    batch: int
    threads: int
    artifact_sha256: str
    mode: Mode = "compute"
    streams: int = 1

    @property
    def cores(self) -> int:
        """Threads that all streams together use."""
        return self.threads * self.streams

    @property
    def title(self) -> str:
        """For people: what tells it from the other rows."""
        mode = "" if self.mode == "compute" else f", {self.mode}"
        streams = f", {self.streams} streams" if self.mode == "throughput" else ""
        return f"{self.runtime} {self.precision} batch {self.batch}{mode}{streams}"
