"""What other users of the machine put into shared folders, and who may have changed what is trusted."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dmformer import ownership
from dmformer.bundle.trust import TRUSTED_KEYS, trusted_keys
from dmformer.bundle.writer import staged
from dmformer.cache import Cache, open_cache
from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.errors import DMFormerError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files to others")
STRANGER = 65534


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder like /tmp."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def link(path: Path, target: Path) -> Path:
    """A link that a neighbour made."""
    path.symlink_to(target)
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    return path


@root
@pytest.mark.parametrize("inside", [False, True])
def test_a_report_does_not_follow_a_neighbours_link(shared: Path, tmp_path: Path, inside: bool) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("before")
    named = link(shared / "x", precious) / "file" if inside else link(shared / "x", precious / "file")
    with pytest.raises(UsageError, match="another user"):
        present.write_report(named, b"after")
    assert (precious / "file").read_text() == "before"


def test_ones_own_link_is_followed(shared: Path, tmp_path: Path) -> None:
    (shared / "x").symlink_to(tmp_path / "file")
    present.write_report(shared / "x", b"after")
    assert (tmp_path / "file").read_bytes() == b"after"
    assert (shared / "x").is_symlink()


@root
def test_a_report_does_not_go_into_a_neighbours_pipe(shared: Path) -> None:
    os.mkfifo(shared / "pipe")
    os.chown(shared / "pipe", STRANGER, STRANGER)
    with pytest.raises(DMFormerError, match="another user"):
        present.write_report(shared / "pipe", b"secret")


def test_a_path_is_resolved_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "l").symlink_to("a/b")
    (tmp_path / "a/b/up").symlink_to("../..")
    for name in ("l/x", "l/../y", "a/b/up/l/z", "nothing/../x", "l/up/a/./b"):
        assert ownership.resolve(tmp_path / name) == (tmp_path / name).resolve()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="without end"):
        ownership.resolve(tmp_path / "loop")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_key_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    assert trusted_keys(folder) == {}
    folder.chmod(mode)
    with pytest.raises(UsageError, match="other users can write"):
        trusted_keys(folder)


def test_a_key_that_others_can_write_or_exchange_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "above/keys"
    folder.mkdir(parents=True)
    (folder / "a.pem").write_text("")
    (folder / "a.pem").chmod(0o666)
    with pytest.raises(UsageError, match="other users can write"):
        trusted_keys(folder)
    (folder / "a.pem").unlink()
    (tmp_path / "above").chmod(0o777)
    with pytest.raises(UsageError, match="exchange"):
        trusted_keys(folder)
    assert TRUSTED_KEYS  # names the folder


def test_the_cache_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "cache"))
    made = open_cache()
    made.keep(made.key("work", 1), "work", [np.zeros(1)], tmp_path)
    for folder in (tmp_path / "cache", tmp_path / "cache/entries", tmp_path / "cache/objects"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert open_cache().folder is not None
    (tmp_path / "cache").chmod(0o777)
    distrusted = open_cache()
    assert distrusted.folder is None
    assert "other users can write" in str(distrusted.trouble)


@root
def test_a_cache_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", STRANGER, STRANGER)
    assert "belongs to another user" in str(open_cache().trouble)


@pytest.mark.parametrize("path", ["/absolute", "../x", "a/../../x", "con.txt"])
def test_a_cache_entry_writes_below_its_root_only(tmp_path: Path, path: str) -> None:
    import hashlib
    from pathlib import Path

    import msgspec

    from dmformer.cache import CacheEntry

    cache, out = Cache(tmp_path / "cache"), tmp_path / "out/deep"
    out.mkdir(parents=True)
    named = str(tmp_path / "absolute") if path == "/absolute" else path
    objects = {}
    content = hashlib.sha256(b"content").hexdigest()
    value = msgspec.msgpack.encode([{"path": named, "sha256": content}])
    (tmp_path / "cache/objects").mkdir(parents=True)
    (tmp_path / "cache/entries").mkdir()
    for data in (b"content", value):
        objects[hashlib.sha256(data).hexdigest()] = len(data)
        (tmp_path / "cache/objects" / hashlib.sha256(data).hexdigest()).write_bytes(data)
    entry = msgspec.json.encode(CacheEntry(what="w", made="", value=hashlib.sha256(value).hexdigest(), objects=objects))
    (tmp_path / "cache/entries/k").write_bytes(hashlib.sha256(entry).hexdigest().encode() + b"\n" + entry)
    before = {file for file in tmp_path.rglob("*") if "cache" not in file.parts}
    assert cache.find("k", list[Path], out) is None
    assert {file for file in tmp_path.rglob("*") if "cache" not in file.parts} == before


@root
def test_leftovers_and_locks_of_neighbours(shared: Path, tmp_path: Path) -> None:
    """What looks like a killed export is neither put in place nor removed; a link is not taken for a lock."""
    planted = shared / f".bundle-{'0' * 16}"
    (planted / "old").mkdir(parents=True)
    for path in (planted, planted / "old"):
        os.chown(path, STRANGER, STRANGER)
    with staged(shared / "bundle") as folder:
        (folder / "file").write_text("mine")
    assert (planted / "old").is_dir()
    assert (shared / "bundle/file").read_text() == "mine"
    precious = tmp_path / "precious"
    precious.write_text("before")
    link(shared / ".other-lock", precious)
    with pytest.raises(DMFormerError), staged(shared / "other"):
        pass
    assert precious.read_text() == "before"


@root
def test_the_last_bundle_must_be_ones_own(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(shared)
    bundle = shared / "dmformer-bundle"
    bundle.mkdir()
    options.remember_bundle(bundle)
    assert options.bundle_path(None) == bundle
    os.chown(bundle, STRANGER, STRANGER)
    with pytest.raises(UsageError, match="another user"):
        options.bundle_path(None)
    (note,) = (tmp_path / "state/dmformer").iterdir()
    note.unlink()
    with pytest.raises(UsageError, match="another user"):  # the one that is taken where none is named
        options.bundle_path(None)
    assert options.bundle_path(bundle) == bundle  # named, it is the user's business


def test_what_changed_since_it_was_opened_is_told(tmp_path: Path) -> None:
    from dmformer.files import OpenFile

    path = tmp_path / "f"
    path.write_bytes(b"content")
    file = OpenFile(path)
    assert file.is_unchanged()
    time.sleep(0.02)  # the clock of file systems ticks in hundredths
    path.rename(tmp_path / "away")
    (tmp_path / "away").rename(path)
    assert not file.is_unchanged()
    assert file.data[:] == b"content"
