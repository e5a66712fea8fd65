"""A bundle that no export made: small files, and reports in which every figure is chosen by a test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper

from dmformer.bench.limits import Limits
from dmformer.bundle.golden import Golden
from dmformer.bundle.manifest import (
    BENCH_REPORT,
    GOLDEN,
    MANIFEST,
    PARITY_REPORT,
    Accuracy,
    AccuracyEvidence,
    Artifact,
    Evidence,
    LatencyEvidence,
    Manifest,
    Model,
    ParityEvidence,
    ProcessorEvidence,
    Simplification,
    Speed,
    Tensor,
    file_entry,
)
from dmformer.cache import Cached
from dmformer.data.preprocessing import Preprocessing
from dmformer.files import indented_json
from dmformer.machine import Processor
from dmformer.verify.evaluate import EvalReport, EvalResult
from dmformer.verify.report import Check, ParityReport
from dmformer.verify.tasks.classification import Decisions, Flip
from dmformer.verify.tasks.segmentation import PixelAgreement
from tests.test_bench_compare import report_of
from tests.test_bench_figures import row

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.bench.report import BenchReport, Result

CPU = Processor(cpu="Maker's own 1000", architecture="x86_64", instructions=("avx2",))
DEVICE = Processor(cpu="Device 7", architecture="aarch64", instructions=("neon",))
CLASSES = ("nought", "one", "two")


def check(stage: str, precision: str, share: float | None, **changed: Any) -> Check:
    """A check of onnxruntime whose difference is a share of its limit."""
    fields: dict[str, Any] = {
        "stage": stage, "runtime": "onnxruntime", "precision": precision, "batch": 1, "passed": True,
        "max_abs": None if share is None else 2e-3 * share, "max_rel": None, "cosine": None, "top1_agreement": None,
        "limit": None if share is None else 2e-3, "limit_source": "16 x the noise of a test", "reason": None,
        "against": "PyTorch",
    }  # fmt: skip
    return Check(**(fields | changed))


def decided(precision: str, *flips: Flip, **changed: Any) -> Check:
    found = Decisions(
        images=4, top1=1 - len(flips) / 4, top1_interval=(0.51, 0.93), top5=1.0, top5_interval=(0.51, 1.0), flips=flips
    )
    return check("decisions", precision, None, batch=4, decisions=found, **changed)


FLIP = Flip(image=2, expected=2, answered=1, margin=0.0123, below_noise=True)


def parity(*more: Check) -> ParityReport:
    checks = (
        check("deploy form", "fp32", 0.2, runtime="torch"),
        check("runtime", "fp32", 0.125, batch=1),
        check("runtime", "fp32", 0.25, batch=2),
        check("rows", "fp32", 0.0, against="itself"),
        check("precision", "fp32", None, against="promise"),
        decided("fp32"),
        check("runtime", "int8", 0.75),
        check("precision", "int8", None, against="promise", reason="no int8 arithmetic on paper"),
        decided("int8", FLIP),
        *more,
    )
    return ParityReport(
        passed=all(one.passed for one in checks), checks=checks, skipped=("tensorrt: no GPU on paper",), processor=CPU
    )


def _network(folder: Path, precision: str) -> Path:
    path = folder / "onnx" / precision / "model.onnx"
    path.parent.mkdir(parents=True)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("image", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["logits"])], precision, ends[:1], ends[1:])
    onnx.save(helper.make_model(graph), path)
    return path


def _golden(segmentation: bool) -> Golden:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (4, 32, 32, 3), np.uint8)
    shape = (4, 3, 16, 16) if segmentation else (4, 3)
    outputs = rng.normal(size=shape).astype(np.float32)
    if not segmentation:
        outputs = np.eye(4, 3, dtype=np.float32)
    return Golden(
        images=images,
        inputs=rng.normal(size=(4, 3, 32, 32)).astype(np.float32),
        outputs={"logits": outputs},
        outputs_float64={"logits": outputs.astype(np.float64)},
        strides={"logits": 3} if segmentation else {},
    )


def _accuracy(top1: float) -> Accuracy:
    return Accuracy(
        images=200, top1=top1, top1_interval=(top1 - 0.05, top1 + 0.01), top5=1.0, top5_interval=(0.98, 1.0),
        agreement_with_torch=0.985,
    )  # fmt: skip


def write_bundle(folder: Path, report: ParityReport | None = None, **changed: Any) -> Path:
    """Write a bundle with two artifacts.

    Args:
        folder: new.
        report: of its checks; otherwise one in which all hold.
        changed: fields of its model.
    """
    report = report or parity()
    fields: dict[str, Any] = {
        "arch": "paper_net", "config": {}, "task": "classification", "classes": CLASSES, "parameters": 1_230_000,
        "macs": 4_560_000, "weights": "checkpoint", "checkpoint_sha256": "c" * 64, "deploy_form": True,
        "notes": ("the mean was assumed",), "overridden": ("std",),
        "training": {"data": "letters, 77 images", "held_out_top1": 0.875, "recipe": {"epochs": 1}},
    }  # fmt: skip
    model = Model(**(fields | changed))
    segmentation = model.task == "segmentation"
    networks = {precision: _network(folder, precision) for precision in ("fp32", "int8")}
    artifacts = [
        Artifact(
            format="onnx", precision=precision, files=(file_entry(folder, path),),
            built_with={"torch": "9.8.7", "onnx": "6.5.4"}, layers={precision: 40, "fp32": 17},
            promised_share=0.6, accuracy=_accuracy(0.935 if precision == "int8" else 0.945), points_lost=0.25,
            sensitivity={"stages.1.blocks.0": 0.0625} if precision == "int8" else {},
            kept_in_fp32={"stages.0.downsample": "it would lose 3 points"} if precision == "int8" else {},
            speed=Speed(p50_ms=2, fp32_p50_ms=1, ratio=2, noise_floor=0.05, faster=False, slower=True, cpu=CPU.cpu),
        )
        for precision, path in networks.items()
    ]  # fmt: skip
    (folder / "reports").mkdir()
    (folder / PARITY_REPORT).write_bytes(indented_json(report))
    (folder / BENCH_REPORT).write_bytes(indented_json(timings(artifacts, CPU.cpu)))
    _golden(segmentation).save(folder / GOLDEN)
    failed = sum(not one.passed for one in report.checks)
    manifest = Manifest(
        schema_version=1,
        tool_version="0.0.7",
        model=model,
        preprocessing=Preprocessing(image_size=32),
        inputs=(Tensor(name="image", dtype="float32", shape=("batch", 3, 32, 32)),),
        outputs=(Tensor(name="logits", dtype="float32", shape=("batch", 3, *((32, 32) if segmentation else ()))),),
        simplification=Simplification(kept=True, reason="12 nodes became 9", nodes_before=12, nodes_after=9),
        artifacts=tuple(artifacts),
        files=tuple(file_entry(folder, folder / name) for name in (GOLDEN, PARITY_REPORT, BENCH_REPORT)),
        evidence=Evidence(
            parity=ParityEvidence(
                passed=not failed, checks=len(report.checks), failed=failed, report=PARITY_REPORT
            ),
            processor=CPU,
            accuracy=AccuracyEvidence(images=200, labelled=True, max_points_lost=0.5, torch=_accuracy(0.95)),
            latency=LatencyEvidence(noise_floor=0.02, report=BENCH_REPORT),
            cached=(Cached(what="the trace", made="2026-01-02T03:04:05Z"),),
            processors=(
                ProcessorEvidence(
                    processor="cortex-z9", emulator="QEMU 1.2", engine="onnxruntime 3.2.1", format="onnx",
                    precision="fp32", artifact_sha256=artifacts[0].sha256, passed=True, checks=5,
                    asked="2026-02-03T04:05:06Z",
                ),
            ),
        ),
    )  # fmt: skip
    (folder / MANIFEST).write_bytes(manifest.encode())
    return folder


def timings(artifacts: list[Artifact] | tuple[Artifact, ...], cpu: str) -> BenchReport:
    """What ``bench`` says of artifacts on a machine."""
    rows: list[Result] = [
        msgspec.structs.replace(
            row(3 + place), precision=one.precision, artifact_sha256=one.sha256, operations=2e8, least_bytes=3e6,
            attainable_ms=1.5, share_of_limit=0.375,
        )
        for place, one in enumerate(artifacts)
    ]  # fmt: skip
    environment = {"cpu": cpu, "cores": 2, "os": "none", "versions": {"onnxruntime": "3.2.1"}}
    limits = Limits(threads=2, gflops=111, gbytes_per_s=22)
    return report_of(*rows, environment=environment, arch="paper_net", limits=limits)


def device_parity(artifacts: tuple[Artifact, ...], *more: Check) -> ParityReport:
    """What ``verify`` says of artifacts on a device."""
    found = parity(*more)
    hashes = tuple(one.sha256 for one in artifacts)
    return msgspec.structs.replace(found, processor=DEVICE, skipped=(), artifacts=hashes)


def device_accuracy(artifacts: tuple[Artifact, ...]) -> EvalReport:
    """What ``eval`` says of artifacts on a device."""
    results = tuple(
        EvalResult(
            images=50, top1=0.86, top1_interval=(0.738, 0.931), runtime="onnxruntime", precision=one.precision,
            artifact_sha256=one.sha256,
        )
        for one in artifacts
    )  # fmt: skip
    return EvalReport(
        data="field photos", images=50, labelled=True, task="classification", classes=CLASSES, results=results
    )


def pixels_decided() -> Check:
    """A check of the classes of pixels, with flips within the noise."""
    found = PixelAgreement(
        images=4, pixels=4096, agreement=4093 / 4096, lowest=0.997, flips=3, below_noise=3, worst_margin=0.001,
        miou=0.998,
    )  # fmt: skip
    return check("decisions", "fp32", None, batch=4, pixels=found)
