"""What an export is asked for, what it would write, and whether this machine can."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dmformer._optional import require
from dmformer.bundle.manifest import GOLDEN, MANIFEST, SAFE_WEIGHT_BITS, Manifest
from dmformer.bundle.select import saturation
from dmformer.bundle.writer import check_destination
from dmformer.data.images import ImageSet
from dmformer.errors import UnavailableError, UsageError
from dmformer.export.formats import EngineOptions, check_convertible
from dmformer.runtimes import registry
from dmformer.verify.report import ParityReport

if TYPE_CHECKING:
    from dmformer.models.checkpoint import Checkpoint  # noqa: TC004 - it imports torch, and an export may be known

PARITY_REPORT = "reports/parity.json"
BENCH_REPORT = "reports/bench.json"


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        checkpoint: weights, configuration and preprocessing.
        weights: where they came from; ``random`` is marked in the manifest.
        seed: of random weights.
        formats: canonical names of the formats to make.
        precisions: canonical names of the precisions to make each format in.
        choose_fastest: keep only the fastest precision of each format.
        calibration: images that stand for what the device will see.
        max_points_lost: accuracy budget of a reduced precision against PyTorch, in percentage points.
        weight_bits: bits that int8 weights use.
        output: the bundle's folder.
        images: real images for the golden set; noise fills it up.
        deploy_form: fold everything linear before tracing (:mod:`dmformer.models.deploy`).
        force: write the bundle although a parity check failed.
        engine: how formats that are compiled are compiled.
        not_made: a sentence for each format that ``all`` had to leave out.
    """

    checkpoint: Checkpoint
    weights: Literal["checkpoint", "demonstration", "random"]
    formats: tuple[str, ...]
    output: Path
    precisions: tuple[str, ...] = ("fp32",)
    choose_fastest: bool = False
    calibration: ImageSet | None = None
    max_points_lost: float = 0.5
    weight_bits: int = SAFE_WEIGHT_BITS
    seed: int | None = None
    images: tuple[Path, ...] = ()
    deploy_form: bool = True
    force: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
    not_made: tuple[str, ...] = ()

    @property
    def reduced(self) -> bool:
        """Whether anything but float32 is asked for; it is then compared with float32."""
        return self.precisions != ("fp32",)

    def pairs(self) -> list[tuple[registry.RuntimeEntry, str]]:
        """The artifacts asked for: each format's row with each precision that its runtime takes.

        Raises:
            UsageError: a format takes none of the precisions.
        """
        found = []
        for row in map(registry.entry_of_format, self.formats):
            taken = registry.support(row).precisions
            if not set(taken) & set(self.precisions):
                raise UsageError(
                    f"format {row.format} at {', '.join(self.precisions)}; expected {', '.join(taken)}: "
                    f"leave --format {row.format} out, or add --precision {taken[0]}"
                )
            found += [(row, precision) for precision in self.precisions if precision in taken]
        return found


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what was found on the way.

    Attributes:
        output: the bundle's folder.
        manifest: of the bundle.
        parity: every check.
        broken: the engines that could not be built, and why.
        not_kept: why the cache did not take what was made.
    """

    output: Path
    manifest: Manifest
    parity: ParityReport
    broken: tuple[str, ...] = ()
    not_kept: str | None = None


def planned_artifacts(request: ExportRequest) -> list[str]:
    """Paths of what an export would write, relative to the bundle; nothing is run."""
    artifacts = [f"{row.format}/{precision}/" for row, precision in request.pairs()]
    return [MANIFEST, GOLDEN, *artifacts, PARITY_REPORT, *([BENCH_REPORT] if request.reduced else [])]


def expected_saturation(request: ExportRequest) -> list[str]:
    """A sentence for each artifact that this machine may answer wrongly, and what to do for other machines."""
    found = []
    for row, precision in request.pairs():
        reason = saturation(row, precision == "int8" and request.weight_bits != SAFE_WEIGHT_BITS)
        if reason is not None:
            elsewhere = f"for devices with VNNI export --format onnx, and there: dmformer build --format {row.format}"
            found.append(f"{row.name} {precision}: {reason}; {elsewhere}")
    return found


def check_possible(request: ExportRequest) -> None:
    """Make sure that everything that the export needs is there; nothing is run.

    Raises:
        UnavailableError: a package that the export or a format needs is not installed.
        UsageError: the output folder cannot be used, or a format takes none of the precisions.
    """
    check_destination(request.output)
    require("onnx", extra="export", purpose="export to ONNX")
    if importlib.util.find_spec("onnxsim") is None:  # only its own process imports it
        raise UnavailableError("simplification needs 'onnxsim', not installed; run: pip install 'dmformer[export]'")
    registry.available_adapter(registry.entry("onnxruntime"))  # it checks the ONNX stages of every export
    for row in dict.fromkeys(row for row, _ in request.pairs()):
        check_convertible(row, request.engine)
        if request.choose_fastest:  # needs timing, and so the runtime
            registry.available_adapter(row)
