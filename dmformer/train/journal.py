"""What a run keeps in its folder: its log, and a snapshot from which it goes on after it was killed.

The log has a line of JSON for each validation; where TensorBoard is installed, its file is written as well.

Random draws are functions of the seed, the step and the image, and the learning rate is one of the step, so that no
generator, sampler or scheduler has a state: the step number is enough. A snapshot adds the weights, their average, the
optimizer and the scale of the loss.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from dmformer.errors import UsageError, first_line
from dmformer.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LOG_NAME = "log.jsonl"
SNAPSHOT_NAME = "last.pt"
_SNAPSHOT_VERSION = 2


def _replace_file(path: Path, data: bytes) -> None:
    """Replace a file: after a crash of the machine there is the old one or the new one, whole.

    Raises:
        StageFailed: the file cannot be written.
    """
    with whole_file(path) as staging, staging.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def save_snapshot(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a snapshot.

    Args:
        path: the file, which is replaced.
        identity: what decides the result of the run, of JSON types; compared when the run is resumed.
        state: tensors, numbers and containers of them.

    Raises:
        StageFailed: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"version": _SNAPSHOT_VERSION, "identity": dict(identity), "state": dict(state)}, buffer)
    _replace_file(path, buffer.getvalue())


def load_snapshot(path: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the state of the run that ``identity`` describes, read without running code from the file.

    Raises:
        UsageError: there is no snapshot, it is damaged, or it is of a run with another identity: all differences are
            named.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        version, before = content["version"], content["identity"]
        state: dict[str, Any] = content["state"]
    except FileNotFoundError as error:
        raise UsageError(f"nothing to resume: no {path}; expected the folder of a run that was interrupted") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"snapshot {path} cannot be read ({first_line(error)}); start anew in another folder"
        ) from error
    if version != _SNAPSHOT_VERSION:
        raise UsageError(
            f"snapshot {path} is of version {version}; expected {_SNAPSHOT_VERSION}: resume with the older dmformer"
        )
    changed = [
        f"{name} is {identity.get(name)!r}, was {before.get(name)!r}"
        for name in sorted({*identity, *before})
        if identity.get(name) != before.get(name)
    ]
    if changed:
        raise UsageError(f"`resume`: {'; '.join(changed)}; expected the options that the run was started with")
    return state


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the log: a validation; accuracies are shares from 0 to 1.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data done.
        loss: mean over the steps since the last row.
        learning_rate: of the last step.
        seconds: since the last row, validation included.
        top1: accuracy on the validation images (classification).
        top5: share of them whose class is among the first five (classification).
        miou: mean intersection over union (segmentation).
        pixel_accuracy: share of labelled pixels that are right (segmentation).
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    seconds: float
    top1: float | None = None
    top5: float | None = None
    miou: float | None = None
    pixel_accuracy: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """Return the accuracies of the task by name."""
        named = {name: getattr(self, name) for name in ("top1", "top5", "miou", "pixel_accuracy")}
        return {name: value for name, value in named.items() if value is not None}


class Journal:
    """The log in a folder; when a run goes on from a step, the rows after that step are dropped."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / LOG_NAME
        self.rows = [row for row in read_rows(self.path) if row.step <= first_step] if first_step else []
        self.board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def add(self, row: Row) -> None:
        """Add a row, and write the log anew, so that the file is whole at any time.

        Raises:
            StageFailed: the file cannot be written.
        """
        self.rows.append(row)
        _replace_file(self.path, b"".join(msgspec.json.encode(each) + b"\n" for each in self.rows))
        if self.board is not None:
            for name, value in {"loss": row.loss, "learning_rate": row.learning_rate, **row.scores}.items():
                self.board.add_scalar(name, value, row.step)
            self.board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.board is not None:
            self.board.close()


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a log; none where there is no file."""
    if not path.is_file():
        return []
    return [msgspec.json.decode(line, type=Row) for line in path.read_bytes().splitlines()]
