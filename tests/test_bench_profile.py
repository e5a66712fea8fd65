"""Where the time goes: kernels sorted by operator, module, and what is lost between the products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import dmformer
from dmformer.bench.profile import OUTSIDE, kernel_module, profile_runtime, summarise_kernels
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import select
from dmformer.runtimes.inspector import Kernel

if TYPE_CHECKING:
    from dmformer.export.cached import ExportResult


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("stages.0.blocks.0.dma.expand/Conv", "stages.0.blocks.0.dma.expand"),
        ("stages.0.blocks.0.dma.expand/Conv/WithoutBiases", "stages.0.blocks.0.dma.expand"),
        ("/stages.2/blocks/blocks.1/dma/branches.2/Conv_output_0_nchwc", "stages.2.blocks.1.dma.branches.2"),
        ("stages.1.blocks.0/Add_1", "stages.1.blocks.0"),
        ("/GlobalAveragePool_output_0_nchwc", ""),
        ("/Flatten", ""),
        ("logits", ""),
    ],
)
def test_the_module_of_a_kernel(name: str, module: str) -> None:
    assert kernel_module(name) == module


def kernel(name: str, operator: str, ms: float) -> Kernel:
    """Slow at first: the last three of five count."""
    return Kernel(name, operator, (10**9, 10**9, *(round(1e6 * each) for each in (ms, ms, 40 * ms))))


def test_kernels_are_sorted() -> None:
    found = summarise_kernels(
        [
            kernel("ReorderInput_1", "ReorderInput", 1),  # for the stem
            kernel("/stages.0/downsample/conv1/Conv_output_0_nchwc", "Conv", 2),
            kernel("stages.0.blocks.0.dma.expand/Conv", "Conv", 4),
            kernel("ReorderOutput_2", "ReorderOutput", 8),  # of what the expansion gives
            kernel("stages.0.blocks.0.ffn.act/Gelu", "Gelu", 16),
            kernel("stages.0.blocks.0/Add_1", "Add", 32),
            kernel("stages.10.blocks.0.dma.gate.fc1/Conv", "Conv", 64),
            kernel("/GlobalAveragePool", "GlobalAveragePool", 128),
            kernel("ReorderOutput_3", "ReorderOutput", 256),  # the last of all: of the pooling before it
            kernel("logits", "Gemm", 512),
        ],
        calls=3,
    )
    assert found.kernels == 10
    assert found.total_ms == pytest.approx(1023)
    assert list(found.operators.items()) == [
        ("Gemm", 512), ("ReorderOutput", 264), ("GlobalAveragePool", 128), ("Conv", 70), ("Add", 32), ("Gelu", 16),
        ("ReorderInput", 1),
    ]  # fmt: skip
    assert {name: part.parts for name, part in found.modules.items()} == {
        "stages.0": {"residual sums": 32, "ffn": 16, "dma": 12, "downsample": 3},
        "stages.10": {"dma": 64},
        OUTSIDE: {"head": 512, "pooling and sums": 384},
    }
    assert sum(part.ms for part in found.modules.values()) == pytest.approx(found.total_ms)
    assert (found.layout_ms, found.elementwise_ms) == (265, 48)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_real_kernels_are_of_the_network(exported: ExportResult, runtime: str) -> None:
    bundle = open_bundle(exported.output)
    (choice,), _ = select(bundle, [runtime])
    found = profile_runtime(choice.runtime(1), [bundle.golden().inputs[:2]])
    assert list(found.modules) == ["stages.0", "stages.1", "stages.2", "stages.3", OUTSIDE]
    assert all({"dma", "ffn", "downsample"} <= set(found.modules[f"stages.{number}"].parts) for number in range(4))
    assert "head" in found.modules[OUTSIDE].parts
    products = sum(ms for operator, ms in found.operators.items() if "conv" in operator.lower())
    assert 0.3 < products / found.total_ms < 1
    assert 0 <= found.layout_ms + found.elementwise_ms < found.total_ms
    assert min(found.operators.values()) >= 0


@pytest.mark.slow
def test_a_run_has_profiles_where_they_were_asked_for(exported: ExportResult) -> None:
    found = dmformer.bench(
        exported.output, runtimes=["ort"], modes=["compute", "end-to-end", "throughput"], duration_s=0.03, rounds=1,
        profile=True,
    )  # fmt: skip
    assert [row.mode for row in found.results] == ["compute", "end-to-end", "throughput"]
    assert [row.profile is not None for row in found.results] == [True, False, False]
    assert all(row.status in ("ok", "unstable") for row in found.results), found.results
    alone, whole, busy = found.results
    assert np.median(whole.samples_ns[0]) > np.median(alone.samples_ns[0])
    assert busy.threads == 1
    assert busy.wall_ns[0] < sum(busy.samples_ns[0])
