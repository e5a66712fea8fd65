"""Preprocessing and class names that other libraries' files and the options of an export give."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dmformer.assets import DEMONSTRATIONS
from dmformer.cache import Cache
from dmformer.data.description import read_class_names, read_description
from dmformer.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dmformer.errors import UsageError
from dmformer.export.cached import key_of
from dmformer.export.networks import find_network
from dmformer.export.options import ExportOptions
from dmformer.models.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Run

HALVES = Preprocessing(image_size=32, crop_fraction=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
TIMM = {
    "architecture": "dmformer",
    "label_names": ["cat", "dog"],
    "pretrained_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "input_size": [3, 32, 32],
    },
}
HUGGING_FACE = {
    "do_normalize": True,
    "do_center_crop": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The demonstration's weights and nothing else."""
    path = tmp_path / "weights" / "plain.pth"
    path.parent.mkdir()
    torch.save(load_file(DEMONSTRATIONS["classification"].checkpoint), path)
    return path


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def decided(**options: Any) -> Preprocessing:
    return find_network(ExportOptions(**options)).checkpoint.preprocessing


@pytest.mark.parametrize(
    "content",
    [TIMM, HUGGING_FACE, HUGGING_FACE | {"do_rescale": False, "image_mean": 127.5, "image_std": 127.5}],
    ids=["timm", "Hugging Face", "Hugging Face 0..255"],
)
def test_files_beside_the_weights_say_the_preprocessing(plain: Path, content: dict[str, Any]) -> None:
    name = "config.json" if content is TIMM else "preprocessor_config.json"
    written(plain.with_name(name), content)
    checkpoint = load_checkpoint(plain)
    assert checkpoint.preprocessing == HALVES
    assert f"{name}'" in " ".join(checkpoint.notes)
    assert "usual was assumed" not in " ".join(checkpoint.notes) or content is not TIMM
    # What the options say goes before it.
    assert decided(weights=plain, mean=[0.25]).mean == (0.25,) * 3


def test_an_unrelated_config_beside_the_weights_is_no_description(plain: Path) -> None:
    written(plain.with_name("config.json"), {"mean": "business"})
    assert "usual was assumed" in " ".join(load_checkpoint(plain).notes)


@pytest.mark.parametrize(
    ("content", "channels", "mean"),
    [
        ("data_preprocessor = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0])", "BGR", 103.53 / 255),
        ("model = dict(data_preprocessor=dict(mean=[127.5] * 3, std=[51, 51, 51], bgr_to_rgb=True))", "RGB", 0.5),
        ('{"data_preprocessor": {"mean": [51, 51, 51], "std": [51, 51, 51], "to_rgb": true}}', "RGB", 0.2),
        ("img_norm_cfg = dict(mean=[51, 0, 0], std=[51, 51, 51], to_rgb=False)", "BGR", 0.2),
    ],
)
def test_openmmlab_counts_from_0_to_255(tmp_path: Path, content: str, channels: str, mean: float) -> None:
    suffix = "json" if content.startswith("{") else "py"
    fields = read_description(written(tmp_path / f"config.{suffix}", content)).fields
    assert fields["channels"] == channels
    assert fields["mean"][0] == pytest.approx(mean)


def test_a_configuration_in_python_is_never_run(tmp_path: Path) -> None:
    path = written(
        tmp_path / "config.py", f"open({str(tmp_path / 'ran')!r}, 'w')\ndata_preprocessor = dict(x=exit())\n"
    )
    read_description(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "no preprocessing in it"),
        ("{", "expected JSON"),
        ({"pretrained_cfg": {"interpolation": "nearest"}}, "expected bicubic or bilinear"),
        ({"pretrained_cfg": {"input_size": [3, 32, 64]}}, "expected a square"),
        ({"data_preprocessor": {"mean": ["x"], "std": [1]}}, "a number for each channel"),
        ({"image_mean": [0.5], "image_std": [0.5], "rescale_factor": 0}, "expected a positive number"),
        ({"pretrained_cfg": {"label_names": {"0": "a", "2": "b"}}}, "expected 0 to 1"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_name(tmp_path: Path, content: Any, said: str) -> None:
    path = written(tmp_path / "config.json", content)
    with pytest.raises(UsageError, match=said) as caught:
        read_description(path)
    assert str(path) in str(caught.value)


def test_options_override_the_checkpoint_and_are_kept(plain: Path) -> None:
    network = find_network(ExportOptions(weights=plain, image_size=32, mean=[0.5], std=[0.5], crop_fraction=1.0))
    assert network.checkpoint.preprocessing == HALVES
    notes = " ".join(network.checkpoint.notes)
    assert "interpolation bicubic; channels RGB; images are seen with 32 pixels" in notes
    assert "as it was given: crop fraction 1; mean 0.5, 0.5, 0.5" in notes
    assert decided(mean=[0.1, 0.2, 0.3]).mean == (0.1, 0.2, 0.3)  # of the demonstration, whose file says another
    assert decided(arch="dmformer_nano", std=[0.1]).std == (0.1,) * 3
    assert find_network(ExportOptions(std=[0.1])).checkpoint.overridden == ("std",)


def test_means_stay_with_their_colours(plain: Path) -> None:
    found = decided(weights=plain, channel_order="bgr")
    assert (found.channels, found.mean, found.std) == ("BGR", IMAGENET_MEAN[::-1], IMAGENET_STD[::-1])
    assert decided(weights=plain, channel_order="bgr", mean=[0.1, 0.2, 0.3]).mean == (0.1, 0.2, 0.3)
    rgb = Preprocessing()
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(
        rgb.with_fields({"channels": "BGR"}).normalize(pixels), rgb.normalize(pixels)[:, ::-1]
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mean": [123.7, 116.3, 103.5]}, "divide by 255"),
        ({"mean": [0.5, 0.5]}, "one for each channel"),
        ({"mean": [float("nan")]}, "scale 0..1"),
        ({"std": [0.0]}, "above 0"),
        ({"std": [float("inf")]}, "above 0"),
        ({"crop_fraction": 0.0}, "expected 1/64 to 1"),
        ({"crop_fraction": float("nan")}, "expected 1/64 to 1"),
        ({"interpolation": "nearest"}, "expected bicubic or bilinear"),
        ({"channel_order": "gbr"}, "expected rgb or bgr"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ExportOptions(**options)


# --- names of classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffcaf\u00e9\r\ndog\r\n",
        "cafe\u0301\n\ndog",
        '["caf\u00e9", "dog"]',
        '{"1": "dog", "0": "caf\u00e9"}',
        '{"id2label": {"0": "caf\u00e9", "1": "dog"}, "architectures": []}',
    ],
    ids=["BOM", "NFD", "list", "dictionary", "id2label"],
)
def test_class_names(tmp_path: Path, content: str) -> None:
    assert read_class_names(written(tmp_path / "names", content)) == ("caf\u00e9", "dog")


def test_as_many_class_names_as_outputs(plain: Path, tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(10)]
    assert load_checkpoint(plain, classes=names).classes == tuple(names)
    with pytest.raises(UsageError, match="9 names of classes; expected one for each of the network's 10"):
        find_network(ExportOptions(weights=plain, classes=written(tmp_path / "names.json", names[1:])))
    written(plain.with_name("config.json"), TIMM)
    checkpoint = load_checkpoint(plain)
    assert checkpoint.classes == ()
    assert "2 names of classes for 10 outputs" in " ".join(checkpoint.notes)


# --- the command and what was made before -----------------------------------------------------------------------------


def test_flags_and_their_errors(plain: Path, inline: Callable[..., Run], tmp_path: Path) -> None:
    given = ("--mean", "0.5", "--std", "0.5,0.5,0.5", "--interpolation", "bilinear", "--crop-fraction", "1")
    done = inline("export", "--dry-run", "--weights", plain, *given, "--channel-order", "BGR", "--image-size", "32")
    assert done.code == 0
    assert "crop fraction 1; interpolation bilinear; channels BGR; mean 0.5, 0.5, 0.5; std 0.5" in done.err
    assert "--mean 'a,b'; expected numbers" in inline("export", "--dry-run", "--mean", "a,b").error_line
    assert "--std 2,3,58" in inline("export", "--dry-run", "--std", "2,3,58").error_line
    missing = inline("export", "--dry-run", "--classes", tmp_path / "none.txt")
    assert (missing.code, "none.txt cannot be read" in missing.error_line) == (2, True)


def test_an_export_is_found_again_only_with_the_same_description(plain: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    options = ExportOptions(weights=plain)
    names = written(plain.with_name("names.txt"), "a\n")
    keys = [key_of(cache, options), key_of(cache, dataclasses.replace(options, classes=names))]
    written(names, "b\n")
    keys.append(key_of(cache, dataclasses.replace(options, classes=names)))
    written(plain.with_name("preprocessor_config.json"), HUGGING_FACE)
    keys.append(key_of(cache, options))
    keys.append(key_of(cache, dataclasses.replace(options, mean=(0.5,))))
    assert all(keys)
    assert len(set(keys)) == len(keys)
