"""Bundles and files as other tools and systems leave them: links to blobs, line endings, mounts, names, no home."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmformer import bench, procfs, verify
from dmformer.bundle.integrity import check_integrity
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.writer import check_destination, check_outside
from dmformer.cache import open_cache
from dmformer.commands import _present, doctor
from dmformer.commands._options import check_report_target, json_to_output
from dmformer.device.doctor import ArtifactStatus
from dmformer.errors import CheckFailed, StageFailed, UnavailableError, UsageError
from dmformer.files import indented_json, utf8_path, whole_file
from dmformer.runtimes import registry
from dmformer.runtimes.support import Availability, Support
from dmformer.verify.api import _broken_engines
from tests.bundles import one_line

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such names")
@pytest.mark.parametrize(
    "runtime", ["onnxruntime", *(pytest.param(name, marks=pytest.mark.slow) for name in ("openvino", "torch"))]
)
def test_a_bundle_in_a_folder_that_is_no_utf8_is_timed_and_asked(bundle: Path, tmp_path: Path, runtime: str) -> None:
    moved = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(bundle, moved)
    if not open_bundle(moved).artifacts(registry.entry(runtime).format):
        pytest.skip("the bundle has no such format")
    assert verify(moved, runtimes=[runtime]).passed
    (row,) = bench(moved, runtimes=[runtime], rounds=1, duration_s=0.05, brief=True).results
    assert row.timed, row.reason


def test_a_path_of_utf8_leads_to_the_same_file(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xe9")
    folder.mkdir()
    (folder / "a").write_bytes(b"content")
    path = utf8_path(folder / "a")
    assert (str(path).encode(), path.read_bytes()) == (os.fsencode(path), b"content")
    assert utf8_path(tmp_path / "é") == tmp_path / "é"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_that_nobody_reads_is_not_waited_for_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(_present, "READER_S", 0.2)
    with pytest.raises(StageFailed, match="is a pipe that nobody reads; waited 0 s"):
        _present.write_report(pipe, b"report")
    monkeypatch.setattr(_present, "READER_S", 60)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    _present.write_report(pipe, b"report" * 5_000)
    assert reader.communicate(timeout=60)[0] == b"report" * 5_000


def test_advice_can_be_pasted_into_a_shell() -> None:
    status = ArtifactStatus(
        format="openvino", precision="fp32", runtime="openvino", held=False, runs=False, buildable=True
    )
    assert doctor._verdict(status, Path("my dir/b")).endswith("dmformer build 'my dir/b' --format openvino")


def test_json_without_a_file_goes_to_standard_output(tmp_path: Path) -> None:
    packed = str(tmp_path / "b.dmf")
    for arguments in (["inspect", "--json"], ["inspect", "--json", str(tmp_path)], ["inspect", "--json", packed]):
        assert json_to_output(arguments) == [*arguments[:2], "-", *arguments[2:]]
    assert json_to_output(["doctor", "--json", "--debug"]) == ["doctor", "--json", "-", "--debug"]
    for arguments in (["doctor", "--json", "-"], ["doctor", "--json", "report.json", "bundle"], ["doctor"]):
        assert json_to_output(arguments) == arguments
    with pytest.raises(UsageError, match="and no bundle"):
        check_report_target(packed)


@pytest.mark.parametrize("name", ["page.html", "reports/parity.json", "manifest.json", "new/folder/"])
def test_nothing_is_written_into_a_bundle(
    bundle: Path, linked: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest lists every file that may be in it: another one, or another content, and its checks fail."""
    (tmp_path / "link").symlink_to(bundle / "onnx")
    monkeypatch.chdir(bundle)
    for target in (bundle / name, linked / name, Path(name), tmp_path / "link" / name):
        for check in (check_report_target, check_destination):
            with pytest.raises(UsageError, match="is inside the bundle"):
                check(target)
    check_outside(bundle)
    check_outside(tmp_path / "manifest.json")


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

        def inspect_files(self, files: object, target: object = None) -> None:
            """There are no files."""

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


@pytest.mark.slow
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
