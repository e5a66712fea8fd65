"""``dmformer train``: what it learns, that it goes on where it was killed, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmformer.data.images import load_pixels
from dmformer.errors import StageFailed, UsageError
from dmformer.models.checkpoint import load_checkpoint
from dmformer.train.api import find_start, initial_network, train
from dmformer.train.images import StepSampler
from dmformer.train.journal import read_rows
from dmformer.train.recipe import Recipe, make_recipe
from tests.networks import one_thread
from tests.training import SMALL, STILL, small, tensors, toml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Run


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


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


def segmentation(**changes: Any) -> Recipe:
    model = {**SMALL["model"], "decoder_widths": [8, 8]}  # type: ignore[dict-item]
    changes = {"largest_class": 1.0, "resize_range": [0.5, 1.5], "color_jitter": 0.2, **changes}
    return small(arch="dmformer_nano_fpn", batch_size=4, model=model, **changes)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_setting_changes_the_weights(colours: Path, tmp_path: Path) -> None:
    def after_three_steps(name: str, **changes: Any) -> torch.Tensor:
        made = train(
            colours,
            tmp_path / name,
            make_recipe(
                {**SMALL, "steps": 3, "interval": 3, "warmup_steps": 0, "randaugment_operations": 0, **changes}
            ),
        )
        found = tensors(made.checkpoint)
        assert all(torch.isfinite(tensor).all() for tensor in found.values()), name
        return found["head.weight"]

    before = after_three_steps("before")
    others = {
        "precision": "bf16", "ema_decay": 0, "clip_norm": 0.01, "schedule": "poly", "seed": 1, "label_smoothing": 0,
        "weight_decay": 1, "min_learning_rate": 9e-3, "drop_path": 0.9, "mixup": 0, "cutmix": 0, "warmup_steps": 1,
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

RUN = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
import torch
from dmformer.train.api import train
from tests.training import small
data, output, how = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(len(how))
done = 0
@contextmanager
def stage(name, parts):
    def advance():
        global done
        done += name != "read every image once"  # steps are counted, not the images before the first
        if how == "killed" and done == 6:
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance
recipe = small(precision="fp16")  # with a scale of the loss, which is kept as well
train(Path(data), Path(output), recipe, resume=how == "resumed", stage=stage)
"""


@pytest.mark.slow
def test_after_kill_9_a_resumed_run_ends_in_the_same_bytes(colours: Path, tmp_path: Path) -> None:
    """Killed in the second of two epochs, two steps after the snapshot."""

    def trained_in(output: Path, how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", RUN, str(colours), str(output), how]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, check=False, capture_output=True, text=True, timeout=300)

    whole, run = tmp_path / "whole", tmp_path / "killed"
    assert trained_in(whole, "whole").returncode == 0
    done = trained_in(run, "killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row.step for row in read_rows(run / "log.jsonl")] == [4]
    assert not (run / "model.safetensors").exists()
    for name in (".last.pt.123", ".last.pt-0123456789abcdef"):  # what a kill while a snapshot is written leaves
        (run / name).write_bytes(b"half")
    assert trained_in(run, "resumed").returncode == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [row.step for row in read_rows(run / "log.jsonl")] == [4, 8]
    assert not list(run.glob(".*"))


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


def test_resuming_with_the_same_names_and_other_contents_is_refused(
    colours: Path, trained: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(colours, tmp_path / "other")
    folder = tmp_path / "other" / "val"
    shutil.copy(folder / "red" / "0.png", folder / "blue" / "0.png")
    with pytest.raises(UsageError, match=r"`resume`: data \(sum of its files' SHA-256\) is '[0-9a-f]{64}', was"):
        train(tmp_path / "other", trained, small(), resume=True)


def test_a_disk_that_is_full_at_the_last_write_loses_nothing(
    colours: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(path: Path, _: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dmformer.train.api.save_checkpoint", write_half)
    with pytest.raises(StageFailed, match=r"model\.safetensors' could not be written: No space left on device$"):
        train(colours, tmp_path / "run", small())
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_file()) == ["last.pt", "log.jsonl"]
    monkeypatch.undo()
    train(colours, tmp_path / "run", small(), resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


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
    start, _ = initial_network(find_start(recipe, None), ("blue", "red"), recipe.seed)
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
    model, notes = initial_network(start, ("a", "b", "c"), 0)
    assert "2 of head are drawn anew (2 classes there, 3 here)" in notes[0]
    before, found = tensors(trained / "model.safetensors"), model.state_dict()
    assert {name for name in before if not torch.equal(before[name], found[name])} == {"head.weight", "head.bias"}
    assert found["head.weight"].shape == (3, 8)
    same, notes = initial_network(start, ("blue", "red"), 0)
    assert notes == ["every tensor was taken from the weights given"]
    assert torch.equal(same.state_dict()["head.weight"], before["head.weight"])
    others, _ = initial_network(start, ("cat", "dog"), 0)
    assert not torch.equal(others.state_dict()["head.weight"], before["head.weight"])


def test_a_decoder_starts_on_the_stages_of_a_classifier(trained: Path) -> None:
    wanted = {"arch": "dmformer_nano_fpn", "model": {"decoder_widths": [8, 8]}}
    with pytest.raises(UsageError, match="`weights` holds custom; expected the stages of dmformer_nano_fpn"):
        find_start(small(**wanted), trained / "model.safetensors")
    from dmformer.assets import DEMONSTRATION_CHECKPOINT

    start = find_start(small(**wanted, preprocessing=None), DEMONSTRATION_CHECKPOINT)
    assert (start.config.task, start.config.drop_path, start.preprocessing.image_size) == ("segmentation", 0.2, 512)
    model, notes = initial_network(start, ("a", "b"), 0)
    stages = {name: tensor for name, tensor in tensors(DEMONSTRATION_CHECKPOINT).items() if name.startswith("stages.")}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stages.items())
    assert "of decoder are drawn anew" in notes[0]
