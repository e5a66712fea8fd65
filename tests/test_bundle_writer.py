"""Bundles are written whole or not at all, and the last one is found again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from dmformer.bundle import writer
from dmformer.bundle.manifest import MANIFEST, decode_manifest, file_entry
from dmformer.commands import _options as locate
from dmformer.errors import StageFailed, UsageError
from tests.bundles import one_line
from tests.conftest import ROOT

if TYPE_CHECKING:
    from dmformer.export.cached import ExportResult


# --- writing ----------------------------------------------------------------------------------------------------------


def fill(folder: Path, content: str) -> None:
    """A bundle that says its content twice: as the tool's version in the manifest, and in a file."""
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "file").write_text(content)
    files = (file_entry(folder, folder / "sub" / "file"),)
    manifest = {
        "schema_version": 1,
        "tool_version": content,
        "model": {"arch": "a", "config": {}, "task": "classification", "classes": [], "parameters": 1, "macs": 1}
        | {"weights": "random"},
        "preprocessing": {"image_size": 32},
        "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 32, 32]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
        "simplification": {"kept": True, "reason": "", "nodes_before": 1, "nodes_after": 1},
        "artifacts": [{"format": "onnx", "precision": "fp32", "files": files, "built_with": {}}],
        "files": [],
        "evidence": {"parity": {"passed": True, "checks": 1, "failed": 0, "report": "r"}},
    }
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def version_in(manifest: bytes) -> str:
    return decode_manifest(manifest, "manifest").tool_version


def content_of(bundle: Path) -> tuple[str, str]:
    return version_in((bundle / MANIFEST).read_bytes()), (bundle / "sub" / "file").read_text()


def write(destination: Path, content: str) -> None:
    with writer.staged(destination) as folder:
        fill(folder, content)


def test_a_new_bundle_is_there_when_the_block_has_ended(tmp_path: Path) -> None:
    with writer.staged(tmp_path / "deep" / "er" / "b") as folder:
        fill(folder, "new")
        assert not (tmp_path / "deep" / "er" / "b").exists()
        assert folder.parent.parent == tmp_path / "deep" / "er"  # the same file system, or else no rename
    assert content_of(tmp_path / "deep" / "er" / "b") == ("new", "new")
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["b"]


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("before", ["nothing", "empty folder", "bundle"])
def test_what_may_be_replaced(tmp_path: Path, before: str, atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not atomic:
        monkeypatch.setattr(writer, "_exchange", lambda *_: False)
    if before != "nothing":
        (tmp_path / "b").mkdir()
    if before == "bundle":
        fill(tmp_path / "b", "old")
    write(tmp_path / "b", "new")
    assert content_of(tmp_path / "b") == ("new", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("stray", ["notes.txt", "sub/other", "onnx/model.onnx"])
def test_a_bundle_with_another_file_in_it_is_not_replaced(tmp_path: Path, stray: str) -> None:
    write(tmp_path / "b", "old")
    (tmp_path / "b" / stray).parent.mkdir(exist_ok=True)
    (tmp_path / "b" / stray).write_text("a user's own")
    with pytest.raises(UsageError, match="would be lost"):
        write(tmp_path / "b", "new")
    assert (tmp_path / "b" / stray).read_text() == "a user's own"


def test_a_folder_whose_manifest_is_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"manifest_version": 3, "name": "an extension of a browser"}')
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UsageError, match="other things in it"):
        write(tmp_path, "new")
    assert (tmp_path / "thesis.txt").exists()


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    with writer.staged(tmp_path / "b") as folder:
        fill(folder, "mine")
        with pytest.raises(UsageError, match="being written by another process") as caught:
            write(tmp_path / "b", "theirs")
        one_line(caught.value)
        write(tmp_path / "c", "another one")
    assert content_of(tmp_path / "b") == ("mine", "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    write(tmp_path / "b", "later")
    assert content_of(tmp_path / "b") == ("later", "later")


def test_what_lies_there_meanwhile_is_replaced(tmp_path: Path) -> None:
    with writer.staged(tmp_path / "b") as folder:
        fill(folder, "mine")
        (tmp_path / "b").mkdir()
        fill(tmp_path / "b", "copied here")
    assert content_of(tmp_path / "b") == ("mine", "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("how", ["exchange", pytest.param("rename", marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, how: str) -> None:
    """Before every event that Python audits, from the first of a write to its last; see tests/killed.py."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", how, str(tmp_path / "b")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["kills"] >= 50
    assert found["old"] > 5
    assert found["new"] > 5
    assert found["left something"] > 20  # and the next write removed it, or that is in "wrong"
    assert (found["put back"] > 0) == (how == "rename")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.slow
def test_a_killed_export_leaves_the_old_bundle(tmp_path: Path) -> None:
    write(tmp_path / "b", "old")
    command = [sys.executable, "-m", "dmformer", "export", "--output", "b"]
    for seconds in (0, 1, 2):  # after it has begun to write, so that it is not killed at its end on a fast machine
        there = set(tmp_path.iterdir())
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            while process.poll() is None and set(tmp_path.iterdir()) <= there:
                time.sleep(0.05)
            time.sleep(seconds)
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
        assert content_of(tmp_path / "b") == ("old", "old")
    assert len(list(tmp_path.iterdir())) > 1  # it was at work
    write(tmp_path / "b", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_leftovers_of_others_stay(tmp_path: Path) -> None:
    others = (".b-0123456789abcde", ".b-0123456789abcdefg", ".c-0123456789abcdef", "b-0123456789abcdef")
    for name in (*others, ".b-0123456789abcdef"):
        (tmp_path / name).mkdir()
    write(tmp_path / "b", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("b", *others))


@pytest.mark.parametrize("raised", [KeyError, StageFailed, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False])
def test_an_error_in_the_block_leaves_things_as_they_were(
    tmp_path: Path, raised: type[BaseException], there: bool
) -> None:
    if there:
        write(tmp_path / "b", "old")
    with pytest.raises(raised), writer.staged(tmp_path / "b") as folder:
        fill(folder, "new")
        raise raised
    assert [path.name for path in tmp_path.iterdir()] == (["b"] if there else [])
    if there:
        assert content_of(tmp_path / "b") == ("old", "old")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(StageFailed, match=r"could not be written.*No space left") as caught,
        writer.staged(tmp_path / "b"),
    ):
        raise OSError(28, "No space left on device")
    one_line(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_the_words_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    expected = r"iostream error; the disk is full: 0\.0 MB"
    with pytest.raises(StageFailed, match=expected) as caught, writer.staged(tmp_path / "b"):
        raise StageFailed("iostream error")
    one_line(caught.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=10**9))
    with pytest.raises(StageFailed, match=r"iostream error$"), writer.staged(tmp_path / "b"):
        raise StageFailed("iostream error")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_export_that_cannot_write_says_so_in_one_line(tmp_path: Path) -> None:
    limited = ("sh", "-c", 'ulimit -f 1000 && exec "$@"', "sh")  # blocks of 512 or 1024 bytes, as the shell has it
    done = subprocess.run(
        [*limited, sys.executable, "-m", "dmformer", "export", "--output", "b"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: export to ONNX failed: [Errno 27] File too large")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_only_bundles_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("mine")
    for name, expected in (
        ("file", "is a file"),
        ("photos", "with other things in it"),
        ("file/b", "cannot be written"),
        ("photos/1.jpg", "is a file"),
    ):
        with pytest.raises(UsageError, match=expected) as caught, writer.staged(tmp_path / name):
            pytest.fail("the work was begun")
        one_line(caught.value)
    assert (tmp_path / "photos" / "1.jpg").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["1.jpg", "file", "photos"]


def test_a_parent_that_cannot_be_written(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(UsageError, match="cannot be written"), writer.staged(closed / "b"):
        pytest.fail("the work was begun")


def test_the_working_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", ".."):
        with pytest.raises(UsageError), writer.staged(Path(name)):
            pytest.fail("the work was begun")
    assert Path.cwd() == tmp_path / "here"


def test_a_link_to_a_bundle_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real" / "b", "old")
    (tmp_path / "current").symlink_to(tmp_path / "real" / "b")
    write(tmp_path / "current", "new")
    assert content_of(tmp_path / "current") == content_of(tmp_path / "real" / "b") == ("new", "new")
    assert (tmp_path / "current").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "real"]
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["b"]


def test_others_may_read_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path / "b", "new")
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.slow
def test_a_reader_sees_one_bundle_or_the_other(tmp_path: Path) -> None:
    """The reader opens the folder once, as a reader that wants a consistent view does, and reads beneath it."""
    target = tmp_path / "b"
    write(target, "0")
    probe = tmp_path / "probe"
    probe.mkdir()
    if not writer._exchange(target, probe):
        pytest.skip("no atomic exchange on this file system")
    writer._exchange(target, probe)
    wrong: list[str] = []
    seen: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                wrong.append(f"no bundle: {error}")
                continue
            try:
                texts = []
                for name in (MANIFEST, "sub/file"):
                    file = os.open(name, os.O_RDONLY, dir_fd=folder)
                    data = os.read(file, 10_000)
                    texts.append(version_in(data) if name == MANIFEST else data.decode())
                    os.close(file)
                seen.update(texts)
                if len(set(texts)) != 1:
                    wrong.append(f"a mixture: {texts}")
            except FileNotFoundError:
                pass  # the old one, already being removed
            finally:
                os.close(folder)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for number in range(1, 200):
            write(target, str(number))
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert len(seen) > 1


def test_without_an_exchange_an_error_is_still_one_of_the_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())  # a C library without renameat2
    write(tmp_path / "b", "old")
    assert not writer._exchange(tmp_path / "b", tmp_path / "b")
    write(tmp_path / "b", "new")
    assert content_of(tmp_path / "b") == ("new", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


# --- finding the last one ---------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path


def test_the_last_bundle_is_remembered_for_each_working_folder(
    home: Path, exported: ExportResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="dmformer export"):
        locate.find_bundle(None)
    locate.remember_bundle(exported.output)
    assert locate.find_bundle(None).root == exported.output
    monkeypatch.chdir(home / "b")
    with pytest.raises(UsageError, match="no bundle named"):
        locate.find_bundle(None)


def test_a_relative_bundle_is_remembered(home: Path, exported: ExportResult) -> None:
    shutil.copytree(exported.output, home / "a" / "mine")
    locate.remember_bundle(Path("mine"))
    assert locate.find_bundle(None).root == home / "a" / "mine"


def test_the_default_folder_is_found_where_nothing_is_remembered(home: Path, exported: ExportResult) -> None:
    shutil.copytree(exported.output, home / "a" / locate.DEFAULT_BUNDLE)
    assert locate.find_bundle(None).root == Path(locate.DEFAULT_BUNDLE)
    locate.remember_bundle(home / "gone")
    assert locate.find_bundle(None).root == Path(locate.DEFAULT_BUNDLE)


def test_a_named_bundle_comes_before_the_remembered(home: Path, bundle: Path, exported: ExportResult) -> None:
    locate.remember_bundle(exported.output)
    assert locate.find_bundle(bundle).root == bundle
    with pytest.raises(UsageError, match="no bundle at"):
        locate.find_bundle(home / "nowhere")


def test_a_home_that_cannot_be_written_is_no_failure(home: Path, exported: ExportResult) -> None:
    (home / "state").write_text("a file where the folder should be")
    locate.remember_bundle(exported.output)
    with pytest.raises(UsageError, match="no bundle named"):
        locate.find_bundle(None)


def test_a_damaged_note_is_no_failure(home: Path, exported: ExportResult) -> None:
    locate.remember_bundle(exported.output)
    (note,) = (path for path in (home / "state").rglob("*") if path.is_file())
    for content in (b"\xff\xfe", b"", b"/nowhere\n", b"a\0b"):
        note.write_bytes(content)
        with pytest.raises(UsageError):
            locate.find_bundle(None)
