"""``dmformer train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present

if TYPE_CHECKING:
    from dmformer.train.journal import Row

_SHIPPED = "ade20k_fpn, ade20k_upernet, digits, imagenet_l, imagenet_s, scenes"


def train(
    data: Annotated[
        Path,
        typer.Option("--data", metavar="DIR", help="train/CLASS/… and val/CLASS/…; for segmentation ADE20K's folders."),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder for the checkpoint, the log and the snapshot.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="FILE|NAME", help=f"A TOML file, or one that ships: {_SHIPPED}."),
    ] = None,
    arch: Annotated[
        str | None, typer.Option("--arch", metavar="NAME", help="Variant, like dmformer_s or dmformer_s_fpn.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Checkpoint to start from; its head may differ."),
    ] = None,
    weights_key: options.WeightsKeyOption = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training images.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Images of one optimizer step, over all processes.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", metavar="N", help="Parts in which each process computes a step.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", metavar="R", help="Largest rate; it grows with the batch size.")
    ] = None,
    precision: Annotated[str | None, typer.Option("--precision", metavar="P", help="fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of every random draw.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Processes that decode images.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any field of the recipe, like drop_path=0.2. Repeatable."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:N; otherwise a GPU if there is one."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --output.")] = False,
    json_file: options.JsonOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Train a network on a folder of images; by default, with the paper's recipe.

    On several GPUs or machines: torchrun --nproc-per-node N -m dmformer train …
    """
    from dmformer._optional import require

    require("torch", extra="train", purpose="dmformer train")
    from dmformer.train.api import train as run_training
    from dmformer.train.recipe import make_recipe, read_recipe

    named: dict[str, Any] = {
        "arch": arch,
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "precision": precision,
        "seed": seed,
        "workers": workers,
    }
    values = read_recipe(recipe) if recipe is not None else {}
    values |= {name: value for name, value in named.items() if value is not None}
    values |= options.parse_pairs(settings or [], "--set", "drop_path=0.2")
    with present.stages() as shown:
        result = run_training(
            data,
            output,
            make_recipe(values),
            weights=weights,
            weights_key=weights_key,
            resume=resume,
            device=device,
            stage=shown.stage,
            say=shown.say,
            report=lambda row: shown.say(_row_line(row)),
        )
    if not result.first:
        return
    scores = ", ".join(f"{name} {present.percent(value)}" for name, value in result.scores.items())
    present.show(f"{result.checkpoint}: {scores} on {result.images[1]} validation images", json_file)
    present.write_json({"checkpoint": str(result.checkpoint), **result.scores}, json_file)


def _row_line(row: Row) -> str:
    scores = "".join(f", {name} {present.percent(value)}" for name, value in row.scores.items())
    return f"step {row.step}, epoch {row.epoch:g}: loss {row.loss:.4f}{scores}"
