"""What an export comes to on this machine: its network, formats, precisions and files, and whether it can be done.

No step is run here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dmformer._optional import require
from dmformer.bundle.manifest import BENCH_REPORT, GOLDEN, MANIFEST, PARITY_REPORT, SAFE_WEIGHT_BITS
from dmformer.bundle.select import saturation_risk
from dmformer.bundle.writer import check_destination
from dmformer.errors import UnavailableError, UsageError
from dmformer.export.formats import check_convertible, check_size, is_compiled
from dmformer.export.networks import Network, find_network
from dmformer.export.options import EngineOptions, ExportOptions
from dmformer.export.precisions import PRECISIONS, check_calibrated
from dmformer.runtimes import registry
from dmformer.task import STRIDES

if TYPE_CHECKING:
    from collections.abc import Sequence

AUTO = "auto"


@dataclass(frozen=True)
class ExportPlan:
    """What an export will do.

    Attributes:
        options: what it was asked for.
        network: the checkpoint, where it came from, and real images.
        formats: canonical names of the formats to make.
        precisions: canonical names of the precisions to make each format in.
        choose_fastest: keep only the fastest precision of each format.
        not_made: a sentence for each format that ``all`` had to leave out.
    """

    options: ExportOptions
    network: Network
    formats: tuple[str, ...]
    precisions: tuple[str, ...]
    choose_fastest: bool = False
    not_made: tuple[str, ...] = ()

    @property
    def output(self) -> Path:
        """The bundle's folder."""
        return Path(self.options.output)

    @property
    def reduces(self) -> bool:
        """Whether anything but float32 is asked for; it is then compared with float32."""
        return self.precisions != ("fp32",)

    @property
    def pairs(self) -> list[tuple[registry.RuntimeEntry, str]]:
        """The artifacts asked for: each format's row with each precision that its runtime takes."""
        return [
            (row, precision)
            for row in map(registry.entry_of_format, self.formats)
            for precision in self.precisions
            if precision in registry.support(row).precisions
        ]

    @property
    def files(self) -> list[str]:
        """Paths of what would be written, relative to the bundle."""
        artifacts = [f"{row.format}/{precision}/" for row, precision in self.pairs]
        return [MANIFEST, GOLDEN, *artifacts, PARITY_REPORT, *([BENCH_REPORT] if self.reduces else [])]

    @property
    def expected_saturation(self) -> list[str]:
        """A sentence for each artifact that this machine may answer wrongly, and what to do for other machines."""
        found = []
        for row, precision in self.pairs:
            reason = saturation_risk(row, precision == "int8" and self.options.weight_bits != SAFE_WEIGHT_BITS)
            if reason is not None:
                elsewhere = (
                    f"for devices with VNNI export --format onnx, and there: dmformer build --format {row.format}"
                )
                found.append(f"{row.name} {precision}: {reason}; {elsewhere}")
        return found

    def check_possible(self) -> None:
        """Make sure that everything that the export needs is there.

        Raises:
            UnavailableError: a package that the export or a format needs is not installed.
            UsageError: the output folder cannot be used.
        """
        check_destination(self.output)
        require("onnx", extra="export", purpose="export to ONNX")
        if importlib.util.find_spec("onnxsim") is None:  # only its own process imports it
            raise UnavailableError("simplification needs 'onnxsim', not installed; run: pip install 'dmformer[export]'")
        registry.available_adapter(registry.entry("onnxruntime"))  # it checks the ONNX stages of every export
        for row in dict.fromkeys(row for row, _ in self.pairs):
            check_convertible(row, self.options.engine)
            if self.choose_fastest:  # needs timing, and so the runtime
                registry.available_adapter(row)


def make_plan(options: ExportOptions) -> ExportPlan:
    """Everything that an export needs, read and checked.

    Raises:
        UsageError: an option or a file cannot be used.
    """
    network = find_network(options)
    if network.checkpoint.config.origin is not None:  # folding knows the layers of a DMFormer
        options = replace(options, deploy_form=False)
    _check_task(network, options)
    automatic = any(name.lower() == AUTO for name in options.precisions)
    precisions = _precisions(options.precisions, automatic, calibrated=network.calibration is not None)
    if options.calibration is not None and precisions == ("fp32",):
        raise UsageError(
            "calibration images, and precision fp32 alone, which needs none; expected a reduced one as well: "
            "`precisions` int8, fp16 or auto"
        )
    if options.weight_bits != SAFE_WEIGHT_BITS and "int8" not in precisions:
        raise UsageError(
            f"int8 weights of {options.weight_bits} bits, and no int8; expected `precisions` int8 or auto as well"
        )
    check_calibrated(precisions, network.calibration)
    formats, not_made = _formats(options, precisions, network)
    return ExportPlan(options, network, formats, precisions, automatic, not_made)


def _check_task(network: Network, options: ExportOptions) -> None:
    task, image_size = network.checkpoint.config.task, network.checkpoint.preprocessing.image_size
    if task == "segmentation" and image_size % STRIDES[-1]:
        raise UsageError(f"`image_size` {image_size} for segmentation; expected a multiple of {STRIDES[-1]}")
    if task == "segmentation" and network.checkpoint.config.num_classes < 2:
        raise UsageError(
            "a segmentation network with one output map; expected a map for each of two classes or more, the "
            "background included: give its last layer a second channel of zeros in front"
        )
    wanted = {name.lower() for name in options.precisions}
    if task == "features" and (options.calibration is not None or {"int8", AUTO} & wanted):
        raise UsageError(
            "features have no accuracy, to which int8, auto and `calibration` would have to keep; expected fp32 or "
            "fp16, or the network with its head"
        )


def _precisions(names: Sequence[str], automatic: bool, *, calibrated: bool) -> tuple[str, ...]:
    """Canonical names, each once; ``auto`` stands for all that can be made."""
    lower = [name.lower() for name in names]
    if automatic and set(lower) != {AUTO}:
        raise UsageError(
            f"precision {AUTO} with {', '.join(name for name in lower if name != AUTO)}; expected it alone"
        )
    if automatic and not calibrated:
        raise UsageError(
            f"precision {AUTO} without images to measure accuracy on; expected `calibration`, a folder of them"
        )
    if automatic:
        return PRECISIONS
    if unknown := [name for name in lower if name not in PRECISIONS]:
        raise UsageError(f"precision {unknown[0]!r}; expected one of {', '.join(PRECISIONS)}, or {AUTO}")
    return tuple(dict.fromkeys(lower))


def _formats(
    options: ExportOptions, precisions: Sequence[str], network: Network
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Canonical names, each once, in the order given; ``all`` stands for those that can be made, and says of the rest.

    Those that take none of the precisions are no part of ``all``.
    """
    formats: list[str] = []
    left_out: list[str] = []
    for name in options.formats:
        if name.lower() != "all":
            row = registry.entry_of_format(name)
            check_size(row, options.open_size)
            _check_kept(row, network)
            _check_taken(row, precisions)
            formats.append(row.format)
            continue
        for row in registry.ENTRIES:
            if not set(registry.support(row).precisions) & set(precisions):
                continue
            try:
                check_size(row, options.open_size)
                _check_kept(row, network)
                check_convertible(row, options.engine)
                formats.append(row.format)
            except (UnavailableError, UsageError) as error:
                left_out.append(f"{row.format}: {error}")
    every = [name.lower() == "all" for name in options.formats]
    compiled = [is_compiled(registry.entry_of_format(name)) for name in formats]
    if options.engine != EngineOptions() and not any(every) and not any(compiled):
        raise UsageError("options of an engine, and no format that is compiled; expected `formats` trt as well")
    return tuple(dict.fromkeys(formats)), tuple(dict.fromkeys(left_out))


def _check_taken(row: registry.RuntimeEntry, precisions: Sequence[str]) -> None:
    taken = registry.support(row).precisions
    if not set(taken) & set(precisions):
        raise UsageError(
            f"format {row.format} at {', '.join(precisions)}; expected {', '.join(taken)}: "
            f"leave `formats` {row.format} out, or add `precisions` {taken[0]}"
        )


def _check_kept(row: registry.RuntimeEntry, network: Network) -> None:
    """Refuse the format of checkpoints for a network of one's own: the code that it needs is not in a bundle."""
    if row.format == "torch" and network.checkpoint.config.origin is not None:
        raise UsageError(
            "format torch holds the weights of a DMFormer alone, and not the code of a network of one's own; expected "
            "another format: verify compares with PyTorch by `module` and `weights`"
        )
