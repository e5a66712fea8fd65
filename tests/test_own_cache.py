"""The cache and a network of one's own: what its code answers is asked each time, what follows is kept by content."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dmformer
from dmformer.models.own import load_own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dmformer.export.cached import ExportResult

    Export = Callable[..., ExportResult]

pytestmark = pytest.mark.usefixtures("quick")

NETWORK = """
from pathlib import Path

from torch import nn

from own_helper import louder


class Network(nn.Module):
    def __init__(self, slope=0.1):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 4, 4), nn.LeakyReLU(slope)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = louder(self.stem(x))
        for block in self.blocks:
            x = x + self.act(block(x))
        return self.head(x.mean((2, 3)) * float(Path(__file__).with_name("factor.txt").read_text()))
"""
HELPER = "def louder(x):\n    return x * {}\n"
STEPS = ("ONNX at fp16", "convert to onnx fp32", "convert to onnx fp16", "verify onnx fp32", "verify onnx fp16")


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Export]:
    """Export the network of a folder as a new process would, with a cache."""
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own_net.py").write_text(NETWORK)
    (tmp_path / "own_helper.py").write_text(HELPER.format("2.0"))
    (tmp_path / "factor.txt").write_text("1.0")
    save(tmp_path, 0)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files change faster than their times
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(**options: Any) -> ExportResult:
        forget()
        return dmformer.export(
            tmp_path / "own.pth", module=f"{tmp_path / 'own_net.py'}:Network", image_size=32, formats=["onnx"],
            precisions=["fp32", "fp16"], output=tmp_path / "b", **options,
        )  # fmt: skip

    def forget() -> None:
        for name in ("own_net", "own_helper"):
            sys.modules.pop(name, None)

    yield run
    forget()


def save(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    weights = {
        "stem.weight": torch.randn(8, 3, 4, 4) * 0.2, "stem.bias": torch.randn(8) * 0.2,
        **{f"blocks.{index}.weight": torch.randn(8, 8, 3, 3) * 0.1 for index in range(3)},
        **{f"blocks.{index}.bias": torch.randn(8) * 0.2 for index in range(3)},
        "head.weight": torch.randn(4, 8), "head.bias": torch.randn(4),
    }  # fmt: skip
    torch.save(weights, folder / "own.pth")


def taken(result: ExportResult) -> set[str]:
    assert result.parity.passed
    return {cached.what.partition(": ")[2] for cached in result.manifest.evidence.cached}


def change_helper(folder: Path) -> None:
    (folder / "own_helper.py").write_text(HELPER.format("3.0"))


def change_source(folder: Path) -> None:
    (folder / "own_net.py").write_text(NETWORK.replace("x + self.act", "x - self.act"))


def change_what_the_code_reads(folder: Path) -> None:
    (folder / "factor.txt").write_text("2.0")


def change_weights(folder: Path) -> None:
    save(folder, 1)


def test_an_unchanged_network_takes_what_follows_from_its_answers(export: Export, tmp_path: Path) -> None:
    first = export()
    assert taken(first) == set()
    again = export()
    assert taken(again) >= set(STEPS)
    assert not any("trace" in what or "emulation" in what or "verify the ONNX" in what for what in taken(again))
    assert again.parity == first.parity
    assert taken(export(use_cache=False)) == set()


SLOW_CHANGES = (change_source, change_what_the_code_reads, change_weights)


@pytest.mark.parametrize(
    "change", [change_helper, *(pytest.param(change, marks=pytest.mark.slow) for change in SLOW_CHANGES)]
)
def test_a_changed_network_takes_nothing(export: Export, tmp_path: Path, change: Callable[[Path], None]) -> None:
    first = export()
    change(tmp_path)
    assert taken(export()).isdisjoint(STEPS)
    reference = f"{tmp_path / 'own_net.py'}:Network"
    assert dmformer.verify(tmp_path / "b", module=reference, weights=tmp_path / "own.pth").passed
    assert open_sha256(first) != open_sha256(export())
    assert taken(export()) >= set(STEPS)


def test_another_option_takes_nothing(export: Export) -> None:
    export()
    assert taken(export(module_options={"slope": 0.3})).isdisjoint(STEPS)


def open_sha256(result: ExportResult) -> list[str]:
    return [artifact.files[0].sha256 for artifact in result.manifest.artifacts]


def test_a_network_at_hand_is_asked_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Export) -> None:
    export()
    model = load_own(f"{tmp_path / 'own_net.py'}:Network", image_size=32).checkpoint.model()
    options: dict[str, Any] = {"image_size": 32, "formats": ["onnx"], "output": tmp_path / "c"}
    dmformer.export(model, **options)
    asked: list[object] = []
    graph = import_module("dmformer.export.graph")
    verified = graph.verified_graph
    monkeypatch.setattr(graph, "verified_graph", lambda source: asked.append(source) or verified(source))
    assert taken(dmformer.export(model, **options)) == {"convert to onnx fp32", "verify onnx fp32"}
    assert len(asked) == 1
