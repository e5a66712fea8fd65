"""Ask for the golden answers elsewhere: on an emulated processor, or with another release of an engine.

Every artifact is asked in a process of its own, so that a crash is a check that failed, and hides no other.
"""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from dmformer.bundle.manifest import MANIFEST, ProcessorEvidence
from dmformer.bundle.reader import own_bundle
from dmformer.bundle.select import select
from dmformer.bundle.writer import note_processors
from dmformer.cache import open_cache
from dmformer.device.emulation import NOT_SHOWN, Machine, emulated_machine, this_machine
from dmformer.device.installation import NoRelease, lay_out_packages, list_releases, temporary_folder
from dmformer.device.processors import processor
from dmformer.errors import DMFormerError, StageFailed, UnavailableError, UsageError
from dmformer.progress import silent
from dmformer.runtimes import registry
from dmformer.verify.compare import Comparison
from dmformer.verify.report import Check, ParityReport, ReleaseRange, Replay, parity_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dmformer.bundle.manifest import Artifact
    from dmformer.bundle.reader import Bundle
    from dmformer.cache import Cache
    from dmformer.device.processors import EmulatedProcessor
    from dmformer.machine import Processor
    from dmformer.progress import Advance, Progress

LIMIT_S = 1800.0  # of one process: emulation on a busy machine takes minutes for what takes seconds
_RANGE = ".."
_BEFORE = "start Python"


class ReplayOrder(Struct, frozen=True, kw_only=True):
    """What the process there is asked: one artifact.

    Attributes:
        bundle: folder.
        runtime: canonical name.
        precision: of the artifact.
        stages: file to which the name of each stage is added when it begins.
    """

    bundle: str
    runtime: str
    precision: str
    stages: str


def replay_artifact(order: ReplayOrder) -> ParityReport:
    """Make every check of one artifact against the golden answers; runs there."""
    from dmformer.verify.api import check_choices

    @contextmanager
    def stage(name: str, parts: int | None = None) -> Iterator[Advance]:
        with Path(order.stages).open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")
        with silent(name, parts) as advance:
            yield advance

    bundle = own_bundle(Path(order.bundle))  # which was admitted before
    with stage(f"import {order.runtime}"):
        chosen, skipped = select(bundle, [order.runtime], [order.precision])
    return check_choices(bundle, chosen, skipped, stage=stage)


def verify_elsewhere(
    bundle: Bundle,
    *,
    runtimes: Sequence[str] = (),
    cpus: Sequence[str] = (),
    engines: Sequence[str] = (),
    root: Path | None = None,
    stage: Progress = silent,
    note: Callable[[str], object] = lambda _: None,
) -> ParityReport:
    """Compare what the runtimes of a bundle answer elsewhere with its golden answers.

    How emulated processors answered is noted in the bundle's evidence, where it is a folder that is not signed.

    Args:
        bundle: what is verified.
        runtimes: names of runtimes; otherwise every one that can be asked there.
        cpus: names of emulated processors; otherwise this machine.
        engines: releases, ``PACKAGE==VERSION`` or ``PACKAGE==FIRST..LAST``; otherwise that of this machine, or else the
            one that the artifact was built with.
        root: a root file system of the device; otherwise a small Debian.
        stage: told about each step.
        note: told whether the bundle's evidence was changed.

    Raises:
        UnavailableError: emulation, or what has to be installed for it, is not to be had on this machine.
        UsageError: an argument cannot be used, or the bundle has nothing that can be asked there.
    """
    processors = _processors(cpus, root)
    releases = _releases(engines)
    work, skipped = _replayable(bundle, runtimes)
    if unused := [name for name in releases if name not in map(_package, work)]:
        has = ", ".join(map(_package, work))
        raise UsageError(f"`engines` has {unused[0]}, which runs nothing of this bundle; expected {has}")
    if not cpus:
        work = {row: artifacts for row, artifacts in work.items() if _package(row) in releases}
    cache, found = open_cache(), _Found(skipped=skipped)
    for one in processors or (None,):
        with ExitStack() as stack:
            if one is None:
                machine = this_machine()
            else:
                with stage(f"lay out {one.name}"):
                    machine = stack.enter_context(emulated_machine(one, root, cache))
            for row, artifacts in work.items():
                for release in releases.get(_package(row), [_default_release(row, artifacts)]):
                    replayed = _Replayer(bundle, machine, row, artifacts, cache, stage, found)
                    replayed.walk(release) if _RANGE in release else replayed.ask(release)
    if cpus:
        found.skipped.append(NOT_SHOWN)
        reason = _note_evidence(bundle, found.evidence)
        note(f"not noted in the bundle: {reason}" if reason else f"noted in the evidence of {bundle.root / MANIFEST}")
    if cache.trouble is not None:
        note(f"the cache could not be written: {cache.trouble}")
    asked = [artifact for artifacts in work.values() for artifact in artifacts]
    return replace(
        parity_report(found.checks, found.skipped, asked),
        replays=tuple(found.replays),
        release_ranges=tuple(found.ranges),
    )


def _processors(cpus: Sequence[str], root: Path | None) -> list[EmulatedProcessor]:
    """Return the processors that are asked for, each once, where one root file system can be of them all."""
    if root is not None and not cpus:
        raise UsageError("`root` without `cpus`; expected the processor of the device that it is of")
    if root is not None and not root.is_dir():
        raise UsageError(f"`root` {str(root)!r} is no folder; expected a root file system")
    found = [processor(name) for name in dict.fromkeys(map(str.lower, cpus))]
    if root is not None and len({one.architecture for one in found}) > 1:
        raise UsageError("`root` with `cpus` of two architectures; expected those of the device that it is of")
    return found


def _note_evidence(bundle: Bundle, evidence: Sequence[ProcessorEvidence]) -> str | None:
    """Note it in the bundle, or return why not, as where another run writes just then: the report took minutes."""
    try:
        return note_processors(bundle, evidence)
    except DMFormerError as error:
        return str(error)


class _Found:
    """What was found so far."""

    def __init__(self, skipped: list[str]) -> None:
        self.checks: list[Check] = []
        self.replays: list[Replay] = []
        self.ranges: list[ReleaseRange] = []
        self.evidence: list[ProcessorEvidence] = []
        self.skipped = skipped


class _Replayer:
    """One engine on one machine."""

    def __init__(
        self,
        bundle: Bundle,
        machine: Machine,
        row: registry.RuntimeEntry,
        artifacts: Sequence[Artifact],
        cache: Cache,
        stage: Progress,
        found: _Found,
    ) -> None:
        self.bundle, self.machine, self.row, self.artifacts = bundle, machine, row, artifacts
        self.cache, self.stage, self.found = cache, stage, found
        self.processor = None if machine.processor is None else machine.processor.name

    def ask(self, version: str) -> bool:
        """Ask every artifact with one release, or with the newest where the version is empty; whether all held."""
        package = _package(self.row)
        pins, title = ([f"{package}=={version}"] if version else []), f"{package} {version}".strip()
        where = self.processor or "here"
        checks: list[Check] = []
        versions: dict[str, str] = {}
        described: Processor | None = None
        with temporary_folder() as folder:
            try:
                with self.stage(f"{where}: install {title}"):
                    versions = lay_out_packages(
                        self.machine.fits, self.row.extra, pins, folder / "packages", self.cache
                    )
            except NoRelease as error:
                checks = [self._broken(artifact, str(error)) for artifact in self.artifacts]
            version = versions.get(package.replace("-", "_"), version)  # files of wheels have no dashes in names
            title = f"{package} {version}".strip()
            for artifact in self.artifacts if versions else ():
                with self.stage(f"{where}: {title} {artifact.precision}"):
                    report = self._call(artifact, folder)
                described = report.processor or described
                asked = {check.runtime for check in checks}  # preprocessing is of no artifact: once is enough
                checks += [
                    check for check in report.checks if check.runtime == self.row.name or check.runtime not in asked
                ]
                self.found.skipped += [reason for reason in report.skipped if reason not in self.found.skipped]
        of_engine = {check.runtime: title for check in checks if check.runtime == self.row.name}
        checks = [replace(one, processor=self.processor, engine=of_engine.get(one.runtime)) for one in checks]
        self.found.checks += checks
        self._note(checks, title)
        self.found.replays.append(
            Replay(
                processor=self.processor,
                runtime=self.row.name,
                engine=title,
                platform=self.machine.fits.title,
                emulator=self.machine.emulator,
                packages=versions,
                described=described,
                passed=all(check.passed for check in checks),
            )
        )
        return all(check.passed for check in checks)

    def walk(self, span: str) -> None:
        """Ask with the releases of a span; where the newest fails and the oldest does not, halve what is between."""
        first, _, last = span.partition(_RANGE)
        package = _package(self.row)
        with self.stage(f"releases of {package}"):
            listed = list_releases(self.machine.fits, package, self.cache)
        versions = [one for one in listed if _within(one, first, last)]
        if not versions:
            nothing = f"no release of {package} from {first} to {last} for {self.machine.fits.title}"
            self.found.checks += [
                replace(self._broken(one, nothing), processor=self.processor, engine=f"{package} {span}")
                for one in self.artifacts
            ]
            return
        good, bad = find_first_bad(versions, self.ask)
        self.found.ranges.append(
            ReleaseRange(
                processor=self.processor, package=package, releases=tuple(versions), last_good=good, first_bad=bad
            )
        )

    def _note(self, checks: Sequence[Check], engine: str) -> None:
        """Note for the bundle's evidence how each artifact answered on an emulated processor."""
        if self.processor is None or self.machine.emulator is None:
            return
        asked = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        for artifact in self.artifacts:
            of_it = [one for one in checks if (one.runtime, one.precision) == (self.row.name, artifact.precision)]
            self.found.evidence.append(
                ProcessorEvidence(
                    processor=self.processor,
                    emulator=self.machine.emulator,
                    engine=engine,
                    format=artifact.format,
                    precision=artifact.precision,
                    artifact_sha256=artifact.sha256,
                    passed=all(one.passed for one in of_it),
                    checks=len(of_it),
                    asked=asked,
                )
            )

    def _call(self, artifact: Artifact, folder: Path) -> ParityReport:
        """Ask one artifact there; what breaks is a check that failed."""
        stages = folder / "stages"
        stages.write_text(f"{_BEFORE}\n", encoding="utf-8")
        order = ReplayOrder(
            bundle=str(self.bundle.root.absolute()),
            runtime=self.row.name,
            precision=artifact.precision,
            stages=str(stages),
        )
        try:
            return self.machine.call(
                "dmformer.verify.replay:replay_artifact", order, ParityReport, LIMIT_S, folder / "packages"
            )
        except StageFailed as error:
            begun = stages.read_text(encoding="utf-8").splitlines()[-1]
            return parity_report([self._broken(artifact, f"{error}, in stage '{begun}'")])
        except DMFormerError as error:
            return parity_report([self._broken(artifact, str(error))])

    def _broken(self, artifact: Artifact, reason: str) -> Check:
        return Check.of("runtime", self.row.name, artifact.precision, 1, Comparison(False, reason=reason))


def find_first_bad(versions: Sequence[str], holds: Callable[[str], bool]) -> tuple[str | None, str | None]:
    """Return the release before the first bad one, and the first bad one; ``None`` for what there is none of.

    Where the newest is bad and the oldest is not, what is between is halved; otherwise all are asked, for one between
    them may be bad alone.

    Args:
        versions: in their order, one at least.
        holds: asks with one.
    """
    low, high = 0, len(versions) - 1
    if not holds(versions[high]):
        if high == 0 or not holds(versions[0]):
            return None, versions[0]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(versions[middle]) else (low, middle)
        return versions[low], versions[high]
    bad = [one for one in versions[:-1] if not holds(one)]
    if not bad:
        return versions[-1], None
    place = versions.index(bad[0])
    return (versions[place - 1] if place else None), bad[0]


def _replayable(
    bundle: Bundle, runtimes: Sequence[str]
) -> tuple[dict[registry.RuntimeEntry, list[Artifact]], list[str]]:
    """Return the artifacts that can be asked elsewhere by their runtimes, and a sentence for each of the others."""
    named = [registry.entry(name) for name in runtimes if name.lower() != "all"]
    work: dict[registry.RuntimeEntry, list[Artifact]] = {}
    skipped = []
    for artifact in bundle.manifest.artifacts:
        row, title = registry.reader_of(artifact.format), f"{artifact.format} {artifact.precision}"
        if row is None:
            skipped.append(f"{title}: this version of dmformer has no runtime for it")
        elif named and row not in named:
            continue
        elif reason := registry.support(row).cannot_replay:
            skipped.append(f"{title}: {reason}")
        else:
            work.setdefault(row, []).append(artifact)
    if not work:
        reasons = "; ".join(skipped) or f"it has nothing for runtime {', '.join(row.name for row in named)}"
        raise UnavailableError(f"nothing in the bundle can be asked elsewhere: {reasons}")
    return work, skipped


def _releases(engines: Sequence[str]) -> dict[str, list[str]]:
    """Return the releases that are asked for by package, a version or two with dots between."""
    found: dict[str, list[str]] = {}
    for text in dict.fromkeys(engines):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\d+(?:\.\w+)*)(?:\.\.(\d+(?:\.\w+)*))?", text)
        if match is None or (match[3] is not None and not _within(match[2], match[2], match[3])):
            raise UsageError(
                f"`engines` {text!r}; expected PACKAGE==VERSION or PACKAGE==FIRST..LAST, the older first, as in "
                "onnxruntime==1.26.0"
            )
        package = _normalized(match[1])
        found.setdefault(package, []).append(match[2] if match[3] is None else f"{match[2]}{_RANGE}{match[3]}")
    return found


def _default_release(row: registry.RuntimeEntry, artifacts: Sequence[Artifact]) -> str:
    """Return the version of an engine on this machine, or else the one that built the artifact; empty for neither."""
    package = _package(row)
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return artifacts[0].built_with.get(package, "")


def _package(row: registry.RuntimeEntry) -> str:
    """Return the name of the distribution of an engine, as indexes write it: ``ai-edge-litert``."""
    return _normalized(next(iter(registry.support(row).package), row.name))


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _within(version: str, first: str, last: str) -> bool:
    """Return whether a version is not before the first and not after the last, of which further digits are left out."""
    numbers, low, high = ([int(part) for part in re.findall(r"\d+", text)] for text in (version, first, last))
    return low <= numbers and numbers[: len(high)] <= high
