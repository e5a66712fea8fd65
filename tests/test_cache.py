"""The cache: found by content, never used where damaged, and honest about when things were measured."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import dmformer
from dmformer import cache as caching
from dmformer.assets import DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from dmformer.bundle.reader import open_bundle
from dmformer.cache import Cache, digest, open_cache
from dmformer.errors import StageFailed, UsageError
from dmformer.export import cached
from dmformer.export.options import EngineOptions, ExportOptions
from dmformer.files import hash_file
from tests import networks
from tests.conftest import NoSimplifier
from tests.test_rooms import ENGINES, python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dmformer.export.cached import ExportResult
    from tests.conftest import Run


@dataclass(frozen=True)
class Value:
    """Something like a stage's result."""

    file: Path
    array: NDArray[np.float32]
    words: tuple[str, ...]


def value(root: Path, content: str = "content") -> Value:
    (root / "deep").mkdir(parents=True, exist_ok=True)
    (root / "deep/file").write_text(content)
    return Value(root / "deep/file", np.arange(6, dtype=np.float32).reshape(2, 3), ("a", content))


def refuse() -> Any:
    pytest.fail("the work was done again")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def objects(cache: Cache) -> list[Path]:
    return sorted((cache.folder / "objects").iterdir())


def entries(cache: Cache) -> list[Path]:
    return sorted((cache.folder / "entries").iterdir())


# --- values -----------------------------------------------------------------------------------------------------------


def test_work_is_done_once(cache: Cache, tmp_path: Path) -> None:
    made = cache.get_or_make("work", {"n": 1}, Value, lambda: value(tmp_path / "first"), tmp_path / "first")
    assert not cache.taken
    again = cache.get_or_make("work", {"n": 1}, Value, refuse, tmp_path / "second")
    assert again.file == tmp_path / "second/deep/file"
    assert again.file.read_text() == made.file.read_text()
    assert again.array.dtype == np.float32
    np.testing.assert_array_equal(again.array, made.array)
    assert again.words == made.words
    assert [taken.what for taken in cache.taken] == ["work"]
    assert again.array.flags.writeable


@pytest.mark.parametrize("other", [("work", {"n": 2}), ("other", {"n": 1}), ("work", {"n": 1, "m": None})])
def test_other_work_is_not_the_same(cache: Cache, tmp_path: Path, other: tuple[str, Any]) -> None:
    cache.get_or_make("work", {"n": 1}, Value, lambda: value(tmp_path / "a"), tmp_path / "a")
    made = cache.get_or_make(*other, Value, lambda: value(tmp_path / "b", "other"), tmp_path / "b")
    assert made.words == ("a", "other")
    assert not cache.taken


def test_files_and_arrays_count_by_content(tmp_path: Path) -> None:
    import torch

    (tmp_path / "one").write_text("x")
    (tmp_path / "two").write_text("x")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    (tmp_path / "two").write_text("y")
    assert digest([tmp_path / "one"]) != digest([tmp_path / "two"])
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = [base, base.copy(order="F"), torch.from_numpy(base)]
    assert len({digest(array) for array in same}) == 1
    others = [base.reshape(3, 2), base.astype(np.int32), base.view(np.int32), base + np.float32(1e-7), base[::-1]]
    assert len({digest(array) for array in (base, *others)}) == 6
    with pytest.raises(TypeError, match="no content"):
        digest(lambda: None)


def test_what_is_not_sound_is_not_kept(cache: Cache, tmp_path: Path) -> None:
    for _ in range(2):
        cache.get_or_make("work", 1, Value, lambda: value(tmp_path), tmp_path, lambda _: False)
    with pytest.raises(StageFailed):
        cache.get_or_make("work", 1, Value, lambda: (_ for _ in ()).throw(StageFailed("broken")), tmp_path)
    assert not cache.taken
    assert not cache.folder.exists()


def test_what_was_made_while_its_input_changed_is_not_kept(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "input").write_text("before")

    def make() -> int:
        (tmp_path / "input").write_text("after")
        return 3

    cache.get_or_make("work", tmp_path / "input", int, make, tmp_path)
    assert not cache.folder.exists()
    cache.get_or_make("work", tmp_path / "input", int, make, tmp_path)
    assert cache.get_or_make("work", tmp_path / "input", int, refuse, tmp_path) == 3


def test_no_cache_works_always(tmp_path: Path) -> None:
    nothing, count = Cache(), []
    for _ in range(2):
        nothing.get_or_make("work", 1, int, lambda: count.append(1) or 3, tmp_path)
    assert len(count) == 2
    assert not nothing.taken


# --- what the key has -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fake"),
    [
        ("metadata.version", lambda package: "9.9" if package == "openvino" else "1"),
        ("describe_processor", lambda: "another processor"),
        ("usable_cores", lambda: 99),
        ("platform.python_version", lambda: "4.0"),
    ],
)
def test_versions_and_the_machine_are_in_the_key(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, name: str, fake: Callable[..., Any]
) -> None:
    monkeypatch.setattr("dmformer.cache.metadata.version", lambda _: "1")
    before = cache.key("work", 1)
    assert before == Cache(cache.folder).key("work", 1)
    monkeypatch.setattr(f"dmformer.cache.{name}", fake)
    assert Cache(cache.folder).key("work", 1) != before


@pytest.mark.parametrize(
    ("name", "value"),
    [("cpu_model", "another"), ("instructions", frozenset({"avx512_vnni"})), ("max_isa", "SSE41")],
)
def test_all_that_is_known_of_the_processor_is_in_the_key(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    before = cache.key("work", 1)
    monkeypatch.setattr(f"dmformer.machine.{name}", lambda: value)
    assert Cache(cache.folder).key("work", 1) != before


def test_every_file_of_the_package_is_in_the_key() -> None:
    found = dict(caching.surroundings()["package"])
    assert {"cache.py", "export/run.py", "verify/compare.py", "assets/digits/7.png"} <= set(found)
    assert not any(name.endswith(".pyc") for name in found)


FACTS: dict[str, Any] = {
    "arch": None,
    "formats": ["onnx"],
    "precisions": ["fp32"],
    "output": Path("b"),
    "image_size": None,
    "images": None,
    "calibration": None,
    "max_accuracy_drop": 0.5,
    "options": {},
    "seed": 0,
    "deploy_form": True,
    "force": False,
    "engine": EngineOptions(),
}


def key_of(cache: Cache, weights: Path | None, **others: Any) -> str:
    return cached.key_of(cache, ExportOptions(weights=weights, **others))


def test_every_argument_is_in_the_key_of_an_export(cache: Cache, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    shutil.copy(DEMONSTRATION_CHECKPOINT, weights)
    photos = Path(shutil.copytree(SAMPLE_IMAGES, tmp_path / "photos"))
    changes: dict[str, Any] = {
        "arch": "dmformer_t",
        "formats": ["openvino"],
        "precisions": ["fp16"],
        "image_size": 64,
        "images": photos,
        "calibration": photos,
        "max_accuracy_drop": 1.0,
        "options": {"gate_input": "x_prime"},
        "seed": 1,
        "deploy_form": False,
        "engine": EngineOptions(max_batch=4),
    }
    keys = {name: key_of(cache, weights, **FACTS | {name: new}) for name, new in changes.items()}
    keys[""] = key_of(cache, weights, **FACTS)
    keys["no weights"] = key_of(cache, None, **FACTS)
    assert all(keys.values())
    assert len(set(keys.values())) == len(changes) + 2
    for name in ("output", "force", "use_cache"):
        assert key_of(cache, weights, **FACTS | {name: "other"}) == keys[""]
    with weights.open("ab") as file:
        file.write(b"\0")
    assert key_of(cache, weights, **FACTS) != keys[""]
    (photos / "3.png").write_bytes((photos / "4.png").read_bytes())
    assert key_of(cache, weights, **FACTS | {"images": photos}) not in keys.values()


@pytest.mark.parametrize(
    ("weights", "changed"),
    [
        (Path("nowhere.pt"), {}),
        (None, {"images": "nowhere"}),
        (None, {"formats": ["trt"]}),
        (None, {"formats": ["all"]}),
        (None, {"formats": ["nothing"]}),
    ],
)
def test_what_cannot_be_known_has_no_key(cache: Cache, weights: Path | None, changed: dict[str, Any]) -> None:
    key = key_of(cache, weights, **FACTS | changed)
    assert not key
    assert cached.find(cache, key, Path("b")) is None


# --- damage, limits, and others at work -------------------------------------------------------------------------------


def spoilings() -> Iterator[tuple[str, Callable[[Path], object]]]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    yield "flipped", flip
    yield "truncated", lambda path: path.write_bytes(path.read_bytes()[:-1])
    yield "empty", lambda path: path.write_bytes(b"")
    yield "longer", lambda path: path.write_bytes(path.read_bytes() + b"\n")
    yield "gone", Path.unlink


@pytest.mark.parametrize("spoil", [pytest.param(spoil, id=name) for name, spoil in spoilings()])
@pytest.mark.parametrize("which", ["entry", "file", "value"])
def test_damage_is_found_and_mended(cache: Cache, tmp_path: Path, which: str, spoil: Callable[[Path], object]) -> None:
    made = cache.get_or_make("work", 1, Value, lambda: value(tmp_path / "a"), tmp_path / "a")
    file = cache.folder / "objects" / hash_file(made.file)[0]
    (other,) = (path for path in objects(cache) if path != file)
    spoil({"entry": entries(cache)[0], "file": file, "value": other}[which])
    assert cache.find(entries(cache)[0].name if entries(cache) else "-", Value, tmp_path / "b") is None
    assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    again = cache.get_or_make("work", 1, Value, lambda: value(tmp_path / "c"), tmp_path / "c")
    assert again.file.read_text() == "content"
    assert not cache.taken
    cache.get_or_make("work", 1, Value, refuse, tmp_path / "d")
    assert (tmp_path / "d/deep/file").read_text() == "content"


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 3500)
    for number in range(3):
        cache.get_or_make("work", number, bytes, lambda n=number: bytes([n]) * 1000, tmp_path)  # type: ignore[misc]
        os.utime(cache.folder / "entries" / cache.key("work", number), (number, number))
    cache.get_or_make("work", 0, bytes, refuse, tmp_path)  # used just now
    cache.get_or_make("work", 3, bytes, lambda: b"3" * 1000, tmp_path)
    assert [cache.holds(cache.key("work", number)) for number in range(4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in objects(cache)) == cache.report().bytes <= 3500
    assert len(objects(cache)) == 3
    cache.get_or_make("work", 4, bytes, lambda: b"4" * 4000, tmp_path)  # fits in no cache of this size
    assert not cache.holds(cache.key("work", 4))
    assert cache.holds(cache.key("work", 3))


def test_what_entries_share_is_there_once(cache: Cache, tmp_path: Path) -> None:
    for number in range(2):
        cache.get_or_make("work", number, Value, lambda: value(tmp_path), tmp_path)
    assert len(entries(cache)) == 2
    assert len(objects(cache)) == 2
    report = cache.report()
    assert report.bytes == report.entries[0].bytes == report.entries[1].bytes


@pytest.mark.slow
def test_many_at_once(tmp_path: Path) -> None:
    """Each with the cache opened anew, as processes do, in one that is too small for all and cleared now and then."""
    wrong: list[str] = []

    def work(worker: int) -> None:
        for round_ in range(12):
            number, root = (worker + round_) % 4, tmp_path / f"{worker}-{round_}"
            root.mkdir()
            cache = Cache(tmp_path / "cache", 2000)
            made = cache.get_or_make(
                "work", number, Value, lambda root=root, number=number: value(root, str(number) * 500), root
            )
            if made.file.read_text() != str(number) * 500 or cache.trouble:
                wrong.append(f"{made} {cache.trouble}")
            if worker == 0 and round_ % 4 == 3:
                cache.clear()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "cache")
    assert cache.get_or_make("work", 1, int, lambda: 3, tmp_path) == 3
    assert cache.trouble
    assert "file/cache" in cache.trouble


def test_on_a_full_disk_nothing_stays_of_what_was_not_kept(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left behind, it would keep the disk full: only an entry that was written removed it."""
    cache.get_or_make("earlier", 1, Value, lambda: value(tmp_path / "earlier"), tmp_path / "earlier")
    before = objects(cache)
    (cache.folder / "objects/new-of-a-process-that-was-killed").touch()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)  # the file has its place, what lists it has none
    cache.get_or_make("work", 1, Value, lambda: value(tmp_path / "root", "other"), tmp_path / "root")
    assert "No space left on device" in str(cache.trouble)
    assert objects(cache) == before


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert open_cache().folder is None  # the tests' own
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path))
    found = open_cache()
    assert isinstance(found, Cache)
    assert (found.folder, found.limit_bytes) == (tmp_path, 4 << 30)
    monkeypatch.delenv("DMFORMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DMFORMER_CACHE_LIMIT_MB", "7")
    found = open_cache()
    assert isinstance(found, Cache)
    assert tmp_path / "home" in found.folder.parents or os.name != "posix"
    assert found.limit_bytes == 7 << 20
    monkeypatch.setenv("DMFORMER_CACHE_LIMIT_MB", "plenty")
    with pytest.raises(UsageError, match="'plenty'; expected a whole number"):
        open_cache()


# --- exports ----------------------------------------------------------------------------------------------------------


TINY: dict[str, Any] = {"arch": "dmformer_nano", "options": {**networks.TINY}, "image_size": 32}


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("dmformer.export.graph"), "Simplifier", NoSimplifier)
        patch.setenv("DMFORMER_CACHE", str(folder / "cache"))
        dmformer.export(output=folder / "first", **TINY)
    return folder


@pytest.fixture
def filled(filled_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Path:
    """The folder of a cache in which one export was kept, whose bundle is beside it."""
    shutil.copytree(filled_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_export(*_: object) -> None:
    pytest.fail("a stage was run")


def test_the_same_export_needs_no_pytorch(filled: Path, tmp_path: Path) -> None:
    code = "import dmformer, json; r = dmformer.export(output=sys.argv[1], **json.loads(sys.argv[2]));"
    said = python(f"{code} print(len(r.parity.checks))", tmp_path / "second", json.dumps(TINY), blocked=ENGINES)
    first, second = open_bundle(tmp_path / "first"), open_bundle(tmp_path / "second")
    assert int(said) == first.manifest.evidence.parity.checks
    second.check_all()
    assert first.manifest.evidence.cached == ()
    (cached,) = second.manifest.evidence.cached
    assert cached.what == "dmformer_nano: the whole export"
    evidence = msgspec.structs.replace(second.manifest.evidence, cached=())
    assert msgspec.structs.replace(second.manifest, evidence=evidence) == first.manifest
    assert dmformer.verify(tmp_path / "second").passed


def test_without_the_cache_everything_is_made(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(_: object) -> None:
        raise StageFailed("ran")

    monkeypatch.setattr(import_module("dmformer.export.graph"), "verified_graph", ran)
    with pytest.raises(StageFailed, match="ran"):
        dmformer.export(output=tmp_path / "second", use_cache=False, **TINY)
    dmformer.export(output=tmp_path / "second", **TINY)


def test_a_bundle_whose_checkpoint_changed_meanwhile_is_not_kept(exported: ExportResult, tmp_path: Path) -> None:
    cache, weights = Cache(tmp_path / "cache"), tmp_path / "w.safetensors"
    weights.write_bytes(b"before")
    options = ExportOptions(weights=weights, **FACTS)
    key = cached.key_of(cache, options)
    weights.write_bytes(b"after")
    cached.keep(cache, key, options, exported.output, exported)
    assert not cache.folder.exists()
    cached.keep(cache, cached.key_of(cache, options), options, exported.output, exported)
    assert len(entries(cache)) == 1


def test_one_format_more_takes_what_is_there(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("dmformer.export.graph"), "verified_graph", no_export)
    result = dmformer.export(output=tmp_path / "second", formats=["onnx", "openvino"], **TINY)
    assert [cached.what for cached in result.manifest.evidence.cached] == [
        "dmformer_nano: trace to ONNX, simplify, verify",
        "dmformer_nano: convert to onnx fp32",
        "dmformer_nano: verify onnx fp32",
    ]
    assert dmformer.verify(tmp_path / "second").passed
    assert [artifact.format for artifact in result.manifest.artifacts] == ["onnx", "openvino"]


def test_an_interrupted_export_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "cache"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(import_module("dmformer.export.steps"), "verify_artifact", interrupt)
        dmformer.export(output=tmp_path / "b", **TINY)
    monkeypatch.setattr(import_module("dmformer.export.graph"), "verified_graph", no_export)
    monkeypatch.setattr(import_module("dmformer.export.steps"), "convert_artifact", no_export)
    result = dmformer.export(output=tmp_path / "b", **TINY)
    assert result.parity.passed
    assert {check.stage for check in result.parity.checks} >= {"traced", "layers", "runtime", "rows"}


def test_a_failed_check_is_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    from dmformer.verify.compare import Comparison

    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(import_module("dmformer.verify.parity"), "compare", lambda *_: Comparison(False, reason="seeded"))
        assert not dmformer.export(output=tmp_path / "b", force=True, **TINY).parity.passed
    assert {entry.what for entry in Cache(tmp_path / "cache").report().entries} == {
        "dmformer_nano: convert to onnx fp32"  # it has no checks
    }
    assert dmformer.export(output=tmp_path / "b", **TINY).parity.passed


@pytest.mark.slow
def test_a_damaged_bundle_is_made_anew(filled: Path, tmp_path: Path) -> None:
    onnx = hash_file(tmp_path / "first/onnx/fp32/model.onnx")[0]
    (filled / "objects" / onnx).write_bytes(b"something else")
    result = dmformer.export(output=tmp_path / "second", **TINY)
    open_bundle(tmp_path / "second").check_all()
    assert hash_file(tmp_path / "second/onnx/fp32/model.onnx")[0] == onnx
    assert "dmformer_nano: the whole export" not in {cached.what for cached in result.manifest.evidence.cached}


def test_a_bundle_that_contradicts_its_manifest_is_made_anew(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(self: Cache, key: str, kind: type[Any], root: Path) -> Any:
        found = whole(self, key, kind, root)
        (root / "onnx/fp32/model.onnx").write_bytes(b"something else")
        monkeypatch.setattr(Cache, "find", whole)
        return found

    whole = Cache.find
    monkeypatch.setattr(Cache, "find", find)
    result = dmformer.export(output=tmp_path / "second", **TINY)
    open_bundle(tmp_path / "second").check_all()
    assert "dmformer_nano: the whole export" not in {cached.what for cached in result.manifest.evidence.cached}


@pytest.mark.slow
def test_every_precision_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "cache"))
    loose_images = Path(shutil.copytree(SAMPLE_IMAGES, tmp_path / "photos"))
    asked: dict[str, Any] = {"precisions": ["fp16"], "calibration": loose_images, "max_accuracy_drop": 100, **TINY}
    first = dmformer.export(output=tmp_path / "first", **asked)
    for module, name in (
        ("export.graph", "verified_graph"),
        ("export.precisions", "make"),
        ("export.precisions", "verify_reduced"),
        ("export.steps", "convert_artifact"),
        ("export.steps", "verify_artifact"),
        ("export.steps", "time_artifacts"),
        ("verify.reference", "torch_answers"),
    ):
        monkeypatch.setattr(import_module(f"dmformer.{module}"), name, no_export)
    monkeypatch.setattr(cached, "find", lambda *_: None)
    second = dmformer.export(output=tmp_path / "second", **asked)
    assert second.parity == first.parity
    evidence = msgspec.structs.replace(second.manifest.evidence, cached=())
    assert msgspec.structs.replace(second.manifest, evidence=evidence) == first.manifest
    assert len(second.manifest.evidence.cached) == 9


def test_the_commands(filled: Path, tmp_path: Path, inline: Callable[..., Run]) -> None:
    from tests.test_cli import valid

    options = [f"--model-option={name}={json.dumps(value)}" for name, value in networks.TINY.items()]
    asked = ("export", "--arch", "dmformer_nano", "--image-size", 32, *options)
    assert "from the cache" in inline(*asked, "--format", "onnx").err  # by stages: the arguments differ in form
    again = inline(*asked)
    assert again.code == 0, again.err
    assert "dmformer_nano gets random weights" in again.err
    assert "the whole export, measured 20" in again.err
    assert "from the cache" not in inline(*asked, "--dry-run").err
    assert "from the cache" not in inline(*asked, "--no-cache").err
    inline(*asked)
    assert "measured 20" in " ".join(inline("inspect").out.split())
    listed = valid(inline("cache", "--json").out, "cache")
    assert listed["entries"][0]["what"].endswith(": the whole export")
    assert listed["folder"] == str(tmp_path / "cache")
    assert listed["entries"][0]["what"] in inline("cache").out
    assert json.loads(inline("cache", "clear", "--json").out)["entries"] == []
    assert not list((tmp_path / "cache").glob("objects/*"))
    assert inline("cache", "burn").code == 2
    assert "DMFORMER_CACHE is empty" in inline("cache", DMFORMER_CACHE="").error_line
