"""Checkpoints as training scripts leave them: which weights are taken, what is said about it, and what is refused."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import enum
import gzip
import io
import json
import pathlib
import pickle
import warnings
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch.optim.swa_utils import AveragedModel

from dmformer.models import state_dict
from dmformer.models.checkpoint import load_checkpoint
from dmformer.models.checkpoint_file import checkpoint_files, read_weights
from dmformer.models.dmformer import DMFormer
from dmformer.train.journal import save_snapshot
from tests.test_checkpoint import CONFIG, Payload, make_state, pickled, refusal, same, stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GOOD = make_state()
RAW = {name: value + 1 for name, value in GOOD.items()}
COUNTED = make_state(counters=True)


def network() -> DMFormer:
    made = DMFormer(CONFIG)
    made.load_state_dict(GOOD, strict=False)
    return made


def prefixed(prefix: str, state: dict[str, torch.Tensor] = GOOD) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def without_statistics(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if ".running_" not in name}


class Settings(dict[str, Any]):
    """Like OmegaConf's, mmengine's and Lightning's: a dictionary of a class of its own."""


class Phase(enum.Enum):
    TRAINING = 1


class Trainer:
    """An object that has the weights among its attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


BESIDE = {
    "args": argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath("/runs")),
    "hyper_parameters": Settings(model=Settings(depth=3), phase=Phase.TRAINING, when=dt.date(2026, 1, 1)),
    "best": np.float64(0.5),
    "epoch": 3,
    "callbacks": [Trainer(log=collections.defaultdict(list, loss=[1.0]))],
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}],
    "optimizer": {"state": prefixed("", {name: value * 0 for name, value in GOOD.items()})},
}


# --- Wherever the weights are -----------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[], Any]] = {
    "Lightning": lambda: {"state_dict": prefixed("model."), **BESIDE},
    "Lightning, compiled": lambda: {"state_dict": prefixed("model._orig_mod."), **BESIDE},
    "a block compiled": lambda: {name.replace("blocks.0.", "blocks.0._orig_mod."): v for name, v in GOOD.items()},
    "timm": lambda: {"state_dict": GOOD, "args": argparse.Namespace(lr=1)},
    "words": lambda: {"model_state": {"network": {"weights": prefixed("net.backbone.encoder.")}}},
    "a word of nobody's": lambda: {"my_best_student": GOOD},
    "position": lambda: (GOOD, {"lr": 1}),
    "ordered": lambda: {"net": OrderedDict(GOOD)},
    "attributes": lambda: {"trainer": Trainer(model=Trainer(params=GOOD))},
    "whole": network,
    "whole, parallel": lambda: torch.nn.DataParallel(network()),
    "whole, wrapped": lambda: {"model": network(), "epoch": 3},
    "arrays": lambda: {name: value.numpy() for name, value in GOOD.items()},
    "the same twice": lambda: {"model": network(), "state_dict": GOOD},
    "thop": lambda: GOOD | {f"{name}.total_ops": torch.zeros(1, dtype=torch.float64) for name in ("norm", "stages.0")},
    "criterion": lambda: {"state_dict": prefixed("model.") | {"criterion.weight": torch.ones(2)}},
    "state of a module": lambda: GOOD | {"head._extra_state": None},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_are_found(way: str, zipped: bool, tmp_path: Path) -> None:
    loaded = load_checkpoint(stored(tmp_path, pickled(WAYS[way](), zipped=zipped)))
    assert same(loaded.state, GOOD)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("way", ["arrays", "words", "whole"])
def test_plain_pickles_are_read(way: str, protocol: int, tmp_path: Path) -> None:
    assert same(load_checkpoint(stored(tmp_path, pickle.dumps(WAYS[way](), protocol))).state, GOOD)


@pytest.mark.parametrize("suffix", [".ckpt", ".pth.tar", ".bin", ".th", ".safetensors", ".pkl", ""])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_content_counts_and_not_the_name(form: str, suffix: str, tmp_path: Path) -> None:
    data = bytes(save(GOOD)) if form == "safetensors" else pickled(GOOD, zipped=form == "zip")
    assert same(load_checkpoint(stored(tmp_path, data, f"weights{suffix}")).state, GOOD)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    (note,) = [n for n in load_checkpoint(stored(tmp_path, WAYS["thop"]())).notes if "left out" in n]
    assert note == "left out, as no weights of the network: norm.total_ops, stages.0.total_ops"
    (note,) = [n for n in load_checkpoint(stored(tmp_path, WAYS["criterion"]())).notes if "left out" in n]
    assert note.endswith(": state_dict.criterion.weight")
    (note,) = [n for n in load_checkpoint(stored(tmp_path, WAYS["timm"]())).notes if "only tensors" in n]
    assert note.endswith(": argparse.Namespace")
    assert not [n for n in load_checkpoint(stored(tmp_path, COUNTED)).notes if "left out" in n or "only tensors" in n]


def test_shared_and_strided_tensors_are_read(tmp_path: Path) -> None:
    all_values = torch.cat([value.flatten() for value in GOOD.values()])
    shared, start = {}, 0
    for name, value in GOOD.items():
        shared[name] = all_values[start : start + value.numel()].view(value.shape)
        start += value.numel()
    shared["head.weight"] = GOOD["head.weight"].t().contiguous().t()
    assert same(load_checkpoint(stored(tmp_path, shared)).state, GOOD)


def test_own_names_may_look_like_wrappers(tmp_path: Path) -> None:
    """Networks of others have modules called module and model; the network's own names decide what is a prefix."""
    state = {"module.model.weight": torch.ones(2), "model.bias": torch.zeros(2)}
    for content in (state, {"state_dict": prefixed("model.", state)}, prefixed("module.", state)):
        assert same(read_weights(stored(tmp_path, content), state.__contains__).state, state)


def test_sums_not_computed_are_not_compared(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = pickled(GOOD)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load_checkpoint(stored(tmp_path, data)).state, GOOD)


# --- Averaged weights -------------------------------------------------------------------------------------------------

AVERAGED: dict[str, tuple[str, Callable[[], Any]]] = {
    "D-FINE": ("ema.module", lambda: {"model": RAW, "ema": {"module": GOOD, "updates": 3}}),
    "BasicSR": ("params_ema", lambda: {"params": RAW, "params_ema": GOOD}),
    "ema_state_dict": ("ema_state_dict", lambda: {"state_dict": RAW, "ema_state_dict": GOOD}),
    "swa": (
        "swa_model.module",
        lambda: {"model": RAW, "swa_model": prefixed("module.") | {"n_averaged": torch.ones(())}},
    ),
    "Ultralytics": ("ema", lambda: {"model": None, "ema": network(), "updates": 3}),
    "a pair": ("ema.0", lambda: {"model": prefixed("", RAW), "ema": (network(), 3)}),
    "prefix": ("state_dict.emaModel", lambda: {"state_dict": prefixed("model.", RAW) | prefixed("emaModel.")}),
    "lucidrains": ("ema_model", lambda: prefixed("online_model.", RAW) | prefixed("ema_model.")),
    "beside flat": ("ema_model", lambda: RAW | prefixed("ema_model.")),
    "averaged alone": ("module", lambda: AveragedModel(network()).state_dict()),
    "mmengine": (
        "state_dict",
        lambda: {"meta": {"mmengine_version": "0.10"}, "state_dict": GOOD, "ema_state_dict": prefixed("module.", RAW)},
    ),
    "Lightning": (
        "state_dict.model",
        lambda: {"state_dict": prefixed("model."), "current_model_state": prefixed("model.", RAW)},
    ),
    "parameters alone": (
        "ema.shadow",
        lambda: {"model": statistics_of_good(), "ema": {"shadow": without_statistics(GOOD)}},
    ),
}


def statistics_of_good() -> dict[str, torch.Tensor]:
    return {name: GOOD[name] if ".running_" in name else value for name, value in RAW.items()}


@pytest.mark.parametrize("tool", AVERAGED)
def test_averaged_weights_are_taken_and_said(tool: str, tmp_path: Path) -> None:
    key, make = AVERAGED[tool]
    loaded = load_checkpoint(stored(tmp_path, make()))
    assert same(loaded.state, GOOD)
    assert f"averaged weights were taken (key {key})" in loaded.notes
    assert ("the averaged weights have no BatchNorm statistics: those of model were taken" in loaded.notes) == (
        tool == "parameters alone"
    )


@pytest.mark.parametrize(
    ("make", "words", "key"),
    [
        (lambda: {"model": GOOD, "best": RAW}, "different weights under model, best", "model"),
        (lambda: {"student": RAW, "teacher": GOOD}, "different weights under student, teacher", "teacher"),
        (lambda: {"model": RAW, "ema": GOOD, "swa": RAW}, "different weights under ema, swa", "ema"),
        (lambda: GOOD | prefixed("teacher.", RAW), "different weights under ., teacher", "."),
        (
            lambda: {"model": GOOD, "ema": {"decay": 0.9, "shadow_params": list(RAW.values())}},
            "without the network's names (ema.shadow_params.0",
            "model",
        ),
        (
            lambda: {"state_dict": GOOD | {f"ema_{name.replace('.', '_')}": value for name, value in RAW.items()}},
            "without the network's names (state_dict.ema_stages_0_downsample",
            "state_dict",
        ),
        (
            lambda: prefixed("model.") | {f"model_ema.{name.replace('.', '')}": value for name, value in RAW.items()},
            "without the network's names (model_ema.stages0downsample",
            "model",
        ),
    ],
)
def test_nothing_is_guessed(make: Callable[[], Any], words: str, key: str, tmp_path: Path) -> None:
    path = stored(tmp_path, make())
    message = refusal(path)
    assert words in message
    assert "`weights_key`" in message
    assert same(load_checkpoint(path, weights_key=key).state, GOOD)


def test_key_is_taken(tmp_path: Path) -> None:
    path = stored(tmp_path, {"model": RAW, "ema": {"module": GOOD}})
    assert same(load_checkpoint(path, weights_key="model").state, RAW)
    assert same(load_checkpoint(path, weights_key="ema").state, GOOD)
    assert same(load_checkpoint(path, weights_key="ema.module").state, GOOD)
    assert "is 'mod'; expected where the file holds weights: model, ema.module" in refusal(path, weights_key="mod")


def test_scalars_of_averaging_are_no_averages(tmp_path: Path) -> None:
    content = {"model": GOOD, "ema": {"decay": torch.tensor(0.9), "steps": torch.tensor(3)}}
    assert same(load_checkpoint(stored(tmp_path, content)).state, GOOD)


def test_snapshot_of_this_project_is_read(tmp_path: Path) -> None:
    average = AveragedModel(network()).state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    for state, expected in (({"average": average}, GOOD), ({"average": None}, RAW)):
        save_snapshot(tmp_path / "last.pt", {"seed": 1}, {"model": RAW, **state, "optimizer": optimizer, "step": 3})
        assert same(load_checkpoint(tmp_path / "last.pt").state, expected)


# --- Shards -----------------------------------------------------------------------------------------------------------


def sharded(folder: Path, form: str, **changes: str) -> Path:
    names = sorted(GOOD)
    shards = {f"model-{i}.{form}": {name: GOOD[name] for name in names[i::2]} for i in range(2)}
    for file, state in shards.items():
        (folder / file).write_bytes(bytes(save(state)) if form == "safetensors" else pickled(state))
    weight_map = {name: file for file, state in shards.items() for name in state} | changes
    index = folder / f"model.{form}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_are_read(form: str, tmp_path: Path) -> None:
    index = sharded(tmp_path, form)
    loaded, of_folder = load_checkpoint(index), load_checkpoint(tmp_path)
    assert same(loaded.state, GOOD)
    assert same(of_folder.state, GOOD)
    assert loaded.sha256 == of_folder.sha256
    before, shard = checkpoint_files(tmp_path), tmp_path / f"model-1.{form}"
    assert before == (index, tmp_path / f"model-0.{form}", shard)
    shard.write_bytes(shard.read_bytes()[:-9])
    assert "model-1" in refusal(index)
    shard.unlink()
    assert "model-1" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "a/b.bin", "..", "", "..\\secret.bin", "c:x", "a\0b"])
def test_shards_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(pickled(GOOD))
    assert "expected files beside it" in refusal(sharded(folder, "bin", **{"head.bias": name}))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    index = sharded(tmp_path, "bin", **{"head.other": "model-0.bin"})
    assert "model-0.bin' has no tensor 'head.other'" in refusal(index)
    index.write_text('{"weight_map": 3}')
    assert "is no index of shards" in refusal(index)


def test_index_of_safetensors_comes_first(tmp_path: Path) -> None:
    sharded(tmp_path, "bin")
    index = sharded(tmp_path, "safetensors")
    assert checkpoint_files(tmp_path)[0] == index


# --- Nothing is run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("place", ["beside", "weight", "inside a rebuild", "shard", "nested"])
def test_code_is_never_run(place: str, form: str, tmp_path: Path) -> None:
    """Wherever in a file the pickle asks for it; beside the weights it is left out, and said."""
    payload = Payload(tmp_path / "ran")

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (payload, 0, (3,), (1,), False, payload)

    class Nested:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (pickle.dumps(payload, 2),)

    class View:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Nested(), 0, (3,), (1,), False, OrderedDict())

    content: Any = {
        "beside": {"model": GOOD, "args": payload},
        "weight": GOOD | {"head.bias": payload},
        "inside a rebuild": GOOD | {"head.bias": Rebuilt()},
        "shard": GOOD | {"head.bias": payload},
        "nested": GOOD | {"head.bias": View()},
    }[place]
    data = pickle.dumps(content, 2) if form == "plain" else pickled(content, zipped=form == "zip")
    path = stored(tmp_path, data, "model-0.bin")
    if place == "shard":
        path = tmp_path / "model.bin.index.json"
        path.write_text(json.dumps({"weight_map": dict.fromkeys(GOOD, "model-0.bin")}))
    if place == "beside":
        loaded = load_checkpoint(path)
        assert same(loaded.state, GOOD)
        assert any("posix.system" in note for note in loaded.notes)
    else:
        assert "head.bias" in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_the_exploit_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran"), 2))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (10**9,), (1,)),
        (-1, (3,), (1,)),
        (2, (3,), (1,)),
        (0, (3,), (-1,)),
        (0, (2**62, 2**62), (1, 1)),
        (0, "x", 1),
    ],
)
def test_tensors_stay_in_their_storage(offset: int, size: Any, stride: Any, tmp_path: Path) -> None:
    class Outside:
        def __reduce__(self) -> Any:
            storage = torch.zeros(3).untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, offset, size, stride, False, OrderedDict())

    assert "head.bias is no tensor" in refusal(stored(tmp_path, GOOD | {"head.bias": Outside()}))


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for name, data in files.items():
            written.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def test_small_files_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr("archive/data.pkl", b"\0" * 10**8)
    assert "is compressed" in refusal(stored(tmp_path, bomb.getvalue()))
    # The memo's number is 2**31: C's unpickler makes room for as many.
    assert refusal(stored(tmp_path, b"\x80\x02}r\xff\xff\xff\x7f."))
    monkeypatch.setattr(state_dict, "_MOST_MEMORY", 1_000_000)  # sooner than in earnest
    content: Any = {"x": 1}
    for _ in range(30):  # two entries in each, the same: a thousand million paths
        content = {"a": content, "b": content}
    assert "more than a state dict" in refusal(stored(tmp_path, {"t.t": torch.ones(1), "deep": content}))
    nested = b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
    assert "holds no weights" in refusal(stored(tmp_path, nested))


# --- What is something else -------------------------------------------------------------------------------------------


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


def onnx_model() -> bytes:
    from onnx import helper

    model = helper.make_model(helper.make_graph([], "graph", [], []), producer_name="pytorch")
    return bytes(model.SerializeToString())


KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "TorchScript": (torchscript, "is TorchScript, which is code; expected a state dict: torch.save(model.state_dict()"),
    "torch.export": (lambda: archive(m__archive_format=b"pt2"), "is a program of torch.export, which is a network by"),
    "ONNX": (onnx_model, "is an ONNX model; expected a state dict"),
    "Keras": (lambda: archive(**{"model.weights.h5": b"x"}), "is a Keras model"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"),
    "TensorFlow": (lambda: bytes(99) + bytes.fromhex("57fb808b247547db"), "is a part of a TensorFlow checkpoint"),
    "TensorFlow's list": (lambda: b'model_checkpoint_path: "x"', "is TensorFlow's list of checkpoints"),
    "LiteRT": (lambda: b"\x1c\0\0\0TFL3" + bytes(99), "is a LiteRT"),
    "NumPy archive": (npz, "is a NumPy archive"),
    "zip": (lambda: archive(**{"model.pth": b"x"}), "is a zip archive without weights: unpack it"),
    "gzip": (lambda: gzip.compress(b"x"), "is compressed: unpack it first"),
    "tar": (lambda: b"storages".ljust(257, b"\0") + b"ustar\0" + bytes(300), "is a tar archive: unpack it"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "pointer, not the weights"),
    "DVC": (lambda: b"outs:\n- md5: a\n", "dvc pull"),
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"Not found. Sorry!", "it begins with b'Not foun'"),
    "page": (lambda: b"<!DOCTYPE html>\n<html></html>\n", "is an HTML or XML page"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weights.pth", "weights"])
def test_other_kinds_are_named(kind: str, name: str, tmp_path: Path) -> None:
    make, words = KINDS[kind]
    assert words in refusal(stored(tmp_path, make(), name))


def test_what_to_do_about_a_pointer(tmp_path: Path) -> None:
    assert "git lfs pull" in refusal(stored(tmp_path, KINDS["Git LFS"][0](), "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("saved_model.pb", "a TensorFlow SavedModel"),
        (".metadata", "dcp_to_torch"),
        ("data.pkl", "an unpacked PyTorch file"),
        ("zero_to_fp32.py", "a DeepSpeed checkpoint"),
        ("model.safetensors", "in it: model.safetensors"),
    ],
)
def test_folders_are_named(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "a quantised tensor"),
        (lambda value: value.to(torch.complex64), "torch.complex64"),
        (lambda value: value.to(torch.int8), "torch.int8"),
        (lambda value: value.bool(), "torch.bool"),
        (lambda value: value.numpy().astype("O"), "an array of O"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_other_kinds_are_refused(change: Any, words: str, zipped: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated
        content = GOOD | {"head.weight": change(GOOD["head.weight"])}
    message = refusal(stored(tmp_path, pickled(content, zipped=zipped)))
    assert f"head.weight is {words}" in message
    assert "expected dense floats" in message
