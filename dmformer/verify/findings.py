"""What a bisection found, as types of the report."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class Island(Struct, frozen=True, kw_only=True):
    """Nodes that have to stay in float32.

    Attributes:
        nodes: their names, beside those that do already; none where making the file anew was enough.
        passed: whether the file that was made anew with them in float32 is right in every tensor, executed literally.
        max_abs: its outputs' largest difference from the truth; ``None`` where it is not finite.
        limit: what is allowed.
        file: the file, in the folder of the case.
    """

    nodes: tuple[str, ...]
    passed: bool
    max_abs: float | None
    limit: float
    file: str


class Finding(Struct, frozen=True, kw_only=True):
    """Where an artifact in its runtime parts from the truth: the network's graph executed in float64.

    Attributes:
        runtime: its name.
        precision: of the artifact.
        batch: rows of each run.
        size: height and width in pixels, where they are not those of the golden images.
        nodes: of the graph, between the last cut that agrees and the first that does not; mostly one.
        module: of the network, to which the first of them belongs.
        tensor: the first that differs.
        max_abs: by how much at most; ``None`` where it is NaN or infinite.
        limit: what was allowed in it.
        runs: how often the runtime ran.
        most_shown: the most inner tensors that one run showed.
        at_fault: ``file`` where the ONNX file at the precision does the same, executed one operator at a time;
            ``engine`` where the file is right and the runtime computes this piece of it wrongly; ``artifact`` where it
            computes the piece right, so that the artifact's own files differ from the ONNX file; ``null`` where the
            bundle has no ONNX file at the precision.
        explanation: the same in words.
        differences: what is different about the nodes in the file.
        case: folder in which the failure was saved, to run alone.
        island: for fp16, the nodes that have to stay in float32.
    """

    runtime: str
    precision: str
    batch: int
    nodes: tuple[str, ...]
    module: str
    tensor: str
    max_abs: float | None
    limit: float
    runs: int
    most_shown: int
    at_fault: Literal["file", "engine", "artifact"] | None
    explanation: str
    differences: tuple[str, ...] = ()
    case: str | None = None
    island: Island | None = None
    size: str | None = None
