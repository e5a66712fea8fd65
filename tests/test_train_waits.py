"""A run of training ends where what it waits for does not come, and its average has learnt something."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import StageFailed, UsageError
from dmformer.train import run as runs
from dmformer.train.api import _average_behind
from dmformer.train.recipe import Recipe


class Dying(torch.utils.data.Dataset[Any]):
    """Images whose reading process ends without a word."""

    collate = staticmethod(torch.utils.data.default_collate)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if torch.utils.data.get_worker_info() is not None:
            os._exit(3)
        return index


def part_of_a_run(**changed: Any) -> Any:
    """As much of a run as reads images."""
    names = {
        "recipe": Recipe(workers=2),
        "plan": SimpleNamespace(part=64),
        "preprocessing": Preprocessing(image_size=224),
        "pixel_classes": None,
    }
    return SimpleNamespace(**{**names, **changed})


def test_a_reading_process_that_dies_ends_the_run() -> None:
    with pytest.raises(StageFailed, match=r"a process that reads images gave none: DataLoader worker.*`workers` 0"):
        list(runs.Run._read(part_of_a_run(), Dying()))  # type: ignore[arg-type]
    assert len(list(runs.Run._read(part_of_a_run(recipe=Recipe(workers=0)), Dying()))) == 4  # type: ignore[arg-type]


def test_shared_memory_is_looked_at_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_bavail=64, f_frsize=1 << 20))
    with pytest.raises(UsageError, match=r"/dev/shm has 67\.1 MB free, and 2 processes .* need 192\.7; .*`workers` 0"):
        runs.Run.check_shared_memory(part_of_a_run())
    runs.Run.check_shared_memory(part_of_a_run(plan=SimpleNamespace(part=8)))
    runs.Run.check_shared_memory(part_of_a_run(recipe=Recipe(workers=0)))


PEER = """
import os, sys
from dmformer.errors import StageFailed
from dmformer.train.processes import join_processes
try:
    with join_processes("cpu") as group:
        group.wait()
        if group.rank == 1:
            os._exit(0)  # without a word
        group.wait()
except StageFailed as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_process_of_the_run_that_ends_without_a_word_ends_the_others() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", PEER], env={**environment, "RANK": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in "01"
    )
    said, _ = first.communicate(timeout=120)
    assert said.startswith("a process of the run does not answer: ")
    assert said.endswith("expected 2 processes that live and reach each other: its own message says why it ended\n")
    assert second.communicate(timeout=60)[0] == ""
    assert (first.returncode, second.returncode) == (0, 0)


def test_the_average_of_a_short_run_has_learnt() -> None:
    model = nn.Linear(1, 1)
    average = AveragedModel(model, multi_avg_fn=runs.warmed_up_averaging(0.9999), use_buffers=True)
    for step in range(72):
        nn.init.constant_(model.weight, step)
        average.update_parameters(model)
        if step == 40:  # as a run that is resumed
            kept = average.state_dict()
            average = AveragedModel(model, multi_avg_fn=runs.warmed_up_averaging(0.9999), use_buffers=True)
            average.load_state_dict(kept)
    assert 60 < average.module.weight.item() < 71


def test_the_decay_asked_for_is_reached_and_kept() -> None:
    averaged, current = [torch.zeros(1)], [torch.ones(1)]
    runs.warmed_up_averaging(0.9)(averaged, current, torch.tensor(1000))
    assert float(averaged[0]) == pytest.approx(0.1)


def test_an_average_far_behind_is_warned_of() -> None:
    recipe = Recipe(ema_decay=0.9999)
    said = _average_behind({"top1": 0.06, "top5": 0.5}, {"top1": 0.94, "top5": 1.0}, recipe)
    assert said is not None
    assert "top1 is 6.0%, and 94.0% with the weights of the last step" in said
    assert _average_behind({"top1": 0.92}, {"top1": 0.94}, recipe) is None
