"""Of a file with several sets of weights, every command takes the one that is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import dmformer
from dmformer.errors import UsageError
from dmformer.models.checkpoint import load_checkpoint
from dmformer.train.api import find_start
from dmformer.verify.evaluate import evaluate
from tests.training import small

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.models.checkpoint import Checkpoint


@pytest.fixture
def several(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    other = {name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in checkpoint.state.items()}
    torch.save({"teacher": dict(checkpoint.state), "student": other}, tmp_path / "several.pth")
    return tmp_path / "several.pth"


def test_verify_and_eval_take_the_set_that_is_named(bundle: Path, several: Path, few_images: Path) -> None:
    with pytest.raises(UsageError, match="choose with `weights_key`"):
        dmformer.verify(bundle, runtimes=["ort"], weights=several)
    failed = {}
    for key in ("teacher", "student"):
        report = dmformer.verify(bundle, runtimes=["ort"], weights=several, weights_key=key)
        failed[key] = "golden" in {check.stage for check in report.checks if not check.passed}
    assert failed == {"teacher": False, "student": True}
    report = evaluate(bundle, few_images, runtimes=["ort"], weights=several, weights_key="student")
    assert report.torch is not None
    with pytest.raises(UsageError, match="`weights_key` without `weights`"):
        dmformer.verify(bundle, weights_key="teacher")


def test_training_starts_from_the_set_that_is_named(several: Path) -> None:
    recipe = small(arch=None, model={})
    first = next(iter(load_checkpoint(several, weights_key="student").state))
    starts = {key: find_start(recipe, several, key).weights for key in ("teacher", "student")}
    states = [start.state[first] for start in starts.values() if start is not None]
    torch.testing.assert_close(states[1], states[0] * 1.01)
