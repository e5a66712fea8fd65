"""Train a network on a folder of images, and write a checkpoint that the other commands take.

A run starts from weights that are drawn anew, or from a checkpoint whose head may be another's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dmformer.data.description import plain_name
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError
from dmformer.files import whole_file
from dmformer.models.checkpoint import Checkpoint, default_preprocessing, load_checkpoint, save_checkpoint
from dmformer.models.config import DMFormerConfig
from dmformer.models.dmformer import build_network, variant_config
from dmformer.models.infer import variant_name
from dmformer.ownership import resolve
from dmformer.progress import silent
from dmformer.train.images import find_data_set
from dmformer.train.journal import LOG_NAME, SNAPSHOT_NAME, load_snapshot
from dmformer.train.processes import join_processes
from dmformer.train.run import Run, TrainingPlan, train_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.models.dmformer import DMFormerBackbone
    from dmformer.progress import Progress
    from dmformer.train.images import DataSet
    from dmformer.train.journal import Row
    from dmformer.train.recipe import Recipe

DEFAULT_ARCH = "dmformer_s"
CHECKPOINT_NAME = "model.safetensors"
# Fields of the recipe that may change when a run is resumed, for the result does not depend on them.
_FREE_FIELDS = ("accumulate", "workers")
_FAR_BEHIND = 0.05  # share of the validation images, or of the mean overlap


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run has made.

    Attributes:
        checkpoint: the file, with the weights of the last step, averaged where the recipe averages them.
        scores: accuracy on the validation images, shares from 0 to 1 by name.
        images: number of training images and of validation images.
        first: whether this is the process that wrote the file.
    """

    checkpoint: Path
    scores: dict[str, float]
    images: tuple[int, int]
    first: bool = True


def train(
    data: Path,
    output: Path,
    recipe: Recipe,
    *,
    weights: Path | None = None,
    weights_key: str | None = None,
    resume: bool = False,
    device: str | None = None,
    stage: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
    report: Callable[[Row], None] = lambda _: None,
) -> TrainingResult:
    """Train a network; under ``torchrun``, together with the other processes.

    Args:
        data: folder with ``train/CLASS/…`` and ``val/CLASS/…``, or for segmentation in ADE20K's layout.
        output: folder for the checkpoint, the log and the snapshot; new or empty, unless the run is resumed.
        recipe: hyper-parameters.
        weights: a checkpoint to start from; by default weights are drawn anew.
        weights_key: which of several sets of weights in that file; ``.`` is its top level.
        resume: go on from the snapshot in ``output``; the weights at the end are those of a run without interruption.
        device: ``cpu``, ``cuda`` or ``cuda:N``; by default a GPU where there is one.
        stage: shows the progress of each interval, in the first process.
        say: called with notes, in the first process.
        report: called with each row of the log, in the first process.

    Raises:
        UsageError: the data, the weights or the recipe cannot be used; ``output`` has something in it; or the run to
            be resumed is another.
        UnavailableError: the device or a package is missing.
        StageFailed: the loss is not finite, or a file cannot be written.
    """
    start = find_start(recipe, weights, weights_key)
    images = find_data_set(data, start.config.task, start.preprocessing)
    model, notes = initial_network(start, images.classes, recipe.seed)
    counts = len(images.training), len(images.validation)
    with join_processes(device) as group:
        plan = TrainingPlan(recipe, counts[0], group.world)
        run = Run(model, recipe, images, start.preprocessing, plan, group)
        run.check_shared_memory()
        contents = run.check_images(stage if group.first else silent, decode=not resume)
        identity = _identity(recipe, images, start, plan, contents)
        first = 0
        if resume:
            state = load_snapshot(output / SNAPSHOT_NAME, identity, group.device)
            run.restore(state)
            first = state["step"]
        group.wait()  # before the first process writes into the folder
        if group.first:
            _prepare(output, resume=resume)
            for note in (*images.notes, *notes):
                say(note)
            say(f"{counts[0]} images to train on, {counts[1]} to validate on, {len(images.classes)} classes")
        row = train_steps(run, first, output, identity, stage if group.first else silent, report)
        scores = run.validate() if row is None else row.scores
        behind = None if run.average is None else _average_behind(scores, run.validate(raw=True), recipe)
        if behind is not None and group.first:
            say(behind)
        if group.first:
            description = {
                "data": f"{plain_name(data.resolve().name)}, {counts[0]} images",
                "recipe": {"command": "dmformer train", **recipe.to_dict()},
                "held_out_images": counts[1],
                **{f"held_out_{name}": round(value, 6) for name, value in scores.items()},
            }
            if start.weights is not None:
                description["started_from_sha256"] = start.weights.sha256
            _write_checkpoint(output / CHECKPOINT_NAME, run, description)
        group.wait()
    return TrainingResult(output / CHECKPOINT_NAME, scores, counts, group.first)


def _average_behind(averaged: dict[str, float], raw: dict[str, float], recipe: Recipe) -> str | None:
    """Say that the average, which is saved, is far behind the weights that it averages; ``None`` where it is not."""
    name = next(iter(averaged))
    if raw[name] - averaged[name] <= _FAR_BEHIND:
        return None
    return (
        f"warning: the averaged weights, which are saved, are far behind: {name} is {averaged[name]:.1%}, and "
        f"{raw[name]:.1%} with the weights of the last step; train longer, or lower ema_decay ({recipe.ema_decay})"
    )


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        config: configuration of the network; the data decide its number of classes.
        preprocessing: how images become inputs.
        weights: a checkpoint to take tensors from; ``None`` where all are drawn.
    """

    config: DMFormerConfig
    preprocessing: Preprocessing
    weights: Checkpoint | None


def find_start(recipe: Recipe, weights: Path | None, weights_key: str | None = None) -> Start:
    """Return what the recipe and the checkpoint to start from decide: configuration and preprocessing.

    Raises:
        UsageError: the checkpoint cannot be used, or its stages are not those of the architecture asked for.
    """
    options = {**recipe.model, "drop_path": recipe.drop_path}
    checkpoint = None if weights is None else load_checkpoint(weights, weights_key=weights_key)
    if checkpoint is None:
        config = variant_config(recipe.arch or DEFAULT_ARCH, **options)
    else:
        config = _config_for(checkpoint, recipe.arch, options)
    if config.task == "features":
        raise UsageError("task features has nothing to train; expected a classifier or a segmentation network")
    usual = default_preprocessing(config)
    if checkpoint is not None and checkpoint.config.task == config.task:
        usual = checkpoint.preprocessing
    preprocessing = recipe.preprocessing or usual
    if len(preprocessing.channels) != config.in_channels:
        raise UsageError(
            f"preprocessing gives channels {preprocessing.channels!r}; "
            f"expected as many as the network's {config.in_channels}"
        )
    if preprocessing.channels == "L" and (recipe.randaugment_operations or recipe.color_jitter):
        raise UsageError("RandAugment and color_jitter need three channels; expected both 0 with channels 'L'")
    return Start(config, preprocessing, checkpoint)


def _config_for(checkpoint: Checkpoint, arch: str | None, options: dict[str, object]) -> DMFormerConfig:
    """Return the checkpoint's configuration, with the head of the architecture where one is named."""
    config = checkpoint.config
    assert isinstance(config, DMFormerConfig)
    if arch is not None:
        wanted = variant_config(arch)
        if (wanted.widths, wanted.depths) != (config.widths, config.depths):
            raise UsageError(f"`weights` holds {checkpoint.arch}; expected the stages of {arch}")
        config = replace(config, **{name: getattr(wanted, name) for name in ("task", "decoder", "decoder_widths")})
    return DMFormerConfig.from_dict({**config.to_dict(), **options})


def initial_network(start: Start, classes: tuple[str, ...], seed: int) -> tuple[DMFormerBackbone, list[str]]:
    """Return the network with as many outputs as classes, on the CPU, and notes on what the checkpoint gave.

    Tensors of the stages are taken as they are; those of the head where they are of the same shape, and those of the
    last layer where the classes are the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_network(replace(start.config, num_classes=len(classes)))
    if start.weights is None:
        return model, []
    fresh = model.state_dict()
    taken = {
        name: tensor for name, tensor in start.weights.state.items()
        if name in fresh and fresh[name].shape == tensor.shape
    }  # fmt: skip
    if start.weights.classes not in ((), classes):  # as many, but others
        taken = {
            name: tensor for name, tensor in taken.items() if not name.startswith(("head.", "decoder.classifier."))
        }
    drawn = [name for name in fresh if name not in taken and not name.endswith(".num_batches_tracked")]
    if missing := [name for name in drawn if name.startswith("stages.")]:
        raise UsageError(f"`weights` does not fit the network's stages: {', '.join(missing[:3])}")
    model.load_state_dict(taken, strict=False)
    if not drawn:
        return model, ["every tensor was taken from the weights given"]
    heads = ", ".join(sorted({name.split(".")[0] for name in drawn}))
    note = f"{len(taken)} tensors were taken from the weights given; {len(drawn)} of {heads} are drawn anew"
    return model, [f"{note} ({start.weights.config.num_classes} classes there, {len(classes)} here)"]


def _identity(recipe: Recipe, images: DataSet, start: Start, plan: TrainingPlan, contents: str) -> dict[str, Any]:
    """Return what decides the result, in JSON types: it must be the same when a run is resumed."""
    values = {name: value for name, value in recipe.to_dict().items() if name not in _FREE_FIELDS}
    sha256 = None if start.weights is None else start.weights.sha256
    of_data = {
        "data (SHA-256 of its names)": images.fingerprint,
        "data (sum of its files' SHA-256)": contents,
        "--weights (SHA-256)": sha256,
    }
    return {**values, **of_data, "images in a part of a step": plan.part}


def _prepare(output: Path, *, resume: bool) -> None:
    """Make the folder, and remove what a killed run left half written."""
    resolve(output)  # refuses another user's link in a shared folder
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is not empty; expected a new folder, or `resume` to go on with the run in it")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for stale in output.glob(".*"):
            if stale.name.startswith(tuple(f".{name}" for name in (SNAPSHOT_NAME, CHECKPOINT_NAME, LOG_NAME))):
                stale.unlink()
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror}; expected a folder that can be written") from error


def _write_checkpoint(path: Path, run: Run, description: dict[str, Any]) -> None:
    config = run.model.config
    state = {k: v.cpu() for k, v in run.result.state_dict().items() if not k.endswith(".num_batches_tracked")}
    arch = variant_name(config) or "custom"
    checkpoint = Checkpoint(arch, config, state, run.preprocessing, run.data.classes, training=description)
    with whole_file(path) as staging:
        save_checkpoint(staging, checkpoint)
