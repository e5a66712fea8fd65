"""The second exporter, of torch.export, passes the same checks as the tracing one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import dmformer
from dmformer.errors import StageFailed, UnavailableError
from dmformer.graph import trace
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


def test_the_next_exporter_is_asked_where_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("no such operator")

    monkeypatch.setattr(trace, "_ways", lambda: [fail, trace._by_tracing])
    assert dmformer.export(build(), image_size=64, output=tmp_path / "b", use_cache=False).parity.passed
    monkeypatch.setattr(trace, "_ways", lambda: [fail, fail])
    with pytest.raises(StageFailed, match="export to ONNX failed: no such operator; no such operator"):
        dmformer.export(build(), image_size=64, output=tmp_path / "c", use_cache=False)


def test_a_torch_without_the_tracing_exporter_needs_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UnavailableError, match="onnxscript"):
        trace._ways()
