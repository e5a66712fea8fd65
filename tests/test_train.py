"""``dmformer train``: what it learns, that it goes on where it was killed, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmformer.commands.train import _SHIPPED
from dmformer.data.images import load_pixels
from dmformer.errors import StageFailed, UsageError
from dmformer.models.checkpoint import load_checkpoint
from dmformer.models.dmformer import variant_config
from dmformer.train.api import train
from dmformer.train.images import StepSampler
from dmformer.train.journal import read_rows
from dmformer.train.optimization import learning_rate, make_optimizer
from dmformer.train.recipe import Recipe, make_recipe, read_recipe, shipped_recipes
from dmformer.train.run import Plan
from dmformer.train.start import build, find_start
from tests.networks import one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Run

COLOURS = {"blue": (40, 60, 220), "red": (220, 60, 40)}
# Everything that is random is on: stochastic depth, RandAugment, mixup and CutMix, erasing, crops and flips.
SMALL = {
    "arch": "dmformer_nano",
    "model": {"widths": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "learning_rate_batch": 8,
    "warmup_epochs": 0.5,
    "drop_path": 0.2,
    "ema_decay": 0.5,
    "preprocessing": {"image_size": 32, "crop_fraction": 1.0},
    "workers": 0,
}
STILL = {"randaugment_operations": 0, "erasing": 0, "mixup": 0, "cutmix": 0, "drop_path": 0, "crop_scale": [1, 1]}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise around one of two colours: 16 images of each to train on, 5 to validate on."""
    folder = tmp_path_factory.mktemp("colours")
    draw = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 5)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(draw.normal(colour, 40, (36, 44, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bright square somewhere on noise, in ADE20K's folders; a stripe of each annotation is ignored."""
    folder = tmp_path_factory.mktemp("squares")
    draw = np.random.default_rng(0)
    for part, count in (("training", 8), ("validation", 3)):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(count):
            pixels, labels = draw.integers(0, 90, (64, 80, 3)), np.ones((64, 80), np.uint8)
            top, left = draw.integers(8, 32, 2)
            pixels[top : top + 24, left : left + 24] = 230
            labels[top : top + 24, left : left + 24] = 2
            labels[:4] = 0
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / part / f"{index}.png")
            Image.fromarray(labels).save(folder / "annotations" / part / f"{index}.png")
    (folder / "classes.txt").write_text("ground\nsquare\n")
    return folder


def small(**changes: Any) -> Recipe:
    return make_recipe({**SMALL, **changes})


def segmentation(**changes: Any) -> Recipe:
    model = {**SMALL["model"], "decoder_widths": [8, 8]}  # type: ignore[dict-item]
    changes = {"largest_class": 1.0, "resize_range": [0.5, 1.5], "color_jitter": 0.2, **changes}
    return small(arch="dmformer_nano_fpn", batch_size=4, model=model, **changes)


def toml(values: dict[str, Any]) -> str:
    """Those of the values that are no tables."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).state


@pytest.fixture(scope="module")
def trained(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of the small recipe."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(colours, folder, small())
    return folder


# --- What comes out ---------------------------------------------------------------------------------------------------


def test_the_command_trains_a_checkpoint_that_is_as_good_as_it_says(
    colours: Path, tmp_path: Path, inline: Callable[..., Run]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(toml({**SMALL, **STILL}))
    nested = [f"{name}={json.dumps(SMALL[name])}" for name in ("model", "preprocessing")]
    options = ["--set", nested[0], "--set", nested[1], "--epochs", 4, "--json", "-"]
    done = inline("train", "--data", colours, "--output", "run", "--recipe", recipe, *options)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["top1"] == 1.0
    checkpoint = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert checkpoint.classes == ("blue", "red")
    assert checkpoint.preprocessing.image_size == 32
    assert checkpoint.training["held_out_top1"] == 1.0
    assert (checkpoint.training["held_out_images"], checkpoint.training["recipe"]["epochs"]) == (10, 4)
    paths = sorted((colours / "val").rglob("*.png"))
    inputs = torch.from_numpy(checkpoint.preprocessing.normalize(load_pixels(paths, checkpoint.preprocessing)))
    with torch.inference_mode():
        found = checkpoint.model()(inputs).argmax(1).tolist()
    assert [checkpoint.classes[index] for index in found] == [path.parent.name for path in paths]
    rows = read_rows(tmp_path / "run" / "log.jsonl")
    assert [row.step for row in rows] == [4, 8, 12, 16]
    assert rows[-1].loss < rows[0].loss
    assert not list((tmp_path / "run").glob(".*"))


def test_segmentation_learns(squares: Path, tmp_path: Path) -> None:
    settings = {"drop_path": 0, "label_smoothing": 0, "learning_rate": 4e-2, "interval": 20}
    made = train(squares, tmp_path / "run", segmentation(epochs=20, **settings))
    assert made.scores["miou"] > 0.7
    checkpoint = load_checkpoint(made.checkpoint)
    assert (checkpoint.config.task, checkpoint.config.decoder, checkpoint.classes) == (
        "segmentation", "fpn", ("ground", "square"),
    )  # fmt: skip
    assert checkpoint.training["held_out_miou"] == pytest.approx(made.scores["miou"], abs=1e-6)


def test_the_same_run_gives_the_same_bytes_whatever_was_drawn_before(
    colours: Path, trained: Path, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    train(colours, tmp_path / "run", small(workers=2))
    again = (tmp_path / "run" / "model.safetensors").read_bytes()
    first = (trained / "model.safetensors").read_bytes()
    assert again.replace(b'"workers\\":2', b'"workers\\":0') == first


def test_every_setting_changes_the_weights(colours: Path, tmp_path: Path) -> None:
    def after_three_steps(name: str, **changes: Any) -> torch.Tensor:
        made = train(
            colours, tmp_path / name, make_recipe({**SMALL, "steps": 3, "interval": 3, "warmup_steps": 0, **changes})
        )
        found = tensors(made.checkpoint)
        assert all(torch.isfinite(tensor).all() for tensor in found.values()), name
        return found["head.weight"]

    before = after_three_steps("before")
    others = {
        "precision": "bf16", "ema_decay": 0, "clip_norm": 0.01, "schedule": "poly", "seed": 1, "label_smoothing": 0,
        "weight_decay": 1, "min_learning_rate": 9e-3, "drop_path": 0.9, "erasing": 1, "mixup": 0, "cutmix": 0,
        "horizontal_flip": 0, "randaugment_magnitude": 20, "accumulate": 2, "warmup_steps": 1,
    }  # fmt: skip
    for name, value in others.items():
        assert not torch.equal(after_three_steps(name, **{name: value}), before), name


def test_what_is_saved_is_the_average(trained: Path) -> None:
    state = torch.load(trained / "last.pt", weights_only=True)["state"]
    saved = tensors(trained / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, state["average"][f"module.{name}"]), name
    assert any(not torch.equal(tensor, state["model"][name]) for name, tensor in saved.items())


# --- Killed, and going on ---------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
import torch
from dmformer.train.api import train
from tests.test_train import small
torch.set_num_threads(1)
done = 0
@contextmanager
def stage(name, parts):
    def advance():
        global done
        done += 1
        if done == 6:
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance
train(Path(sys.argv[1]), Path(sys.argv[2]), small(precision="fp16"), stage=stage)
"""


def test_after_kill_9_a_resumed_run_ends_in_the_same_bytes(colours: Path, tmp_path: Path) -> None:
    """Killed in the second of two epochs, two steps after the snapshot."""
    recipe = small(precision="fp16")  # with a scale of the loss, which is kept as well
    whole = train(colours, tmp_path / "whole", recipe)
    run = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(colours), str(run)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row.step for row in read_rows(run / "log.jsonl")] == [4]
    assert not (run / "model.safetensors").exists()
    (run / ".last.pt.123").write_bytes(b"half")  # what a kill while a snapshot is written leaves
    torch.manual_seed(5)
    resumed = train(colours, run, recipe, resume=True)
    assert resumed.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    assert [row.step for row in read_rows(run / "log.jsonl")] == [4, 8]
    assert not (run / ".last.pt.123").exists()


def test_a_finished_run_has_nothing_left_to_do(colours: Path, trained: Path) -> None:
    before = (trained / "model.safetensors").read_bytes()
    made = train(colours, trained, small(), resume=True)
    assert made.checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 4}, "batch_size is 4, was 8; images in a part of a step is 4, was 8"),
        ({"epochs": 3}, "epochs is 3, was 2"),
        ({"accumulate": 2}, "images in a part of a step is 4, was 8"),
    ],
)
def test_resuming_with_other_options_is_refused(
    changes: dict[str, Any], words: str, colours: Path, trained: Path
) -> None:
    with pytest.raises(UsageError) as failure:
        train(colours, trained, small(**changes), resume=True)
    assert words in str(failure.value)
    assert "expected the options that the run was started with" in str(failure.value)


def test_resuming_with_other_images_is_refused(colours: Path, trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(colours, tmp_path / "other")
    (tmp_path / "other" / "train" / "red" / "0.png").rename(tmp_path / "other" / "train" / "red" / "new.png")
    with pytest.raises(UsageError, match=r"data \(SHA-256 of its names\) is"):
        train(tmp_path / "other", trained, small(), resume=True)


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize("content", [b"", b"no snapshot", Dangerous()])
def test_a_snapshot_that_is_none_is_refused(content: object, colours: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match="cannot be read") as failure:
        train(colours, tmp_path, small(), resume=True)
    assert len(str(failure.value).splitlines()) == 1


# --- Several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one_does_in_two_parts(colours: Path, tmp_path: Path) -> None:
    """Equal but for the order of additions.

    BatchNorm's running statistics are updated twice a step by one process and once by each of two, so that after eight
    steps they have gone unequally far on the same way.
    """
    recipe = small(ema_decay=0)
    alone = train(colours, tmp_path / "one", small(ema_decay=0, accumulate=2))
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_dict()))
    script = (
        "import json, sys; from pathlib import Path; import torch; torch.set_num_threads(1);"
        "from dmformer.train.api import train; from dmformer.train.recipe import make_recipe;"
        "train(Path(sys.argv[1]), Path(sys.argv[2]), make_recipe(json.loads(Path(sys.argv[3]).read_text())))"
    )
    (tmp_path / "main.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [tmp_path / "main.py", colours, tmp_path / "two", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    one, two = tensors(alone.checkpoint), tensors(tmp_path / "two" / "model.safetensors")
    start, _ = build(find_start(recipe, None), ("blue", "red"), recipe.seed)
    for name, tensor in one.items():
        moved = (tensor - start.state_dict()[name]).abs().max()
        limit = 0.5 if "running_" in name else 1e-3
        assert (two[name] - tensor).abs().max() <= limit * moved + 1e-6, name
    rows = [read_rows(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [row.step for row in rows[1]] == [4, 8]
    assert [row.loss for row in rows[1]] == pytest.approx([row.loss for row in rows[0]], rel=1e-5)


@pytest.mark.parametrize("steps", [range(12), range(5, 12)])
def test_parts_of_a_step_are_the_same_however_they_are_shared_out(steps: range) -> None:
    def parts(world: int, accumulate: int) -> list[list[Any]]:
        recipe = small(accumulate=accumulate)
        each = [list(StepSampler(27, recipe, steps, rank, world)) for rank in range(world)]
        return [part for together in zip(*each, strict=True) for part in together]

    one = parts(1, 4)
    assert one == parts(2, 2) == parts(4, 1)
    assert [len(part) for part in one] == [2] * 4 * len(steps)
    whole = [place for part in one for place in part]
    for epoch in range(1, 4):  # three steps of eight images, three images are left out
        seen = [place.image for place in whole if place.epoch == epoch]
        assert len(set(seen)) == len(seen)
        assert epoch == 1 or len(seen) == 24 or epoch == 3
    full = list(StepSampler(27, small(), range(12), 0, 1))
    assert list(StepSampler(27, small(), range(5, 12), 0, 1)) == full[5:]


# --- From another checkpoint ------------------------------------------------------------------------------------------


def test_channels_must_be_the_networks_and_colours_need_three() -> None:
    with pytest.raises(UsageError, match="preprocessing gives channels 'RGB'; expected as many as the network's 1"):
        find_start(small(model={"in_channels": 1}), None)
    with pytest.raises(UsageError, match="expected both 0 with channels 'L'"):
        find_start(small(model={"in_channels": 1}, preprocessing=None), None)
    grey = find_start(small(model={"in_channels": 1}, preprocessing=None, randaugment_operations=0), None)
    assert grey.preprocessing.channels == "L"


def test_the_head_is_drawn_anew_for_other_classes(trained: Path, colours: Path) -> None:
    start = find_start(small(arch=None, model={}), trained / "model.safetensors")
    assert start.preprocessing.image_size == 32
    model, notes = build(start, ("a", "b", "c"), 0)
    assert "2 of head are drawn anew (2 classes there, 3 here)" in notes[0]
    before, found = tensors(trained / "model.safetensors"), model.state_dict()
    assert {name for name in before if not torch.equal(before[name], found[name])} == {"head.weight", "head.bias"}
    assert found["head.weight"].shape == (3, 8)
    same, notes = build(start, ("blue", "red"), 0)
    assert notes == ["every tensor was taken from --weights"]
    assert torch.equal(same.state_dict()["head.weight"], before["head.weight"])
    others, _ = build(start, ("cat", "dog"), 0)
    assert not torch.equal(others.state_dict()["head.weight"], before["head.weight"])


def test_a_decoder_starts_on_the_stages_of_a_classifier(trained: Path) -> None:
    wanted = {"arch": "dmformer_nano_fpn", "model": {"decoder_widths": [8, 8]}}
    with pytest.raises(UsageError, match="--weights holds custom; expected the stages of dmformer_nano_fpn"):
        find_start(small(**wanted), trained / "model.safetensors")
    from dmformer.assets import DEMONSTRATION_CHECKPOINT

    start = find_start(small(**wanted, preprocessing=None), DEMONSTRATION_CHECKPOINT)
    assert (start.config.task, start.config.drop_path, start.preprocessing.image_size) == ("segmentation", 0.2, 512)
    model, notes = build(start, ("a", "b"), 0)
    stages = {name: tensor for name, tensor in tensors(DEMONSTRATION_CHECKPOINT).items() if name.startswith("stages.")}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stages.items())
    assert "of decoder are drawn anew" in notes[0]


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
    model, _ = build(find_start(small(), None), ("a", "b"), 0)
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
        (unreadable, ["--workers", "1"], "red/3.png: not an image that Pillow can read"),
        (unreadable_validation, [], "red/3.png: not an image that Pillow can read"),
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
    with pytest.raises(UsageError, match="is not empty; expected a new folder, or --resume"):
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
    plan = Plan(small(epochs=3, interval=5), 31, 2)
    assert (plan.part, plan.epoch, plan.steps, plan.interval) == (4, 3, 9, 5)
    assert Plan(small(steps=7), 31, 1).steps == 7
