"""From names that a user typed to artifacts of a bundle and the runtimes that run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmformer.bundle.manifest import Artifact
from dmformer.bundle.reader import Bundle
from dmformer.errors import UnavailableError, UsageError
from dmformer.runtimes import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dmformer.runtimes.base import Runtime


@dataclass(frozen=True)
class Choice:
    """An artifact and the runtime for it."""

    artifact: Artifact
    entry: registry.RuntimeEntry
    bundle: Bundle

    @property
    def title(self) -> str:
        """Runtime and precision."""
        return f"{self.entry.name} {self.artifact.precision}"

    @property
    def saturation(self) -> str | None:
        """Why the artifact's int8 sums may saturate on this machine (:func:`saturation`)."""
        return saturation(self.entry, self.artifact.full_range)

    @property
    def caveat(self) -> str | None:
        """What is to be known before the artifact is run on this machine (:func:`caveat`)."""
        return caveat(self.entry, self.artifact)

    def runtime(self, threads: int | None = None, taps: Sequence[str] = ()) -> Runtime:
        """The runtime, not yet open, over files whose hashes were checked.

        Args:
            threads: for one inference; otherwise all cores.
            taps: inner tensors to show.

        Raises:
            CheckFailed: a file is not what the manifest says.
            UnavailableError: the runtime, or this artifact, cannot run on this machine.
        """
        adapter = registry.available_adapter(self.entry)
        if reason := adapter.support.cannot_load(self.artifact.target):
            raise UnavailableError(f"{self.artifact.format} {self.artifact.precision}: {reason}")
        path = self.bundle.load_path(self.artifact)
        artifact = self.artifact
        return adapter(path, threads=threads, precision=artifact.precision, target=artifact.target, taps=taps)


def preferred(
    artifacts: Sequence[Artifact], cannot: Callable[[registry.RuntimeEntry, Artifact], str | None]
) -> tuple[registry.RuntimeEntry, Artifact] | None:
    """The first artifact that runs here, in the manifest's order, those whose int8 sums may saturate last.

    Args:
        artifacts: to choose from.
        cannot: why one cannot run; asked in turn until there is no reason.
    """
    known = [(row, one) for one in artifacts if (row := registry.reader_of(one.format)) is not None]
    known.sort(key=lambda pair: saturation(pair[0], pair[1].full_range) is not None)
    return next((pair for pair in known if cannot(*pair) is None), None)


def cannot_run(row: registry.RuntimeEntry, artifact: Artifact) -> str | None:
    """Why an artifact cannot run on this machine; ``None`` where it can, as far as is known without loading it."""
    support = registry.support(row)
    status = support.probe()
    return support.cannot_load(artifact.target) if status.available else status.reason


def saturation(row: registry.RuntimeEntry, full_range: bool) -> str | None:
    """Why int8 sums may saturate on this machine, and what to do; ``None`` where they do not.

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
    """What is to be known of an artifact that runs here: that its sums saturate, or that it is computed in float32."""
    return saturation(row, artifact.full_range) or registry.support(row).cannot_compute(artifact.precision)


def select(bundle: Bundle, runtimes: Sequence[str], precisions: Sequence[str] = ()) -> tuple[list[Choice], list[str]]:
    """Artifacts to work on, and a sentence for each one that had to be left out.

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
            f"the bundle has nothing at {missing[0]}; it has {_contents(bundle)}: export with --precision {missing[0]}"
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
                f"the bundle has nothing for runtime {row.name}{_at(precisions)}; it has {_contents(bundle)}: "
                f"export with --format {row.format}{wanting}"
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
        raise UsageError(f"the bundle has nothing{_at(precisions)}; it has {_contents(bundle)}")
    return chosen, skipped


def _divide(choices: Sequence[Choice]) -> tuple[list[Choice], list[str]]:
    """Those that can run on this machine, and a sentence for each of the others."""
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


def _contents(bundle: Bundle) -> str:
    return ", ".join(f"{artifact.format} {artifact.precision}" for artifact in bundle.manifest.artifacts)
