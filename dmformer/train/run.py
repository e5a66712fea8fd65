"""The steps of a training run: batches in; validations, log rows and snapshots out.

The plumbing is PyTorch's own: DistributedDataParallel, autocast and GradScaler, AveragedModel, DataLoader. Accelerate
and Lightning Fabric were considered; what they add to these is the choice of a device, for which they bring HTTP
clients into the installation, and neither keeps the loss scale and the place in the data in one file that can be read
without running code from it.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from dmformer.data.annotated import IGNORED
from dmformer.data.images import unreadable
from dmformer.errors import StageFailed, UsageError, first_line
from dmformer.train.augment import BatchAugmentation, seed_of
from dmformer.train.images import StepSampler, TrainingImages, ValidationImages
from dmformer.train.journal import SNAPSHOT_NAME, Journal, Row, save_snapshot
from dmformer.verify.tasks.segmentation import confusion_matrix, pixel_accuracy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from dmformer.data.preprocessing import Preprocessing
    from dmformer.models.dmformer import DMFormerBackbone
    from dmformer.progress import Progress
    from dmformer.train.images import DataSet
    from dmformer.train.processes import Processes
    from dmformer.train.recipe import Recipe

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - through which PyTorch hands tensors from process to process on Linux
_PREFETCHED = 2  # batches that each process of a DataLoader holds ready
_BATCH_LIMIT_S = 900  # for one batch
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingPlan:
    """How many steps a run has, and how each is divided among the processes.

    Attributes:
        part: images of one forward pass of one process.
        epoch: steps of one pass over the images.
        steps: steps of the run.
        interval: steps between validations.

    Raises:
        UsageError: the batch cannot be divided so, or there are fewer images than in one batch.
    """

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


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices and kernels only: not on biases, norms and scales."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.squeeze().ndim > 1]
    others = [p for p in parameters if p.squeeze().ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def learning_rate(recipe: Recipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """Return the rate of a step: linear warm-up, then the schedule; it depends on the step alone and needs no state.

    Args:
        recipe: has the rates for ``learning_rate_batch`` images.
        step: number of the step, from 0.
        steps: number of steps of the whole run.
        steps_per_epoch: length of an epoch, for a warm-up that is given in epochs.
    """
    scale = recipe.batch_size / recipe.learning_rate_batch
    highest, lowest = recipe.learning_rate * scale, recipe.min_learning_rate * scale
    warmup = recipe.warmup_steps if recipe.warmup_steps is not None else round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    remaining = (
        (1 + math.cos(math.pi * progress)) / 2 if recipe.schedule == "cosine" else (1 - progress) ** recipe.poly_power
    )
    return lowest + (highest - lowest) * remaining


def loss_of(logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """Return the cross entropy of images (N, classes) or of pixels (N, classes, H, W).

    Targets are shares of the classes that sum to 1, (N, classes), or the labels of pixels, (N, H, W).
    """
    if targets.is_floating_point():
        return F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
    total = F.cross_entropy(
        logits.float(), targets, ignore_index=IGNORED, label_smoothing=recipe.label_smoothing, reduction="sum"
    )
    return total / (targets != IGNORED).sum().clamp(min=1)  # an image without any label counts for nothing


def warmed_up_averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return the update of a moving average whose decay is ``min(decay, (1 + n) / (10 + n))`` after n updates.

    Weights of the first steps are soon forgotten, so that the average of a short run has learnt something. The rule is
    that of TensorFlow's ``ExponentialMovingAverage`` (``num_updates``); timm's ``ModelEmaV3`` has a warm-up as well.
    ``AveragedModel`` counts the updates in a buffer, which snapshots hold.
    """

    def update(averaged: Any, current: Any, count: Any) -> None:
        done = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(averaged, current, done)

    return update


class Run:
    """A network in training, with everything that changes from step to step.

    Args:
        model: the network to train, on the CPU.
        recipe: hyper-parameters.
        data: images and classes.
        preprocessing: how validation images become inputs; training images have its size and colours.
        plan: how many steps there are.
        group: this process among the others.
    """

    def __init__(
        self,
        model: DMFormerBackbone,
        recipe: Recipe,
        data: DataSet,
        preprocessing: Preprocessing,
        plan: TrainingPlan,
        group: Processes,
    ) -> None:
        self.recipe, self.data, self.preprocessing, self.plan, self.group = recipe, data, preprocessing, plan, group
        self.pixel_classes = len(data.classes) if model.config.task == "segmentation" else None
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
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=recipe.precision == "fp16")
        self.mixing = None if self.pixel_classes else BatchAugmentation(recipe, len(data.classes))
        self.average: AveragedModel | None = None
        if recipe.ema_decay:
            averaging = warmed_up_averaging(recipe.ema_decay)
            self.average = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)

    @property
    def result(self) -> nn.Module:
        """Return the network to validate and to save: the average, where there is one."""
        return self.model if self.average is None else self.average.module

    def step(self, step: int, batches: Iterator[Any]) -> Tensor:
        """Do one optimizer step, and return this process's loss."""
        self.network.train()
        recipe, parts = self.recipe, self.recipe.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, self.plan.steps, self.plan.epoch)
        total = torch.zeros((), device=self.group.device)
        for index in range(parts):
            inputs, labels = self._on_device(next(batches))
            part = index * self.group.world + self.group.rank
            if self.mixing is not None:
                inputs, labels = self.mixing(inputs, labels, seed_of(recipe.seed, step, part, 1))
            torch.manual_seed(seed_of(recipe.seed, step, part, 2))  # of stochastic depth and dropout
            with self._gradient_exchange(last=index == parts - 1):
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

    def _on_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, UsageError):  # an image that a worker could not read
            raise batch
        inputs, labels = batch
        return inputs.to(self.group.device, non_blocking=True), labels.to(self.group.device, non_blocking=True)

    def _gradient_exchange(self, *, last: bool) -> AbstractContextManager[Any]:
        """Let the processes exchange gradients after the last part of a step only."""
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        kind, precision = self.group.device.type, self.recipe.precision
        return torch.autocast(kind, _TYPES[precision], enabled=precision != "fp32")

    def validate(self, *, raw: bool = False) -> dict[str, float]:
        """Return the accuracy on the validation images of all processes: shares from 0 to 1 by name.

        Args:
            raw: of the weights as they are, where there is an average of them.
        """
        self.group.average_buffers(self.model)
        if self.average is not None:
            self.group.average_buffers(self.average.module)
        model = (self.model if raw else self.result).eval()
        images = ValidationImages(self.data.validation, self.preprocessing, self.pixel_classes)
        own = range(self.group.rank, len(images), self.group.world)
        counts = np.zeros(1, np.int64)
        with torch.inference_mode():
            for batch in self._read(images, batch_size=self.plan.part, sampler=own):
                inputs, labels = self._on_device(batch)
                with self._autocast():
                    logits = model(inputs)
                counts = counts + self._count(logits, labels)
        counts = self.group.total(torch.from_numpy(counts).to(self.group.device)).cpu().numpy()
        if not self.pixel_classes:
            return {"top1": float(counts[0] / counts[2]), "top5": float(counts[1] / counts[2])}
        accuracy = pixel_accuracy(counts)
        if accuracy.miou is None or accuracy.pixel_accuracy is None:
            raise UsageError("no pixel of the validation images has a class; expected annotations with numbers above 0")
        return {"miou": accuracy.miou, "pixel_accuracy": accuracy.pixel_accuracy}

    def _count(self, logits: Tensor, labels: Tensor) -> Any:
        """Count pixels by class and answer, or images: right, with their class among the first five, and all."""
        if self.pixel_classes:
            return confusion_matrix(logits.argmax(1).cpu().numpy(), labels.cpu().numpy(), self.pixel_classes)
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        return np.array([int(best[:, 0].sum()), int(best.any(1).sum()), len(labels)], np.int64)

    def batches(self, steps: range) -> Iterator[Any]:
        """Return the parts of some steps that this process computes."""
        images = TrainingImages(self.data.training, self.recipe, self.preprocessing, self.pixel_classes)
        sampler = StepSampler(len(images), self.recipe, steps, self.group.rank, self.group.world)
        return self._read(images, batch_sampler=sampler, pin_memory=self.group.device.type == "cuda")

    def check_images(self, stage: Progress, *, decode: bool = True) -> str:
        """Read all files once, each process its share: one that cannot be read would end the run much later.

        Args:
            stage: shows the progress.
            decode: whether they are decoded too, which a run that is resumed has behind it.

        Returns:
            A sum of SHA-256, by which other contents are told apart.

        Raises:
            UsageError: an image or an annotation cannot be used; the message has the first, and how many there are.
        """
        parts = (self.data.training, self.data.validation)
        total = np.zeros(4, np.int64)
        with stage("read every image once", sum(map(len, parts))) as advance:
            for number, part in enumerate(parts):
                images = ValidationImages(part, self.preprocessing, self.pixel_classes)
                digests: dict[int, NDArray[np.int64]] = {}
                read = partial(_read_once, images, number, decode, digests)
                found = unreadable(range(self.group.rank, len(part), self.group.world), read, advance)
                if found:
                    more = f" ({len(found)} of {len(part)} such images)" if len(found) > 1 else ""
                    raise UsageError(f"{found[min(found)]}{more}")
                for digest in digests.values():
                    total += digest
        summed = self.group.total(torch.from_numpy(total).to(self.group.device))
        return str(summed.cpu().numpy().tobytes().hex())

    def _read(self, images: TrainingImages | ValidationImages, **options: Any) -> Iterator[Any]:
        """Give batches; a process that reads them and dies, or gives none for long, ends the run in one line."""
        workers = self.recipe.workers
        limit_s = _BATCH_LIMIT_S if workers else 0
        try:
            yield from DataLoader(images, collate_fn=images.collate, num_workers=workers, timeout=limit_s, **options)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise StageFailed(
                f"a process that reads images gave none: {first_line(error)}; expected enough memory and room in "
                f"{_SHARED_MEMORY}: lower `workers`, or `workers` 0"
            ) from error

    def check_shared_memory(self) -> None:
        """Refuse to begin where the batches that reading processes hold ready have no room in the shared memory.

        Raises:
            UsageError: there is too little; the processes would wait for it for good, or be killed.
        """
        workers = self.recipe.workers
        if not workers or not _SHARED_MEMORY.is_dir():
            return
        size = self.preprocessing.image_size
        pixels = len(self.preprocessing.channels) * 4 + (8 if self.pixel_classes else 0)  # float32; labels in int64
        needed = (_PREFETCHED * workers + 1) * self.plan.part * size * size * pixels
        room = os.statvfs(_SHARED_MEMORY)
        if (free := room.f_bavail * room.f_frsize) < needed:
            raise UsageError(
                f"{_SHARED_MEMORY} has {free / 1e6:.1f} MB free, and {workers} processes that read images need "
                f"{needed / 1e6:.1f}; expected more (docker run --shm-size), or `workers` 0"
            )

    def state(self) -> dict[str, Any]:
        """Return what changes from step to step."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _read_once(
    images: ValidationImages, part: int, decode: bool, digests: dict[int, NDArray[np.int64]], row: int
) -> object:
    """Keep the digest of an image's file, and decode it where asked to."""
    digests[row] = images.digest(row, part)
    return images[row] if decode else None


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
        first: number of steps that are done.
        folder: where the log and the snapshot are written.
        identity: what decides the result, for the snapshots.
        stage: shows the progress of each interval.
        report: called with each row of the log.

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
