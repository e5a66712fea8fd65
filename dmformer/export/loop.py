"""The loop over steps that serves an export and, begun later, a build on the device.

It alone holds state: what the cache gave, which checks were made, what was left out, what broke. It imports no PyTorch.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from dmformer.bundle.select import cannot_run
from dmformer.export import steps
from dmformer.export.formats import is_compiled, is_from_onnx
from dmformer.export.steps import ConvertedArtifact, TimedArtifacts, VerifiedArtifact, Work
from dmformer.files import indented_json
from dmformer.machine import gpu_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import msgspec

    from dmformer.bundle.manifest import Artifact
    from dmformer.cache import Cache
    from dmformer.export.precisions import PrecisionFile
    from dmformer.runtimes import registry
    from dmformer.verify.report import Check


T = TypeVar("T")


class Loop:
    """The loop over steps of an export or a build under way.

    Attributes:
        checks: those made so far.
        left_out: a sentence for each thing that was asked for and is not done.
        broken: the engines that could not be built, and why.
        runs_own_code: whether the network is somebody's own code, for which no key of the cache can stand: what it
            imports, reads and asks for is not known.
    """

    runs_own_code = False

    def __init__(self, cache: Cache, name: str = "", left_out: Iterable[str] = ()) -> None:
        self.cache = cache
        self.name = name  # of the network, in front of what the cache keeps
        self.checks: list[Check] = []
        self.left_out = list(left_out)
        self.broken: list[str] = []

    def once(self, what: str, inputs: object, kind: type[T], step: Callable[[], T], root: Path) -> T:
        """Return what a step gives, or gave before with the same inputs; it is kept where its checks hold."""
        return self.cache.get_or_make(f"{self.name}: {what}", inputs, kind, step, root, _held)

    def ask_network(self, what: str, inputs: object, kind: type[T], step: Callable[[], T], root: Path) -> T:
        """As :meth:`once`, of a step that runs the network: with somebody's own code it is done each time.

        The steps after it depend on what it gave, by content, and on nothing else of the code.
        """
        return step() if self.runs_own_code else self.once(what, inputs, kind, step, root)

    def artifact(
        self, work: Work, row: registry.RuntimeEntry, file: PrecisionFile, network: object
    ) -> VerifiedArtifact:
        """Convert an ONNX file to a format, and verify what was made.

        Args:
            work: what the steps work with.
            row: the format and its runtime.
            file: the ONNX file.
            network: stands for the network among the inputs of cached steps.
        """
        what = f"{row.format} {file.precision}"
        convert = functools.partial(steps.convert_artifact, work, row, file)
        if is_compiled(row) and not work.engine.targets:  # tuned on the GPU of this machine, as it is just now
            artifact = convert().artifact
        else:
            inputs = (network, row.format, file.precision, replace(file, answers=None), work.engine)
            once = self.once if is_from_onnx(row) else self.ask_network
            artifact = once(f"convert to {what}", inputs, ConvertedArtifact, convert, work.folder).artifact
        reason = cannot_run(row, artifact)
        budget = (work.calibration, work.max_accuracy_drop)
        verified = self.once(
            f"verify {what}",
            (artifact, file.onnx, work.golden, *budget, reason, gpu_of([artifact])),
            VerifiedArtifact,
            functools.partial(steps.verify_artifact, work, row, artifact, file),
            work.folder,
        )
        if reason:
            compared = "Its ONNX file was compared in onnxruntime; run dmformer verify on the device"
            self.left_out.append(f"{what}: built and not run, {reason}" + (f". {compared}" if verified.checks else ""))
        return verified


def _held(found: object) -> bool:
    """Return whether a step's result may be kept: its checks held, and a noise floor is known where it timed."""
    if isinstance(found, TimedArtifacts):
        return found.report.noise_floor is not None
    return all(check.passed for check in getattr(found, "checks", ()))


def gpu_of(artifacts: Sequence[Artifact]) -> list[object]:
    """Name and driver of the GPU, where one may run an artifact: what is measured depends on them."""
    if all(artifact.target is None for artifact in artifacts):
        return []
    state = gpu_state() or {}
    return [state.get("name"), state.get("driver")]


def write_report(path: Path, content: msgspec.Struct) -> None:
    """Write a report into a bundle's folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(indented_json(content))
