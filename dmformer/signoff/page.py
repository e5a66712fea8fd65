"""The page of a sign-off: the verdict first, then what was shipped, and everything that is known of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from dmformer.bench.page import FIGURES, LATENCY_CAPTION, latency_picture, row_figures
from dmformer.bench.sentences import limits
from dmformer.machine import processor_title
from dmformer.page.document import Section, Table, Verdict, render_page, with_rest
from dmformer.signoff.accuracy import accuracy_section
from dmformer.signoff.checks import checks_section, decisions_section, every_check_section, layers_section
from dmformer.signoff.pictures import sensitivity_pictures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bench.report import Result
    from dmformer.bundle.manifest import Manifest, Model
    from dmformer.machine import Processor
    from dmformer.signoff.api import SignOff
    from dmformer.signoff.sources import Source

_MOST_POINTS = 12  # of a verdict; the section that says what is open has all
_MOST_TIMED = 20  # rows of a picture
_NOT_PROVEN = (
    "It gathers what was reported and runs nothing. Hashes prove that files are what the manifest lists, not who wrote "
    "it: a trusted signature does. Checks compare with PyTorch on a few images, on the processors named here; accuracy "
    "is that on the images named here; latency that of the machines named here. A report that was added is as good as "
    "the one who sent it: reports are not signed."
)


def sign_off_page(known: SignOff) -> str:
    """Return the page, as HTML.

    Raises:
        UnavailableError: a package is missing.
    """
    manifest, opened = known.manifest, known.sources[0].bundle
    assert opened is not None
    listing = _sections(known)
    return render_page(
        f"Sign-off of {manifest.model.arch}",
        f"{_size(manifest)} · made by dmformer {manifest.tool_version} · manifest {opened.manifest_sha256[:16]}…",
        _verdicts(known),
        [section for section in listing if section.parts],
    )


def _verdicts(known: SignOff) -> list[Verdict]:
    verdicts = [Verdict(text=known.verdict, points=_first(known.failures), held=known.passed)]
    if known.open_points:
        verdicts.append(Verdict(text=f"{len(known.open_points)} open points", points=_first(known.open_points)))
    return verdicts


def _first(points: Sequence[str]) -> list[str]:
    more = len(points) - _MOST_POINTS
    return [*points[:_MOST_POINTS], *([f"and {more} more"] if more > 0 else [])]


def _sections(known: SignOff) -> list[Section]:
    return [
        _shipped(known),
        checks_section(known),
        decisions_section(known),
        layers_section(known),
        accuracy_section(known),
        *_latency(known),
        _places(known),
        _sensitivity(known),
        _assumed(known),
        Section(title="What remains open", parts=_lines(known.open_points)),
        Section(title="What this page does not prove", parts=_lines([_NOT_PROVEN])),
        every_check_section(known),
    ]


def _lines(lines: Sequence[str]) -> list[Table]:
    return [Table(rows=[[line] for line in lines], texts=1)] if lines else []


# --- what was shipped -------------------------------------------------------------------------------------------------


def _size(manifest: Manifest) -> str:
    classes = f", {manifest.class_count} classes" if manifest.class_count else ""
    return f"{manifest.model.task}{classes}, {manifest.model.parameters / 1e6:.2f} M parameters"


def _shipped(known: SignOff) -> Section:
    facts: dict[str, list[str]] = {}
    files = []
    for place, (source, manifest) in enumerate(known.bundles):
        model, pre = manifest.model, manifest.preprocessing
        assert source.bundle is not None
        module = [] if model.module is None else [("network", f"{model.module.reference}, one's own")]
        inputs = ", ".join(f"{one.name} {' x '.join(map(str, one.shape))}" for one in manifest.inputs)
        outputs = ", ".join(f"{one.name} {' x '.join(map(str, one.shape))}" for one in manifest.outputs)
        rows = [
            ("model", f"{model.arch}, {_size(manifest)}, {model.macs / 1e9:.3g} GMACs an image"),
            *module,
            ("weights", model.weights_origin),
            *[("trained", fact) for fact in [_training(model)] if fact],
            ("form", "deploy: everything linear folded" if model.deploy_form else "training: as PyTorch has it"),
            ("input, output", f"{inputs}; {outputs}"),
            ("images", f"{pre.image_size}x{pre.image_size} {pre.channels}, {pre.interpolation}"),
            ("manifest", f"SHA-256 {source.bundle.manifest_sha256}"),
            ("signature", _signature(source)),
        ]
        for name, value in rows:
            facts.setdefault(name, [""] * len(known.bundles))[place] = value
        files += [
            [known.named(source, entry.path), f"{entry.bytes / 1e6:.2f} MB", entry.sha256] for entry in manifest.entries
        ]
    built = [
        [
            known.named(source, f"{one.format} {one.precision}"),
            f"{one.bytes / 1e6:.1f} MB",
            _built_with(one.built_with),
        ]
        for source, manifest in known.bundles
        for one in manifest.artifacts
    ]
    titles = ["", *(source.title for source, _ in known.bundles)]
    return Section(
        title="What was shipped",
        parts=[
            Table(rows=[[name, *values] for name, values in facts.items()], columns=titles, texts=len(known.bundles)),
            Table(rows=built, columns=["artifact", "size", "built with"], texts=1),
            Table(rows=files, columns=["file", "size", "SHA-256"], texts=1),
        ],
    )


def _built_with(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _training(model: Model) -> str:
    """Say what the checkpoint's metadata tells of its training, without the recipe."""
    return ", ".join(f"{name} {value}" for name, value in model.training.items() if not isinstance(value, dict))


def _signature(source: Source) -> str:
    assert source.integrity is not None
    found = source.integrity.signature
    if found.status == "none":
        return "none"
    held = {"trusted": "holds", "unknown key": "holds, by an unknown key", "bad": "does NOT hold"}[found.status]
    trusted = f", trusted as {found.trusted_as}" if found.trusted_as else ""
    return f"{held}; key {found.fingerprint}{trusted}{f' ({found.reason})' if found.reason else ''}"


# --- latency and machines ---------------------------------------------------------------------------------------------


def _latency(known: SignOff) -> list[Section]:
    timed: list[tuple[Result, str]] = []
    rows, machines = [], []
    for source in known.sources:
        if source.bench is None:
            continue
        place = str(source.bench.environment.get("cpu", "processor not noted"))
        drawn = [
            row for row in source.bench.results if row.timed and row.samples_ns and all(map(_positive, row.samples_ns))
        ]
        timed += [(row, place) for row in drawn]
        rows += [[*row_figures(row), source.title] for row in source.bench.results]
        machines += [[source.title, limit] for limit in [limits(source.bench)] if limit]
    picture = (
        [latency_picture([row for row, _ in timed[:_MOST_TIMED]], [place for _, place in timed[:_MOST_TIMED]])]
        if timed
        else []
    )
    caption = with_rest(LATENCY_CAPTION, len(timed), _MOST_TIMED)
    table = [Table(columns=[*FIGURES, "source"], rows=rows, texts=2)] if rows else []
    limit = [Table(columns=["source", "what the machine can do at best"], rows=machines, texts=1)] if machines else []
    return [Section(title="Latency", caption=caption, parts=[*picture, *table, *limit])]


def _positive(samples: tuple[int, ...]) -> bool:
    return bool(samples) and min(samples) > 0


def _places(known: SignOff) -> Section:
    rows = []
    for source in known.sources:
        if source.bundle is not None:
            evidence = source.bundle.manifest.evidence
            made = evidence.processor
            if made is not None:
                rows.append([_cpu(made), "where it was made", _held(evidence.parity.passed), source.title])
            for one in evidence.processors:
                what = f"{one.format} {one.precision} by {one.engine}, {one.asked}"
                rows.append([f"{one.processor}, emulated by {one.emulator}", what, _held(one.passed), source.title])
        elif source.parity is not None:
            if (server := source.parity.server) is not None:
                place = f"server {server.name} {server.version} at {server.url}"
                rows.append([place, ", ".join(server.models), _held(source.parity.passed), source.title])
            elif source.parity.processor is not None and not source.parity.replays:
                asked = ", ".join(dict.fromkeys(f"{check.runtime} {check.precision}" for check in source.parity.checks))
                rows.append([_cpu(source.parity.processor), asked, _held(source.parity.passed), source.title])
            for replay in source.parity.replays:
                place = replay.processor or (_cpu(replay.described) if replay.described else "this machine")
                emulated = f", emulated by {replay.emulator}" if replay.emulator else ""
                rows.append([f"{place}{emulated}", f"by {replay.engine}", _held(replay.passed), source.title])
        if source.bench is not None:
            rows.append([str(source.bench.environment.get("cpu", "-")), "timed", "-", source.title])
    return Section(
        title="Where it was checked and timed",
        parts=[
            Table(
                columns=["processor or server", "what", "verdict", "source"],
                rows=rows,
                texts=4,
                bad=[place for place, row in enumerate(rows) if row[2] == "FAILED"],
            )
        ]
        if rows
        else [],
    )


def _held(passed: bool) -> str:
    return "held" if passed else "FAILED"


def _cpu(processor: Processor) -> str:
    return processor_title(msgspec.structs.asdict(processor))


# --- sensitivity, and what was assumed --------------------------------------------------------------------------------


def _sensitivity(known: SignOff) -> Section:
    found = {
        known.named(source, one.precision): one.sensitivity
        for source, manifest in known.bundles
        for one in manifest.artifacts
        if one.sensitivity
    }
    return Section(
        title="Sensitivity",
        caption="The error that a precision causes in one block alone: where accuracy is lost first.",
        parts=list(sensitivity_pictures(found)),
    )


def _assumed(known: SignOff) -> Section:
    rows = []
    for source, manifest in known.bundles:
        model = manifest.model
        kept = "kept" if manifest.simplification.kept else "NOT kept"
        lines = [
            *(f"assumed while reading the checkpoint: {note}" for note in model.notes),
            *(f"given to the export instead of the checkpoint's: {name}" for name in model.overridden),
            *(
                [f"an image is of the second class above a probability of {model.threshold:g}"]
                if model.threshold
                else []
            ),
            f"the simplified graph was {kept}: {manifest.simplification.reason}",
            *(f"measured earlier, {cached.made}: {cached.what}" for cached in manifest.evidence.cached),
        ]
        rows += [known.named(source, line) for line in lines]
    return Section(title="What was assumed", parts=_lines(rows))
