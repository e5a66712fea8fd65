"""Recipes: what they say, and what ``dmformer train`` refuses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dmformer.commands.train import _SHIPPED
from dmformer.errors import StageFailed, UsageError
from dmformer.models.dmformer import variant_config
from dmformer.train.api import find_start, initial_network, train
from dmformer.train.recipe import Recipe, make_recipe, read_recipe, shipped_recipes
from dmformer.train.run import TrainingPlan, learning_rate, make_optimizer
from tests.networks import one_thread
from tests.training import SMALL, STILL, small, toml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Run


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# --- The recipe -------------------------------------------------------------------------------------------------------


def test_the_recipes_that_ship_can_be_made() -> None:
    assert shipped_recipes() == ["ade20k_fpn", "ade20k_upernet", "digits", "imagenet_l", "imagenet_s", "scenes"]
    assert ", ".join(shipped_recipes()) == _SHIPPED  # what the help says
    for name in shipped_recipes():
        recipe = make_recipe(read_recipe(name))
        variant_config(recipe.arch or "", **recipe.model, drop_path=recipe.drop_path)


@pytest.mark.parametrize("name", ["imagenet_s", "imagenet_l"])
def test_the_papers_recipe_is_the_default(name: str) -> None:
    recipe, default = make_recipe(read_recipe(name)), Recipe()
    for each in (recipe, default):
        assert (each.epochs, each.batch_size, each.learning_rate, each.schedule) == (300, 1024, 1e-3, "cosine")
    assert (default.mixup, default.cutmix, default.erasing, default.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert recipe.arch == {"imagenet_s": "dmformer_s", "imagenet_l": "dmformer_l"}[name]


def test_the_papers_schedules_of_ade20k() -> None:
    fpn, upernet = (make_recipe(read_recipe(f"ade20k_{name}")) for name in ("fpn", "upernet"))
    assert (fpn.steps, fpn.batch_size, upernet.steps, upernet.batch_size) == (40_000, 16, 160_000, 16)
    rates = [[learning_rate(r, step, r.steps or 0, 1263) for step in (0, 1499, 1500, 20_000, (r.steps or 0) - 1)]
             for r in (fpn, upernet)]  # fmt: skip
    assert rates[0][0] == 2e-4
    assert rates[0][3] == pytest.approx(2e-4 * 0.5**0.9)
    assert rates[1][0] == pytest.approx(6e-5 / 1501)
    assert max(rates[1]) == rates[1][2] == 6e-5
    assert rates[1][3] == pytest.approx(6e-5 * (160_000 - 20_000) / (160_000 - 1500))
    assert rates[1][4] < 1e-9


def test_the_rate_rises_falls_and_scales_with_the_batch() -> None:
    recipe = small(warmup_epochs=2, batch_size=16, min_learning_rate=1e-4)
    rates = [learning_rate(recipe, step, 40, 4) for step in range(40)]
    assert rates[:8] == pytest.approx([2e-2 * (step + 1) / 9 for step in range(8)])
    assert rates.index(max(rates)) == 8
    assert rates[8] == pytest.approx(2e-2)  # 1e-2 for 8 images
    assert rates[24] == pytest.approx((2e-2 + 2e-4) / 2)
    assert all(later < earlier for earlier, later in pairwise(rates[8:]))
    assert 2e-4 < rates[-1] < 3e-4


def test_weight_decay_is_for_matrices_and_kernels_alone() -> None:
    model, _ = initial_network(find_start(small(), None), ("a", "b"), 0)
    decayed, others = make_optimizer(model, small()).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05
    assert others["weight_decay"] == 0.0
    assert all(".weight" in names[id(p)] and "norm" not in names[id(p)] for p in decayed["params"])
    assert {names[id(p)].rpartition(".")[2] for p in others["params"]} == {"weight", "bias", "gamma"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epoch": 3, "lr": 1, "seed": 1}, "unknown key epoch, lr; known: arch, model"),
        ({"epochs": "many"}, "Expected `int`, got `str` - at `$.epochs`"),
        ({"epochs": 0}, "Expected `int` >= 1"),
        ({"crop_scale": [0.9, 0.1]}, "crop_scale is 0.9 to 0.1; expected the smaller one first"),
        ({"crop_scale": [0.9, 1.1]}, "crop_scale goes up to 1.1; expected at most 1"),
        ({"precision": "int8"}, "Invalid enum value 'int8'"),
        ({"preprocessing": {"size": 3}}, "unknown field `size`"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as failure:
        make_recipe(values)
    assert words in str(failure.value)
    assert len(str(failure.value).splitlines()) == 1


# --- What is refused --------------------------------------------------------------------------------------------------


def spoil_nothing(data: Path) -> None:
    del data


def no_images(data: Path) -> None:
    for path in (data / "train").rglob("*.png"):
        path.unlink()


def an_empty_class(data: Path) -> None:
    (data / "train" / "green").mkdir()


def one_class(data: Path) -> None:
    import shutil

    shutil.rmtree(data / "train" / "red")


def another_class(data: Path) -> None:
    (data / "val" / "green").mkdir()


def unreadable(data: Path) -> None:
    (data / "train" / "red" / "3.png").write_bytes(b"\x89PNG no image")


def unreadable_validation(data: Path) -> None:
    (data / "val" / "red" / "3.png").write_bytes(b"\x89PNG no image")


def no_validation(data: Path) -> None:
    (data / "val").rename(data / "test")


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (no_images, [], "no image in"),
        (an_empty_class, [], "green: no image in it; expected some of every class"),
        (one_class, [], "train: 1 class folders; expected two or more"),
        (another_class, [], "green not in"),
        (unreadable, ["--workers", "1"], "red/3.png: no image that is read here"),
        (unreadable_validation, [], "red/3.png: no image that is read here"),
        (no_validation, [], "no folder"),
        (spoil_nothing, ["--batch-size", "64"], "32 training images; expected at least batch_size, which is 64"),
        (spoil_nothing, ["--accumulate", "3"], "batch_size is 8 for 1 processes with accumulate 3"),
        (spoil_nothing, ["--accumulate", "8"], "of 2 images a part at least, for BatchNorm"),
        (spoil_nothing, ["--set", "epoch=3"], "unknown key epoch"),
        (spoil_nothing, ["--set", "epoch"], "--set 'epoch'; expected KEY=VALUE"),
        (spoil_nothing, ["--recipe", "nothing"], "no recipe 'nothing'; expected a TOML file or one of ade20k_fpn"),
        (spoil_nothing, ["--resume"], "nothing to resume"),
        (spoil_nothing, ["--device", "tpu"], "expected cpu, cuda or cuda:N"),
        (spoil_nothing, ["--arch", "swin_t"], "unknown architecture 'swin_t'"),
        (spoil_nothing, ["--set", 'model={"task":"features"}'], "task features has nothing to train"),
    ],
)  # fmt: skip
def test_unusable_input_is_one_line_and_exit_code_2(
    spoil: Callable[[Path], None], options: list[str], words: str, colours: Path, tmp_path: Path,
    inline: Callable[..., Run],
) -> None:  # fmt: skip
    import shutil

    data = Path(shutil.copytree(colours, tmp_path / "data"))
    spoil(data)
    (tmp_path / "small.toml").write_text(toml(SMALL))
    settings = [f"preprocessing={json.dumps(SMALL['preprocessing'])}", f"model={json.dumps(SMALL['model'])}"]
    given = [text for value in settings for text in ("--set", value)]
    recipes = [] if "--recipe" in options else ["--recipe", "small.toml"]
    done = inline("train", "--data", data, "--output", "run", *recipes, *given, *options)
    assert done.code == 2, done.err
    assert words in done.error_line
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_folder_with_something_in_it_is_left_alone(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty; expected a new folder, or `resume`"):
        train(colours, tmp_path, small())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_loss_that_is_no_number_ends_the_run(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="the loss became nan before step 4; expected a number: lower learning_rate"):
        train(colours, tmp_path / "run", small(learning_rate=1e30, **STILL))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_gpu_that_is_not_there_is_exit_code_3(colours: Path, tmp_path: Path, inline: Callable[..., Run]) -> None:
    if torch.cuda.device_count() > 7:
        pytest.skip("there is one")
    done = inline("train", "--data", colours, "--output", "run", "--arch", "dmformer_nano", "--device", "cuda:7")
    assert done.code == 3
    assert "no GPU 7" in done.error_line


def test_a_plan_counts_steps() -> None:
    plan = TrainingPlan(small(epochs=3, interval=5), 31, 2)
    assert (plan.part, plan.epoch, plan.steps, plan.interval) == (4, 3, 9, 5)
    assert TrainingPlan(small(steps=7), 31, 1).steps == 7
