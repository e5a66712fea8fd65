"""``dmformer predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmformer.commands import _present as present
from dmformer.errors import UsageError


def predict(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="[BUNDLE] IMAGE...", help="Image files; before them, if you like, the bundle."),
    ],
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime", metavar="NAME", help="Otherwise, or with auto, the first of the bundle that runs here."
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="P", help="Otherwise the first there is.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Classes shown for each image.")] = 5,
    threads: present.ThreadsOption = None,
    json_file: present.JsonOption = None,
) -> None:
    """Classify images: the most likely classes and their probabilities."""
    from dmformer.bundle.packing import SUFFIX
    from dmformer.bundle.predictor import Predictor, PredictReport, choose

    present.check_json_target(json_file)
    named, images = (paths[0], paths[1:]) if paths[0].is_dir() or paths[0].suffix == SUFFIX else (None, paths)
    if not images:
        raise UsageError("no image given; expected at least one image file")
    choice = choose(present.bundle_named(named), runtime, precision)
    with Predictor(choice, threads) as predictor:
        predictions = predictor.predict(images, top_k)
    present.say(f"{choice.entry.name} {choice.artifact.precision}")
    if choice.instead is not None:
        present.say(f"note: {choice.instead}")
    report = PredictReport(
        runtime=choice.entry.name, precision=choice.artifact.precision, predictions=tuple(predictions)
    )
    present.write_json(report, json_file)
    listing = present.table("", ["image", "class", "probability", ""], numeric=["probability"])
    for prediction in predictions:
        for rank, likely in enumerate(prediction.classes):
            cells = [
                prediction.image if rank == 0 else "",
                likely.name if likely.name is not None else str(likely.index),
                f"{likely.probability:.2%}",
                "█" * round(20 * likely.probability),
            ]
            present.add_row(listing, cells)
    present.show(listing, json_file)
