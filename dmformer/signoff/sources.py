"""What tells something about a bundle: the bundle itself, other bundles, and reports of other machines."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from dmformer.bench.report import BenchReport
from dmformer.bundle.golden import Golden
from dmformer.bundle.integrity import IntegrityReport, check_integrity
from dmformer.bundle.manifest import BENCH_REPORT, PARITY_REPORT
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.errors import CheckFailed, UsageError
from dmformer.files import decode_json, read_bounded
from dmformer.verify.evaluate import EvalReport
from dmformer.verify.report import ParityReport

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


_MOST_BYTES = 64 << 20  # of a report
# The keys that tell a report's kind; every report of the kind has them.
_KINDS: tuple[tuple[frozenset[str], type[msgspec.Struct]], ...] = (
    (frozenset(("passed", "checks")), ParityReport),
    (frozenset(("environment", "results")), BenchReport),
    (frozenset(("data", "labelled", "results")), EvalReport),
)
_MOST_COUNTED = 1 << 53  # images, calls or nanoseconds: more is no count of anything
_EXPECTED = "expected what verify, bench or eval wrote with --json, or a bundle"


@dataclass(frozen=True)
class Source:
    """Something that tells of a bundle.

    Attributes:
        title: what tells the source from the others.
        bundle: where the source is one.
        integrity: of the bundle's files and signature.
        parity: checks.
        bench: latencies.
        accuracy: accuracy on a folder of images.
        golden: golden images and answers; ``None`` where the bundle has none that can be read.
    """

    title: str
    bundle: Bundle | None = None
    integrity: IntegrityReport | None = None
    parity: ParityReport | None = None
    bench: BenchReport | None = None
    accuracy: EvalReport | None = None
    golden: Golden | None = None

    @property
    def artifacts(self) -> frozenset[str]:
        """The SHA-256 of each artifact that it has or is about."""
        if self.bundle is not None:
            return frozenset(artifact.sha256 for artifact in self.bundle.manifest.artifacts)
        parity = () if self.parity is None else self.parity.artifacts
        bench = () if self.bench is None else (row.artifact_sha256 for row in self.bench.results)
        accuracy = () if self.accuracy is None else (row.artifact_sha256 for row in self.accuracy.results)
        return frozenset((*parity, *bench, *accuracy))

    @property
    def reports(self) -> list[ParityReport | BenchReport | EvalReport]:
        """The reports that it has or is."""
        return [report for report in (self.parity, self.bench, self.accuracy) if report is not None]


def bundle_source(named: Path | Bundle, title: str) -> Source:
    """Open a bundle under the policy in force, check its files, and read the reports in it.

    A file that is not what the manifest says is left out; ``integrity`` names it.

    Raises:
        CheckFailed: the policy asks for a signature that is not there, it is of another manifest, or a packed file is
            damaged.
        UnavailableError: the bundle is signed, and the package that checks signatures is not installed.
        UsageError: there is no bundle, or a report in it cannot be read.
    """
    bundle = named if isinstance(named, Bundle) else open_bundle(named)
    integrity = check_integrity(bundle.source)
    try:
        golden = bundle.golden()
    except (CheckFailed, UsageError):
        golden = None
    return Source(
        title,
        bundle=bundle,
        integrity=integrity,
        parity=_read(bundle, PARITY_REPORT, ParityReport),
        bench=_read(bundle, BENCH_REPORT, BenchReport),
        golden=golden,
    )


def _read(bundle: Bundle, name: str, kind: type[Any]) -> Any:
    """Return a report of a bundle; ``None`` where it has none, or one that is not what the manifest says."""
    for entry in bundle.manifest.files:
        if entry.path == name:
            try:
                return decode_json(bundle.read(entry), kind)
            except CheckFailed:
                return None
            except msgspec.DecodeError as error:
                raise UsageError(f"{bundle.source}: {name} is no report that this version reads: {error}") from error
    return None


def read_sources(bundle: Path | Bundle, add: Sequence[Path]) -> list[Source]:
    """Return the sources of a page: the bundle, and what is added to it, each told by what is in it.

    Raises:
        CheckFailed: the policy asks for a signature that is not there, it is of another manifest, or a packed file is
            damaged.
        UnavailableError: a bundle is signed, and the package that checks signatures is not installed.
        UsageError: a file cannot be read, is neither report nor bundle, does not say which artifacts it asked, is of
            artifacts that no bundle here has, or is here already.
    """
    packed = [path.is_dir() or (path.is_file() and zipfile.is_zipfile(path)) for path in add]
    sources = [bundle_source(bundle, "this bundle")]
    for number in sorted(range(len(add)), key=lambda number: not packed[number]):  # bundles first
        path = add[number]
        source = bundle_source(path, f"bundle {path.name or path}") if packed[number] else read_report(path)
        if any(_repeats(source, other) for other in sources):
            raise UsageError(f"`add` {str(path)!r} is on the page already; expected each bundle and each report once")
        known = frozenset().union(*(other.artifacts for other in sources if other.bundle is not None))
        if source.bundle is None and (foreign := sorted(source.artifacts - known)):
            raise UsageError(
                f"`add` {str(path)!r} is of an artifact {foreign[0][:12]}…, which the bundle does not have; expected a "
                "report on this bundle: name the bundle that it is of with `add` as well"
            )
        if source.title in [other.title for other in sources]:
            source = replace(source, title=f"{number + 1}. {source.title}, {path}")
        sources.append(source)
    return sources


def _repeats(source: Source, other: Source) -> bool:
    """Whether a source is another one again: the same bundle, or a report that the other has too."""
    if source.bundle is not None:
        return other.bundle is not None and source.bundle.manifest_sha256 == other.bundle.manifest_sha256
    return any(report in other.reports for report in source.reports)


def read_report(path: Path) -> Source:
    """Read the JSON of ``verify``, ``bench`` or ``eval``, told by its keys.

    Raises:
        UsageError: it cannot be read, is none of them, does not say which artifacts it asked, or has a figure that
            nothing measured can have.
    """
    try:
        data = read_bounded(path, _MOST_BYTES, links=True)
    except OSError as error:
        raise UsageError(f"`add` {str(path)!r}: {error.strerror}; {_EXPECTED}") from error
    try:
        keys = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).keys()
        kind = next((kind for needed, kind in _KINDS if needed <= keys), None)
        report = decode_json(data, kind) if kind is not None else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"`add` {str(path)!r} is no report that this version reads: {error}; {_EXPECTED}") from error
    if isinstance(report, ParityReport):
        if not report.artifacts:
            raise UsageError(
                f"`add` {str(path)!r} says not which artifacts it asked; expected a report of verify --json by this "
                "version"
            )
        place = report.processor.cpu if report.processor else "processor not noted"
        if report.server is not None:
            place = f"a server, asked from {place}"
        return Source(f"{path.name} ({place})", parity=report)
    if wrong := _impossible(report):
        raise UsageError(f"`add` {str(path)!r} is no report that this version reads: {wrong}; {_EXPECTED}")
    if isinstance(report, BenchReport):
        return Source(f"{path.name} ({report.environment.get('cpu', 'processor not noted')})", bench=report)
    if isinstance(report, EvalReport):
        return Source(path.name, accuracy=report)
    raise UsageError(
        f"`add` {str(path)!r} is no report for the page; {_EXPECTED}: neither a server's load nor what tune found"
    )


def _impossible(report: object) -> str | None:
    """Return what no measurement can have given: a row that was timed without calls, or shares of no images."""
    if isinstance(report, BenchReport):
        for row in report.results:
            counts = (
                row.samples,
                row.attainable_ms or 0,
                *row.wall_ns,
                *(each for samples in row.samples_ns for each in samples),
            )
            if row.timed and (row.samples < 1 or not row.samples_ns or not all(row.samples_ns)):
                return f"{row.title} has a latency and no calls that were timed"
            if not all(0 <= count < _MOST_COUNTED for count in counts):
                return f"{row.title} has times that no clock gives"
    if isinstance(report, EvalReport):
        for one in (*report.results, *([report.torch] if report.torch else [])):
            shares = (one.top1, one.top5, one.miou, one.pixel_accuracy, one.agreement_with_torch)
            if not 0 < one.images < _MOST_COUNTED or not all(0 <= share <= 1 for share in shares if share is not None):
                return "an accuracy that is no share of its images"
    return None
