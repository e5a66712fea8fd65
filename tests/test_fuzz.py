"""Whatever bytes come, a parser answers or refuses in one line of ours; it neither crashes nor raises anything else.

Each target runs briefly here, and for longer where ``FUZZ_SECONDS`` says how long one may take:
``FUZZ_SECONDS=120 python -m pytest tests/test_fuzz.py``. What once broke a parser stays as an example.
"""

from __future__ import annotations

import functools
import io
import json
import os
import time
import zipfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from dmformer.bundle import trust
from dmformer.bundle.archive import extract
from dmformer.bundle.golden import parse_golden
from dmformer.bundle.manifest import decode_manifest
from dmformer.bundle.settings import Settings, SettingsFile, read_settings
from dmformer.cache import Cache, CacheEntry
from dmformer.errors import DMFormerError
from dmformer.files import OpenFile, indented_json
from dmformer.runtimes.registry import inspect_artifact
from dmformer.signoff.api import SignOff
from dmformer.signoff.sources import Source, bundle_source, read_report
from dmformer.verify.localize.case import Case, read_case
from tests.paper_bundle import device_accuracy, parity, timings, write_bundle
from tests.test_bench_figures import row

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
FUZZ = settings(
    max_examples=500 if SECONDS else 40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def repeated(test: Callable[..., None]) -> Callable[..., None]:
    """Run a target once, or again and again, each time with other examples, for as long as ``FUZZ_SECONDS`` says."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        ends = time.monotonic() + SECONDS
        test(*arguments, **fixtures)
        while time.monotonic() < ends:
            test(*arguments, **fixtures)

    return run


def refuses(parse: Callable[[], object]) -> None:
    """Run a parser that may refuse, by an error of ours."""
    with suppress(DMFormerError):
        parse()


def seed_manifest() -> dict[str, Any]:
    file = {"path": "onnx/fp32/model.onnx", "bytes": 1, "sha256": "0" * 64}
    tensor = {"name": "image", "dtype": "float32", "shape": ["batch", 3, 32, 32]}
    return {
        "schema_version": 1,
        "tool_version": "1",
        "model": {
            "arch": "x", "config": {}, "task": "classification", "classes": [], "parameters": 1, "macs": 1,
            "weights": "random",
        },
        "preprocessing": {"image_size": 32},
        "inputs": [tensor],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}],
        "simplification": {"kept": True, "reason": "", "nodes_before": 1},
        "artifacts": [{"format": "onnx", "precision": "fp32", "files": [file], "built_with": {}}],
        "files": [],
        "evidence": {"parity": {"passed": True, "checks": 1, "failed": 0, "report": ""}},
    }  # fmt: skip


@st.composite
def mutated(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Change, remove or insert a few bytes, or cut the end off."""
    spoilt = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(spoilt) - 1)))
        spoilt[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(spoilt[: draw(st.integers(0, len(spoilt)))] if draw(st.booleans()) else spoilt)


@st.composite
def altered(draw: Callable[[Any], Any], content: Any) -> bytes:
    """JSON in which a few values, at any depth, are others."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        at: Any = content
        while isinstance(at, (dict, list)) and at:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else list(range(len(at)))))
            if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.integers(0, 3)) == 0:
                at[key] = draw(JSON)
                break
            at = at[key]
    return json.dumps(content).encode()


def test_the_seed_is_a_manifest() -> None:
    decode_manifest(json.dumps(seed_manifest()).encode(), "seed")


@repeated
@FUZZ
@given(altered(seed_manifest()) | mutated(json.dumps(seed_manifest()).encode()) | st.binary(max_size=64))
@example(b'{"schema_version": 1, "a": ' + b"[" * 5000)
@example(b'{"schema_version": ' + b"9" * 5000 + b"}")
@example(b"\xff")
@example(json.dumps(seed_manifest()).encode().replace(b"{", b'{"schema_version": 1, ', 1))
def test_manifest(data: bytes) -> None:
    refuses(lambda: decode_manifest(data, "manifest.json"))


def test_a_key_that_is_there_twice() -> None:
    data = json.dumps(seed_manifest()).encode().replace(b'"arch"', b'"arch": "y", "arch"')
    with pytest.raises(DMFormerError, match="'arch' is there twice"):
        decode_manifest(data, "manifest.json")


def seed_archive() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("manifest.json", json.dumps(seed_manifest()))
        archive.writestr("onnx/fp32/model.onnx", b"\0")
    return target.getvalue()


@repeated
@FUZZ
@given(mutated(seed_archive()) | st.binary(max_size=64))
@example(b"PK\x05\x06" + b"\0" * 18)
def test_archive(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "archive"
    folder.mkdir(exist_ok=True)
    (folder / "b.dmf").write_bytes(data)
    try:
        refuses(lambda: extract(folder / "b.dmf", folder))
    finally:
        for path in ("manifest.json", "onnx/fp32/model.onnx"):
            (folder / path).unlink(missing_ok=True)


def npz(**arrays: Any) -> bytes:
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


CASE_JSON = json.loads(
    msgspec.json.encode(Case(runtime="ort", precision="fp32", files=(), node="n", limits={"y": 1.0}))
)
CASE_JSON["files"] = [{"path": "m.onnx", "bytes": 1, "sha256": "0" * 64}]
CASE_NPZ = npz(**{"inputs/x": np.zeros((1, 2), np.float32), "expected/y": np.zeros((1, 2), np.float32)})


@repeated
@FUZZ
@given(
    altered(CASE_JSON) | mutated(json.dumps(CASE_JSON).encode()),
    st.just(CASE_NPZ) | mutated(CASE_NPZ) | st.binary(max_size=64),
)
@example(json.dumps(CASE_JSON).encode(), npz(**{"expected/y": np.array([None], dtype=object)}))
@example(b"[" * 5000, CASE_NPZ)
def test_case(tmp_path_factory: pytest.TempPathFactory, data: bytes, arrays: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "case.json").write_bytes(data)
    (folder / "case.npz").write_bytes(arrays)
    refuses(lambda: read_case(folder))
    from pathlib import Path

    refuses(lambda: parse_golden(arrays, Path("golden.npz")))


@repeated
@FUZZ
@given(
    st.dictionaries(st.sampled_from(["path", "sha256", "dtype", "shape", "data", "x"]), JSON | st.binary(max_size=16)),
    st.binary(max_size=64) | st.none(),
)
@example({"path": "/etc/passwd", "sha256": "0" * 64}, None)
@example({"path": "../x", "sha256": "0" * 64}, None)
@example({"path": "x"}, None)
@example({"dtype": "O", "shape": [1], "data": b"\1" * 8}, None)
@example({}, b"x")
def test_cache_entry(tmp_path_factory: pytest.TempPathFactory, stored: dict[str, Any], raw: bytes | None) -> None:
    import hashlib
    from pathlib import Path

    root = tmp_path_factory.getbasetemp() / "fuzz-cache"
    (root / "objects").mkdir(parents=True, exist_ok=True)
    (root / "entries").mkdir(exist_ok=True)
    try:
        value = raw if raw is not None else msgspec.msgpack.encode([stored])
    except OverflowError:
        assume(False)  # MessagePack has no such integers
    sha256 = hashlib.sha256(value).hexdigest()
    (root / "objects" / sha256).write_bytes(value)
    entry = msgspec.json.encode(CacheEntry(what="w", made="", value=sha256, objects={}))
    content = raw or hashlib.sha256(entry).hexdigest().encode() + b"\n" + entry
    (root / "entries/k").write_bytes(content)
    for kind in (list[Path], list[np.ndarray]):
        out = root / "out"
        out.mkdir(exist_ok=True)
        assert Cache(root).find("k", kind, out) is None or kind is not list[Path]
        (root / "entries/k").write_bytes(content)


def safetensors(header: bytes, data: bytes = b"\0" * 8) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


HEADER = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"dmformer": "{}"}}


@repeated
@FUZZ
@given(altered(HEADER).map(safetensors) | mutated(safetensors(json.dumps(HEADER).encode())))
@example(safetensors(json.dumps({"w": {"dtype": "I4", "shape": [2], "data_offsets": [0, 8]}}).encode()))
@example(safetensors(b'{"__metadata__": 1}'))
@example(safetensors(b"[" * 5000))
@example(b"\xff" * 8 + b"{}")
def test_safetensors(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "w.safetensors"
    path.write_bytes(data)
    refuses(lambda: inspect_artifact("torch", [OpenFile(path)]))
    try:
        from dmformer.models.checkpoint import load_checkpoint
    except ImportError:  # where there is no PyTorch
        return
    refuses(lambda: load_checkpoint(path))


# ModelProto{graph{initializer{external_data{location: w.bin}}, node{op_type: EPContext}}}
ONNX = bytes.fromhex("3a1a2a116a0f0a086c6f636174696f6e1203772e620a05220341" + "6464")


@repeated
@FUZZ
@given(mutated(ONNX) | st.binary(max_size=64))
@example(b"")
@example(b"\0\0\0\0ORTM")
@example(ONNX)
def test_onnx(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "m.onnx"
    path.write_bytes(data)
    for name in ("onnx", "openvino"):
        refuses(lambda name=name: inspect_artifact(name, [OpenFile(path)]))  # type: ignore[misc]


SIGNATURE = trust.Signature(
    algorithm="ed25519",
    manifest_sha256="0" * 64,
    fingerprint="0" * 64,
    public_key="A" * 60,
    signature="A" * 88,
).encode()


@repeated
@FUZZ
@given(mutated(SIGNATURE) | st.binary(max_size=64))
@example(SIGNATURE)
def test_signature(data: bytes) -> None:
    refuses(lambda: trust.read_signature(data, b"", "manifest.sig"))


SETTINGS = indented_json(
    SettingsFile(
        manifest_sha256="0" * 64,
        machines={"x": Settings(runtime="ort", precision="fp32", threads=1, p50_ms=1.0, measured_at="")},
    )
)


@repeated
@FUZZ
@given(mutated(SETTINGS) | JSON.map(lambda content: json.dumps(content).encode()) | st.binary(max_size=64))
@example(SETTINGS)
@example(b"[" * 5000)
def test_settings(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "b.settings.json"
    path.write_bytes(data)
    refuses(lambda: read_settings(path))


REPORT = b'{"passed": true, "checks": [], "skipped": ["x"], "environment": {"cpu": "x"}, "results": [], "data": "x"}'


@repeated
@FUZZ
@given(mutated(REPORT) | JSON.map(lambda content: json.dumps(content).encode()) | st.binary(max_size=64))
@example(b"")
@example(b"[" * 5000)
@example(b'{"results": [], "environment": {"cpu": 7}}')
def test_added_report(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "report.json"
    path.write_bytes(data)
    refuses(lambda: read_report(path))


@pytest.fixture(scope="module")
def signed_off(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return bundle_source(write_bundle(tmp_path_factory.mktemp("fuzz") / "bundle"), "this bundle")


_TIMED = msgspec.to_builtins(timings((), "x"))
_TIMED["results"] = [msgspec.to_builtins(row(3)) | {"samples_ns": [[3_000_000, 4_000_000]], "samples": 2}]


def strange_timing(**changed: Any) -> bytes:
    return json.dumps(_TIMED | {"results": [_TIMED["results"][0] | changed]}).encode()


@repeated
@FUZZ
@given(altered(_TIMED) | altered(msgspec.to_builtins(device_accuracy(()))) | altered(msgspec.to_builtins(parity())))
@example(strange_timing(runtime="$\\frac{$"))
@example(strange_timing(mode="throughput", samples=0))
@example(strange_timing(attainable_ms=1e308))
@example(strange_timing(samples_ns=[[10**400]]))
def test_a_page_of_an_added_report(tmp_path_factory: pytest.TempPathFactory, signed_off: Source, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "added.json"
    path.write_bytes(data)
    with suppress(DMFormerError):
        known = SignOff((signed_off, read_report(path)), (), ())
        known.html()
        known.bom()
