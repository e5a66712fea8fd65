"""The log of a run: a line of JSON for each validation, and TensorBoard's file where that is installed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import msgspec

from dmformer.train.snapshot import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

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
