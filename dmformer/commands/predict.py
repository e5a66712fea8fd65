"""``dmformer predict``."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from dmformer.serve.predictor import ClassProbability, ClassShare, Predictor, PredictReport, SegmentReport


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
    threads: options.ThreadsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="For the pictures NAME.overlay.png of a segmentation network; otherwise the working folder.",
        ),
    ] = None,
    json_file: options.JsonOption = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Classify images, or label their pixels: then a picture of each in colour, with a legend, is written."""
    from dmformer.bundle.archive import SUFFIX
    from dmformer.bundle.settings import choose_configured
    from dmformer.serve.predictor import Predictor

    named, images = (paths[0], paths[1:]) if paths[0].is_dir() or paths[0].suffix == SUFFIX else (None, paths)
    if not images:
        raise UsageError("no image given; expected at least one image file")
    bundle = options.find_bundle(named)
    task = bundle.manifest.model.task
    if task == "features":
        raise UsageError("a bundle of features tells no classes; expected dmformer.load(...).outputs(...) in Python")
    if output is not None and task != "segmentation":
        raise UsageError(f"--output is for the pictures of a segmentation network; the bundle is for {task}")
    configured = choose_configured(bundle, runtime, precision, threads)
    choice = configured.choice
    targets = _overlay_paths(images, output or Path()) if task == "segmentation" else []
    if configured.note is not None:
        present.say(configured.note)
    if choice.caveat is not None:
        present.say(f"note: {choice.title}: {choice.caveat}")
    report: PredictReport | SegmentReport
    with Predictor(choice, configured.threads, note=configured.note) as predictor:
        if task == "segmentation":
            report, listing = _segment(predictor, images, targets, top_k)
        else:
            report, listing = _classify(predictor, images, top_k)
    present.say(choice.title)
    present.write_json(report, json_file)
    present.show(listing, json_file)


def _classify(predictor: Predictor, images: list[Path], top_k: int) -> tuple[PredictReport, Table]:
    from dmformer.serve.predictor import PredictReport

    predictions = predictor.predict(images, top_k)
    listing = present.table("", ["image", "class", "probability", ""], numeric=["probability"])
    for prediction in predictions:
        for rank, likely in enumerate(prediction.classes):
            present.add_row(listing, _cells(prediction.image if rank == 0 else "", likely, likely.probability, 2))
    ran = predictor.runtime
    report = PredictReport(
        runtime=ran.name, precision=ran.precision, predictions=tuple(predictions), notes=predictor.notes
    )
    return report, listing


def _segment(predictor: Predictor, images: list[Path], targets: list[Path], top_k: int) -> tuple[SegmentReport, Table]:
    from dmformer.serve.predictor import SegmentedImage, SegmentReport

    predictions = []
    listing = present.table("", ["image", "class", "pixels", ""], numeric=["pixels"])
    for segments, target in zip(predictor.segment(images), targets, strict=True):
        png = io.BytesIO()
        segments.overlay().save(png, "PNG")
        present.write_report(target, png.getvalue())
        predictions.append(SegmentedImage(image=str(segments.path), classes=segments.classes, overlay=str(target)))
        for rank, share in enumerate(segments.classes[:top_k]):
            present.add_row(listing, _cells(str(segments.path) if rank == 0 else "", share, share.share, 1))
        present.say(f"wrote {target}")
    ran = predictor.runtime
    report = SegmentReport(
        runtime=ran.name, precision=ran.precision, predictions=tuple(predictions), notes=predictor.notes
    )
    return report, listing


def _cells(image: str, label: ClassProbability | ClassShare, share: float, digits: int) -> list[str]:
    name = label.name if label.name is not None else str(label.index)
    return [image, name, f"{share:.{digits}%}", "█" * round(20 * share)]


def _overlay_paths(images: list[Path], folder: Path) -> list[Path]:
    """Name a file for each image, all different, also where images of several folders have one name."""
    from dmformer.bundle.writer import check_outside

    if not folder.is_dir():
        raise UsageError(f"--output {folder}: no such folder; expected one for the pictures")
    check_outside(folder / "picture")
    names: list[str] = []
    for image in images:
        stems = (image.stem if number == 1 else f"{image.stem}-{number}" for number in itertools.count(1))
        names.append(next(stem for stem in stems if stem not in names))
    return [folder / f"{name}.overlay.png" for name in names]
