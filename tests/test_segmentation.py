"""Networks that label pixels, and the backbone alone: what they compute, their deploy form, their checkpoints, ONNX."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dmformer.errors import UsageError
from dmformer.export.networks import lively_
from dmformer.graph.trace import trace
from dmformer.models import deploy as folding
from dmformer.models.checkpoint import Checkpoint, default_preprocessing, load_checkpoint, save_checkpoint
from dmformer.models.config import DMFormerConfig
from dmformer.models.deploy import deploy
from dmformer.models.dmformer import (
    DMFormerBackbone,
    build_network,
    create_model,
    list_models,
    variant_config,
)
from dmformer.models.segmentation import DMFormerFeatures, SemanticFPN, UPerNet, pool_bins
from tests.networks import TINY, answers, image, one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Run

LIMIT = 1e-9
FPN = {"task": "segmentation", "decoder": "fpn", "decoder_widths": (10, 6)}
UPERNET = {"task": "segmentation", "decoder": "upernet", "decoder_widths": (7,)}
FEATURES = {"task": "features"}
EACH = pytest.mark.parametrize("options", [FPN, UPERNET, FEATURES], ids=["fpn", "upernet", "features"])
DECODERS = pytest.mark.parametrize("options", [FPN, UPERNET], ids=["fpn", "upernet"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def lively(options: dict[str, Any], seed: int = 0) -> DMFormerBackbone:
    """A tiny network in float64."""
    return lively_(build_network(DMFormerConfig.from_dict({**TINY, **options})), seed).double()


def outputs(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found: Any = answers(model, x)
    return found if isinstance(found, tuple) else (found,)


def deviation(model: nn.Module, form: nn.Module, x: torch.Tensor) -> float:
    """Largest difference of a form's answers from the training form's, over the largest of those."""
    pairs = list(zip(outputs(model, x), outputs(form, x), strict=True))
    for expected, found in pairs:
        assert found.shape == expected.shape
        assert expected.std() > 0.05
    return max(float((found - expected).abs().max() / expected.abs().max()) for expected, found in pairs)


# --- What they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooling_is_adaptive_average_pooling(bins: int) -> None:
    for size in ((1, 1), (2, 3), (5, 7), (6, 6), (7, 4), (16, 24)):
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(pool_bins(x, bins), F.adaptive_avg_pool2d(x, bins), rtol=0, atol=1e-14)


def semantic_fpn_by_the_book(decoder: SemanticFPN, maps: list[torch.Tensor]) -> torch.Tensor:
    """The semantic branch of Kirillov et al., section 3.2, with sizes written out instead of factors."""
    merged = [lateral(features) for lateral, features in zip(decoder.lateral, maps, strict=True)]
    for index in (2, 1, 0):
        merged[index] = merged[index] + F.interpolate(merged[index + 1], size=merged[index].shape[2:], mode="nearest")
    total = torch.zeros(())
    for index, smooth in enumerate(decoder.smooth):
        x = smooth(merged[index])
        convs = [module for module in decoder.levels[index].children() if isinstance(module, nn.Sequential)]  # type: ignore[union-attr]
        assert len(convs) == (1, 1, 2, 3)[index]
        for doubling, conv in enumerate(convs):
            x = F.relu(conv.norm(conv.conv(x)))
            if index:
                size = maps[index - doubling - 1].shape[2:]
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        assert x.shape[2:] == maps[0].shape[2:]
        total = total + x
    result: torch.Tensor = decoder.classifier.conv(total)  # type: ignore[operator]
    return result


def upernet_by_the_book(decoder: UPerNet, maps: list[torch.Tensor]) -> torch.Tensor:
    """Xiao et al., figure 4: pyramid pooling, top-down pyramid, fusion."""

    def enlarged(x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=to.shape[2:], mode="bilinear", align_corners=False)

    pooled = [
        enlarged(pool.mix(F.adaptive_avg_pool2d(maps[3], bins)), maps[3])
        for pool, bins in zip(decoder.pools, (1, 2, 3, 6), strict=True)
    ]
    pyramid = [*(lateral(x) for lateral, x in zip(decoder.lateral, maps[:3], strict=True))]
    pyramid.append(decoder.bottleneck(torch.cat([maps[3], *pooled], 1)))
    for index in (2, 1, 0):
        pyramid[index] = pyramid[index] + enlarged(pyramid[index + 1], pyramid[index])
    levels = [*(smooth(x) for smooth, x in zip(decoder.smooth, pyramid[:3], strict=True)), pyramid[3]]
    fused = decoder.fuse(torch.cat([enlarged(level, levels[0]) for level in levels], 1))
    result: torch.Tensor = decoder.classifier.conv(fused)  # type: ignore[operator]
    return result


@DECODERS
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (160, 32)])
def test_logits_are_those_of_the_papers_decoder(options: dict[str, Any], size: tuple[int, int]) -> None:
    model: Any = lively(options)
    x = image(height=size[0], width=size[1]).double()
    with torch.inference_mode():
        maps = model.forward_features(x)
        written_out = semantic_fpn_by_the_book if options is FPN else upernet_by_the_book
        quarter = written_out(model.decoder, maps)
    assert quarter.shape == (2, TINY["num_classes"], size[0] // 4, size[1] // 4)
    whole = F.interpolate(quarter, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(answers(model, x), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "decoder_parameters"),
    [
        # laterals, 3x3 of the pyramid, 3x3 with norm of the branch (4 from the pyramid, 3 more), classifier
        ("dmformer_s_fpn", 1024 * 256 + 4 * 256 + 4 * (9 * 256 * 256 + 256)
         + 4 * (9 * 256 * 128 + 256) + 3 * (9 * 128 * 128 + 256) + 128 * 150 + 150),
        # pools, bottleneck, laterals, 3x3 of the pyramid, fusion, classifier
        ("dmformer_s_upernet", 4 * (512 * 512 + 1024) + (9 * 5 * 512 * 512 + 1024) + 512 * 512 + 3 * 1024
         + 3 * (9 * 512 * 512 + 1024) + (9 * 4 * 512 * 512 + 1024) + 512 * 150 + 150),
    ],
)  # fmt: skip
def test_decoders_have_the_fields_usual_size(name: str, decoder_parameters: int) -> None:
    with torch.device("meta"):
        model: Any = create_model(name)
        classifier = create_model("dmformer_s")
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder_parameters
    stages = {name: p.shape for name, p in classifier.stages.named_parameters()}
    assert {name: p.shape for name, p in model.stages.named_parameters()} == stages
    assert model.config.num_classes == 150


def test_features_are_the_stages_maps() -> None:
    model = create_model("dmformer_nano", task="features").eval()
    assert isinstance(model, DMFormerFeatures)
    x = image(height=64, width=96)
    for found, expected in zip(answers(model, x), model.forward_features(x), strict=True):
        torch.testing.assert_close(found, expected)


@EACH
@pytest.mark.parametrize("size", [(32, 96), (64, 32)])
def test_shapes_are_those_that_the_configuration_tells(options: dict[str, Any], size: tuple[int, int]) -> None:
    model = lively(options)
    found = outputs(model, image(height=size[0], width=size[1], count=1).double())
    assert tuple(tuple(each.shape[1:]) for each in found) == model.config.output_shapes(*size)
    assert len(model.config.output_names) == len(found)


@pytest.mark.parametrize("size", [(33, 47), (97, 32)])
def test_shapes_of_the_maps_hold_at_odd_sizes(size: tuple[int, int]) -> None:
    model = lively(FEATURES)
    found = outputs(model, image(height=size[0], width=size[1], count=1).double())
    assert tuple(tuple(each.shape[1:]) for each in found) == model.config.output_shapes(*size)


@DECODERS
@pytest.mark.parametrize("form", ["training", "deploy"])
def test_sides_that_are_no_multiple_of_32_are_refused(options: dict[str, Any], form: str) -> None:
    model = lively(options)
    with pytest.raises(UsageError, match="image of 64x40 pixels; expected sides that are multiples of 32"):
        answers(model if form == "training" else deploy(model), image(height=64, width=40).double())


@DECODERS
def test_every_tensor_of_a_decoder_reaches_the_logits(options: dict[str, Any]) -> None:
    model = lively(options)
    x = image(count=1, height=64, width=64).double()
    before = answers(model, x)
    unmoved = []
    for name, tensor in model.state_dict().items():
        if name.startswith("decoder.") and tensor.is_floating_point():
            kept = tensor.clone()
            tensor.mul_(1.01)
            if float((answers(model, x) - before).abs().max() / before.abs().max()) < 1e-7:
                unmoved.append(name)
            tensor.copy_(kept)
    assert not unmoved


# --- Configuration ----------------------------------------------------------------------------------------------------


def test_models_can_be_listed_by_task() -> None:
    assert list_models("classification") == ["dmformer_nano", "dmformer_t", "dmformer_s", "dmformer_l"]
    segmenters = ["dmformer_nano_fpn", "dmformer_nano_upernet", "dmformer_s_fpn", "dmformer_s_upernet"]
    assert list_models("segmentation") == segmenters
    assert list_models() == list_models("classification") + segmenters


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("dmformer_nano", {"task": "segmentation"}, "decoder is None with task segmentation; expected fpn or upernet"),
        ("dmformer_nano_fpn", {"task": "classification"}, "decoder is fpn with task classification; expected none"),
        ("dmformer_nano_fpn", {"decoder_widths": [8]}, "1 decoder_widths; expected 2: pyramid, head"),
        ("dmformer_nano", {"decoder_widths": [8]}, "1 decoder_widths; expected 0: no decoder"),
        ("dmformer_nano_fpn", {"decoder": "deeplab"}, "Invalid enum value 'deeplab'"),
        ("dmformer_nano", {"task": "detection"}, "Invalid enum value 'detection'"),
    ],
)
def test_configurations_that_cannot_be_are_refused(name: str, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as failure:
        variant_config(name, **changed)
    assert words in str(failure.value)


def test_a_configuration_of_before_there_were_tasks_is_a_classifier() -> None:
    new = {"task", "decoder", "decoder_widths", "decoder_dropout"}
    before = {name: value for name, value in variant_config("dmformer_t").to_dict().items() if name not in new}
    assert DMFormerConfig.from_dict(before) == variant_config("dmformer_t")


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_of(name: str, size: int = 64, **options: Any) -> Checkpoint:
    model = lively_(create_model(name, **options))
    preprocessing = default_preprocessing(model.config).with_fields({"image_size": size})
    return Checkpoint(name, model.config, model.state_dict(), preprocessing)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dmformer_nano_fpn", {"num_classes": 11}),
        ("dmformer_nano_upernet", {"num_classes": 3}),
        ("dmformer_nano", {"task": "features"}),
    ],
)
def test_a_checkpoint_comes_back_and_is_recognised_without_metadata(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    saved = checkpoint_of(name, **options)
    save_checkpoint(tmp_path / "a.safetensors", saved)
    torch.save(saved.state, tmp_path / "a.pth")
    x = image(count=1)
    for file in ("a.safetensors", "a.pth"):
        loaded = load_checkpoint(tmp_path / file)
        assert (loaded.arch, loaded.config) == (name, saved.config)
        for found, expected in zip(outputs(loaded.model(), x), outputs(saved.model(), x), strict=True):
            assert torch.equal(found, expected)
    assert load_checkpoint(tmp_path / "a.safetensors").notes == ()
    if "num_classes" in options:
        assert load_checkpoint(tmp_path / "a.pth", arch=name).config == saved.config


@pytest.mark.parametrize("name", ["dmformer_nano", "dmformer_nano_upernet"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_the_backbone_of_any_checkpoint_can_be_taken_alone(name: str, suffix: str, tmp_path: Path) -> None:
    saved, path = checkpoint_of(name), tmp_path / f"a.{suffix}"
    if suffix == "pth":
        torch.save(saved.state, path)
    else:
        save_checkpoint(path, saved)
    loaded = load_checkpoint(path, options={"task": "features"})
    assert loaded.arch == "dmformer_nano"
    assert "of the head were left out" in " ".join(loaded.notes)
    x = image(count=1)
    for found, expected in zip(outputs(loaded.model(), x), saved.model().forward_features(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_preprocessing_is_assumed_by_the_task(tmp_path: Path) -> None:
    torch.save(checkpoint_of("dmformer_nano_fpn").state, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert (loaded.preprocessing.image_size, loaded.preprocessing.crop_fraction) == (512, 1.0)
    assert "512 pixels" in " ".join(loaded.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["dmformer_nano_fpn"], "dmformer_nano_fpn, segmentation, 150 classes, 64x64 pixels"),
        (["dmformer_nano", "--model-option", "task=features"], "dmformer_nano, features, 64x64 pixels"),
    ],
)
def test_a_plan_says_the_task(options: list[str], said: str, inline: Callable[..., Run]) -> None:
    done = inline("export", "--image-size", "64", "--dry-run", "--arch", *options)
    assert done.code == 0
    assert said in done.err.splitlines()


# --- Deploy form and ONNX ---------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("seed", range(2))
def test_deploy_form_answers_as_the_training_form(options: dict[str, Any], seed: int) -> None:
    choices = {"branch_merge": ("sum", "concat")[seed % 2], "gate_input": ("x", "x_prime")[seed]}
    model = lively({**options, **choices}, seed)
    assert deviation(model, deploy(model, 64), image().double()) < LIMIT
    of_any_size = deploy(model)
    for height, width in ((32, 32), (64, 128)):
        assert deviation(model, of_any_size, image(height=height, width=width).double()) < LIMIT


@EACH
def test_no_norm_and_no_dropout_is_left_and_names_are_kept(options: dict[str, Any]) -> None:
    model = lively(options)
    form = deploy(model)
    kinds = (nn.BatchNorm2d, nn.Dropout2d, nn.Identity)
    assert any(isinstance(module, kinds) for module in model.modules())
    assert not any(isinstance(module, kinds) for module in form.modules())
    here, there = ({name for name, _ in each.named_modules()} for each in (form, model))
    assert {name.rpartition(".")[2] for name in here - there} == {"mix", "skip"}


@DECODERS
def test_a_norm_of_the_decoder_that_is_left_out_is_seen(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(options)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    of_decoder = sum(isinstance(m, nn.BatchNorm2d) for n, m in model.named_modules() if n.startswith("decoder."))
    as_it_is, called = folding._affine, 0

    def left_out_once(norm: nn.BatchNorm2d) -> folding.Affine:
        nonlocal called
        called += 1
        found = as_it_is(norm)
        missing = folding.Affine(torch.ones_like(found.scale), torch.zeros_like(found.shift))
        return missing if called == left_out else found

    monkeypatch.setattr(folding, "_affine", left_out_once)
    for left_out in range(norms - of_decoder + 1, norms + 1):  # noqa: B007 - the function above reads it
        called = 0
        assert deviation(model, deploy(model), image(count=1).double()) > 1000 * LIMIT
        assert called == norms


@pytest.mark.parametrize(
    ("name", "options", "open_size"),
    [
        ("dmformer_nano_fpn", {}, True),
        ("dmformer_nano_upernet", {}, True),
        ("dmformer_nano_upernet", {}, False),
        ("dmformer_nano", {"task": "features"}, True),
    ],
)
def test_onnx_answers_at_every_size(name: str, options: dict[str, Any], open_size: bool, tmp_path: Path) -> None:
    import onnxruntime

    checkpoint = replace(checkpoint_of(name, num_classes=5, **options), open_size=open_size)
    exact = checkpoint.model().double()
    path = tmp_path / "a.onnx"
    trace(checkpoint, deploy(checkpoint.model(), None if open_size else 64), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert tuple(output.name for output in session.get_outputs()) == checkpoint.config.output_names
    for height, width in ((32, 32), (96, 160), (224, 64)) if open_size else ((64, 64),):
        x = image(height=height, width=width, count=3)
        for found, expected in zip(session.run(None, {"image": x.numpy()}), outputs(exact, x.double()), strict=True):
            largest = float(expected.abs().max())
            np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5 * largest)
