"""A bundle as one file: the same bytes for the same bundle, and no harm from an archive that means some."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

import dmformer
from dmformer.assets import SAMPLE_IMAGES
from dmformer.bundle.manifest import GOLDEN, MANIFEST, SIGNATURE
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.writer import pack, unpack
from dmformer.errors import CheckFailed, DMFormerError, StageFailed, UsageError
from dmformer.files import hash_file
from tests.bundles import lengthen, one_line, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Run

    Members = list[tuple[zipfile.ZipInfo, bytes]]

DIGIT = SAMPLE_IMAGES / "7.png"


@pytest.fixture
def packed(bundle: Path, tmp_path: Path) -> Path:
    return pack(open_bundle(bundle), tmp_path / "packed.dmf")


@pytest.fixture
def small(bundle: Path, tmp_path: Path) -> Path:
    """A packed bundle of few bytes, whose files mean nothing."""

    def shrink(content: dict[str, Any]) -> None:
        content["artifacts"] = content["artifacts"][:1]
        content["artifacts"][0].update(format="unknown", files=[content["artifacts"][0]["files"][0]])
        content["artifacts"][0]["files"][0]["path"] = "unknown/a"
        content["files"] = content["files"][:1]
        for entry in (content["files"][0], content["artifacts"][0]["files"][0]):
            (folder / entry["path"]).parent.mkdir(exist_ok=True)
            (folder / entry["path"]).write_bytes(b"content of " + entry["path"].encode())
            entry["sha256"], entry["bytes"] = hash_file(folder / entry["path"])

    folder = tmp_path / "few"
    folder.mkdir()
    shutil.copy(bundle / MANIFEST, folder)
    rewrite(folder, shrink)
    return pack(open_bundle(folder), tmp_path / "few.dmf")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the system's folder for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untouched(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- pack and unpack --------------------------------------------------------------------------------------------------


def test_what_is_packed_comes_out_again(bundle: Path, packed: Path, tmp_path: Path) -> None:
    opened = unpack(packed, tmp_path / "out")
    assert content(tmp_path / "out") == content(bundle)
    assert opened.root == tmp_path / "out"
    opened.check_all()


def test_the_same_bundle_is_the_same_bytes(bundle: Path, packed: Path, tmp_path: Path) -> None:
    before = packed.read_bytes()
    shutil.copytree(bundle, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (1e9, 1e9))
        path.chmod(0o700)
    assert pack(open_bundle(tmp_path / "copy")).read_bytes() == before
    out = unpack(packed, tmp_path / "out")
    assert pack(out, tmp_path / "again.dmf").read_bytes() == before


def test_standard_tools_read_it(bundle: Path, packed: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "zipfile", "-e", packed, tmp_path / "out"], check=True)
    assert content(tmp_path / "out") == content(bundle)
    with zipfile.ZipFile(packed) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == MANIFEST
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.namelist()[1:] == sorted(archive.namelist()[1:])


def test_commands_name_the_files_themselves(inline: Callable[..., Run], bundle: Path, tmp_path: Path) -> None:
    run = inline("pack", bundle)
    assert run.code == 0, run.err
    packed = tmp_path / "bundle.dmf"
    assert hash_file(packed)[0] in run.out
    shutil.rmtree(bundle)
    run = inline("unpack", packed)
    assert run.code == 0, run.err
    assert open_bundle(bundle).manifest_sha256 in run.out


def test_a_spoilt_bundle_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "stray").touch()
    with pytest.raises(CheckFailed, match="stray"):
        pack(open_bundle(bundle))
    (bundle / "stray").unlink()
    lengthen(bundle / GOLDEN)
    with pytest.raises(CheckFailed, match=GOLDEN):
        pack(open_bundle(bundle))
    assert untouched(tmp_path) == {"bundle", *(f"bundle/{name}" for name in untouched(bundle))}


def test_a_bundle_that_changes_while_it_is_packed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (MANIFEST, GOLDEN):
        opened = open_bundle(bundle)
        before = (bundle / name).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(type(opened), "check_all", lambda _, name=name: lengthen(bundle / name))
            with pytest.raises((CheckFailed, StageFailed)):
                pack(opened)
        (bundle / name).write_bytes(before)
    assert list(tmp_path.iterdir()) == [bundle]


@pytest.mark.parametrize("what", ["text", "folder", "other zip", "link"])
def test_only_packed_bundles_are_replaced(bundle: Path, packed: Path, tmp_path: Path, what: str) -> None:
    target = tmp_path / "target.dmf"
    if what == "text":
        target.write_text("mine")
    elif what == "folder":
        target.mkdir()
    elif what == "link":
        target.symlink_to(packed)
    else:
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("mine", "x")
    with pytest.raises(UsageError, match="no packed bundle"):
        pack(open_bundle(bundle), target)
    assert pack(open_bundle(bundle), packed) == packed


def test_outputs_that_cannot_be(bundle: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder that exists"):
        pack(open_bundle(bundle), tmp_path / "nowhere" / "x.dmf")
    with pytest.raises(UsageError, match="inside the bundle"):
        pack(open_bundle(bundle), bundle / "x.dmf")
    with pytest.raises(UsageError, match="packed already"):
        pack(open_bundle(packed))
    with pytest.raises(UsageError, match="is a folder"):
        unpack(bundle)
    with pytest.raises(UsageError, match="expected `output`"):
        unpack(packed.rename(tmp_path / "packed.zip"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UsageError, match="other things in it"):
        unpack(tmp_path / "packed.zip", tmp_path / "mine")


def test_an_older_bundle_is_replaced_as_a_whole(bundle: Path, packed: Path) -> None:
    shutil.rmtree(bundle / "openvino")
    unpack(packed, bundle)
    open_bundle(bundle).check_all()


def test_a_full_disk_leaves_nothing(bundle: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = untouched(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StageFailed, match="No space left"):
        pack(open_bundle(bundle), tmp_path / "new.dmf")
    monkeypatch.setattr("dmformer.bundle.archive._copy", full)
    with pytest.raises(StageFailed, match="No space left"):
        unpack(small, tmp_path / "new")
    with pytest.raises(StageFailed, match="No space left"):
        open_bundle(small)
    assert untouched(tmp_path) == before


STOPPED = """
import sys, time
import dmformer.bundle.archive as archive
import dmformer.bundle.writer as packing
from dmformer.cli import main
def wait(*_, **__):
    open("waiting", "w").close()
    time.sleep(60)
archive._check_listing = packing._add = wait
sys.argv = ["dmformer", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("command", ["pack", "unpack", "inspect"])
def test_ctrl_c_leaves_nothing(command: str, bundle: Path, small: Path, tmp_path: Path, scratch: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    output = [] if command == "inspect" else ["--output", "out"]
    arguments = [command, bundle if command == "pack" else small, *output]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *map(str, arguments)], cwd=work, stderr=subprocess.PIPE, text=True
    )
    while not (work / "waiting").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "stopped\n"
    assert process.returncode == 130
    assert untouched(work) == {"waiting"}
    assert untouched(scratch) == set()


# --- where a bundle is taken ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_take_a_packed_bundle(
    inline: Callable[..., Run], packed: Path, scratch: Path, few_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("dmformer.bench.api"), "ROUNDS", 1)
    for arguments in (
        ["predict", packed, DIGIT, "--runtime", "ov"],
        ["inspect", packed],
        ["doctor", packed],
        ["check", packed],
        ["verify", packed, "--runtime", "ort"],
        ["eval", packed, "--runtime", "ort", "--data", few_images],
        ["bench", packed, "--runtime", "ort", "--duration", "0.03"],
    ):
        run = inline(*arguments)
        assert run.code == 0, run.err
        assert str(scratch) not in run.out + run.err
        assert not list(scratch.glob("dmformer-*")), arguments  # engines leave files of their own


def test_the_python_functions_take_a_packed_bundle(packed: Path, scratch: Path) -> None:
    with dmformer.load(packed, runtime="ov") as predictor:
        assert stat.S_IMODE(next(scratch.iterdir()).stat().st_mode) == 0o700
        assert predictor.predict(DIGIT)[0].classes[0].name == "7"
    del predictor
    assert untouched(scratch) == set()


def test_a_packed_bundle_takes_nothing_in(inline: Callable[..., Run], packed: Path) -> None:
    run = inline("build", packed, "--format", "ov")
    assert run.code == 2
    assert "dmformer unpack" in run.error_line


# --- archives that mean harm, or are damaged --------------------------------------------------------------------------


def members_of(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return [(member, archive.read(member)) for member in archive.infolist()]


def write(path: Path, members: Members) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members:
            archive.writestr(member, data)


def named(name: str) -> Callable[[Members], object]:
    def change(members: Members) -> None:
        members[-1][0].filename = name

    return change


def added(name: str, mode: int = 0o100644) -> Callable[[Members], object]:
    def change(members: Members) -> None:
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        members.append((member, b"harm"))

    return change


def compressed(members: Members) -> None:
    members[-1][0].compress_type = zipfile.ZIP_DEFLATED


def typed(mode: int) -> Callable[[Members], object]:
    def change(members: Members) -> None:
        members[-1][0].external_attr = mode << 16

    return change


def other_content(members: Members) -> None:
    members[-1] = (members[-1][0], members[-1][1][:-1] + b"?")


def longer(members: Members) -> None:
    members[-1] = (members[-1][0], members[-1][1] + b"?")


def manifest_of(data: bytes) -> Callable[[Members], object]:
    def change(members: Members) -> None:
        members[0] = (members[0][0], data)

    return change


HARM: dict[str, tuple[Callable[[Members], object], type[DMFormerError]]] = {
    "path up": (named("../harm"), UsageError),
    "path up inside": (named("a/../../harm"), UsageError),
    "absolute": (named("/tmp/harm"), UsageError),
    "drive": (named("C:/harm"), UsageError),
    "backslash": (named("..\\harm"), UsageError),
    "nothing": (named(""), UsageError),
    "a folder": (added("folder/", 0o040755), UsageError),
    "a link": (typed(0o120777), UsageError),
    "a device": (typed(0o060777), UsageError),
    "a pipe": (typed(0o010777), UsageError),
    "another file": (added("harm"), CheckFailed),
    "another link": (added("harm", 0o120777), UsageError),
    "a signature of nothing": (added(SIGNATURE), CheckFailed),
    "twice": (lambda members: members.append(members[-1]), UsageError),
    "twice, but for case": (added("Unknown/A"), UsageError),
    "no manifest": (lambda members: members.pop(0), UsageError),
    "a missing file": (lambda members: members.pop(), CheckFailed),
    "nothing at all": (lambda members: members.clear(), UsageError),
    "compressed": (compressed, UsageError),
    "other content": (other_content, CheckFailed),
    "longer than listed": (longer, CheckFailed),
    "an empty manifest": (manifest_of(b""), UsageError),
    "a manifest of something else": (manifest_of(b"{}"), UsageError),
    "a huge manifest": (manifest_of(bytes(17 << 20)), UsageError),
}


def refused(path: Path, tmp_path: Path, scratch: Path) -> DMFormerError:
    """What both ways of unpacking say; fails where they leave anything behind."""
    before = untouched(tmp_path)
    with pytest.raises(DMFormerError) as one:
        unpack(path, tmp_path / "out")
    with pytest.raises(DMFormerError) as other:
        open_bundle(path)
    assert one_line(one.value) == one_line(other.value)
    assert untouched(tmp_path) == before
    assert untouched(scratch) == set()
    return one.value


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HARM)
def test_archives_that_mean_harm(small: Path, tmp_path: Path, scratch: Path, kind: str) -> None:
    change, expected = HARM[kind]
    members = members_of(small)
    change(members)
    write(small, members)
    assert type(refused(small, tmp_path, scratch)) is expected


def patched(path: Path, name: str, field: int, value: int) -> None:
    """Change a 4-byte field of a member in the archive's index (APPNOTE.TXT, 4.3.12)."""
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
    data[at + field : at + field + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)


COMPRESSED_SIZE, SIZE, OFFSET = 20, 24, 42


def test_a_member_that_claims_more_than_the_archive_has(small: Path, tmp_path: Path, scratch: Path) -> None:
    patched(small, "unknown/a", SIZE, 1 << 31)
    assert "more than the archive has" in str(refused(small, tmp_path, scratch))
    patched(small, "unknown/a", COMPRESSED_SIZE, 1 << 31)
    assert "more than the archive has" in str(refused(small, tmp_path, scratch))


def test_members_that_overlap(small: Path, tmp_path: Path, scratch: Path) -> None:
    """Bombs of Fifield's kind: one piece of the file stands for many members."""
    members = members_of(small)
    members += [(zipfile.ZipInfo(f"member-{index:02}"), b"") for index in range(40)]
    write(small, members)
    size = len(members[0][1])
    for index in range(40):
        for field in (SIZE, COMPRESSED_SIZE):
            patched(small, f"member-{index:02}", field, size)
    assert "more than the archive has" in str(refused(small, tmp_path, scratch))


def test_an_encrypted_member(small: Path, tmp_path: Path, scratch: Path) -> None:
    data = bytearray(small.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 8] |= 1
    small.write_bytes(data)
    assert "encrypted" in str(refused(small, tmp_path, scratch))


@pytest.mark.parametrize("what", ["missing", "pipe", "text", "empty", "png"])
def test_what_is_no_archive(tmp_path: Path, scratch: Path, what: str) -> None:
    path = tmp_path / "x.dmf"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "png":
        shutil.copy(DIGIT, path)
    elif what != "missing":
        path.write_text("text" if what == "text" else "")
    for work in (lambda: unpack(path, tmp_path / "out"), lambda: open_bundle(path)):
        with pytest.raises(UsageError) as caught:
            work()
        assert "x.dmf" in one_line(caught.value)
    assert untouched(scratch) == set()


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Bytes changed, cut out, doubled, and truncated."""
    generator = random.Random(seed)
    for number in range(count):
        changed = bytearray(data)
        at = generator.randrange(len(data))
        if number % 4 < 2:
            for _ in range(generator.choice((1, 1, 4))):
                changed[generator.randrange(len(data))] = generator.randrange(256)
        elif number % 4 == 2:
            length = generator.randrange(1, 64)
            changed[at : at + length] = bytes(changed[at : at + length]) * generator.choice((0, 2))
        else:
            del changed[at:]
        yield bytes(changed)


def test_mutated_archives(small: Path, tmp_path: Path, scratch: Path) -> None:
    """One thousand: refused in one line with nothing left behind, or the very bundle that was packed."""
    original = content(unpack(small, tmp_path / "out").root)
    shutil.rmtree(tmp_path / "out")
    original.pop(MANIFEST)  # has no hash; a signature would cover it
    before = untouched(tmp_path)
    refusals = []
    for data in mutations(small.read_bytes(), 1000, seed=1):
        small.write_bytes(data)
        try:
            opened = open_bundle(small)
        except DMFormerError as error:
            refusals.append(error)
        else:
            found = content(opened.root)
            found.pop(MANIFEST)
            assert found == original
            del opened
        assert untouched(scratch) == set()
    assert untouched(tmp_path) == before
    assert 700 < len(refusals) < 1000
    assert {refusal.exit_code for refusal in refusals} == {1, 2}
    assert all(map(one_line, refusals))
