"""The processes of one training run: one alone, or those that ``torchrun`` started, on one machine or on many."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from dmformer.errors import StageFailed, UnavailableError, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

_PEER_LIMIT = timedelta(minutes=30)  # PyTorch's own for gloo


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        device: the device that this process computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Return whether this process is the one that writes files and messages."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum values over all processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def average_buffers(self, model: nn.Module) -> None:
        """Give every process the mean of all processes' BatchNorm statistics, each of which saw its own images only."""
        for buffer in model.buffers():
            if self.world > 1 and buffer.is_floating_point():
                self.total(buffer).div_(self.world)

    def wait(self) -> None:
        """Wait until every process has come to this call."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def join_processes(device: str | None) -> Iterator[Processes]:
    """Join the other processes of the run, by ``torchrun``'s environment variables, for the length of the block.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; ``None`` takes a GPU where there is one, for each process its own.

    Raises:
        UsageError: the device is none to train on.
        UnavailableError: this machine does not have the device.
        StageFailed: another process ended, or did not answer within half an hour.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")), world)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    try:
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PEER_LIMIT)
        try:
            yield Processes(distributed.get_rank(), world, chosen)
        finally:
            distributed.destroy_process_group()
    except RuntimeError as error:  # gloo has no class of its own
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise StageFailed(
            f"a process of the run does not answer: {first_line(error)}; expected {world} processes that live and "
            "reach each other: its own message says why it ended"
        ) from error


def _device(name: str | None, local_rank: int, world: int) -> torch.device:
    count = torch.cuda.device_count()
    if name is None:
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"device {name!r} is not one to train on; expected cpu, cuda or cuda:N")
    if device.index is not None and world > 1:
        raise UsageError(f"device {name!r} for {world} processes; expected cuda, of which each takes its own")
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise UnavailableError(f"no GPU {index}: PyTorch sees {count} here; expected one for each process, or cpu")
    return torch.device("cuda", index)
