"""Bundles: manifest, hashes, golden file, atomic writing, finding one, choosing from one, predicting with one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

import dmformer
from dmformer.assets import SAMPLE_IMAGES
from dmformer.bundle import locate, reader, writer
from dmformer.bundle.golden import Golden, load_golden
from dmformer.bundle.manifest import GOLDEN, MANIFEST, Artifact, FileEntry, decode_manifest, file_entry, hash_file
from dmformer.bundle.predictor import Predictor, choose
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import select
from dmformer.errors import CheckFailed, DMFormerError, StageFailed, UnavailableError, UsageError
from dmformer.runtimes import registry
from dmformer.runtimes.base import Availability

if TYPE_CHECKING:
    from dmformer.export.pipeline import ExportResult

DIGITS = sorted(SAMPLE_IMAGES.glob("*.png"))
Change = Callable[[dict[str, Any]], object]


def rewrite(bundle: Path, change: Change) -> None:
    """Change the manifest of a bundle as JSON."""
    path = bundle / MANIFEST
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def adopt(bundle: Path, name: str) -> None:
    """Make the manifest's size and hash of a file those that the file has."""
    sha256, size = hash_file(bundle / name)

    def change(content: dict[str, Any]) -> None:
        entries = content["files"] + [entry for artifact in content["artifacts"] for entry in artifact["files"]]
        (entry,) = (entry for entry in entries if entry["path"] == name)
        entry.update(sha256=sha256, bytes=size)

    rewrite(bundle, change)


def listed(bundle: Bundle) -> list[FileEntry]:
    return [*bundle.manifest.files, *(entry for artifact in bundle.manifest.artifacts for entry in artifact.files)]


def one_line(error: BaseException) -> str:
    assert str(error).strip()
    assert "\n" not in str(error)
    return str(error)


# --- manifest ---------------------------------------------------------------------------------------------------------


def test_a_manifest_survives_the_round_trip(exported: ExportResult) -> None:
    data = (exported.output / MANIFEST).read_bytes()
    manifest = decode_manifest(data, "here")
    assert manifest == exported.manifest
    assert manifest.encode() == data
    assert data.endswith(b"}\n")


def test_a_manifest_may_hold_more_than_this_version_knows(bundle: Path) -> None:
    rewrite(bundle, lambda content: content.update(added_later={"by": "a newer tool"}))
    assert open_bundle(bundle).manifest.schema_version == 1


BAD_BYTES = {
    "empty": b"",
    "text": b"hello\nworld\n",
    "a list": b"[]",
    "null": b"null",
    "binary": bytes(range(256)),
    "not utf-8": b'{"schema_version": 1, "tool_version": "\xff"}',
    "utf-16": '{"schema_version": 1}'.encode("utf-16"),
    "two documents": b"{} {}",
    "deep": b'{"schema_version": 1, "model": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BAD_BYTES)
def test_bytes_that_are_no_manifest(bundle: Path, kind: str) -> None:
    (bundle / MANIFEST).write_bytes(BAD_BYTES[kind])
    with pytest.raises(UsageError) as caught:
        open_bundle(bundle)
    assert MANIFEST in one_line(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_manifest(bundle: Path, share: float) -> None:
    data = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UsageError) as caught:
        open_bundle(bundle)
    one_line(caught.value)


def path_of(path: str) -> Change:
    return lambda content: content["artifacts"][0]["files"][0].update(path=path)


BAD_CONTENT: dict[str, Change] = {
    "newer version": lambda content: content.update(schema_version=2),
    "version 0": lambda content: content.update(schema_version=0),
    "version as text": lambda content: content.update(schema_version="1"),
    "no version": lambda content: content.pop("schema_version"),
    "no model": lambda content: content.pop("model"),
    "no artifacts": lambda content: content.pop("artifacts"),
    "empty artifacts": lambda content: content.update(artifacts=[]),
    "artifact without files": lambda content: content["artifacts"][0].update(files=[]),
    "model as list": lambda content: content.update(model=[]),
    "classes as numbers": lambda content: content["model"].update(classes=[1, 2]),
    "unknown task": lambda content: content["model"].update(task="poetry"),
    "negative size": lambda content: content["files"][0].update(bytes=-1),
    "fraction of a byte": lambda content: content["files"][0].update(bytes=1.5),
    "short hash": lambda content: content["files"][0].update(sha256="abc"),
    "upper-case hash": lambda content: content["files"][0].update(sha256="A" * 64),
    "preprocessing of no size": lambda content: content["preprocessing"].update(image_size=0),
    "two means": lambda content: content["preprocessing"].update(mean=[0.5, 0.5]),
    "unknown preprocessing": lambda content: content["preprocessing"].update(rotate=90),
    "path up": path_of("../manifest.json"),
    "path up inside": path_of("onnx/../../x"),
    "absolute path": path_of("/etc/passwd"),
    "backslash": path_of("onnx\\fp32\\model.onnx"),
    "drive letter": path_of("C:/model.onnx"),
    "drive letter alone": path_of("C:model.onnx"),
    "no path": path_of(""),
    "the folder itself": path_of("."),
}


@pytest.mark.parametrize("kind", BAD_CONTENT)
def test_manifests_with_bad_content(bundle: Path, kind: str) -> None:
    rewrite(bundle, BAD_CONTENT[kind])
    with pytest.raises(UsageError) as caught:
        open_bundle(bundle)
    assert MANIFEST in one_line(caught.value)


def test_the_version_is_looked_at_first(bundle: Path) -> None:
    (bundle / MANIFEST).write_text('{"schema_version": 7}')
    with pytest.raises(UsageError, match="schema version 7; expected 1"):
        open_bundle(bundle)


def test_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UsageError, match="no bundle at") as caught:
            open_bundle(root)
        assert "dmformer export" in one_line(caught.value)


def test_a_huge_manifest_is_not_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_MANIFEST_BYTES", 1024)
    with pytest.raises(UsageError, match="more than"):
        open_bundle(bundle)


# --- hashes -----------------------------------------------------------------------------------------------------------


def offsets(size: int) -> list[int]:
    return sorted({0, 1, 7, size // 3, size // 2, size - 2, size - 1})


def test_any_byte_changed_is_found(bundle: Path) -> None:
    opened = open_bundle(bundle)
    for entry in listed(opened):
        path = bundle / entry.path
        data = path.read_bytes()
        assert opened.check(entry) == path
        for offset in offsets(len(data)):
            path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
            with pytest.raises(CheckFailed, match="changed or damaged") as caught:
                opened.check(entry)
            assert str(path) in one_line(caught.value)
        path.write_bytes(data)
        assert opened.check(entry) == path


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_link_outside(path: Path) -> None:
    outside = path.parents[3] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def to_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def to_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def folder_to_link_outside(path: Path) -> None:
    outside = path.parents[3] / "outside"
    path.parent.rename(outside)
    path.parent.symlink_to(outside, target_is_directory=True)


@pytest.mark.parametrize(
    "spoil",
    [lengthen, shorten, Path.unlink, to_folder, to_link_outside, to_broken_link, to_loop, folder_to_link_outside],
    ids=lambda function: function.__name__,
)
def test_files_that_are_not_what_the_manifest_lists(bundle: Path, spoil: Callable[[Path], None]) -> None:
    opened = open_bundle(bundle)
    (artifact,) = opened.artifacts("onnx")
    spoil(bundle / artifact.files[0].path)
    with pytest.raises(CheckFailed) as caught:
        opened.load_path(artifact)
    assert artifact.files[0].path in one_line(caught.value)


def test_every_file_of_an_artifact_is_checked(bundle: Path) -> None:
    opened = open_bundle(bundle)
    (artifact,) = opened.artifacts("openvino")
    assert opened.load_path(artifact).suffix == ".xml"
    lengthen(bundle / artifact.files[1].path)
    with pytest.raises(CheckFailed, match=r"model\.bin"):
        opened.load_path(artifact)


@pytest.mark.parametrize(
    ("name", "runtime"),
    [(GOLDEN, None), ("onnx/fp32/model.onnx", "ort"), ("openvino/fp32/model.bin", "ov")],
)
def test_nothing_is_parsed_before_its_hash_was_checked(
    bundle: Path, name: str, runtime: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*arguments: Any, **named: Any) -> Any:
        pytest.fail("parsed")

    lengthen(bundle / name)
    opened = open_bundle(bundle)
    monkeypatch.setattr(np, "load", parse)
    for row in registry.ENTRIES:
        monkeypatch.setattr(registry.adapter(row), "load", parse)
    if runtime is None:
        with pytest.raises(CheckFailed):
            opened.golden()
    else:
        with pytest.raises(CheckFailed), dmformer.load(bundle, runtime=runtime):
            pass


def test_the_hash_of_an_artifact() -> None:
    one = FileEntry(path="onnx/fp32/model.onnx", bytes=1, sha256="1" * 64)
    two = FileEntry(path="onnx/fp32/weights.bin", bytes=2, sha256="2" * 64)
    alone = Artifact(format="onnx", precision="fp32", files=(one,), built_with={})
    both = Artifact(format="onnx", precision="fp32", files=(one, two), built_with={})
    swapped = Artifact(format="onnx", precision="fp32", files=(two, one), built_with={})
    listing = f"{'1' * 64}  onnx/fp32/model.onnx\n{'2' * 64}  onnx/fp32/weights.bin\n"
    assert alone.sha256 == "1" * 64
    assert both.sha256 == hashlib.sha256(listing.encode()).hexdigest()
    assert swapped.sha256 != both.sha256
    assert (alone.bytes, both.bytes) == (1, 3)


def test_a_file_entry_describes_a_file(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 3)
    path = tmp_path / "sub" / "file"
    path.parent.mkdir()
    path.write_bytes(data)
    entry = file_entry(tmp_path, path)
    assert (entry.path, entry.bytes, entry.sha256) == ("sub/file", len(data), hashlib.sha256(data).hexdigest())


# --- golden -----------------------------------------------------------------------------------------------------------


def small_golden() -> Golden:
    generator = np.random.default_rng(0)
    outputs = generator.standard_normal((2, 4))
    return Golden(
        images=generator.integers(0, 255, (2, 8, 8, 3), np.uint8),
        inputs=generator.standard_normal((2, 3, 8, 8)).astype(np.float32),
        outputs={"logits": outputs.astype(np.float32)},
        outputs_float64={"logits": outputs},
    )


def arrays_of(golden: Golden) -> dict[str, Any]:
    return {
        "images": golden.images,
        "inputs": golden.inputs,
        "outputs/logits": golden.outputs["logits"],
        "outputs_float64/logits": golden.outputs_float64["logits"],
    }


def test_golden_survives_the_round_trip(tmp_path: Path) -> None:
    golden = small_golden()
    golden.save(tmp_path / GOLDEN)
    found = arrays_of(load_golden(tmp_path / GOLDEN))
    for name, array in arrays_of(golden).items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_the_same_golden_content_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_golden().save(tmp_path / "one.npz")
    monkeypatch.setattr("time.time", lambda: 2e9)
    small_golden().save(tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


BAD_ARRAYS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no images": lambda arrays: arrays.pop("images"),
    "no inputs": lambda arrays: arrays.pop("inputs"),
    "no outputs": lambda arrays: (arrays.pop("outputs/logits"), arrays.pop("outputs_float64/logits")),
    "no float64": lambda arrays: arrays.pop("outputs_float64/logits"),
    "other names": lambda arrays: arrays.update({"outputs/more": arrays["outputs/logits"]}),
    "no rows": lambda arrays: arrays.update({name: array[:0] for name, array in arrays.items()}),
    "fewer outputs than inputs": lambda arrays: arrays.update({"outputs/logits": arrays["outputs/logits"][:1]}),
    "fewer images than inputs": lambda arrays: arrays.update(images=arrays["images"][:1]),
    "inputs of another type": lambda arrays: arrays.update(inputs=arrays["inputs"].astype(np.float64)),
    "images of another type": lambda arrays: arrays.update(images=arrays["images"].astype(np.float32)),
    "a number for inputs": lambda arrays: arrays.update(inputs=np.float32(1)),
    "texts": lambda arrays: arrays.update(inputs=np.array(["a", "b"])),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_golden_files_with_bad_arrays(tmp_path: Path, kind: str) -> None:
    arrays = arrays_of(small_golden())
    BAD_ARRAYS[kind](arrays)
    np.savez_compressed(tmp_path / GOLDEN, **arrays)
    with pytest.raises(UsageError) as caught:
        load_golden(tmp_path / GOLDEN)
    assert GOLDEN in one_line(caught.value)


def npy_inside_of_nothing(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00garbage")


def middle_zeroed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("golden"),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "middle zeroed": middle_zeroed,
    "a bare array": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"),
    "bad array inside": npy_inside_of_nothing,
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_golden_damaged_under_a_hash_that_fits(bundle: Path, kind: str) -> None:
    BAD_FILES[kind](bundle / GOLDEN)
    adopt(bundle, GOLDEN)
    with pytest.raises(UsageError) as caught:
        open_bundle(bundle).golden()
    assert GOLDEN in one_line(caught.value)


def test_golden_never_unpickles(bundle: Path, tmp_path: Path) -> None:
    arrays = arrays_of(small_golden())
    arrays["images"] = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(bundle / GOLDEN, allow_pickle=True, **arrays)
    adopt(bundle, GOLDEN)
    with pytest.raises(UsageError):
        open_bundle(bundle).golden()
    assert not (tmp_path / "sprung").exists()
    with np.load(bundle / GOLDEN, allow_pickle=True) as archive:
        assert archive["images"].shape == (1,)  # the trap itself works
    assert (tmp_path / "sprung").exists()


def test_a_manifest_that_lists_no_golden_file(bundle: Path) -> None:
    rewrite(bundle, lambda content: content.update(files=[]))
    with pytest.raises(UsageError, match=r"lists no golden\.npz"):
        open_bundle(bundle).golden()


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
        assert folder.parent == tmp_path / "deep" / "er"  # the same file system, or else no rename
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


def test_a_bundle_that_another_export_put_there_meanwhile_is_replaced(tmp_path: Path) -> None:
    with writer.staged(tmp_path / "b") as folder:
        fill(folder, "mine")
        write(tmp_path / "b", "theirs")
    assert content_of(tmp_path / "b") == ("mine", "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("raised", [KeyError, StageFailed, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False])
def test_an_error_in_the_block_leaves_things_as_they_were(
    tmp_path: Path, raised: type[BaseException], there: bool
) -> None:
    if there:
        write(tmp_path / "b", "old")
    with pytest.raises(raised), writer.staged(tmp_path / "b") as folder:  # noqa: PT012
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
    locate.remember(exported.output)
    assert locate.find_bundle(None).root == exported.output
    monkeypatch.chdir(home / "b")
    with pytest.raises(UsageError, match="no bundle named"):
        locate.find_bundle(None)


def test_a_relative_bundle_is_remembered(home: Path, exported: ExportResult) -> None:
    shutil.copytree(exported.output, home / "a" / "mine")
    locate.remember(Path("mine"))
    assert locate.find_bundle(None).root == home / "a" / "mine"


def test_the_default_folder_is_found_where_nothing_is_remembered(home: Path, exported: ExportResult) -> None:
    shutil.copytree(exported.output, home / "a" / locate.DEFAULT_BUNDLE)
    assert locate.find_bundle(None).root == Path(locate.DEFAULT_BUNDLE)
    locate.remember(home / "gone")
    assert locate.find_bundle(None).root == Path(locate.DEFAULT_BUNDLE)


def test_a_named_bundle_comes_before_the_remembered(home: Path, bundle: Path, exported: ExportResult) -> None:
    locate.remember(exported.output)
    assert locate.find_bundle(bundle).root == bundle
    with pytest.raises(UsageError, match="no bundle at"):
        locate.find_bundle(home / "nowhere")


def test_a_home_that_cannot_be_written_is_no_failure(home: Path, exported: ExportResult) -> None:
    (home / "state").write_text("a file where the folder should be")
    locate.remember(exported.output)
    with pytest.raises(UsageError, match="no bundle named"):
        locate.find_bundle(None)


def test_a_damaged_note_is_no_failure(home: Path, exported: ExportResult) -> None:
    locate.remember(exported.output)
    (note,) = (path for path in (home / "state").rglob("*") if path.is_file())
    for content in (b"\xff\xfe", b"", b"/nowhere\n", b"a\0b"):
        note.write_bytes(content)
        with pytest.raises(UsageError):
            locate.find_bundle(None)


# --- choosing ---------------------------------------------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make runtimes unavailable."""
    for name in names:
        kind = registry.adapter(registry.entry(name))
        monkeypatch.setattr(kind, "probe", classmethod(lambda cls: Availability(False, reason=f"no {cls.name} here")))


def names(bundle: Bundle, *runtimes: str) -> list[str]:
    return [choice.entry.name for choice in select(bundle, runtimes)[0]]


@pytest.fixture
def opened(exported: ExportResult) -> Bundle:
    return open_bundle(exported.output)


EVERY = [row.name for row in registry.ENTRIES]


def test_without_names_or_with_all_everything_that_runs_is_taken(opened: Bundle) -> None:
    assert names(opened) == names(opened, "all") == names(opened, "ALL") == EVERY


def test_named_runtimes_come_in_their_order_and_once(opened: Bundle) -> None:
    assert names(opened, "ov", "ort") == ["openvino", "onnxruntime"]
    assert names(opened, "ort", "onnxruntime", "ORT") == ["onnxruntime"]
    assert names(opened, "all", "ov") == ["openvino", *(name for name in EVERY if name != "openvino")]


def test_what_cannot_run_is_left_out_and_said(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openvino")
    chosen, skipped = select(opened, [])
    assert "openvino" not in [choice.entry.name for choice in chosen]
    assert skipped == ["openvino: no openvino here"]


def test_a_named_runtime_that_cannot_run_is_refused(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openvino")
    for wanted in (["ov"], ["all", "ov"], ["ort", "ov"]):
        with pytest.raises(UnavailableError, match="no openvino here"):
            select(opened, wanted)


def test_nothing_can_run(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *EVERY)
    with pytest.raises(UnavailableError, match="nothing in the bundle can run") as caught:
        select(opened, [])
    assert all(f"no {name} here" in str(caught.value) for name in EVERY)


def test_nothing_in_the_bundle_for_a_runtime(bundle: Path) -> None:
    rewrite(bundle, lambda content: content.update(artifacts=[content["artifacts"][1]]))
    opened = open_bundle(bundle)
    assert names(opened) == ["onnxruntime"]
    with pytest.raises(UsageError, match=r"nothing for runtime openvino; it has onnx fp32.*--format openvino"):
        select(opened, ["ov"])


def test_precisions(opened: Bundle) -> None:
    assert len(select(opened, [], ["fp32"])[0]) == len(EVERY)
    for runtimes in ([], ["ort"]):
        with pytest.raises(UsageError, match=r"nothing.* at int8, fp16; it has .*onnx fp32"):
            select(opened, runtimes, ["int8", "fp16"])


def test_unknown_runtimes_are_wrong_usage(opened: Bundle) -> None:
    with pytest.raises(UsageError, match="unknown runtime 'tflite'"):
        select(opened, ["ort", "tflite"])


def test_choose_takes_the_first_that_runs_in_the_manifests_order(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = ["openvino", "onnx", "torch"]
    rewrite(bundle, lambda content: content["artifacts"].sort(key=lambda artifact: order.index(artifact["format"])))
    opened = open_bundle(bundle)
    assert choose(opened, None, None).entry.name == "openvino"
    assert choose(opened, None, "fp32").entry.name == "openvino"
    assert choose(opened, "ort", None).entry.name == "onnxruntime"
    hide(monkeypatch, "openvino")
    assert choose(opened, None, None).entry.name == "onnxruntime"
    with pytest.raises(UnavailableError):
        choose(opened, "ov", None)
    with pytest.raises(UsageError):
        choose(opened, None, "int8")
    hide(monkeypatch, "onnxruntime", "torch")
    with pytest.raises(UnavailableError):
        choose(opened, None, None)


def test_artifacts_of_no_known_format_are_passed_over(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["artifacts"][0].update(format="tflite"))
    opened = open_bundle(bundle)
    assert choose(opened, None, None).entry.name == "onnxruntime"
    assert "torch" not in names(opened)


# --- predicting -------------------------------------------------------------------------------------------------------


def test_the_digits_are_read(exported: ExportResult) -> None:
    with dmformer.load(exported.output, runtime="ort") as predictor:
        predictions = predictor.predict(DIGITS, top_k=10)  # more than one batch of images
    assert len(DIGITS) == 10
    assert [Path(prediction.image) for prediction in predictions] == DIGITS
    for path, prediction in zip(DIGITS, predictions, strict=True):
        likely = prediction.classes
        assert likely[0].name == path.stem
        assert sorted(entry.index for entry in likely) == list(range(10))
        assert all(entry.name == str(entry.index) for entry in likely)
        probabilities = [entry.probability for entry in likely]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)
        assert all(0 <= probability <= 1 for probability in probabilities)


def test_several_images_as_one_by_one(exported: ExportResult) -> None:
    with dmformer.load(exported.output, runtime="ort", threads=1) as predictor:
        together = predictor.predict([str(path) for path in DIGITS])
        alone = [predictor.predict([path])[0] for path in DIGITS]
    for one, other in zip(together, alone, strict=True):
        assert one.image == other.image
        assert one.classes[0].index == other.classes[0].index
        assert one.classes[0].probability == pytest.approx(other.classes[0].probability, abs=1e-5)


@pytest.mark.parametrize(("top_k", "shown"), [(1, 1), (3, 3), (10, 10), (1000, 10)])
def test_top_k(exported: ExportResult, top_k: int, shown: int) -> None:
    with dmformer.load(exported.output, runtime="ort") as predictor:
        assert len(predictor.predict(DIGITS[:1], top_k)[0].classes) == shown
        assert predictor.predict([], top_k) == []


def test_no_class_names(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["model"].update(classes=[]))
    with dmformer.load(bundle, runtime="ort") as predictor:
        (likely,) = predictor.predict(DIGITS[:1], top_k=1)[0].classes
    assert (likely.index, likely.name) == (0, None)


class Loud:
    """A runtime whose logits are far beyond what exp() takes."""

    def run(self, inputs: Any) -> Any:
        (array,) = inputs.values()
        return {"logits": np.tile(np.float32([1e4, -1e4, 9e3]), (len(array), 1))}


def test_large_logits_do_not_overflow(opened: Bundle) -> None:
    predictor = Predictor(choose(opened, "ort", None))
    predictor.runtime = Loud()  # type: ignore[assignment]
    predictor.manifest = msgspec.structs.replace(
        opened.manifest, outputs=(msgspec.structs.replace(opened.manifest.outputs[0], name="logits"),)
    )
    assert [likely.probability for likely in predictor.predict(DIGITS[:1])[0].classes] == [1, 0, 0]


def test_an_image_that_cannot_be_read_is_named(exported: ExportResult, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with dmformer.load(exported.output, runtime="ort") as predictor:
        for bad in ("text.png", "missing.png"):
            with pytest.raises(UsageError, match=bad):
                predictor.predict([DIGITS[0], tmp_path / bad])


def test_load_refuses_what_it_cannot_use(exported: ExportResult, tmp_path: Path) -> None:
    for arguments in (
        {"bundle": tmp_path},
        {"bundle": exported.output, "runtime": "tflite"},
        {"bundle": exported.output, "precision": "int8"},
        {"bundle": exported.output, "threads": 0},
    ):
        with pytest.raises(UsageError):
            dmformer.load(**arguments)  # type: ignore[arg-type]


def test_load_of_a_spoilt_bundle(bundle: Path) -> None:
    lengthen(bundle / "onnx/fp32/model.onnx")
    with pytest.raises(CheckFailed):
        dmformer.load(bundle, runtime="ort")
    with dmformer.load(bundle, runtime="ov") as predictor:
        assert predictor.predict(DIGITS[:1], 1)[0].classes[0].name == "0"


def test_a_manifest_that_does_not_fit_the_artifact(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["inputs"][0].update(name="pixels"))
    with pytest.raises(DMFormerError) as caught, dmformer.load(bundle, runtime="ort") as predictor:
        predictor.predict(DIGITS[:1])
    one_line(caught.value)
