"""What a bundle may hold, and that nothing of it can change unseen: names, hashes, links, files that are not listed."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator

import dmformer
from dmformer.bundle.integrity import check_integrity
from dmformer.bundle.manifest import GOLDEN, MANIFEST, SIGNATURE, check_distinct, check_name
from dmformer.bundle.reader import open_bundle
from dmformer.errors import CheckFailed, UsageError
from dmformer.files import OpenFile
from dmformer.runtimes.onnx_weights import FIELDS, external_files
from tests.bundles import adopt, one_line, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run

ONNX = "onnx/fp32/model.onnx"

# --- names ------------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "", ".", "..", "/", "/etc/passwd", "../x", "a/../b", "a/..", "./a", "a/./b", "a//b", "a/", "\\a", "a\\b", "..\\a",
    "C:/a", "C:a", "a/b:stream", "//server/share", "a\0b", "a\nb", "a\x7f", "a\u202eb", "\ud800", "a?", "a*", "a|b",
    "nul", "NUL.txt", "a/con", "com1.x", "lpt9", "a.", "a ", "a./b", "x" * 201, "ü" * 101, "/".join("a" * 150),
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_lead_out_or_that_some_system_cannot_hold(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_name(name)
    assert "expected a relative path" in one_line(caught.value)


@pytest.mark.parametrize("name", ["a", "a/b/c.onnx", "model v2.bin", "größe.png", "..a", "a..b", "console", ".hidden"])
def test_names_that_any_system_can_hold(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "names",
    [("a", "a"), ("a/B", "a/b"), ("straße", "STRASSE"), ("é", "e\u0301"), ("a", "a/b"), ("A/b", "x", "a/b/c")],
    ids=ascii,
)
def test_names_that_collide(names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        check_distinct(names)


def test_names_that_do_not_collide() -> None:
    check_distinct(["a", "b", "ab", "c/a", "c/b", "ca"])


def listed_as(path: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["artifacts"][0]["files"][0].update(path=path)


@pytest.mark.parametrize(
    "path", [*BAD_NAMES, "manifest.json", "MANIFEST.json", "manifest.sig", "Golden.NPZ"], ids=ascii
)
def test_a_manifest_with_such_names_is_refused(bundle: Path, path: str) -> None:
    rewrite(bundle, listed_as(path))
    with pytest.raises(UsageError) as caught:
        open_bundle(bundle)
    assert MANIFEST in one_line(caught.value)


# --- content ----------------------------------------------------------------------------------------------------------


def positions(size: int, generator: random.Random) -> set[int]:
    return {0, size // 2, size - 1, *(generator.randrange(size) for _ in range(3))}


def test_any_byte_of_any_listed_file_is_found(bundle: Path) -> None:
    """The manifest's own bytes: tests/test_signature.py."""
    generator = random.Random(0)
    opened = open_bundle(bundle)
    present = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert present == {MANIFEST, *(entry.path for entry in opened.manifest.entries)}
    for entry in opened.manifest.entries:
        path = bundle / entry.path
        for position in positions(entry.bytes, generator):
            with path.open("r+b") as file:
                file.seek(position)
                before = file.read(1)
                file.seek(position)
                file.write(bytes([before[0] ^ generator.randrange(1, 256)]))
            for look in (opened.check, opened.read):
                with pytest.raises(CheckFailed, match="changed or damaged"):
                    look(entry)
            with path.open("r+b") as file:
                file.seek(position)
                file.write(before)
        assert opened.read(entry) == opened.check(entry).read_bytes()
    opened.check_all()


def test_what_is_checked_of_the_golden_file_is_what_is_parsed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read once: another content that comes between check and use has no effect."""
    opened = open_bundle(bundle)
    expected = opened.golden().inputs
    path, check = bundle / GOLDEN, type(opened)._compare

    def check_and_exchange(*arguments: Any) -> None:
        check(*arguments)
        path.write_bytes(b"something else")

    monkeypatch.setattr(type(opened), "_compare", check_and_exchange)
    assert (opened.golden().inputs == expected).all()
    assert path.read_bytes() == b"something else"


def test_a_size_that_no_memory_has_is_not_allocated(bundle: Path) -> None:
    rewrite(bundle, lambda content: [file.update(bytes=1 << 62) for file in content["files"]])
    with pytest.raises(CheckFailed, match="changed or damaged"):
        open_bundle(bundle).golden()


def link_to_file(bundle: Path) -> None:
    (bundle / "extra").symlink_to(bundle / ONNX)


def link_to_folder(bundle: Path) -> None:
    (bundle.parent / "empty").mkdir()
    (bundle / "extra").symlink_to(bundle.parent / "empty", target_is_directory=True)


def pipe(bundle: Path) -> None:
    os.mkfifo(bundle / "extra")


def file_below(bundle: Path) -> None:
    (bundle / "extra").mkdir()
    (bundle / "extra" / "file").touch()


def broken_link(bundle: Path) -> None:
    (bundle / "extra").symlink_to("nowhere")


@pytest.mark.parametrize(
    "add", [link_to_file, link_to_folder, pipe, file_below, broken_link], ids=lambda function: function.__name__
)
def test_nothing_may_lie_in_a_bundle_that_is_not_listed(bundle: Path, add: Callable[[Path], None]) -> None:
    add(bundle)
    with pytest.raises(CheckFailed, match=r"extra.*not listed"):
        open_bundle(bundle).check_all()


@pytest.mark.parametrize("name", [ONNX, GOLDEN, "reports/parity.json"])
def test_listed_files_are_no_links_not_even_to_the_right_content(bundle: Path, name: str, tmp_path: Path) -> None:
    shutil.move(bundle / name, tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckFailed, match="is a link"):
        open_bundle(bundle).check_all()


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE])
def test_manifest_and_signature_are_files(bundle: Path, name: str, tmp_path: Path) -> None:
    content = (bundle / MANIFEST).read_bytes()
    for make in (lambda path: path.symlink_to(tmp_path / "elsewhere"), os.mkfifo, Path.mkdir):
        (tmp_path / "elsewhere").write_bytes(content)
        (bundle / name).unlink(missing_ok=True)
        make(bundle / name)
        with pytest.raises((UsageError, CheckFailed), match="no file"):
            open_bundle(bundle)
        (bundle / name).rmdir() if (bundle / name).is_dir() else (bundle / name).unlink()


def test_a_runtime_finds_no_file_that_was_not_checked(bundle: Path) -> None:
    """OpenVINO reads the .bin beside the .xml, whoever put it there."""

    def forget(content: dict[str, Any]) -> None:
        (artifact,) = (artifact for artifact in content["artifacts"] if artifact["format"] == "openvino")
        artifact["files"] = [file for file in artifact["files"] if file["path"].endswith(".xml")]

    rewrite(bundle, forget)
    with pytest.raises(CheckFailed, match=r"model\.bin is not listed"), dmformer.load(bundle, runtime="openvino"):
        pass


# --- weights of ONNX files outside the file ---------------------------------------------------------------------------


def with_external(bundle: Path, location: str, inside: str = "initializer") -> None:
    """An ONNX file whose first tensor names another file, under a hash that fits."""
    import onnx

    path = bundle / ONNX
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    if inside == "attribute":
        graph = onnx.helper.make_graph([], "inner", [], [])
        graph.initializer.append(tensor)
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", graph))
        tensor = model.graph.node[0].attribute[-1].g.initializer[0]
    if inside == "constant":
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))
        tensor = model.graph.node[-1].attribute[0].t
    if inside == "function":
        node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
        model.functions.append(onnx.helper.make_function("d", "f", [], ["c"], [node], []))
        tensor = model.functions[0].node[0].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    adopt(bundle, ONNX)


@pytest.mark.parametrize("inside", ["initializer", "attribute", "constant", "function"])
def test_weights_elsewhere_are_found_wherever_the_tensor_is(bundle: Path, inside: str) -> None:
    with_external(bundle, "weights.bin", inside)
    assert external_files(OpenFile(bundle / ONNX)) == {"weights.bin"}


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../../golden.npz", "weights.bin", "", "*/_ORT_MEM_ADDR_/*", "model.onnx", "../fp32/model.onnx"],
)
def test_weights_in_a_file_that_was_not_checked_are_refused(bundle: Path, location: str) -> None:
    with_external(bundle, location)
    with pytest.raises(CheckFailed, match="keeps weights in"), dmformer.load(bundle, runtime="ort"):
        pass
    assert not check_integrity(bundle).passed


def test_weights_in_a_file_of_the_artifact_are_checked_like_it(bundle: Path) -> None:
    import onnx

    path, beside = bundle / ONNX, bundle / "onnx/fp32/weights.bin"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)

    def list_it(content: dict[str, Any]) -> None:
        (artifact,) = (artifact for artifact in content["artifacts"] if artifact["format"] == "onnx")
        artifact["files"].append({"path": "onnx/fp32/weights.bin", "bytes": 0, "sha256": "0" * 64})

    rewrite(bundle, list_it)
    adopt(bundle, ONNX)
    adopt(bundle, "onnx/fp32/weights.bin")
    with dmformer.load(bundle, runtime="ort") as predictor:
        assert predictor.predict([Path(dmformer.__file__).parent / "assets/digits/7.png"])[0].classes[0].name == "7"
    beside.write_bytes(beside.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckFailed, match=r"weights\.bin: SHA-256"), dmformer.load(bundle, runtime="ort"):
        pass


def test_the_fields_are_those_of_the_specification() -> None:
    """Every way from a model to a tensor's external_data, out of the onnx package's own description."""
    import onnx

    found: dict[str, dict[int, str]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.name in found:
            continue
        found[message.name] = {}
        for field in message.fields:
            if field.message_type is not None:
                found[message.name][field.number] = field.message_type.name
                waiting.append(field.message_type)
    leads = {"TensorProto"}
    while more := {name for name, fields in found.items() if leads & set(fields.values())} - leads:
        leads |= more
    expected = {
        name: {number: kind for number, kind in fields.items() if kind in leads}
        for name, fields in found.items()
        if name in leads - {"TensorProto"}
    }
    (external,) = (field for field in onnx.TensorProto.DESCRIPTOR.fields if field.name == "external_data")
    assert {**expected, "TensorProto": {external.number: external.message_type.name}} == FIELDS


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00", b"hello world", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05a", b"\xff" * 20, b"\x3b", b"\x08",
        b"\x3a" + struct.pack("<Q", 1 << 63), b"\x0d\0", b"\xba\x80\x80\x80\x80\x01\0", b"\x3a\x02\x08\x80",
    ],
    ids=lambda data: data.hex()[:16],
)  # fmt: skip
def test_what_is_no_onnx_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(UsageError) as caught:
        external_files(OpenFile(tmp_path / "m.onnx"))
    assert "ONNX file" in one_line(caught.value)


def nested(depth: int) -> bytes:
    """Graphs in attributes of nodes of graphs ..."""
    data = b""
    for tag in [0x32, 0x2A, 0x0A] * depth:  # AttributeProto.g, NodeProto.attribute, GraphProto.node
        length = len(data)
        size = b""
        while True:
            size += bytes([length & 0x7F | (0x80 if length > 0x7F else 0)])
            length >>= 7
            if not length:
                break
        data = bytes([tag]) + size + data
    return data


def test_nesting_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for depth, fits in ((10, True), (60, False)):
        inner = nested(depth)
        path.write_bytes(b"\x3a" + bytes([len(inner) & 0x7F | 0x80, len(inner) >> 7]) + inner)
        if fits:
            assert external_files(OpenFile(path)) == set()
        else:
            with pytest.raises(UsageError, match="in one another"):
                external_files(OpenFile(path))


def test_a_golden_file_that_expands_without_end(bundle: Path) -> None:
    import numpy as np

    np.savez_compressed(bundle / GOLDEN, images=np.zeros((1, 6000, 6000, 3), np.uint8))
    adopt(bundle, GOLDEN)
    with pytest.raises(UsageError, match="expand to 108"):
        open_bundle(bundle).golden()


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_says_what_it_proves_and_what_not(inline: Callable[..., Run], bundle: Path) -> None:
    run = inline("check", bundle, "--json", "-")
    assert run.code == 0, run.err
    document = json.loads(run.out)
    schema = Path(dmformer.__file__).parent / "schemas" / "check.json"
    Draft202012Validator(json.loads(schema.read_text())).validate(document)
    assert document["passed"]
    assert document["manifest_sha256"] == open_bundle(bundle).manifest_sha256
    assert document["signature"]["status"] == "none"
    assert "Not who wrote manifest.json, nor that manifest.json itself is unchanged" in document["proves"]


def test_check_names_every_file_that_is_wrong(inline: Callable[..., Run], bundle: Path) -> None:
    os.truncate(bundle / ONNX, 1000)
    (bundle / "reports/parity.json").unlink()
    (bundle / "stray").touch()
    run = inline("check", bundle, "--json", "-")
    assert run.code == 1
    assert "reports/parity.json" in run.error_line
    document = json.loads(run.out)
    failed = {file["path"]: file["reason"] for file in document["files"] if not file["passed"]}
    assert set(failed) == {ONNX, "reports/parity.json", "stray"}
    assert document["proves"].startswith("nothing: 3 of")


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("{}")], ids=["none", "no manifest"])
def test_check_of_no_bundle_is_2(inline: Callable[..., Run], bundle: Path, spoil: Callable[[Path], None]) -> None:
    spoil(bundle / MANIFEST)
    run = inline("check", bundle)
    assert run.code == 2
    assert MANIFEST in run.error_line
