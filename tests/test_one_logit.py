"""A classifier with one output: a sigmoid and two classes, never the softmax of one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

import dmformer
from dmformer.assets import DEMONSTRATIONS
from dmformer.bundle.manifest import Manifest, decode_manifest
from dmformer.bundle.reader import open_bundle
from dmformer.errors import UsageError
from dmformer.layouts.api import serve_layout
from dmformer.models.checkpoint import checked_classes, load_checkpoint, save_checkpoint
from dmformer.task import class_logits
from dmformer.verify.evaluate import evaluate
from dmformer.verify.tasks.classification import decide, paired, score
from tests.conftest import made_once

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.models.checkpoint import Checkpoint

SEVEN = 7
LOGITS = np.array([[3.0], [-2.0], [1.0], [-1.0]], np.float32)


def is_it_a_seven() -> Checkpoint:
    """The demonstration's logit of sevens, against the mean of the others."""
    whole = load_checkpoint(DEMONSTRATIONS["classification"].checkpoint)
    weight, bias = whole.state["head.weight"], whole.state["head.bias"]
    others = [index for index in range(10) if index != SEVEN]
    head = {
        "head.weight": weight[[SEVEN]] - weight[others].mean(0),
        "head.bias": bias[[SEVEN]] - bias[others].mean() - 1.0,
    }
    return replace(whole, config=replace(whole.config, num_classes=1), state={**whole.state, **head}, classes=())


@pytest.fixture(scope="module")
def one_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of it, whose class 1 has a name."""

    def make(folder: Path) -> Path:
        save_checkpoint(folder / "one.safetensors", is_it_a_seven())
        (folder / "names.txt").write_text("seven\n", encoding="utf-8")
        dmformer.export(folder / "one.safetensors", classes=folder / "names.txt", output=folder / "bundle")
        return folder / "bundle"

    return made_once(tmp_path_factory, "one-output", make)


def test_the_manifest_says_the_threshold_and_both_classes(one_output: Path) -> None:
    manifest = open_bundle(one_output).manifest
    assert manifest.model.threshold == 0.5
    assert manifest.model.classes == ("not seven", "seven")
    assert (manifest.class_count, manifest.outputs[0].shape) == (2, ("batch", 1))
    assert "sigmoid" in " ".join(manifest.model.notes)


def test_probabilities_are_the_sigmoid(one_output: Path) -> None:
    samples = DEMONSTRATIONS["classification"].samples
    with dmformer.load(one_output) as predictor:
        for name, expected in (("7", "seven"), ("3", "not seven")):
            (logit,) = predictor.outputs(samples / f"{name}.png")["logits"][0]
            best, other = predictor.predict(samples / f"{name}.png")[0].classes
            assert best.name == expected
            by_index = {best.index: best.probability, other.index: other.probability}
            assert by_index[1] == pytest.approx(1 / (1 + np.exp(-float(logit))))
            assert sum(by_index.values()) == pytest.approx(1)


def test_accuracy_counts_both_classes(one_output: Path, tmp_path: Path) -> None:
    images = DEMONSTRATIONS["classification"].calibration
    assert images is not None
    for digit in ("3", "7"):
        shutil.copytree(images / digit, tmp_path / ("seven" if digit == "7" else "not seven"))
    (result,) = evaluate(one_output, tmp_path).results
    assert result.top1 is not None
    assert result.top1 > 0.9


def test_verify_compares_decisions(one_output: Path) -> None:
    report = dmformer.verify(one_output)
    assert report.passed
    assert any(check.stage == "decisions" and check.decisions is not None for check in report.checks)


def test_servers_are_told(one_output: Path, tmp_path: Path) -> None:
    layout = serve_layout("triton", open_bundle(one_output), tmp_path / "served")
    assert "its sigmoid is the probability of class 1" in (layout.output / "README.md").read_text(encoding="utf-8")
    assert "label_filename" not in (layout.output / "models" / layout.models[0] / "config.pbtxt").read_text()
    assert not (layout.output / "models" / layout.models[0] / "labels.txt").exists()


def test_a_threshold_that_is_not_applied_is_refused(one_output: Path) -> None:
    manifest = open_bundle(one_output).manifest
    other = msgspec.to_builtins(manifest)
    other["model"]["threshold"] = 0.9
    with pytest.raises(UsageError, match=r"threshold 0\.9; expected 0\.5"):
        decode_manifest(msgspec.json.encode(other), "manifest.json")
    del other["model"]["threshold"]  # as in bundles of older versions
    assert isinstance(decode_manifest(msgspec.json.encode(other), "manifest.json"), Manifest)


# --- what decides -----------------------------------------------------------------------------------------------------


def test_one_logit_decides_between_two_classes() -> None:
    labels = np.array([1, 0, 0, 1])
    assert score(LOGITS, labels, -LOGITS).top1 == 0.5
    assert score(LOGITS, labels, -LOGITS).agreement_with_torch == 0.0
    assert decide(-LOGITS, LOGITS, 0.1).top1 == 0.0
    flip = decide(LOGITS + 1.5, LOGITS, 0.1).flips[0]
    assert (flip.image, flip.expected, flip.answered, flip.below_noise) == (3, 0, 1, False)
    pair = paired(LOGITS, -LOGITS, np.array([1, 0, 1, 0]))
    assert (pair.torch_only, pair.runtime_only) == (0, 4)


def test_other_logits_stay_as_they_are() -> None:
    for shape in ((2, 3), (2, 1, 4, 4)):
        logits = np.zeros(shape, np.float32)
        assert class_logits(logits) is logits


def test_names_of_the_two_classes() -> None:
    config = is_it_a_seven().config
    assert checked_classes(["no", "yes"], config) == ("no", "yes")
    assert checked_classes(["yes"], config) == ("not yes", "yes")
    with pytest.raises(UsageError, match="3 names of classes; expected one or two"):
        checked_classes(["a", "b", "c"], config)


def test_a_segmentation_network_needs_two_maps(tmp_path: Path) -> None:
    whole = load_checkpoint(DEMONSTRATIONS["segmentation"].checkpoint)
    state = dict(whole.state)
    for name in ("decoder.classifier.conv.weight", "decoder.classifier.conv.bias"):
        if name in state:
            state[name] = state[name][:1].clone()
    config = replace(whole.config, num_classes=1)
    save_checkpoint(tmp_path / "one.safetensors", replace(whole, config=config, state=state, classes=()))
    with pytest.raises(UsageError, match="one output map; expected a map for each of two classes"):
        dmformer.export(tmp_path / "one.safetensors", output=tmp_path / "bundle")
