"""From names that a user typed to artifacts of a bundle and the runtimes that run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmformer.bundle.manifest import Artifact, Manifest
from dmformer.bundle.reader import Bundle
from dmformer.errors import UnavailableError, UsageError
from dmformer.runtimes import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dmformer.runtimes.base import Runtime


AUTO = "auto"  # in the place of a runtime's name: the first that can run


@dataclass(frozen=True)
class Choice:
    """An artifact of a bundle, and the runtime that runs it."""

    artifact: Artifact
    entry: registry.RuntimeEntry
    bundle: Bundle

    @property
    def title(self) -> str:
        """The names of the runtime and the precision."""
        return f"{self.entry.name} {self.artifact.precision}"

    @property
    def saturation_risk(self) -> str | None:
        """Why the artifact's int8 sums may saturate on this machine, as :func:`saturation_risk` says it."""
        return saturation_risk(self.entry, self.artifact.full_range)

    @property
    def caveat(self) -> str | None:
        """What a user should know before the artifact is run on this machine, as :func:`caveat` says it."""
        return caveat(self.entry, self.artifact)

    def runtime(self, threads: int | None = None, taps: Sequence[str] = ()) -> Runtime:
        """Return the runtime, not yet entered, over the open files whose hashes were checked.

        Args:
            threads: for one inference; otherwise all cores.
            taps: inner tensors to show.

        Raises:
            CheckFailed: a file is not what the manifest says, or leads to one that it does not list.
            UnavailableError: the runtime, or this artifact, cannot run on this machine.
            UsageError: a file is damaged, or of another format than the manifest says.
        """
        adapter = registry.available_adapter(self.entry)
        if reason := adapter.support.cannot_load(self.artifact.target):
            raise UnavailableError(f"{self.artifact.format} {self.artifact.precision}: {reason}")
        files = self.bundle.open_artifact(self.artifact)
        artifact = self.artifact
        return adapter(
            files[0].path,
            files=files,
            threads=threads,
            precision=artifact.precision,
            target=artifact.target,
            taps=taps,
        )


def choose(bundle: Bundle, runtime: str | None, precision: str | None) -> Choice:
    """Return the first artifact, in the manifest's order, of a runtime; those whose int8 sums may saturate come last.

    Args:
        bundle: to choose from.
        runtime: its name; otherwise, or with ``auto``, the first that can run on this machine.
        precision: of the artifact; otherwise any.

    Raises:
        UnavailableError: the runtime that was named, or every one, cannot run on this machine.
        UsageError: a name is unknown, or the bundle has nothing for it.
    """
    if runtime is not None and runtime.lower() == AUTO:
        runtime = None
    if runtime is None:
        artifacts = [artifact for artifact in bundle.manifest.artifacts if precision in (None, artifact.precision)]
        first = first_runnable(artifacts, cannot_run)
        if first is not None:
            return Choice(first[1], first[0], bundle)
    choices, _ = select(bundle, [runtime] if runtime else [], [precision] if precision else [])
    return min(choices, key=lambda choice: choice.saturation_risk is not None)


def first_runnable(
    artifacts: Sequence[Artifact], reason_against: Callable[[registry.RuntimeEntry, Artifact], str | None]
) -> tuple[registry.RuntimeEntry, Artifact] | None:
    """Return the first artifact that runs here, in the manifest's order, those whose int8 sums may saturate last.

    Args:
        artifacts: to choose from.
        reason_against: why one cannot run; asked of one after another until there is no reason.
    """
    readable = [(row, artifact) for artifact in artifacts if (row := registry.reader_of(artifact.format)) is not None]
    readable.sort(key=lambda pair: saturation_risk(pair[0], pair[1].full_range) is not None)
    return next((pair for pair in readable if reason_against(*pair) is None), None)


def cannot_run(row: registry.RuntimeEntry, artifact: Artifact) -> str | None:
    """Say why an artifact cannot run on this machine; ``None`` where it can, as far as one sees without loading it."""
    support = registry.support(row)
    status = support.probe()
    return support.cannot_load(artifact.target) if status.available else status.reason


def saturation_risk(row: registry.RuntimeEntry, full_range: bool) -> str | None:
    """Say why int8 sums may saturate on this machine, and what to do; ``None`` where they do not.

    Args:
        row: of the runtime.
        full_range: whether the int8 weights use 8 bits (:attr:`dmformer.bundle.manifest.Artifact.full_range`).
    """
    reason = registry.support(row).saturates() if full_range else None
    return reason and (
        f"its int8 weights use 8 bits, and their sums may saturate in {row.name}: {reason}; export it again with "
        "weights of 7 bits (the default), or run it at another precision"
    )


def caveat(row: registry.RuntimeEntry, artifact: Artifact) -> str | None:
    """Say that an artifact's sums saturate here, or that it is computed in float32; ``None`` where neither is so."""
    return saturation_risk(row, artifact.full_range) or registry.support(row).cannot_compute(artifact.precision)


def matching_artifacts(manifest: Manifest, runtimes: Sequence[str], precisions: Sequence[str] = ()) -> list[Artifact]:
    """Return the artifacts of runtimes and precisions, wherever they run; all of them where none is named.

    Raises:
        UsageError: a runtime is unknown, or there are none.
    """
    formats = {registry.entry(name).format for name in runtimes if name.lower() != "all"}
    wanted = {precision.lower() for precision in precisions}
    found = [
        artifact
        for artifact in manifest.artifacts
        if (not formats or artifact.format in formats) and (not wanted or artifact.precision in wanted)
    ]
    if not found:
        named = " ".join([*runtimes, *precisions])
        raise UsageError(f"the bundle has nothing for {named}; it has {_contents(manifest)}")
    return found


def select(bundle: Bundle, runtimes: Sequence[str], precisions: Sequence[str] = ()) -> tuple[list[Choice], list[str]]:
    """Return the artifacts to work on, and a sentence for each one that had to be left out.

    A runtime that is named must be able to run and must have an artifact. With none named, or ``all``, every artifact
    whose runtime can run on this machine is taken.

    Raises:
        UnavailableError: a runtime that was named, or every one, cannot run on this machine.
        UsageError: a name is unknown, or the bundle has nothing for it.
    """
    precisions = [precision.lower() for precision in precisions]
    held = {artifact.precision for artifact in bundle.manifest.artifacts}
    if missing := [precision for precision in precisions if precision not in held]:
        raise UsageError(
            f"the bundle has nothing at {missing[0]}; it has {_contents(bundle.manifest)}; "
            f"run: dmformer export --precision {missing[0]}"
        )
    wanted = list(dict.fromkeys(registry.entry(name) for name in runtimes if name.lower() != "all"))
    chosen: list[Choice] = []
    skipped: list[str] = []
    for row in wanted:
        registry.available_adapter(row)
        found = _choices(bundle, row, precisions)
        if not found:
            wanting = "".join(f" --precision {precision}" for precision in precisions)
            raise UsageError(
                f"the bundle has nothing for runtime {row.name}{_at(precisions)}; it has {_contents(bundle.manifest)}: "
                f"run: dmformer export --format {row.format}{wanting}"
            )
        fit, reasons = _divide(found)
        if not fit:
            raise UnavailableError("; ".join(reasons))
        chosen.extend(fit)
        skipped.extend(reasons)
    if not wanted or any(name.lower() == "all" for name in runtimes):
        for row in registry.ENTRIES:
            fit, reasons = _divide([] if row in wanted else _choices(bundle, row, precisions))
            chosen.extend(fit)
            skipped.extend(reasons)
        formats = sorted({artifact.format for artifact in bundle.manifest.artifacts})
        unknown = [name for name in formats if registry.reader_of(name) is None]
        skipped.extend(f"{name}: this version of dmformer has no runtime for it" for name in unknown)
    if not chosen and skipped:
        raise UnavailableError(f"nothing in the bundle can run on this machine: {'; '.join(skipped)}")
    if not chosen:
        raise UsageError(f"the bundle has nothing{_at(precisions)}; it has {_contents(bundle.manifest)}")
    return chosen, skipped


def _divide(choices: Sequence[Choice]) -> tuple[list[Choice], list[str]]:
    """Return those that can run on this machine, and a sentence for each of the others."""
    fit, reasons = [], []
    for choice in choices:
        if reason := cannot_run(choice.entry, choice.artifact):
            reasons.append(f"{choice.artifact.format} {choice.artifact.precision}: {reason}")
        else:
            fit.append(choice)
    return fit, reasons


def _choices(bundle: Bundle, row: registry.RuntimeEntry, precisions: Sequence[str]) -> list[Choice]:
    return [
        Choice(artifact, row, bundle)
        for artifact in bundle.artifacts(row.format)
        if not precisions or artifact.precision in precisions
    ]


def _at(precisions: Sequence[str]) -> str:
    return f" at {', '.join(precisions)}" if precisions else ""


def _contents(manifest: Manifest) -> str:
    return ", ".join(f"{artifact.format} {artifact.precision}" for artifact in manifest.artifacts)
