"""Where the program is run: names that are no UTF-8, closed streams, no home, a mount point for an output."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from dmformer.bundle import writer
from dmformer.bundle.trust import Policy
from dmformer.bundle.writer import check_destination
from dmformer.cache import open_cache
from dmformer.errors import UnavailableError, UsageError
from dmformer.files import indented_json
from dmformer.procfs import is_mount_point
from dmformer.runtimes.support import Availability, Support
from dmformer.verify.api import verify
from tests.tiers import first

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dmformer.export.cached import ExportResult


class Named(msgspec.Struct):
    """Part of a report."""

    names: tuple[str, ...]
    by_name: dict[str, float]


def test_a_report_with_names_that_are_no_utf8() -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    report = msgspec.json.decode(indented_json(Named((name, "caf\u00e9"), {name: 0.5})))
    assert report == {"names": ["caf\\xe9.png", "caf\u00e9"], "by_name": {"caf\\xe9.png": 0.5}}


@pytest.mark.parametrize(
    "closed", [(1,), (0, 1, 2), *(pytest.param(one, marks=pytest.mark.slow) for one in ((0,), (2,)))], ids=str
)
def test_closed_streams_lead_nowhere(closed: tuple[int, ...], tmp_path: Path) -> None:
    """The exit code is that of the work, and files that are opened do not take the streams' numbers."""

    def close() -> None:
        for number in closed:
            os.close(number)

    for argument, code in (("--version", 0), ("--nonsense", 2)):
        command = [sys.executable, "-m", "dmformer", argument]
        done = subprocess.run(command, preexec_fn=close, cwd=tmp_path, timeout=120, check=False)
        assert done.returncode == code


def test_what_others_print_goes_to_standard_error(tmp_path: Path) -> None:
    code = """
import ctypes, os, subprocess
from dmformer.process import printing_to_stderr
from tests.tiers import first

library = ctypes.CDLL(None)
print("before")
with printing_to_stderr():
    print("python")
    library.printf(b"native\\n")
    os.write(1, b"descriptor\\n")
    subprocess.run(["echo", "child"], check=True)
print("after")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["before", "after"]
    assert sorted(done.stderr.split()) == ["child", "descriptor", "native", "python"]
    closed = code[: code.index("    library.printf")].replace('print("before")', "os.close(1)")
    done = subprocess.run([sys.executable, "-c", closed], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.startswith("python")


def test_what_is_written_to_the_original_stream_goes_to_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import sys
from dmformer.process import printing_to_stderr

with printing_to_stderr():
    print("inside", file=sys.__stdout__)
print("after")
"""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout.split(), done.stderr.split()) == (["after"], ["inside"])


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("DMFORMER_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_path", nowhere)
    monkeypatch.setattr("platformdirs.user_config_path", nowhere)
    cache = open_cache()
    assert cache.folder is None
    assert "no home folder" in str(cache.trouble)
    with pytest.raises(UsageError, match="no trusted keys; expected DMFORMER_TRUSTED_KEYS"):
        _ = Policy(required=True).folder


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    check_destination(tmp_path / "out")
    monkeypatch.setattr(writer, "is_mount_point", lambda folder: folder.name == "out")
    with pytest.raises(UsageError, match=r"mount point.*out/bundle"):
        check_destination(tmp_path / "out")
    check_destination(tmp_path / "out" / "bundle")


def test_mounts_are_known(tmp_path: Path) -> None:
    from pathlib import Path as AnyPath

    assert is_mount_point(AnyPath("/"))
    assert is_mount_point(AnyPath("/proc"))
    assert not is_mount_point(tmp_path)


class Odd(Support):
    """An engine that fails as it is imported."""

    name = "odd"

    def __init__(self, failure: Exception) -> None:
        self.failure = failure

    def inspect_files(self, files: object, target: object = None) -> None:
        """There are no files."""

    def import_engine(self) -> Availability:
        raise self.failure


@pytest.mark.parametrize(
    ("failure", "broken"), first(1, [(RuntimeError("no home"), True), (UnavailableError("none"), False)])
)
def test_verify_never_passes_where_an_engine_could_not_be_asked(
    failure: Exception, broken: bool, exported: ExportResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmformer.runtimes import registry

    real: Callable[[Any], Support] = registry.support
    monkeypatch.setattr(registry, "support", lambda row: Odd(failure) if row.name == "openvino" else real(row))
    report = verify(exported.output)
    assert report.passed is not broken
    assert any("openvino" in reason for reason in report.skipped)
    failed = [check for check in report.checks if not check.passed]
    assert [(check.runtime, check.stage) for check in failed] == ([("openvino", "runtime")] if broken else [])
    assert verify(exported.output, runtimes=["ort"]).passed
