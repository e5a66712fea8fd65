"""Bundles and files as other tools and systems leave them: links to blobs, line endings, mounts, names, no home."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from dmformer import procfs
from dmformer.bundle.integrity import check_integrity
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.writer import check_destination
from dmformer.cache import open_cache
from dmformer.errors import CheckFailed, StageFailed, UnavailableError, UsageError
from dmformer.files import indented_json, whole_file
from dmformer.runtimes.support import Availability, Support
from dmformer.verify.api import _broken_engines
from tests.bundles import one_line

if TYPE_CHECKING:
    from pathlib import Path

ONNX = "onnx/fp32/model.onnx"


@pytest.fixture
def linked(bundle: Path, tmp_path: Path) -> Path:
    """The bundle as a content store keeps it: every file a link to a blob."""
    folder = tmp_path / "snapshot"
    for number, path in enumerate(sorted(path for path in bundle.rglob("*") if path.is_file())):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, blob)
        link = folder / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return folder


def test_a_bundle_of_links_opens_as_a_copy(linked: Path) -> None:
    assert check_integrity(linked).passed
    opened = open_bundle(linked)
    (artifact,) = opened.artifacts("onnx")
    path = opened.load_path(artifact)
    assert path.is_file()
    assert not path.is_symlink()
    before = path.read_bytes()
    (linked / ONNX).resolve().write_bytes(b"something else")  # after the check nothing follows a link
    assert path.read_bytes() == before
    opened.check_all()
    assert opened.source == linked


def changed(link: Path) -> None:
    with link.resolve().open("ab") as file:
        file.write(b"x")


def dangling(link: Path) -> None:
    link.resolve().unlink()


def no_link(link: Path) -> None:
    content = link.read_bytes()
    link.unlink()
    link.write_bytes(content)


def unlisted(link: Path) -> None:
    link.with_name("other").symlink_to(link.resolve())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(changed, "changed or damaged"), (dangling, "link to no file"), (no_link, "no link"), (unlisted, "not listed")],
)
def test_links_that_lead_elsewhere_are_refused(linked: Path, spoil: Any, message: str) -> None:
    spoil(linked / ONNX)
    with pytest.raises(CheckFailed, match=message) as caught:
        open_bundle(linked)
    one_line(caught.value)


def test_line_endings_are_named(bundle: Path) -> None:
    path = bundle / "openvino/fp32/model.xml"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(CheckFailed, match="line endings were rewritten"):
        open_bundle(bundle).check_all()
    path.write_bytes(path.read_bytes().replace(b"<", b" <", 1))
    with pytest.raises(CheckFailed) as caught:
        open_bundle(bundle).check_all()
    assert "line endings" not in str(caught.value)


def test_what_file_managers_leave_is_no_foreign_file(bundle: Path) -> None:
    for name in (".DS_Store", "onnx/Thumbs.db", "onnx/fp32/.DS_Store"):
        (bundle / name).write_bytes(b"icons")
    open_bundle(bundle).check_all()
    assert check_integrity(bundle).passed


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "mounts", lambda: [procfs.Mount("/", str(tmp_path / "out"), "ext4", frozenset())])
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match=r"is a mount point.*out/bundle"):
        check_destination(tmp_path / "out")
    check_destination(tmp_path / "out" / "bundle")
    with pytest.raises(StageFailed, match="is a mount point"), whole_file(tmp_path / "out"):
        pass


def test_names_that_are_no_utf8_are_escaped() -> None:
    assert indented_json({"image": "caf\udce9.png", "é": ("a\udcff",)}) == (
        b'{\n  "image": "caf\\\\xe9.png",\n  "\xc3\xa9": [\n    "a\\\\xff"\n  ]\n}\n'
    )


def test_without_a_home_there_is_no_cache_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(*_: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DMFORMER_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_path", no_home)
    cache = open_cache()
    assert cache.folder is None
    assert cache.trouble is not None
    assert "DMFORMER_CACHE" in cache.trouble


@pytest.mark.parametrize("broken", [True, False])
def test_an_engine_that_is_installed_and_does_not_load_is_broken(broken: bool) -> None:
    class Engine(Support):
        name = "engine"

        def import_engine(self) -> Availability:
            raise RuntimeError("Could not determine home directory.") if broken else UnavailableError("not installed")

    reason = "Could not determine home directory." if broken else "not installed"
    assert Engine().probe() == Availability(False, reason=reason, broken=broken)


def test_verify_fails_for_an_engine_that_is_broken_and_not_for_one_that_is_absent(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_bundle(bundle)
    for broken in (True, False):
        monkeypatch.setattr(Support, "probe", lambda _, b=broken: Availability(False, reason="no home", broken=b))
        checks = _broken_engines(opened)
        assert {check.passed for check in checks} == ({False} if broken else set())
        assert len(checks) == (len(opened.manifest.artifacts) if broken else 0)


def test_a_closed_standard_output_is_no_defect(bundle: Path) -> None:
    command = [sys.executable, "-m", "dmformer", "inspect", str(bundle)]
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs signals of POSIX")
def test_a_hang_up_ends_as_a_termination_does() -> None:
    script = (
        "import os, signal, sys, dmformer.cli as cli\n"
        "stop = lambda **_: os.kill(os.getpid(), int(sys.argv[1]))\n"
        "stop.commands = {}\n"
        "cli.typer.main.get_command = lambda _: stop\n"
        "cli.main()"
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        done = subprocess.run([sys.executable, "-c", script, str(int(number))], timeout=60, check=False)
        assert done.returncode == 128 + number
    ignored = ["nohup", sys.executable, "-c", script, str(int(signal.SIGHUP))]
    assert subprocess.run(ignored, timeout=60, check=False, stdout=subprocess.DEVNULL).returncode == 0
