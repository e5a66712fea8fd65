"""What this machine runs a bundle with: the choice of ``dmformer tune``, in a file of the machine's own.

``NAME.settings.json`` lies beside the bundle NAME, a folder or a packed file, and is no part of it: what was signed
stays as it is. It has a choice for each machine that was tuned, by the processor's name and the number of cores, and
counts for the bundle whose manifest it names alone. A caller who names a runtime or a precision does not get it.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct

from dmformer.bundle.manifest import Word
from dmformer.bundle.select import AUTO, Choice, choose
from dmformer.errors import DMFormerError, StageFailed, UsageError, first_line
from dmformer.files import Sha256, decode_json, indented_json, read_bounded, whole_file
from dmformer.machine import check_threads, cpu_model, usable_cores
from dmformer.ownership import exposure, resolve

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.bundle.reader import Bundle

SUFFIX = ".settings.json"
_VERSION = 1
_MOST_BYTES = 1 << 20


class Settings(Struct, frozen=True, kw_only=True):
    """How one machine runs a bundle.

    Attributes:
        runtime: canonical name.
        precision: of the artifact.
        threads: for one inference.
        batch: rows in each call.
        streams: calls under way at once, each with so many threads.
        objective: what it was chosen for: ``latency`` or ``throughput``.
        p50_ms: median of one call when it was chosen, in milliseconds.
        measured_at: when, in UTC, as in RFC 3339.
    """

    runtime: Word
    precision: Word
    threads: Annotated[int, Meta(ge=1, le=4096)]
    batch: Annotated[int, Meta(ge=1)] = 1
    streams: Annotated[int, Meta(ge=1, le=4096)] = 1
    objective: Word = "latency"
    p50_ms: float
    measured_at: str


class SettingsFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of the file: the bundle's manifest that it is about, and the settings of each machine."""

    schema_version: Annotated[int, Meta(ge=_VERSION, le=_VERSION)] = _VERSION
    manifest_sha256: Sha256
    machines: dict[str, Settings]


@dataclass(frozen=True)
class ConfiguredChoice:
    """What a bundle is run with, and one sentence for whoever runs it.

    Attributes:
        choice: the artifact and its runtime.
        threads: for one inference; ``None`` for all cores.
        settings: that were taken; ``None`` where there are none, or where the caller chose.
        note: which settings were taken, or why those that are there were not; ``None`` without any.
    """

    choice: Choice
    threads: int | None
    settings: Settings | None = None
    note: str | None = None


def machine_key() -> str:
    """Return what tells this machine from others: its processor, architecture and the cores that may be used."""
    return f"{cpu_model()}, {platform.machine()}, {usable_cores()} cores"


def settings_path(bundle: Bundle) -> Path:
    """Return the file for a bundle's settings: beside it, of its name."""
    source = bundle.source.resolve()
    return source.with_name(source.name + SUFFIX)


def write_settings(bundle: Bundle, settings: Settings) -> Path:
    """Keep this machine's settings; those of other machines for the same bundle stay. Returns the file.

    Raises:
        StageFailed: the file cannot be written.
        UsageError: another user's link leads there.
    """
    path = check_writable(bundle)
    try:
        kept = read_settings(path)
        trusted = kept.manifest_sha256 == bundle.manifest_sha256 and exposure(path) is None
        machines = kept.machines if trusted else {}
    except (OSError, DMFormerError):  # there is none, or it is damaged: it is written anew
        machines = {}
    content = SettingsFile(manifest_sha256=bundle.manifest_sha256, machines={**machines, machine_key(): settings})
    with whole_file(resolve(path)) as staging:
        staging.write_bytes(indented_json(content))
        staging.chmod(0o644)  # settings that others could have changed are not taken
    if reason := exposure(path):
        raise StageFailed(f"{str(path)!r} is written, but not to be used: {reason}; expected a folder of your own")
    return path


def check_writable(bundle: Bundle) -> Path:
    """Return the file for a bundle's settings, after checking that it can be written: before the work that it keeps.

    Raises:
        StageFailed: it cannot be written.
        UsageError: it is a link, or something else than a file.
    """
    path = settings_path(bundle)
    if path.is_symlink():
        raise UsageError(f"{str(path)!r} is a link; expected a file, or none: remove the link")
    if path.exists() and not path.is_file():
        raise UsageError(f"{str(path)!r} is no file; expected a file, or none: move it away")
    if not os.access(path.parent, os.W_OK):
        raise StageFailed(
            f"{str(path)!r} could not be written: {str(path.parent)!r} is read-only; expected a bundle in a folder "
            "that can be written"
        )
    return path


def choose_configured(
    bundle: Bundle, runtime: str | None, precision: str | None, threads: int | None = None
) -> ConfiguredChoice:
    """Choose what this machine's settings say; where the caller chooses, or there are none, as :func:`choose` does.

    Args:
        bundle: to choose from.
        runtime: a runtime's name; ``None`` or ``auto`` leaves it to the settings.
        precision: of the artifact; ``None`` leaves it to the settings.
        threads: for one inference; ``None`` leaves it to the settings.

    Raises:
        UnavailableError: the runtime that was named, or every one, cannot run on this machine.
        UsageError: a name is unknown, or the bundle has nothing for it.
    """
    if precision is not None or (runtime is not None and runtime.lower() != AUTO):
        return ConfiguredChoice(choose(bundle, runtime, precision), threads)
    settings, note = machine_settings(bundle)
    if settings is not None:
        # One caller has the cores that several streams would share.
        used = settings.threads * settings.streams if threads is None else threads
        try:
            choice = choose(bundle, settings.runtime, settings.precision)
            return ConfiguredChoice(choice, used, settings, taken_note(bundle, settings, used))
        except DMFormerError as error:
            note = _unused_note(bundle, error)
    return ConfiguredChoice(choose(bundle, None, None), threads, note=note)


def machine_settings(bundle: Bundle) -> tuple[Settings | None, str | None]:
    """Return this machine's settings, whether or not their runtime can run; and why the file's are not used.

    Both are ``None`` where the file is missing, or has nothing for this machine.
    """
    try:
        return _find(bundle, settings_path(bundle)), None
    except DMFormerError as error:
        return None, _unused_note(bundle, error)


def taken_note(bundle: Bundle, settings: Settings, threads: int) -> str:
    """Return a sentence that says which settings of the bundle's file were taken, with how many threads."""
    return (
        f"as {settings_path(bundle).name} says, tuned for {settings.objective} at {settings.measured_at}: "
        f"{settings.runtime} {settings.precision}, {threads} {'thread' if threads == 1 else 'threads'}"
    )


def _unused_note(bundle: Bundle, error: DMFormerError) -> str:
    return f"{settings_path(bundle).name} is not used: {error}"


def _find(bundle: Bundle, path: Path) -> Settings | None:
    """Return this machine's settings; ``None`` where there are none.

    Raises:
        UsageError: the file is damaged, is about another bundle, others may have written it, or it says more threads
            than this machine takes.
    """
    try:
        content = read_settings(path)
        reason = exposure(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"it cannot be read: {error.strerror or first_line(error)}") from error
    if reason is not None:
        raise UsageError(f"{reason}; expected a file of your own: dmformer tune --write makes it")
    if content.manifest_sha256 != bundle.manifest_sha256:
        raise UsageError("it is about another bundle of that name; expected: dmformer tune --write")
    settings = content.machines.get(machine_key())
    if settings is not None:
        check_threads(settings.threads * settings.streams)
    return settings


def read_settings(path: Path) -> SettingsFile:
    """Read a file of settings.

    Raises:
        OSError: it cannot be read, is no regular file, or is too large.
        UsageError: it is damaged.
    """
    try:
        return decode_json(read_bounded(path, _MOST_BYTES), SettingsFile)
    except msgspec.DecodeError as error:
        raise UsageError(f"it is damaged: {first_line(error)}") from error
