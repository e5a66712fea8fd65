"""The parity report: its checks, and findings about where failures begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from dmformer.machine import Processor, describe_processor
from dmformer.verify.tasks.classification import Decisions
from dmformer.verify.tasks.segmentation import PixelAgreement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bundle.manifest import Artifact
    from dmformer.verify.compare import Comparison, Limit


PYTORCH = "PyTorch"  # what most checks compare with


class Island(Struct, frozen=True, kw_only=True):
    """Nodes that have to stay in float32.

    Attributes:
        nodes: names of the nodes, beside those that stay there already; none where making the file anew was enough.
        passed: whether the file that was made anew with them in float32 is right in every tensor, executed literally.
        max_abs: the largest difference of its outputs from the truth; ``None`` where it is not finite.
        limit: the largest difference allowed.
        file: name of the file, in the folder of the case.
    """

    nodes: tuple[str, ...]
    passed: bool
    max_abs: float | None
    limit: float
    file: str


class Finding(Struct, frozen=True, kw_only=True):
    """Where an artifact in its runtime parts from the truth: the network's graph executed in float64.

    Attributes:
        runtime: name of the runtime.
        precision: of the artifact.
        batch: rows of each run.
        size: height and width in pixels, where they are not those of the golden images.
        nodes: names of the nodes between the last cut that agrees and the first that does not; mostly one.
        module: the network's module that the node of ``tensor`` belongs to.
        tensor: the first that differs.
        max_abs: the largest difference in it; ``None`` where it is NaN or infinite.
        limit: the largest difference allowed in it.
        runs: how often the runtime ran.
        most_shown: the most inner tensors that one run showed.
        at_fault: ``file`` where the ONNX file at the precision does the same, executed one operator at a time;
            ``engine`` where the file is right and the runtime computes this piece of it wrongly; ``artifact`` where it
            computes the piece right, so that the artifact's own files differ from the ONNX file; ``null`` where the
            bundle has no ONNX file at the precision, or the runtime reads none.
        explanation: what is at fault, in a sentence.
        differences: what is different about the nodes in the file.
        case: folder in which the failure was saved, to run alone.
        island: for a faulty file at fp16, the nodes that have to stay in float32.
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


class Check(Struct, frozen=True, kw_only=True):
    """One row of the parity report; see :class:`dmformer.verify.compare.Comparison` for the figures.

    Attributes:
        stage: what was checked.
        batch: rows that were asked at once, or images that were compared.
        limit: the largest absolute difference allowed.
        limit_source: where the limit comes from.
        reason: what failed, or what is to be known of a check that held.
        against: what it was compared with: PyTorch, a stage before it, or itself.
        size: height and width in pixels, where they are not those of the golden images.
        decisions: where classes of images were compared.
        pixels: where classes of pixels were compared.
        processor: the emulated one that answered; ``null`` for this machine's.
        engine: package and release that answered, where it is not this installation's; or the model of a server.
    """

    stage: str
    runtime: str
    precision: str
    batch: int
    passed: bool
    max_abs: float | None
    max_rel: float | None
    cosine: float | None
    top1_agreement: float | None
    limit: float | None
    limit_source: str | None
    reason: str | None
    against: str
    size: str | None = None
    decisions: Decisions | None = None
    pixels: PixelAgreement | None = None
    processor: str | None = None
    engine: str | None = None

    @property
    def where(self) -> str:
        """The stage, with the size of the images where it is not that of the golden ones."""
        return self.stage if self.size is None else f"{self.stage} at {self.size}"

    @property
    def asked(self) -> str:
        """What was asked: the stage, the runtime and the precision, and where that was elsewhere."""
        there = f" on {self.processor}" if self.processor else ""
        return f"{self.where} in {self.engine or self.runtime} {self.precision}{there}"

    @classmethod
    def of(
        cls,
        stage: str,
        runtime: str,
        precision: str,
        batch: int,
        comparison: Comparison,
        limit: Limit | None = None,
        against: str = PYTORCH,
        *,
        size: str | None = None,
        decisions: Decisions | None = None,
        pixels: PixelAgreement | None = None,
    ) -> Check:
        """Make a check from a comparison and the limit that was kept to."""
        return cls(
            stage=stage,
            runtime=runtime,
            precision=precision,
            batch=batch,
            passed=comparison.passed,
            max_abs=comparison.max_abs,
            max_rel=comparison.max_rel,
            cosine=comparison.cosine,
            top1_agreement=comparison.top1_agreement,
            limit=limit.max_abs if limit else None,
            limit_source=limit.source if limit else None,
            reason=comparison.reason,
            against=against,
            size=size,
            decisions=decisions,
            pixels=pixels,
        )


class Replay(Struct, frozen=True, kw_only=True):
    """Golden answers asked for elsewhere, with one release of one engine.

    Attributes:
        processor: name of the emulated one; ``null`` for this machine's.
        runtime: canonical name.
        engine: package and release.
        platform: what the packages are for.
        emulator: name, version and the model that it played; ``null`` without one.
        packages: version of each Python package that was installed for it.
        described: the processor as the process there saw it; ``null`` where it did not answer.
        passed: whether every check held.
    """

    processor: str | None
    runtime: str
    engine: str
    platform: str
    emulator: str | None
    packages: dict[str, str]
    described: Processor | None
    passed: bool


class ReleaseRange(Struct, frozen=True, kw_only=True):
    """Where releases of an engine begin to fail.

    Attributes:
        processor: name of the emulated one; ``null`` for this machine's.
        package: of the engine.
        releases: all in the range, the oldest first; where the newest fails, only some of them were asked.
        last_good: the release before the first bad one, or the newest; ``null`` where there is none.
        first_bad: ``null`` where every one holds.
    """

    processor: str | None
    package: str
    releases: tuple[str, ...]
    last_good: str | None
    first_bad: str | None


class Server(Struct, frozen=True, kw_only=True):
    """A server that was asked by the Open Inference Protocol.

    Attributes:
        url: where it was asked.
        name: as it calls itself.
        version: of it.
        models: that were asked, each with its version.
    """

    url: str
    name: str
    version: str
    models: tuple[str, ...]


class ParityReport(Struct, frozen=True, kw_only=True):
    """What ``verify`` or an export found.

    Attributes:
        passed: whether there were checks, and all of them held.
        checks: in the order in which they were made.
        skipped: a sentence for whatever was not checked or was left out.
        findings: the places where failures begin, if they were looked for.
        processor: what computed the answers; this machine, where it emulated others.
        replays: what was asked elsewhere, on an emulated processor or with another release of an engine.
        release_ranges: where releases begin to fail, for each range that was asked for.
        artifacts: SHA-256 of each artifact that was asked, as the manifest's artifacts have it; empty in the report of
            an export, which is listed in the manifest itself, and in older ones, which sign-off refuses.
        server: what answered, where that was a server.
    """

    passed: bool
    checks: tuple[Check, ...]
    skipped: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    processor: Processor | None = None
    replays: tuple[Replay, ...] = ()
    release_ranges: tuple[ReleaseRange, ...] = ()
    artifacts: tuple[str, ...] = ()
    server: Server | None = None


def parity_report(
    checks: Sequence[Check], skipped: Sequence[str] = (), artifacts: Sequence[Artifact] = ()
) -> ParityReport:
    """Make the report of some checks; without any it does not pass."""
    return ParityReport(
        passed=bool(checks) and all(check.passed for check in checks),
        checks=tuple(checks),
        skipped=tuple(skipped),
        processor=describe_processor(),
        artifacts=tuple(artifact.sha256 for artifact in artifacts),
    )


def failure(report: ParityReport) -> str:
    """Say how many checks of a report failed, and which first: checks come in the order of the stages."""
    failed = [check for check in report.checks if not check.passed]
    first = failed[0]
    return (
        f"{len(failed)} of {len(report.checks)} checks failed; first: {first.asked} at batch {first.batch}, "
        f"against {first.against}: {first.reason}"
    )


def add_cause(checks: Sequence[Check], cause: str | None) -> list[Check]:
    """Add what may have caused it to the reason of each check that found other answers than expected.

    A runtime that did not answer, or one that ran another precision, has its own reason.
    """

    def differs(check: Check) -> bool:
        compared = check.max_abs is not None or check.top1_agreement is not None or check.stage == "accuracy"
        return compared and not check.passed

    return [
        msgspec.structs.replace(check, reason=f"{check.reason}; {cause}") if cause and differs(check) else check
        for check in checks
    ]
