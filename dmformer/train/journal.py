"""The log of a run: a line of JSON for each validation, and TensorBoard's file where that is installed.

What a run needs to go on after it was killed, and how it is kept.

Random draws are functions of the seed, the step and the image, and the learning rate is one of the step, so that no
generator, sampler or scheduler has a state: the step says it all. What is left is the weights, their average, the
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

from dmformer.errors import StageFailed, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


VERSION = 1


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: after a crash there is the old one or the new one, whole.

    Raises:
        StageFailed: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StageFailed(f"{path} could not be written: {error.strerror}") from error


def save_snapshot(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a snapshot.

    Args:
        path: the file, which is replaced.
        identity: what makes the run the run that it is, of JSON types; compared when it is resumed.
        state: tensors, numbers and containers of them.

    Raises:
        StageFailed: it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "identity": dict(identity), "state": dict(state)}, buffer)
    write_atomically(path, buffer.getvalue())


def load_snapshot(path: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The state of the run that ``identity`` describes; read without running code from the file.

    Raises:
        UsageError: there is none, it is damaged, or it is of a run that is another in some way: all are named.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        version, before, state = content["version"], content["identity"], content["state"]
    except FileNotFoundError as error:
        raise UsageError(f"nothing to resume: no {path}; expected the folder of a run that was interrupted") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"snapshot {path} cannot be read ({first_line(error)}); start anew in another folder"
        ) from error
    if version != VERSION:
        raise UsageError(f"snapshot {path} is of version {version}; expected {VERSION}: resume with the older dmformer")
    changed = [
        f"{name} is {identity.get(name)!r}, was {before.get(name)!r}"
        for name in sorted({*identity, *before})
        if identity.get(name) != before.get(name)
    ]
    if changed:
        raise UsageError(f"--resume: {'; '.join(changed)}; expected the options that the run was started with")
    found: dict[str, Any] = state
    return found


LOG_NAME = "log.jsonl"


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was found after some step; shares from 0 to 1.

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
        """The measures of accuracy that there are."""
        named = {name: getattr(self, name) for name in ("top1", "top5", "miou", "pixel_accuracy")}
        return {name: value for name, value in named.items() if value is not None}


class Journal:
    """Writes rows into a folder; those beyond the step from which a run goes on are dropped."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / LOG_NAME
        self.rows = [row for row in read_rows(self.path) if row.step <= first_step] if first_step else []
        self.board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def add(self, row: Row) -> None:
        """Write one more row, so that the file is whole at any time.

        Raises:
            StageFailed: the file cannot be written.
        """
        self.rows.append(row)
        write_atomically(self.path, b"".join(msgspec.json.encode(each) + b"\n" for each in self.rows))
        if self.board is not None:
            for name, value in {"loss": row.loss, "learning_rate": row.learning_rate, **row.scores}.items():
                self.board.add_scalar(name, value, row.step)
            self.board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.board is not None:
            self.board.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a log; none where there is no file."""
    if not path.is_file():
        return []
    return [msgspec.json.decode(line, type=Row) for line in path.read_bytes().splitlines()]
