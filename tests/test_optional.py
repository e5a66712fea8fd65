"""Packages that are not there, and packages that are and do not load, are told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dmformer._optional import require
from dmformer.errors import UnavailableError
from tests.bundles import one_line

if TYPE_CHECKING:
    from pathlib import Path


def test_what_is_not_installed_comes_with_its_command() -> None:
    with pytest.raises(
        UnavailableError, match=r"'no_engine', which is not installed; run: pip install 'dmformer\[gpu\]'"
    ):
        require("no_engine.inner", extra="gpu", purpose="it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("from half_engine._native import run", "'half_engine', which does not load here: No module named"),
        ("import no_dependency", "'no_dependency', which is not installed; run: pip install"),
        ("raise OSError('libfast.so: no such file')", "'half_engine', which does not load here: libfast.so"),
    ],
)
def test_what_does_not_load_is_not_called_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    (tmp_path / "half_engine").mkdir()
    (tmp_path / "half_engine/__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnavailableError, match=message) as error:
        require("half_engine", extra="gpu", purpose="it")
    one_line(error.value)
