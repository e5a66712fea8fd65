"""Seeded faults, each through the checks that stand in its way, and clean exports, which must raise no alarm.

A fault is caught where a check fails. Where it sits in a node, the module that is named must be the one that was
spoilt. The exit code is 1 where one is missed or led elsewhere, or a clean export raises an alarm.

Usage: python -m benchmarks.faults [CLEAN_EXPORTS]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import dmformer
from benchmarks.fault_kinds import FP32, Fault, Outcome
from benchmarks.fault_kinds_elsewhere import IN_BUNDLES, PRECISION
from benchmarks.fault_kinds_pixels import ANNOTATIONS, IN_DECODER
from dmformer.assets import CALIBRATION_IMAGES, DEMONSTRATION_CHECKPOINT, SCENES, SEGMENTATION_CHECKPOINT
from dmformer.bundle.manifest import SAFE_WEIGHT_BITS
from dmformer.bundle.reader import open_bundle
from dmformer.data.images import image_set
from dmformer.errors import StageFailed, UsageError
from dmformer.export import steps
from dmformer.export.networks import random_checkpoint
from dmformer.export.options import EngineOptions
from dmformer.export.precisions import Calibration, PrecisionFile, PrecisionSource, check_file, make, verify_reduced
from dmformer.models.checkpoint import Checkpoint, load_checkpoint
from dmformer.models.deploy import deploy
from dmformer.progress import silent
from dmformer.runtimes import registry
from dmformer.verify.evaluate import evaluate
from dmformer.verify.localize import localize
from dmformer.verify.report import ParityReport, parity_report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


class Bench:
    """What faults are tried on.

    Args:
        bundle: a clean one of a demonstration checkpoint, with ONNX and OpenVINO at fp32.
        scratch: an existing folder.
        weights: the checkpoint.
    """

    def __init__(self, bundle: Path, scratch: Path, weights: Path = DEMONSTRATION_CHECKPOINT) -> None:
        self.bundle, self.scratch, self.weights = bundle, scratch, weights
        self.checkpoint = load_checkpoint(weights)
        self._made: dict[str, PrecisionFile] = {}

    def in_bundle(self, fault: Fault) -> Outcome:
        """Spoil a copy of the bundle, verify it as a device would, and bisect."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder, ExitStack() as patches:
            bundle = Path(shutil.copytree(self.bundle, Path(folder) / "bundle"))
            for patch in fault.inject(bundle):
                patches.enter_context(patch)
            opened = open_bundle(bundle)
            weights = self.weights if fault.module is not None else None
            found = dmformer.verify(opened, runtimes=[fault.runtime], weights=weights)
            if weights is not None:
                found = localize(opened, found, weights=weights, folder=Path(folder) / "cases", stage=silent)
            return outcome(fault, found)

    def in_eval(self, fault: Fault) -> Outcome:
        """Measure the accuracy of a copy of the bundle on the shipped scenes; a doubt about the labels is a finding."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder, ExitStack() as patches:
            bundle = Path(shutil.copytree(self.bundle, Path(folder) / "bundle"))
            for patch in fault.inject(bundle):
                patches.enter_context(patch)
            try:
                notes = evaluate(bundle, SCENES, runtimes=[fault.runtime]).notes
            except UsageError as error:
                notes = (str(error),)
            return Outcome(fault, ("annotations",) if notes else (), said=notes)

    def in_precision(self, fault: Fault) -> Outcome:
        """Spoil the ONNX file at a precision as if its maker had, and check it as an export does."""
        name = fault.kind.split()[1]
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            source = self.source()
            if name not in self._made:
                self._made[name] = make(name, source)
            made = self._made[name]
            path = Path(shutil.copy(made.onnx, folder))
            fault.inject(path)
            golden = open_bundle(self.bundle).golden()
            try:
                _, checks = check_file(replace(made, onnx=path), source, form(self.checkpoint, folded=True), golden)
            except StageFailed as error:
                module = str(error).partition("it begins at ")[2].partition("/")[0]
                return Outcome(fault, ("reduced",), (module,), (str(error),))
        reasons = [check.reason or "" for check in checks if check.stage == "tensors" and not check.passed]
        modules = tuple(reason.partition("/")[0] for reason in reasons)
        return replace(outcome(fault, parity_report(checks)), modules=modules)

    def source(self) -> PrecisionSource:
        """What a precision is made from."""
        images = image_set(CALIBRATION_IMAGES, self.checkpoint.preprocessing, self.checkpoint.classes, 10).spread(40)
        return PrecisionSource(
            onnx=self.bundle / FP32,
            inputs=open_bundle(self.bundle).golden().inputs,
            calibration=Calibration.of(self.checkpoint.model(), images),
            max_points_lost=100.0,
            weight_bits=SAFE_WEIGHT_BITS,
            scratch=self.scratch,
            stage=silent,
            block_of=self.checkpoint.config.block_of,
        )


def outcome(fault: Fault, found: ParityReport) -> Outcome:
    """What a report says of a fault."""
    failed = tuple(dict.fromkeys(check.where for check in found.checks if not check.passed))
    modules = tuple(dict.fromkeys(finding.module for finding in found.findings))
    said = (*(check.reason or "" for check in found.checks if not check.passed), *found.skipped)
    return Outcome(fault, failed, modules, said)


def outcomes(bench: Bench, pixels: Bench) -> Iterator[Outcome]:
    """Every fault in turn: those of a classifier, and those of a network that labels pixels."""
    for fault in IN_BUNDLES:
        yield bench.in_bundle(fault)
    for fault in PRECISION:
        yield bench.in_precision(fault)
    for fault in IN_DECODER:
        yield pixels.in_bundle(fault)
    for fault in ANNOTATIONS:
        yield pixels.in_eval(fault)


# Clean exports


def form(checkpoint: Checkpoint, folded: bool) -> nn.Module:
    """The network as it was traced."""
    model = checkpoint.model()
    return deploy(model, checkpoint.preprocessing.image_size) if folded else model


def random_options(random: np.random.Generator) -> dict[str, Any]:
    """Fields of a configuration that other networks than the default have."""
    return {
        "num_classes": int(random.integers(2, 40)),
        "expansion": int(random.integers(1, 4)),
        "branch_merge": str(random.choice(["sum", "concat"])),
        "inner_residual": bool(random.integers(2)),
        "gate_input": str(random.choice(["x", "x_prime"])),
        "layer_scale": [None, 0.01][int(random.integers(2))],
        "depths": [int(depth) for depth in random.integers(1, 4, 4)],
    }


def clean(seed: int, scratch: Path) -> tuple[list[str], list[str]]:
    """Export a random configuration at every precision through both engines.

    Returns:
        What failed, which should be nothing; and the precisions that were refused, because they drown the network.
    """
    refused: list[str] = []
    random = np.random.default_rng(seed)
    options = random_options(random)
    size = int(random.choice([32, 64, 80]))
    folded = bool(random.integers(4))  # one in four is not
    output = scratch / f"clean-{seed}"
    result = dmformer.export(
        use_cache=False,
        arch="dmformer_nano",
        options=options,
        image_size=size,
        seed=seed,
        deploy_form=folded,
        formats=["onnx", "openvino"],
        output=output,
        force=True,
    )
    failed = [f"fp32 {check.where}: {check.reason}" for check in result.parity.checks if not check.passed]
    checkpoint = random_checkpoint("dmformer_nano", options, size, seed)
    images = image_set(CALIBRATION_IMAGES, checkpoint.preprocessing, (), 10).spread(40)
    golden = open_bundle(output).golden()
    source = PrecisionSource(
        onnx=output / FP32,
        inputs=golden.inputs,
        calibration=Calibration.of(checkpoint.model(), images),
        max_points_lost=100.0,
        weight_bits=SAFE_WEIGHT_BITS,
        scratch=scratch / f"scratch-{seed}",
        stage=silent,
        block_of=checkpoint.config.block_of,
    )
    source.scratch.mkdir()
    for name in ("fp16", "int8"):
        try:
            reduced = verify_reduced(make(name, source), source, lambda: form(checkpoint, folded), golden)
        except StageFailed as error:
            if "parity cannot be judged" not in str(error):
                raise
            refused.append(f"{name}: {error}")  # int8 drowns what this network tells apart
            continue
        golden, checks = reduced.golden, list(reduced.checks)
        for row in map(registry.entry, ("onnxruntime", "openvino")):
            work = steps.Work(output, silent, EngineOptions(), golden)
            artifact = steps.convert_artifact(work, row, reduced.file).artifact
            checks += steps.verify_artifact(work, row, artifact, reduced.file).checks
        failed += [f"{name} {check.where} in {check.runtime}: {check.reason}" for check in checks if not check.passed]
    shutil.rmtree(output)
    return failed, refused


def main() -> None:
    """Print a line for each fault, and the figures."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory(prefix="dmformer-") as folder:
        scratch = Path(folder)
        dmformer.export(use_cache=False, formats=["onnx", "openvino"], output=scratch / "bundle")
        dmformer.export(use_cache=False, task="segmentation", formats=["onnx", "openvino"], output=scratch / "pixels")
        benches = Bench(scratch / "bundle", scratch), Bench(scratch / "pixels", scratch, SEGMENTATION_CHECKPOINT)
        found = []
        for one in outcomes(*benches):
            found.append(one)
            where = ", ".join(one.modules) if one.fault.module else "-"
            verdict = ("caught" if one.caught else "MISSED") + ("" if one.located else ", WRONG PLACE")
            print(
                f"{verdict:8} {one.fault.kind:14} {one.fault.name:34} {', '.join(one.failed)[:40]:40} {where}",
                flush=True,
            )
        in_nodes = [one for one in found if one.fault.module]
        caught, located = sum(one.caught for one in found), sum(one.located for one in in_nodes)
        kinds = Counter(one.fault.kind.split()[0] for one in found)
        print(f"{len(found)} faults ({', '.join(f'{number} {kind}' for kind, number in kinds.items())})")
        print(f"caught {caught} of {len(found)}")
        print(f"led to the right module {located} of {len(in_nodes)}")
        alarms, refusals, begun = 0, 0, time.monotonic()
        for seed in range(count):
            failed, refused = clean(seed, scratch)
            alarms, refusals = alarms + bool(failed), refusals + len(refused)
            for reason in failed:
                print(f"FALSE ALARM, seed {seed}: {reason}", flush=True)
        print(f"false alarms in {count} clean exports at three precisions in two engines: {alarms}")
        print(f"precisions refused, because they drown what the network tells apart: {refusals} of {2 * count}")
        print(f"({time.monotonic() - begun:.0f} s)")
    sys.exit(not (caught == len(found) and located == len(in_nodes) and not alarms))


if __name__ == "__main__":
    main()
