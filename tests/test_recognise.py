"""A network of one's own that is a DMFormer is recognised, whoever wrote it; one that only looks like it is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dmformer
from dmformer.bundle.reader import open_bundle
from dmformer.errors import UsageError
from dmformer.export.networks import lively_
from dmformer.export.options import ExportOptions
from dmformer.export.run import plan_export
from dmformer.models import recognise as recognition
from dmformer.models.checkpoint import load_checkpoint, save_checkpoint
from dmformer.models.config import DMFormerConfig
from dmformer.models.deploy import deploy
from dmformer.models.dmformer import build_network, outputs_by_name
from dmformer.models.key_map import read_key_map, write_key_map
from dmformer.models.own import OwnSpecification, load_own
from dmformer.models.recognise import recognise
from tests import foreign_dmformers
from tests.bundles import one_line
from tests.conftest import made_once
from tests.foreign_dmformers import CLASSES, DEPTHS, KINDS, WIDTHS, Functional, Stacked, trained
from tests.networks import TINY, one_thread
from tests.tiers import first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from dmformer.models.checkpoint import Checkpoint
    from tests.conftest import Run

SOURCE = Path(foreign_dmformers.__file__)
OF_THE_KIND = {"widths": WIDTHS, "depths": DEPTHS, "num_classes": CLASSES}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def found(model: nn.Module, size: int = 64) -> Checkpoint:
    return recognise(load_own(model, image_size=size).checkpoint)


def difference(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """How far two networks are apart in float64, over the largest answer."""
    with torch.no_grad():
        (ours,), (theirs,) = (outputs_by_name(model.double()(x.double())).values() for model in (one, other))
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- What is one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_dmformer_is_recognised_whoever_wrote_it(kind: type[nn.Module]) -> None:
    model = trained(kind)
    checkpoint = found(model)
    assert checkpoint.config == DMFormerConfig.from_dict({**OF_THE_KIND, **KINDS[kind]})
    assert checkpoint.notes[-1].startswith(
        "recognised as DMFormer: widths=[8,12,16,20], depths=[1,2,1,1], num_classes=5"
    )
    assert checkpoint.config.origin is None
    x = torch.randn(2, checkpoint.config.in_channels, 96, 96, generator=torch.Generator().manual_seed(3))
    assert difference(deploy(checkpoint.model().double(), 96), trained(kind), x) < 1e-10
    assert model.state_dict().keys() == trained(kind).state_dict().keys()


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"task": "features"},
    {"gate_input": "x_prime", "layer_scale": None, "branch_merge": "concat", "stem_bias": True},
    {"inner_residual": False, "stage_norm": "batch", "head_norm": None, "downsample_kernel": 3},
    {"stage_norm": "layer", "task": "features", "downsample_norm_last": True},
    {"stage_norm": "layer", "head_norm_pooled": True, "ffn_kernel": 5, "ffn_ratios": (1.0, 2.5, 3.0, 0.5)},
    {"downsample_norm": "layer", "downsample_norm_last": True, "gate_reduction": 1, "expansion": 1},
    {"stem_norms": ("layer", None, "batch"), "stem_activations": ("gelu", None, "relu"), "attention_norm": "layer"},
)


@pytest.mark.parametrize("changed", VARIANTS, ids=str)
def test_what_this_program_builds_is_recognised_as_what_it_is(changed: dict[str, Any]) -> None:
    config = DMFormerConfig.from_dict({**TINY, **changed})
    model = lively_(build_network(config))
    checkpoint = found(model)
    expected = replace(config, num_classes=DMFormerConfig.num_classes) if config.task == "features" else config
    assert checkpoint.config == expected
    assert all(torch.equal(checkpoint.state[name], value) for name, value in model.state_dict().items() if value.ndim)


def test_layer_scales_that_mute_a_network_do_not_hide_what_it_is() -> None:
    assert found(trained(Functional, scale=1e-6)).config == found(trained(Functional)).config


def test_a_network_for_one_size_alone_is_recognised_at_it() -> None:
    class Fixed(Stacked):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            assert x.shape[-1] == 96
            return super().forward(x)

    assert found(trained(Fixed), 96).key_map is not None


# --- What is none -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("twist", first(2, ["residual", "clamp", "silu", "tanh", "max pool"]))
def test_the_same_tensors_with_another_function_are_not_recognised(kind: type[nn.Module], twist: str) -> None:
    if kind is Stacked and twist == "residual":
        pytest.skip("it has no inner residual, and one of X before the norm is none that we have")
    model = trained(kind, twist, scale=1e-9)
    checkpoint = found(model)
    assert isinstance(checkpoint.config, OwnSpecification)
    assert checkpoint.key_map is None
    assert checkpoint.notes[-1].startswith("not recognised as a DMFormer (")
    assert "\n" not in checkpoint.notes[-1]


def test_a_residual_before_the_norm_is_not_recognised() -> None:
    reason = found(trained(Stacked, "residual")).notes[-1]
    assert "no configuration gives the same answers" in reason


def test_dilations_that_differ_between_stages_are_not_recognised() -> None:
    assert "its dilations differ" in found(trained(Functional, "dilation")).notes[-1]


def test_a_muted_difference_is_heard_with_random_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the random weights are for: with a network's own alone, layer scales of 1e-13 would hide its residual."""
    model = trained(Functional, "residual", scale=1e-13)
    assert found(model).key_map is None
    monkeypatch.setattr(recognition, "_STRENGTHS", ())
    assert found(model).key_map is not None


@pytest.mark.parametrize("name", first(1, ["w.0_0_k3", "w.hb", "w.2_0_gb", "w.d2g"]))
def test_a_tensor_in_another_place_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is what accepts: it refuses a map that leads to the tensor of another place."""
    as_it_is = recognition.translate

    def changed(state: Any, key_map: Any) -> Any:
        translated = as_it_is(state, key_map)
        ours = key_map.keys[name]
        return {**translated, ours: translated[ours].roll(1, 0)}

    monkeypatch.setattr(recognition, "translate", changed)
    assert "no configuration gives the same answers" in found(trained(Functional)).notes[-1]


def test_other_networks_say_why_they_are_none() -> None:
    from tests.own_network import build

    assert "do not stand in the order of a DMFormer" in found(build()).notes[-1]
    segmenter = lively_(build_network(DMFormerConfig.from_dict({
        **TINY, "task": "segmentation", "decoder": "fpn", "decoder_widths": (8, 8),
    })))  # fmt: skip
    assert "not recognised as a DMFormer (" in found(segmenter).notes[-1]


# --- Key maps ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mapped() -> Checkpoint:
    return found(trained(Functional))


@pytest.mark.parametrize("wrapped", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_a_key_map_takes_the_place_of_the_code(mapped: Checkpoint, wrapped: Any, tmp_path: Path) -> None:
    assert mapped.key_map is not None
    write_key_map(tmp_path / "map.json", mapped.key_map)
    torch.save(wrapped(trained(Functional).state_dict()), tmp_path / "w.pth")
    loaded = load_checkpoint(tmp_path / "w.pth", key_map=read_key_map(tmp_path / "map.json"))
    assert loaded.config == mapped.config
    assert loaded.state.keys() == mapped.state.keys()
    assert all(torch.equal(loaded.state[name], value) for name, value in mapped.state.items())
    assert not [note for note in loaded.notes if "not told" in note]


def edited(mapped: Checkpoint, **changed: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(dmformer.files.indented_json(mapped.key_map))
    return {**content, **changed}


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


BAD_MAPS: dict[str, Any] = {
    "is no key map": lambda _: "{",
    "is no key map (1 names are repeated: w.hb": lambda m: json.dumps(edited(m)).replace('"w.hw"', '"w.hb"'),
    "is no key map (Expected `object`": lambda _: "[]",
    "missing required field `keys`": lambda m: without(edited(m), "keys"),
    "unknown field `more`": lambda m: edited(m, more=1),
    "Invalid enum value 2": lambda m: edited(m, version=2),
    "unknown field width; known": lambda m: edited(m, config={"width": 3}),
    "1 names are missing: head.bias": lambda m: edited(m, keys=without(edited(m)["keys"], "w.hb")),
    "1 names are unknown: nose": lambda m: edited(m, keys={**edited(m)["keys"], "w.nose": "nose"}),
    "1 names are repeated: head.bias": lambda m: edited(m, keys={**edited(m)["keys"], "w.more": "head.bias"}),
    "1 names are repeated: w.hb": lambda m: edited(m, unused=["w.hb"]),
    "zero, and no bias: head.weight": lambda m: edited(
        m, keys=without(edited(m)["keys"], "w.hw"), zeros=[*edited(m)["zeros"], "head.weight"]
    ),
}


@pytest.mark.parametrize("message", BAD_MAPS)
def test_a_bad_key_map_is_refused_in_one_line(message: str, mapped: Checkpoint, tmp_path: Path) -> None:
    content = BAD_MAPS[message](mapped)
    (tmp_path / "map.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        read_key_map(tmp_path / "map.json")
    assert message in one_line(refused.value)
    assert "expected" in one_line(refused.value) or "known" in one_line(refused.value)


def test_a_key_map_that_cannot_be_read_or_written_is_refused(mapped: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_key_map(tmp_path / "none.json")
    assert mapped.key_map is not None
    with pytest.raises(UsageError, match="No such file or directory; expected"):
        write_key_map(tmp_path / "none" / "map.json", mapped.key_map)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("w.hb"), "1 missing: w.hb"),
        (lambda s: s.update(more=torch.ones(2)), "1 unexpected: more"),
        (lambda s: s.update({"w.hb": torch.ones(6)}), r"1 of another shape: w.hb \(received \(6,\), expected \(5,\)\)"),
    ],
)
def test_weights_that_do_not_fit_a_key_map_are_listed(
    change: Any, message: str, mapped: Checkpoint, tmp_path: Path
) -> None:
    state = dict(trained(Functional).state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=message) as refused:
        load_checkpoint(tmp_path / "w.pth", key_map=mapped.key_map)
    one_line(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_map": "m"}, "`key_map` without `weights`"),
        ({"key_map": "m", "weights": "w", "arch": "dmformer_s"}, "`key_map` with `arch`"),
        ({"key_map": "m", "weights": "w", "module": "n.py:build"}, "`key_map` with `module`"),
        ({"save_key_map": "m", "weights": "w"}, "`save_key_map` without `module`"),
    ],
)
def test_a_key_map_where_it_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        ExportOptions(**options)
    one_line(refused.value)


def test_no_key_map_of_a_network_that_is_not_recognised(tmp_path: Path) -> None:
    asked = ExportOptions(module=trained(Functional, "silu"), image_size=64, save_key_map=tmp_path / "map.json")
    with pytest.raises(UsageError, match="the network was not recognised as a DMFormer") as refused:
        plan_export(asked)
    one_line(refused.value)


def test_a_checkpoint_with_our_names_needs_no_key_map(mapped: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours.safetensors", mapped)
    assert mapped.key_map is not None
    assert load_checkpoint(tmp_path / "ours.safetensors", key_map=mapped.key_map).key_map is None
    write_key_map(tmp_path / "map.json", mapped.key_map)
    with pytest.raises(UsageError, match="which has our names"):
        plan_export(ExportOptions(tmp_path / "ours.safetensors", key_map=tmp_path / "map.json"))


# --- Exported ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recognised_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key map, weights under their own names, and a bundle in the formats onnx, openvino and torch."""

    def make(folder: Path) -> Path:
        torch.save({"model": trained(Functional).state_dict()}, folder / "w.pth")
        dmformer.export(
            folder / "w.pth",
            module=f"{SOURCE}:functional",
            image_size=64,
            formats=("onnx", "openvino", "torch"),
            output=folder / "bundle",
            save_key_map=folder / "map.json",
        )
        torch.save(trained(Functional, scale=0.1).state_dict(), folder / "others.pth")
        return folder

    return made_once(tmp_path_factory, "recognised", make)


@pytest.mark.slow
def test_a_recognised_network_goes_the_way_of_a_dmformer(recognised_export: Path) -> None:
    bundle = open_bundle(recognised_export / "bundle")
    model = bundle.manifest.model
    assert model.deploy_form
    assert model.module is None
    assert model.weights == "checkpoint"
    assert model.notes[-1].startswith("recognised as DMFormer: ")
    assert model.key_map == read_key_map(recognised_export / "map.json")
    assert {artifact.format for artifact in bundle.manifest.artifacts} == {"onnx", "openvino", "torch"}
    assert bundle.manifest.evidence.parity.passed
    assert dmformer.verify(bundle).passed


@pytest.mark.slow
def test_weights_with_their_own_names_are_compared_with_the_bundle(recognised_export: Path) -> None:
    bundle = recognised_export / "bundle"
    assert dmformer.verify(bundle, runtimes=["onnxruntime"], weights=recognised_export / "w.pth").passed
    assert not dmformer.verify(bundle, runtimes=["onnxruntime"], weights=recognised_export / "others.pth").passed
    assert dmformer.verify(bundle, runtimes=["onnxruntime"], module=f"{SOURCE}:functional").passed


def test_the_key_map_alone_gives_the_same_file(recognised_export: Path, inline: Callable[..., Run]) -> None:
    weights, key_map = recognised_export / "w.pth", recognised_export / "map.json"
    done = inline("export", "--weights", weights, "--key-map", key_map, "--image-size", 64, "--output", "again")
    assert done.code == 0, done.err
    (ours,) = open_bundle(recognised_export / "bundle").artifacts("onnx")
    again = json.loads((recognised_export / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    assert again["model"]["key_map"]["config"] == again["model"]["config"]
    assert ours.files[0].sha256[:12] in done.out


def test_the_command_line_names_its_flags(tmp_path: Path, inline: Callable[..., Run]) -> None:
    done = inline("export", "--key-map", "none.json", "--weights", "w.pth")
    assert (done.code, done.error_line[:36]) == (2, "error: --key-map 'none.json' cannot ")
    done = inline("export", "--save-key-map", "map.json")
    assert (done.code, "--save-key-map without --module" in done.error_line) == (2, True)


@pytest.mark.slow
def test_steps_of_a_recognised_network_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "cache"))
    first, again = (
        dmformer.export(module=trained(Stacked), image_size=64, output=tmp_path / name) for name in ("first", "again")
    )
    assert not first.manifest.evidence.cached
    assert again.manifest.evidence.cached
    assert [one.files for one in first.manifest.artifacts] == [one.files for one in again.manifest.artifacts]
