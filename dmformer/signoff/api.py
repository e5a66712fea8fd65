"""``dmformer.report``: whether everything held that is known about a bundle, and what remains open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmformer.errors import CheckFailed
from dmformer.runtimes import registry
from dmformer.signoff.sources import Source, read_sources
from dmformer.verify.report import failure
from dmformer.verify.tasks import measure_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dmformer.bundle.manifest import AccuracyEvidence, Manifest
    from dmformer.bundle.reader import Bundle
    from dmformer.verify.evaluate import EvalResult
    from dmformer.verify.report import Check


def report(bundle: str | Path | Bundle, *, add: Sequence[str | Path] = ()) -> SignOff:
    """Gather everything that is known about a bundle, for the one who signs it off. Nothing is run.

    Args:
        bundle: a bundle's folder, or a packed file.
        add: reports of other machines, as ``verify``, ``bench`` and ``eval`` write them with ``--json``, and other
            bundles, which are shown beside this one.

    Returns:
        Whether everything held, and what remains open; ``html()`` is a page of it, ``bom()`` a CycloneDX bill of
        materials.

    Raises:
        CheckFailed: the policy asks for a signature that is not there, it is of another manifest, or a packed bundle is
            damaged.
        UnavailableError: the bundle is signed, and the package that checks signatures is not installed.
        UsageError: there is no bundle, or what is added is neither a report nor a bundle, or a report on another one.
    """
    named = Path(bundle) if isinstance(bundle, str) else bundle
    sources = tuple(read_sources(named, [Path(path) for path in add]))
    return SignOff(sources, tuple(_failures(sources)), tuple(_open_points(sources)))


@dataclass(frozen=True)
class SignOff:
    """What is known about a bundle.

    Attributes:
        sources: what tells it; the first is the bundle itself.
        failures: a sentence for whatever did not hold.
        open_points: a sentence for whatever was not checked, not measured, assumed, or is to be known.
    """

    sources: tuple[Source, ...]
    failures: tuple[str, ...]
    open_points: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def manifest(self) -> Manifest:
        """The bundle's."""
        opened = self.sources[0].bundle
        assert opened is not None
        return opened.manifest

    @property
    def bundles(self) -> list[tuple[Source, Manifest]]:
        """Every source that is a bundle, with its manifest."""
        return [(source, source.bundle.manifest) for source in self.sources if source.bundle is not None]

    def named(self, source: Source, label: str) -> str:
        """Return the label of something in a bundle, with the bundle where there are several."""
        return f"{label}, {source.title}" if len(self.bundles) > 1 else label

    @property
    def checks(self) -> list[tuple[Source, Check]]:
        """Every check, with its source."""
        return [(source, check) for source in self.sources if source.parity for check in source.parity.checks]

    @property
    def own_checks(self) -> list[tuple[Source, Check]]:
        """The checks that are of the bundle itself, and not of another one beside it."""
        own = _own(self.sources)
        return [(source, check) for source, check in self.checks if any(source is one for one in own)]

    @property
    def verdict(self) -> str:
        """Whether everything held, in a sentence."""
        held, count = sum(check.passed for _, check in self.checks), len(self.checks)
        if self.passed:
            return f"Every check held: {count} of {count}. Every file is what the manifest lists."
        failures = "1 failure" if len(self.failures) == 1 else f"{len(self.failures)} failures"
        return f"NOT everything held: {failures}; of the {count} checks listed here, {held} held."

    def judge(self) -> None:
        """Refuse a bundle of which something did not hold.

        Raises:
            CheckFailed: something did not.
        """
        if self.failures:
            raise CheckFailed(f"{self.verdict} First: {self.failures[0]}")

    def html(self) -> str:
        """Return a page that needs no network.

        Raises:
            UnavailableError: a package is missing.
        """
        from dmformer.signoff.page import sign_off_page

        return sign_off_page(self)

    def bom(self) -> bytes:
        """Return a machine-learning bill of materials: CycloneDX 1.6, as JSON.

        Raises:
            UnavailableError: a package is missing.
        """
        from dmformer.signoff.bom import bill_of_materials

        return bill_of_materials(self)


def _own(sources: Sequence[Source]) -> list[Source]:
    """Return the bundle itself, and the reports that are about its artifacts and no others."""
    first, *others = sources
    own = (source for source in others if source.bundle is None and source.artifacts)
    return [first, *(source for source in own if source.artifacts <= first.artifacts)]


def _failures(sources: Sequence[Source]) -> Iterator[str]:
    for place, source in enumerate(sources):
        yield from (
            f"{_prefix(place, source)}{failed}" for failed in (*_failed_checks(source), *_failed_bundle(source))
        )
    opened = sources[0].bundle
    assert opened is not None
    yield from _over_budget(sources, opened.manifest.evidence.accuracy)


def _prefix(place: int, source: Source) -> str:
    """Return what names a source in a sentence: nothing for the bundle itself."""
    return f"{source.title}: " if place else ""


def _failed_checks(source: Source) -> Iterator[str]:
    parity = source.parity
    if parity is not None and not all(check.passed for check in parity.checks):
        yield failure(parity)
    elif parity is not None and not parity.passed:
        yield "the report says that it did not pass"


def _points_lost(sources: Sequence[Source]) -> Iterator[tuple[str, EvalResult, float | None]]:
    """Give each accuracy that was added of this bundle, with what names it and the percentage points that it loses.

    They are lost against PyTorch on the same images; ``None`` where the report does not have PyTorch's accuracy.
    """
    first, *others = _own(sources)
    assert first.bundle is not None
    manifest = first.bundle.manifest
    if not manifest.class_count:
        return
    measure = measure_of(manifest.model.task, manifest.class_count)
    for source in others:
        if source.accuracy is None:
            continue
        torch = source.accuracy.torch
        for one in source.accuracy.results:
            compared = torch is not None and one.agreement_with_torch is not None
            lost = measure.points_lost(one, torch) if torch is not None and compared else None
            yield f"{source.title}: {one.runtime} {one.precision}", one, lost


def _over_budget(sources: Sequence[Source], evidence: AccuracyEvidence | None) -> Iterator[str]:
    for title, one, lost in _points_lost(sources):
        if evidence is not None and lost is not None and lost > evidence.max_points_lost:
            yield (
                f"{title} loses {lost:.2f} points on {one.images} images; the accuracy budget is "
                f"{evidence.max_points_lost:g}"
            )


def _without_budget(sources: Sequence[Source], evidence: AccuracyEvidence | None) -> Iterator[str]:
    for title, one, lost in _points_lost(sources):
        if evidence is None:
            yield f"{title}: not held to the accuracy budget: the bundle has none"
        elif lost is None:
            # Other images may be harder for PyTorch as well: how far apart the two are decides nothing.
            pairs = ((evidence.torch.top1, one.top1), (evidence.torch.miou, one.miou))
            below = [100 * (ours - its) for ours, its in pairs if ours is not None and its is not None]
            apart = f"; PyTorch's on the calibration images is {below[0]:+.2f} points from it" if below else ""
            yield (
                f"{title}: not held to the accuracy budget of {evidence.max_points_lost:g}: the report has no accuracy "
                f"of PyTorch on the same images (eval with --weights measures it){apart}"
            )


def _failed_bundle(source: Source) -> Iterator[str]:
    if source.bundle is None or source.integrity is None:
        return
    yield from (f"{file.path}: {file.reason}" for file in source.integrity.files if not file.passed)
    signature, evidence = source.integrity.signature, source.bundle.manifest.evidence
    if not source.integrity.passed and all(file.passed for file in source.integrity.files):
        yield f"signature: {signature.reason or signature.status}"
    if source.parity is None:
        yield "no parity report that is what the manifest lists; export the bundle again"
    elif source.parity.passed and not evidence.parity.passed:
        yield f"the manifest says that {evidence.parity.failed} checks failed"
    for one in evidence.processors:
        if not one.passed:
            yield f"{one.format} {one.precision} on {one.processor}, by {one.engine}: checks failed"


def _open_points(sources: Sequence[Source]) -> Iterator[str]:
    for place, source in enumerate(sources):
        yield from (f"{_prefix(place, source)}{point}" for point in _open_in(source))
    first = sources[0]
    assert first.bundle is not None
    manifest = first.bundle.manifest
    own = _own(sources)
    asked = {(check.runtime, check.precision) for source in own if source.parity for check in source.parity.checks}
    for artifact in manifest.artifacts:
        row = registry.reader_of(artifact.format)
        if row is None or (row.name, artifact.precision) not in asked:
            yield f"{artifact.format} {artifact.precision}: no check of its answers"
    yield from _without_budget(sources, manifest.evidence.accuracy)
    if not any(source.parity for source in own[1:]) and not manifest.evidence.processors:
        yield "its answers were checked on no other machine than the one that made it: run dmformer verify there"
    if not any(source.bench for source in own):
        yield "latency: not measured"
    if manifest.evidence.accuracy is None and not any(source.accuracy for source in own):
        yield "accuracy: not measured"


def _open_in(source: Source) -> Iterator[str]:
    yield from _open_in_checks(source)
    yield from _open_in_timings(source)
    if source.accuracy is not None:
        yield from (f"not measured: {reason}" for reason in source.accuracy.skipped)
        yield from source.accuracy.notes
        yield from (f"left out: {reason}" for reason in source.accuracy.unreadable)
        if not source.accuracy.labelled:
            yield "no labels: agreement with PyTorch was measured, and no accuracy"
    if source.bundle is not None and source.integrity is not None:
        yield from _open_in_bundle(source.bundle.manifest, source.integrity.signature.status)


def _open_in_checks(source: Source) -> Iterator[str]:
    if source.parity is None:
        return
    yield from (f"not checked: {reason}" for reason in source.parity.skipped)
    for check in source.parity.checks:
        if check.passed and check.stage == "precision" and check.reason:
            yield f"{check.asked}: {check.reason}"


def _open_in_timings(source: Source) -> Iterator[str]:
    if source.bench is None:
        return
    if source.bench.partial:
        yield "the timing was stopped before its end"
    yield from source.bench.notes
    yield from (f"not timed: {reason}" for reason in source.bench.skipped)
    odd = [row for row in source.bench.results if row.status != "ok"]
    for status, reason in dict.fromkeys((row.status, row.reason) for row in odd):
        titles = [row.title for row in odd if (row.status, row.reason) == (status, reason)]
        yield f"timing {status}: {', '.join(titles)}: {reason}"


def _open_in_bundle(manifest: Manifest, signature: str) -> Iterator[str]:
    if signature == "none":
        yield "not signed: nothing says who wrote it"
    elif signature == "unknown key":
        yield "signed by a key that is not among the trusted ones here"
    if manifest.model.weights == "random":
        yield f"RANDOM weights, seed {manifest.model.seed}: never trained"
    accuracy = manifest.evidence.accuracy
    if accuracy is not None and not accuracy.labelled:
        yield "the calibration images have no labels: agreement with PyTorch was measured, and no accuracy"
    if accuracy is not None and accuracy.label_doubt:
        yield f"the labels may be wrong: {accuracy.label_doubt}"
    for artifact in manifest.artifacts:
        if artifact.speed is not None and artifact.precision != "fp32" and not artifact.speed.faster:
            yield f"{artifact.format} {artifact.precision} was not faster than fp32 where it was made"
    yield from (f"assumed: {note}" for note in manifest.model.notes)
    yield from (f"measured earlier, {cached.made}: {cached.what}" for cached in manifest.evidence.cached)
