"""One training run: batches in, steps, validation, snapshots, a checkpoint out.

The plumbing is PyTorch's own: DistributedDataParallel, autocast and GradScaler, AveragedModel, DataLoader. Accelerate
and Lightning Fabric were considered; what they add to these is the choice of a device, for which they bring HTTP
clients into the installation, and neither keeps the loss scale and the place in the data in one file that can be read
without running code from it.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from dmformer.errors import StageFailed, UsageError
from dmformer.train.augment import BatchAugmentation, seed_of
from dmformer.train.images import StepSampler, TrainingImages, ValidationImages
from dmformer.train.journal import Journal, Row, save_snapshot
from dmformer.train.start import learning_rate, loss_of, make_optimizer
from dmformer.verify.tasks.segmentation import confusion_matrix, pixel_accuracy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from dmformer.data.preprocessing import Preprocessing
    from dmformer.models.dmformer import DMFormerBackbone
    from dmformer.progress import Progress
    from dmformer.train.images import Data
    from dmformer.train.processes import Processes
    from dmformer.train.recipe import Recipe

SNAPSHOT_NAME = "last.pt"
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Plan:
    """How many steps there are, and how each is shared out."""

    def __init__(self, recipe: Recipe, images: int, world: int) -> None:
        parts = recipe.accumulate * world
        if recipe.batch_size % parts or recipe.batch_size // parts < 2:
            raise UsageError(
                f"batch_size is {recipe.batch_size} for {world} processes with accumulate {recipe.accumulate}; "
                f"expected a multiple of {parts}, of 2 images a part at least, for BatchNorm"
            )
        if images < recipe.batch_size:
            raise UsageError(f"{images} training images; expected at least batch_size, which is {recipe.batch_size}")
        self.part = recipe.batch_size // parts
        self.epoch = images // recipe.batch_size
        self.steps = recipe.steps if recipe.steps is not None else recipe.epochs * self.epoch
        self.interval = recipe.interval or self.epoch


class Run:
    """A network in training, with everything that changes from step to step.

    Args:
        model: on the CPU.
        recipe: of the run.
        data: images and classes.
        preprocessing: of validation images, and the size and colours of all.
        plan: how many steps there are.
        group: this process among the others.
    """

    def __init__(
        self,
        model: DMFormerBackbone,
        recipe: Recipe,
        data: Data,
        preprocessing: Preprocessing,
        plan: Plan,
        group: Processes,
    ) -> None:
        self.recipe, self.data, self.preprocessing, self.plan, self.group = recipe, data, preprocessing, plan, group
        self.pixels = model.config.task == "segmentation"
        if recipe.sync_batch_norm and group.world > 1:
            if group.device.type != "cuda":
                raise UsageError("sync_batch_norm on the CPU; expected GPUs: set it to false")
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(group.device)
        self.network: nn.Module = model
        if group.world > 1:
            ids = [group.device] if group.device.type == "cuda" else None
            self.network = DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False)
        self.optimizer = make_optimizer(model, recipe)
        kind = group.device.type
        self.scaler = torch.amp.GradScaler(kind, enabled=recipe.precision == "fp16")
        self.mixing = BatchAugmentation(recipe, len(data.classes)) if not self.pixels else None
        self.average: AveragedModel | None = None
        if recipe.ema_decay:
            averaging = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)

    @property
    def result(self) -> nn.Module:
        """The network to validate and to save: the average, where there is one."""
        return self.model if self.average is None else self.average.module

    def step(self, step: int, batches: Iterator[Any]) -> Tensor:
        """One optimizer step; returns this process's loss."""
        self.network.train()
        recipe, parts = self.recipe, self.recipe.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, self.plan.steps, self.plan.epoch)
        total = torch.zeros((), device=self.group.device)
        for index in range(parts):
            inputs, labels = self._moved(next(batches))
            part = index * self.group.world + self.group.rank
            if self.mixing is not None:
                inputs, labels = self.mixing(inputs, labels, seed_of(recipe.seed, step, part, 1))
            torch.manual_seed(seed_of(recipe.seed, step, part, 2))  # of stochastic depth and dropout
            with self._together(last=index == parts - 1):
                with self._autocast():
                    logits = self.network(inputs)
                loss = loss_of(logits, labels, recipe) / parts
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return total

    def _moved(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, UsageError):  # an image that a worker could not read
            raise batch
        inputs, labels = batch
        return inputs.to(self.group.device, non_blocking=True), labels.to(self.group.device, non_blocking=True)

    def _together(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged after the last part of a step only."""
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        kind, precision = self.group.device.type, self.recipe.precision
        return torch.autocast(kind, _TYPES[precision], enabled=precision != "fp32")

    def validate(self) -> dict[str, float]:
        """Accuracy on the validation images, shared out over the processes: shares from 0 to 1 by name."""
        self.group.average_buffers(self.model)
        if self.average is not None:
            self.group.average_buffers(self.average.module)
        model = self.result.eval()
        counts = np.zeros(1, np.int64)
        for logits, labels in self._answers(model):
            counts = counts + (self._confusion(logits, labels) if self.pixels else _hits(logits, labels))
        counts = self.group.total(torch.from_numpy(counts).to(self.group.device)).cpu().numpy()
        if not self.pixels:
            return {"top1": float(counts[0] / counts[2]), "top5": float(counts[1] / counts[2])}
        found = pixel_accuracy(counts)
        if found.miou is None or found.pixel_accuracy is None:
            raise UsageError("no pixel of the validation images has a class; expected annotations with numbers above 0")
        return {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}

    def _answers(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        images = ValidationImages(self.data.validation, self.preprocessing, self._pixel_classes)
        own = range(self.group.rank, len(images), self.group.world)
        loader: DataLoader[Any] = DataLoader(
            images,
            self.plan.part,
            sampler=own,
            collate_fn=images.collate,
            num_workers=self.recipe.workers,
        )
        with torch.inference_mode():
            for batch in loader:
                inputs, labels = self._moved(batch)
                with self._autocast():
                    yield model(inputs), labels

    @property
    def _pixel_classes(self) -> int | None:
        return len(self.data.classes) if self.pixels else None

    def _confusion(self, logits: Tensor, labels: Tensor) -> Any:
        return confusion_matrix(logits.argmax(1).cpu().numpy(), labels.cpu().numpy(), len(self.data.classes))

    def batches(self, steps: range) -> Iterator[Any]:
        """The parts of some steps that this process computes."""
        images = TrainingImages(self.data.training, self.recipe, self.preprocessing, self._pixel_classes)
        sampler = StepSampler(len(images), self.recipe, steps, self.group.rank, self.group.world)
        return iter(
            DataLoader(
                images,
                batch_sampler=sampler,
                collate_fn=images.collate,
                num_workers=self.recipe.workers,
                pin_memory=self.group.device.type == "cuda",
            )
        )

    def state(self) -> dict[str, Any]:
        """What changes from step to step."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _hits(logits: Tensor, labels: Tensor) -> Any:
    """How many are right, how many have their class among the first five, and how many there are."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return np.array([int(best[:, 0].sum()), int(best.any(1).sum()), len(labels)], np.int64)


def train_steps(
    run: Run,
    first: int,
    folder: Path,
    identity: Mapping[str, Any],
    stage: Progress,
    report: Callable[[Row], None],
) -> Row | None:
    """Train from a step to the end, with a validation, a row and a snapshot after each interval.

    Args:
        run: the network, in the state of that step.
        first: steps done.
        folder: for the log and the snapshot.
        identity: of the snapshots.
        stage: told of each interval.
        report: called with each row.

    Returns:
        The last row; ``None`` where nothing was left to do.

    Raises:
        UsageError: an image cannot be read.
        StageFailed: the loss is not finite, or a file cannot be written.
    """
    plan, group = run.plan, run.group
    journal = Journal(folder, first) if group.first else None
    row = None
    batches = run.batches(range(first, plan.steps))
    for begin in range(first, plan.steps, plan.interval):
        started, end = time.monotonic(), min(begin + plan.interval, plan.steps)
        total = torch.zeros((), device=group.device)
        with stage(f"steps {begin + 1} to {end} of {plan.steps}", end - begin) as advance:
            for step in range(begin, end):
                total += run.step(step, batches)
                advance()
        loss = float(group.total(total)) / (end - begin) / group.world
        if not np.isfinite(loss):
            raise StageFailed(f"the loss became {loss} before step {end}; expected a number: lower learning_rate")
        scores = run.validate()
        row = Row(
            step=end,
            epoch=round(end / plan.epoch, 3),
            loss=loss,
            learning_rate=run.optimizer.param_groups[0]["lr"],
            seconds=round(time.monotonic() - started, 3),
            **scores,
        )
        if journal is not None:
            save_snapshot(folder / SNAPSHOT_NAME, identity, {**run.state(), "step": end})
            journal.add(row)
            report(row)
        group.wait()
    if journal is not None:
        journal.close()
    return row
