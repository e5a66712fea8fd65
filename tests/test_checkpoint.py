"""Checkpoints: what is read, what is told from them, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError
from dmformer.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dmformer.models.config import DMFormerConfig
from dmformer.models.dmformer import DMFormer, create_model, list_models
from tests.tiers import first

State = dict[str, torch.Tensor]
CONFIG = DMFormerConfig(widths=(4, 8, 12, 16), depths=(1, 1, 2, 1), num_classes=3)
SMALL = Preprocessing(image_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
TRAINING = {"data": "noise", "held_out_top1": 0.5}


def make_state(config: DMFormerConfig = CONFIG, *, counters: bool = False) -> State:
    torch.manual_seed(0)
    state = DMFormer(config).state_dict()
    return {name: value for name, value in state.items() if counters or not name.endswith("num_batches_tracked")}


def made(config: DMFormerConfig = CONFIG) -> Checkpoint:
    return Checkpoint("custom", config, make_state(config), SMALL, ("a", "b", "c"), training=TRAINING)


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metadata(**changes: Any) -> dict[str, Any]:
    preprocessing = {"image_size": 32}
    return {"version": 1, "arch": "custom", "config": CONFIG.to_dict(), "preprocessing": preprocessing, **changes}


def safetensors_bytes(told: Any = None, state: State | None = None) -> bytes:
    text = told if isinstance(told, str) else json.dumps(told or metadata())
    return bytes(save(state or make_state(), metadata={"dmformer": text}))


def pickled(content: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as failure:
        load_checkpoint(path, **options)
    message = str(failure.value)
    assert len(message.splitlines()) == 1, message
    assert failure.value.exit_code == 2
    return message


def stored(tmp_path: Path, content: Any, name: str = "weights.pth") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else pickled(content))
    return path


# --- What is read -----------------------------------------------------------------------------------------------------


def test_saved_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_checkpoint(path, made())
    loaded = load_checkpoint(path)
    assert same(loaded.state, made().state)
    assert (loaded.arch, loaded.config, loaded.preprocessing) == ("custom", CONFIG, SMALL)
    assert (loaded.classes, loaded.training, loaded.notes) == (("a", "b", "c"), TRAINING, ())
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_checkpoint(path, image_size=64).preprocessing == SMALL.with_fields({"image_size": 64})
    assert not loaded.model().training


def test_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    backwards = replace(made(), state=dict(reversed(made().state.items())))
    save_checkpoint(tmp_path / "a.safetensors", made())
    save_checkpoint(tmp_path / "b.safetensors", backwards)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_pickles_are_read(suffix: str, zipped: bool, tmp_path: Path) -> None:
    loaded = load_checkpoint(stored(tmp_path, pickled(make_state(counters=True), zipped=zipped), f"w{suffix}"))
    assert same(loaded.state, make_state())
    assert loaded.config == CONFIG
    assert "preprocessing" in loaded.notes[-1]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize(
    "wrappers", [[], ["state_dict"], ["model"], ["model_ema"], ["state_dict_ema"], ["model", "state_dict"]]
)
def test_wrappers_and_prefixes_are_taken_off(wrappers: list[str], prefix: str, tmp_path: Path) -> None:
    content: Any = {prefix + name: value for name, value in make_state().items()}
    for key in wrappers:
        content = {key: content, "epoch": 3, "loss": torch.tensor(0.5)}
    assert same(load_checkpoint(stored(tmp_path, content)).state, make_state())


@pytest.mark.parametrize("pair", [("model_ema", "model"), ("state_dict_ema", "state_dict")])
def test_averaged_weights_are_preferred(pair: tuple[str, str], tmp_path: Path) -> None:
    plain = {name: value + 1 for name, value in make_state().items()}
    loaded = load_checkpoint(stored(tmp_path, {pair[1]: plain, pair[0]: make_state()}))
    assert same(loaded.state, make_state())
    assert f"the checkpoint holds {pair[0]}, {pair[1]}: {pair[0]} was taken" in loaded.notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in make_state().items()}
    loaded = load_checkpoint(stored(tmp_path, state))
    assert same(loaded.state, {name: value.float() for name, value in state.items()})
    assert f"weights of type {str(dtype)[6:]} were converted to float32" in loaded.notes


def test_header_length_that_looks_like_a_tag_is_read(tmp_path: Path) -> None:
    """15,392 is 0x3C20, which a file begins with as ' <'."""
    short = int.from_bytes(safetensors_bytes(metadata(training={"x": ""}))[:8], "little")
    data = safetensors_bytes(metadata(training={"x": "x" * (0x13C20 - short)}))
    assert data[:3] == b" <\x01"
    assert load_checkpoint(stored(tmp_path, data, "w.safetensors")).config == CONFIG


# --- What is told from names and shapes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", first(3, sorted(list_models(), key=lambda name: "nano" not in name)))
def test_variant_is_recognised(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=7)
    state = {k: torch.zeros(v.shape, dtype=torch.float16) for k, v in model.state_dict().items() if v.ndim}
    loaded = load_checkpoint(stored(tmp_path, state))
    assert (loaded.arch, loaded.config) == (name, model.config)


@pytest.mark.parametrize(
    "options",
    [
        {"branch_merge": "concat"},
        {"expansion": 3},
        {"expansion": 1, "branch_merge": "concat"},
        {"kernel_sizes": (5, 9), "dilations": (1, 2)},
        {"kernel_sizes": (3,), "dilations": (1,)},
        {"layer_scale": None},
        {"ffn_ratios": (1.0, 2.5, 3.0, 0.5)},
        {"stem_width": 6},
        {"gate_reduction": 2},
        {"in_channels": 1},
    ],
    ids=str,
)
def test_odd_configuration_is_inferred(options: dict[str, Any], tmp_path: Path) -> None:
    config = replace(CONFIG, **options)
    loaded = load_checkpoint(stored(tmp_path, make_state(config)))
    assert loaded.config == config
    assert len(loaded.preprocessing.channels) == config.in_channels


UNTOLD = {
    "dilations": (2, 1, 3), "gate_input": "x_prime", "inner_residual": False, "batch_norm_eps": 1e-3,
    "stem_activations": ("gelu", None, "relu"),
}  # fmt: skip


def test_what_shapes_do_not_tell_is_noted_or_taken(tmp_path: Path) -> None:
    config = replace(CONFIG, **UNTOLD)
    bare = stored(tmp_path, make_state(config))
    (note,) = [note for note in load_checkpoint(bare).notes if "not told" in note]
    assert all(name in note for name in UNTOLD)
    told = load_checkpoint(bare, options=UNTOLD)
    assert told.config == config
    assert not [note for note in told.notes if "not told" in note]
    save_checkpoint(tmp_path / "w.safetensors", made(config))
    assert load_checkpoint(tmp_path / "w.safetensors").config == config
    other = load_checkpoint(tmp_path / "w.safetensors", options={"inner_residual": True})
    assert other.config == replace(config, inner_residual=True)


def test_misfit_lists_names_and_shapes(tmp_path: Path) -> None:
    state = make_state(replace(CONFIG, num_classes=3))
    state["extra"] = torch.zeros(1)
    del state["norm.bias"]
    message = refusal(stored(tmp_path, state), arch="dmformer_nano")
    assert "does not fit dmformer_nano" in message
    assert "missing: norm.bias" in message
    assert "1 unexpected: extra" in message
    assert "head.weight (received (3, 16), expected (3, 128))" in message or "of another shape" in message


def test_wrong_shape_is_given_with_the_expected_one(tmp_path: Path) -> None:
    state = {**make_state(), "norm.bias": torch.zeros(5)}
    assert "1 of another shape: norm.bias (received (5,), expected (16,))" in refusal(stored(tmp_path, state))


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    assert "unknown architecture 'swin'" in refusal(stored(tmp_path, make_state()), arch="swin")


# --- What is refused --------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_pickle_runs_no_code(form: str, tmp_path: Path) -> None:
    content = {"head.weight": Payload(tmp_path / "ran")}
    data = pickle.dumps(content, protocol=2) if form == "plain pickle" else pickled(content, zipped=form == "zip")
    assert "wants to run code" in refusal(stored(tmp_path, data))
    assert not (tmp_path / "ran").exists()


def test_whole_module_is_read_without_its_code(tmp_path: Path) -> None:
    model = DMFormer(CONFIG)
    loaded = load_checkpoint(stored(tmp_path, model))
    assert same(loaded.state, {name: value for name, value in model.state_dict().items() if name in loaded.state})
    assert any("only tensors were loaded" in note for note in loaded.notes)


def itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: {"epoch": 1}, "holds no weights (keys epoch)"),
        (lambda: {"e\npoch": 1}, "holds no weights (keys e\\npoch)"),
        (lambda: [torch.ones(2)], "holds no weights"),
        (itself, "holds no weights"),
        (lambda: {"e\nx": torch.ones(2)}, "no DMFormer"),
        (lambda: make_state() | {"x\ny": torch.ones(2)}, "1 unexpected: x\\ny"),
        (lambda: make_state() | {"head.bias": 3}, "'head.bias' is of type int"),
        (
            lambda: make_state() | {"head.bias": torch.tensor([1.0, torch.nan, 1])},
            "NaN or infinite values in head.bias",
        ),
        (lambda: make_state() | {"head.bias": torch.tensor([1.0, -torch.inf, 1])}, "NaN or infinite"),
        (lambda: make_state() | {"head.bias": torch.tensor([1e300] * 3, dtype=torch.float64)}, "NaN or infinite"),
        (lambda: make_state() | {"head.bias": torch.ones(3, dtype=torch.int64)}, "head.bias is torch.int64"),
        (lambda: make_state() | {"head.bias": torch.ones(3).to_sparse()}, "torch.sparse_coo; expected dense"),
        (lambda: make_state() | {"head.bias": torch.ones(3, device="meta")}, "expected dense floats"),
        (lambda: make_state() | {"head.bias": torch.ones(1).expand(10**13)}, "expected dense floats"),
        (lambda: make_state() | {"module.head.bias": torch.ones(3)}, "holds 'head.bias' twice"),
        (lambda: make_state() | {f"stages.0.blocks.{'9' * 5000}.x": torch.ones(1)}, "1 unexpected"),
        (lambda: make_state() | {"stages.0.blocks.60000.x": torch.ones(1)}, "1 unexpected"),
        (lambda: make_state() | {"head.weight": torch.ones(())}, "not the shapes"),
    ],
)
def test_unusable_pickle_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    assert words in refusal(stored(tmp_path, content()))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "checkpoint"),
        (b"<!DOCTYPE html>\n<html></html>\n", "HTML"),
        (b"\xef\xbb\xbf\n <html><head>", "HTML"),
        (b"just some text\nand more of it\n" * 20, "download it again"),
        (b"\x80\x02", "download it again"),
    ],
)
def test_other_files_are_refused(data: bytes, words: str, suffix: str, tmp_path: Path) -> None:
    path = stored(tmp_path, data, f"w{suffix}")
    message = refusal(path)
    assert str(path) in message
    assert words in message


def test_path_must_be_a_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.pth")
    (tmp_path / "folder.pth").mkdir()
    assert "directory" in refusal(tmp_path / "folder.pth").lower()
    assert "a device or a pipe" in refusal(Path(os.devnull))


@pytest.mark.parametrize("kept", [0.0005, 0.01, 0.2, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_truncated_file_is_refused(form: str, kept: float, tmp_path: Path) -> None:
    data = safetensors_bytes() if form == "safetensors" else pickled(make_state(), zipped=form == "zip")
    suffix = ".safetensors" if form == "safetensors" else ".pth"
    message = refusal(stored(tmp_path, data[: int(len(data) * kept)], f"w{suffix}"))
    assert "copy or download it again" in message


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
def test_huge_header_is_refused(length: int, tmp_path: Path) -> None:
    data = struct.pack("<Q", length) + safetensors_bytes()[8:]
    assert "no whole .safetensors" in refusal(stored(tmp_path, data, "w.safetensors"))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("{", "metadata is damaged"),
        ("[]", "metadata is damaged"),
        (
            '{"version":1,"arch":"","config":{},"preprocessing":{},"training":' + '{"a":' * 9999 + "1" + "}" * 10000,
            "damaged",
        ),
        (metadata(version=2), "metadata version 2; expected 1"),
        (metadata(config=None), "metadata is damaged"),
        (metadata(config={"num_classes": 0}), ">= 1"),
        (metadata(config={"in_channels": 2}), "in_channels"),
        (metadata(config={"wid\nths": 2}), "unknown field wid\\nths"),
        (metadata(config={**CONFIG.to_dict(), "depths": [60000, 1, 2, 1]}), "<= 1024"),
        (
            metadata(config={"widths": [65536] * 4, "expansion": 65536, "kernel_sizes": [65535], "dilations": [1]}),
            "memory",
        ),
        (metadata(config={**CONFIG.to_dict(), "ffn_ratios": [1e300] * 4}), "memory"),
        (metadata(preprocessing={"image_size": 3}), "image_size"),
        (metadata(preprocessing={"si\nze": 3}), "si ze"),
        (metadata(preprocessing={"channels": "L", "mean": [0.5], "std": [0.5]}), "expected as many as the network's 3"),
    ],
    ids=range(14),
)
def test_bad_metadata_is_refused(told: Any, words: str, tmp_path: Path) -> None:
    assert words in refusal(stored(tmp_path, safetensors_bytes(told), "w.safetensors"))


DAMAGED = {
    "safetensors": (safetensors_bytes(), ".safetensors"),
    "zip": (pickled(make_state()), ".pth"),
    "legacy": (pickled(make_state(), zipped=False), ".pth"),
}


@pytest.mark.parametrize("form", list(DAMAGED))
@given(drawn=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_are_read_or_refused(form: str, tmp_path: Path, drawn: st.DataObject) -> None:
    data, suffix = bytearray(DAMAGED[form][0]), DAMAGED[form][1]
    front, back = st.integers(0, min(16000, len(data) - 1)), st.integers(max(0, len(data) - 9000), len(data) - 1)
    for position in drawn.draw(st.lists(front | back, min_size=1, max_size=4)):
        data[position] = drawn.draw(st.integers(0, 255))
    path = stored(tmp_path, bytes(data), f"w{suffix}")
    try:
        loaded = load_checkpoint(path)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - a file that is still whole is fine too
    else:
        assert all(value.isfinite().all() for value in loaded.state.values())
