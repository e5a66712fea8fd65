"""Bundles: manifest, hashes and golden file."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dmformer
from dmformer.bundle import reader
from dmformer.bundle.golden import Golden, load_golden
from dmformer.bundle.manifest import GOLDEN, MANIFEST, Artifact, FileEntry, decode_manifest, file_entry
from dmformer.bundle.reader import open_bundle
from dmformer.errors import CheckFailed, UsageError
from dmformer.runtimes import registry
from tests.bundles import Change, adopt, lengthen, one_line, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dmformer.export.cached import ExportResult


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
    for root, advice in ((tmp_path, "export"), (tmp_path / "missing", "export"), (tmp_path / "file", "pack")):
        with pytest.raises(UsageError, match="no bundle at") as caught:
            open_bundle(root)
        assert f"dmformer {advice}" in one_line(caught.value)


def test_a_huge_manifest_is_not_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_MANIFEST_BYTES", 1024)
    with pytest.raises(UsageError, match="more than"):
        open_bundle(bundle)


# --- hashes -----------------------------------------------------------------------------------------------------------


def offsets(size: int) -> list[int]:
    return sorted({0, 1, 7, size // 3, size // 2, size - 2, size - 1})


def test_any_byte_changed_is_found(bundle: Path) -> None:
    opened = open_bundle(bundle)
    for entry in opened.manifest.entries:
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


def reduced_golden() -> Golden:
    golden = small_golden()
    return replace(golden, files={name: {"logits": golden.outputs["logits"] + 1} for name in ("int8", "fp16")})


def test_reduced_answers_survive_the_round_trip(tmp_path: Path) -> None:
    golden = reduced_golden()
    golden.files["fp16"]["logits"] += 1
    golden.save(tmp_path / GOLDEN)
    found = load_golden(tmp_path / GOLDEN)
    assert set(found.files) == {"fp16", "int8"}
    for outputs, moved in ((found.outputs, 0), (found.files["int8"], 1), (found.files["fp16"], 2)):
        array = outputs["logits"]
        np.testing.assert_allclose(array, golden.outputs["logits"] + moved, atol=1e-6)
        assert array.dtype == np.float32
    assert set(found.outputs) == set(found.outputs_float64) == {"logits"}


def test_the_same_golden_content_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced_golden().save(tmp_path / "one.npz")
    monkeypatch.setattr("time.time", lambda: 2e9)
    reduced_golden().save(tmp_path / "two.npz")
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


def reduced(values: NDArray[Any], name: str = "outputs_fp16/logits") -> Callable[[dict[str, Any]], object]:
    return lambda arrays: arrays.update({name: values})


BAD_REDUCED: dict[str, Callable[[dict[str, Any]], object]] = {
    "another type": reduced(np.ones((2, 4))),
    "half floats": reduced(np.ones((2, 4), np.float16)),
    "fewer rows": reduced(np.ones((1, 4), np.float32)),
    "no values": reduced(np.ones((2, 0), np.float32)),
    "another output": reduced(np.ones((2, 4), np.float32), "outputs_fp16/features"),
    "no output's name": reduced(np.ones((2, 4), np.float32), "outputs_fp16"),
}


@pytest.mark.parametrize("change", (BAD_ARRAYS | BAD_REDUCED).values(), ids=[*BAD_ARRAYS, *BAD_REDUCED])
def test_golden_files_with_bad_arrays(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    arrays = arrays_of(small_golden())
    change(arrays)
    np.savez_compressed(tmp_path / GOLDEN, **arrays)
    with pytest.raises(UsageError) as caught:
        load_golden(tmp_path / GOLDEN)
    assert GOLDEN in one_line(caught.value)


def test_golden_files_with_one_good_and_one_bad_precision(tmp_path: Path) -> None:
    arrays = arrays_of(small_golden())
    reduced(np.ones((2, 4), np.float32))(arrays)
    np.savez_compressed(tmp_path / GOLDEN, **arrays)
    assert set(load_golden(tmp_path / GOLDEN).files) == {"fp16"}
    reduced(np.ones((3, 4), np.float32), "outputs_int8/logits")(arrays)
    np.savez_compressed(tmp_path / GOLDEN, **arrays)
    with pytest.raises(UsageError, match="'outputs_int8/logits'"):
        load_golden(tmp_path / GOLDEN)


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
