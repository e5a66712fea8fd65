"""Train a network on a folder of images, and write a checkpoint that the other commands take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmformer.errors import UsageError
from dmformer.models.checkpoint import Checkpoint, save_checkpoint
from dmformer.models.infer import variant_name
from dmformer.progress import silent
from dmformer.train.images import find_data
from dmformer.train.journal import load_snapshot
from dmformer.train.processes import processes
from dmformer.train.run import SNAPSHOT_NAME, Plan, Run, train_steps
from dmformer.train.start import build, find_start

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.progress import Progress
    from dmformer.train.images import Data
    from dmformer.train.journal import Row
    from dmformer.train.recipe import Recipe
    from dmformer.train.start import Start

CHECKPOINT_NAME = "model.safetensors"
# What may change when a run is resumed: it changes nothing of the result.
_FREE = ("accumulate", "workers")


@dataclass(frozen=True)
class Trained:
    """What a run has made.

    Attributes:
        checkpoint: the file; of the last step, and of the averaged weights where the recipe averages them.
        scores: accuracy on the validation images, shares from 0 to 1 by name.
        images: how many were trained on, and how many validated on.
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
    resume: bool = False,
    device: str | None = None,
    stage: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
    report: Callable[[Row], None] = lambda _: None,
) -> Trained:
    """Train a network; under ``torchrun``, together with the other processes.

    Args:
        data: folder with ``train/CLASS/…`` and ``val/CLASS/…``, or for segmentation in ADE20K's layout.
        output: folder for the checkpoint, the log and the snapshot; new or empty, unless the run is resumed.
        recipe: hyper-parameters.
        weights: a checkpoint to start from.
        resume: go on from the snapshot in ``output``; the weights at the end are those of a run without interruption.
        device: ``cpu``, ``cuda`` or ``cuda:N``; by default a GPU where there is one.
        stage: told of each interval, in the first process.
        say: called with notes, in the first process.
        report: called with each row of the log, in the first process.

    Raises:
        UsageError: the data, the weights or the recipe cannot be used; ``output`` has something in it; or the run to
            be resumed is another.
        UnavailableError: the device or a package is not there.
        StageFailed: the loss is not finite, or a file cannot be written.
    """
    start = find_start(recipe, weights)
    found = find_data(data, start.config.task, start.preprocessing)
    model, notes = build(start, found.classes, recipe.seed)
    with processes(device) as group:
        plan = Plan(recipe, len(found.training), group.world)
        identity = _identity(recipe, found, start, plan)
        run = Run(model, recipe, found, start.preprocessing, plan, group)
        first = 0
        if resume:
            state = load_snapshot(output / SNAPSHOT_NAME, identity, group.device)
            run.restore(state)
            first = state["step"]
        group.wait()  # before the first process writes into the folder
        if group.first:
            _prepare(output, resume=resume)
            for note in notes:
                say(note)
            size = len(found.training), len(found.validation)
            say(f"{size[0]} images to train on, {size[1]} to validate on, {len(found.classes)} classes")
        row = train_steps(run, first, output, identity, stage if group.first else silent, report)
        scores = run.validate() if row is None else row.scores
        if group.first:
            _write(output / CHECKPOINT_NAME, run, _training(data, recipe, found, start, scores))
        group.wait()
    return Trained(output / CHECKPOINT_NAME, scores, (len(found.training), len(found.validation)), group.first)


def _identity(recipe: Recipe, data: Data, start: Start, plan: Plan) -> dict[str, Any]:
    """What decides the result: of JSON types, and compared when a run is resumed."""
    values = {name: value for name, value in recipe.to_dict().items() if name not in _FREE}
    sha256 = None if start.weights is None else start.weights.sha256
    of_data = {"data (SHA-256 of its names)": data.fingerprint, "--weights (SHA-256)": sha256}
    return {**values, **of_data, "images in a part of a step": plan.part}


def _prepare(output: Path, *, resume: bool) -> None:
    """The folder, without what a killed run left half written."""
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is not empty; expected a new folder, or --resume to go on with the run in it")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for stale in output.glob(".*"):
            if stale.name.startswith((f".{SNAPSHOT_NAME}.", f".{CHECKPOINT_NAME}.", ".log.jsonl.")):
                stale.unlink()
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror}; expected a folder that can be written") from error


def _training(data: Path, recipe: Recipe, found: Data, start: Start, scores: dict[str, float]) -> dict[str, Any]:
    """What the checkpoint says of how it was made."""
    said: dict[str, Any] = {
        "data": f"{data.resolve().name}, {len(found.training)} images",
        "recipe": {"command": "dmformer train", **recipe.to_dict()},
        "held_out_images": len(found.validation),
        **{f"held_out_{name}": round(value, 6) for name, value in scores.items()},
    }
    if start.weights is not None:
        said["started_from_sha256"] = start.weights.sha256
    return said


def _write(path: Path, run: Run, training: dict[str, Any]) -> None:
    model, config = run.result, run.model.config
    state = {k: v.cpu() for k, v in model.state_dict().items() if not k.endswith(".num_batches_tracked")}
    arch = variant_name(config) or "custom"
    checkpoint = Checkpoint(arch, config, state, run.preprocessing, run.data.classes, training=training)
    temporary = path.with_name(f".{path.name}.new")
    save_checkpoint(temporary, checkpoint)
    temporary.replace(path)
