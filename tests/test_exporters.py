"""The second exporter, of torch.export, passes the same checks as the tracing one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from torch import Tensor, nn

import dmformer
from dmformer.errors import StageFailed, UnavailableError
from dmformer.graph import trace
from dmformer.models.own import load_own
from tests.own_network import build

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quick")]


@pytest.mark.slow
def test_the_exporter_of_torch_export_passes_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(trace, "_ways", lambda: [trace._by_torch_export])
    result = dmformer.export(build(), image_size=64, output=tmp_path / "b", use_cache=False)
    assert result.parity.passed
    assert "layers" in {check.stage for check in result.parity.checks}


@pytest.mark.slow
def test_the_next_exporter_is_asked_where_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("no such operator")

    monkeypatch.setattr(trace, "_ways", lambda: [fail, trace._by_tracing])
    assert dmformer.export(build(), image_size=64, output=tmp_path / "b", use_cache=False).parity.passed
    monkeypatch.setattr(trace, "_ways", lambda: [fail, fail])
    with pytest.raises(StageFailed, match="export to ONNX failed: no such operator; no such operator"):
        dmformer.export(build(), image_size=64, output=tmp_path / "c", use_cache=False)


class Folding(nn.Module):
    """What the tracing exporter fails on where the batch is open, after it has printed its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.conv(x).flatten(2).unfold(2, 64, 64).flatten(2)[:, :, :256]
        return nn.functional.fold(columns, (32, 32), 2, stride=2).mean((2, 3))


def test_what_a_failing_exporter_prints_is_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace, "_ways", lambda: [trace._by_tracing])
    checkpoint = load_own(Folding(), image_size=32).checkpoint
    with pytest.raises(StageFailed, match="export to ONNX failed"):
        trace.trace(checkpoint, checkpoint.model(), tmp_path / "x.onnx")
    printed = capfd.readouterr()
    assert not printed.out
    assert "graph(" in printed.err


def test_a_torch_without_the_tracing_exporter_needs_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UnavailableError, match="onnxscript"):
        trace._ways()
