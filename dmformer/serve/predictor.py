"""Predict the class of an image, or of each of its pixels, through any runtime of a bundle."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from dmformer.bundle.reader import open_bundle
from dmformer.bundle.settings import choose_configured
from dmformer.data.images import load_pixels, load_uncropped, open_image
from dmformer.data.overlay import LegendEntry, overlay
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import StageFailed, UsageError
from dmformer.task import OUTPUT_NAME, STRIDES, class_logits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from PIL.Image import Image
    from typing_extensions import Self

    from dmformer.bundle.manifest import Manifest
    from dmformer.bundle.select import Choice

_BATCH = 8


class ClassProbability(Struct, frozen=True, kw_only=True):
    """One class: its index, its name where the checkpoint has names, and its probability (0..1).

    That is the softmax of the logits; where the network has one, its sigmoid for class 1, and the rest for class 0.
    """

    index: int
    name: str | None
    probability: float


class Prediction(Struct, frozen=True, kw_only=True):
    """The most likely classes of one image, most likely first."""

    image: str
    classes: tuple[ClassProbability, ...]


class PredictReport(Struct, frozen=True, kw_only=True):
    """What ``predict`` writes as JSON; ``notes`` say what is to be known of the artifact on this machine."""

    runtime: str
    precision: str
    predictions: tuple[Prediction, ...]
    notes: tuple[str, ...] = ()


class ClassShare(Struct, frozen=True, kw_only=True):
    """One class: its index, its name where the checkpoint has names, and its share of the pixels (0..1)."""

    index: int
    name: str | None
    share: float


class SegmentedImage(Struct, frozen=True, kw_only=True):
    """The classes of an image's pixels, the largest share first, and the picture of them, where one was written."""

    image: str
    classes: tuple[ClassShare, ...]
    overlay: str | None = None


class SegmentReport(Struct, frozen=True, kw_only=True):
    """What ``predict`` writes as JSON for segmentation; ``notes`` as in :class:`PredictReport`."""

    runtime: str
    precision: str
    predictions: tuple[SegmentedImage, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segments:
    """The classes that a network for segmentation gives an image's pixels.

    Attributes:
        path: of the image.
        labels: the class of each pixel that the network saw, (H, W).
        classes: those that occur, the largest share first.
        preprocessing: of the network; its ``visible_box`` says which part of the image that was.
        uncropped: whether the network saw all of the image.
    """

    path: Path
    labels: NDArray[np.intp]
    classes: tuple[ClassShare, ...]
    preprocessing: Preprocessing
    uncropped: bool

    def overlay(self) -> Image:
        """Draw the classes in colour over the image, with a legend: a Pillow image.

        Raises:
            UsageError: the image cannot be read any more.
        """
        image = self.preprocessing.upright(open_image(self.path))
        box = (0.0, 0.0, float(image.width), float(image.height))
        if not self.uncropped:
            box = self.preprocessing.visible_box(*image.size)
        legend = [LegendEntry(one.index, one.name or f"class {one.index}", one.share) for one in self.classes]
        return overlay(image, self.labels, box, legend)


class Predictor:
    """Runs image files through a network, ``batch`` at a time. A context manager.

    Any number of threads may call its methods: images are decoded side by side, inferences run one after another, each
    with all the threads of the engine. Leaving the context waits for the inference that runs.

    Where height and width are open, :meth:`segment` shows the network all of an image, its shorter side at the size of
    the bundle's preprocessing; in all other cases it sees the centre square.
    """

    def __init__(
        self, choice: Choice, threads: int | None = None, batch: int = _BATCH, note: str | None = None
    ) -> None:
        self.batch = batch
        self.bundle = choice.bundle  # a packed one lasts as long as this
        self.manifest = choice.bundle.manifest
        self.notes = tuple(said for said in (note, choice.caveat) if said)
        self.runtime = choice.runtime(threads)

    def __enter__(self) -> Self:
        self.runtime.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self.runtime.in_turn():
            self.runtime.__exit__(kind, error, traceback)

    def predict(self, images: str | Path | Sequence[str | Path], top_k: int = 5) -> list[Prediction]:
        """Classify image files.

        Raises:
            UsageError: the bundle is for another task, or an image cannot be read; the message names it.
            StageFailed: the runtime failed, or answered with NaN or infinity.
        """
        self._check_task("classification")
        paths = _as_paths(images)
        predictions = []
        for start in range(0, len(paths), self.batch):
            batch = paths[start : start + self.batch]
            logits = class_logits(self.outputs(batch)[OUTPUT_NAME])
            predictions += [self._top(path, row, top_k) for path, row in zip(batch, logits, strict=True)]
        return predictions

    def segment(self, images: str | Path | Sequence[str | Path]) -> Iterator[Segments]:
        """Label every pixel of image files, one file after another.

        Raises:
            UsageError: the bundle is for another task, or an image cannot be read; the message names it.
            StageFailed: the runtime failed, or answered with NaN or infinity.
        """
        self._check_task("segmentation")
        preprocessing, uncropped = self.manifest.preprocessing, self.manifest.open_size
        for path in _as_paths(images):
            if uncropped:
                logits = self._run(load_uncropped(path, preprocessing, STRIDES[-1]))[OUTPUT_NAME]
            else:
                logits = self.outputs(path)[OUTPUT_NAME]
            self._check_finite(path, logits)
            labels = logits[0].argmax(0)  # (classes, H, W) -> (H, W); ties go to the lower class
            counts = np.bincount(labels.ravel())
            order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
            classes = tuple(
                ClassShare(index=int(i), name=self._class_name(int(i)), share=float(counts[i] / labels.size))
                for i in order
            )
            yield Segments(path, labels, classes, preprocessing, uncropped)

    def outputs(self, images: str | Path | Sequence[str | Path]) -> dict[str, NDArray[np.float32]]:
        """Run image files through the network in one batch, for any task; return its outputs by name.

        Raises:
            UsageError: an image cannot be read; the message names it.
            StageFailed: the runtime failed.
        """
        return self._run(load_pixels(_as_paths(images), self.manifest.preprocessing))

    def run(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run preprocessed images (N, C, H, W) through the network in one batch; return its outputs by name.

        Raises:
            UsageError: they are of another type or shape than the network takes.
            StageFailed: the runtime failed.
        """
        self.runtime.check_open()
        with self.runtime.in_turn():  # an engine's request or execution context is one thread's at a time
            return self.runtime.run_rows({self.manifest.inputs[0].name: inputs})

    def _run(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        return self.run(self.manifest.preprocessing.normalize(pixels))

    def _check_task(self, wanted: str) -> None:
        task = self.manifest.model.task
        if task != wanted:
            method = {"classification": "predict()", "segmentation": "segment()", "features": "outputs()"}[task]
            raise UsageError(f"a bundle for {task}, asked for {wanted}; expected Predictor.{method}")

    def _check_finite(self, path: Path, logits: NDArray[np.float32]) -> None:
        if not np.isfinite(logits).all():
            raise StageFailed(f"{self.runtime.name} answers {path} with NaN or infinity; expected finite logits")

    def _class_name(self, index: int) -> str | None:
        names = self.manifest.model.classes
        return names[index] if names else None

    def _top(self, path: Path, logits: NDArray[np.float32], top_k: int) -> Prediction:
        self._check_finite(path, logits)
        probabilities = softmax(logits)
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        return Prediction(
            image=str(path),
            classes=tuple(
                ClassProbability(index=int(i), name=self._class_name(int(i)), probability=float(probabilities[i]))
                for i in order
            ),
        )


def read_tensor(manifest: Manifest, image: Image) -> NDArray[np.float32]:
    """Return what the network sees of a decoded image, (1, C, H, W).

    That is all of it for segmentation of open height and width, and otherwise the centre square.

    Raises:
        UsageError: its pixels cannot be used.
    """
    preprocessing = manifest.preprocessing
    if manifest.model.task == "segmentation" and manifest.open_size:
        pixels = preprocessing.uncropped_pixels(image, STRIDES[-1])
    else:
        pixels = preprocessing.pixels(image)
    return preprocessing.normalize(pixels[None])


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return probabilities from logits along the last axis."""
    scaled = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: NDArray[np.float64] = scaled / scaled.sum(-1, keepdims=True)
    return probabilities


def _as_paths(images: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(image) for image in ([images] if isinstance(images, (str, Path)) else images)]


def load(
    bundle: str | Path, runtime: str | None = None, precision: str | None = None, threads: int | None = None
) -> Predictor:
    """Open a bundle as a predictor: ``with dmformer.load("dmformer-bundle") as p: p.predict(["image.png"])``.

    Args:
        bundle: the bundle's folder.
        runtime: a runtime's name; otherwise, or with ``auto``, the first one of the bundle, in the order in which they
            were exported, that can run on this machine. Where neither it nor a precision is given, what ``dmformer tune
            --write`` has kept for this machine beside the bundle counts, threads included; the predictor's ``notes``
            say so.
        precision: of the artifact; otherwise the first one there is.
        threads: for one inference; otherwise all cores.

    Raises:
        CheckFailed: a file is not what the manifest says.
        UnavailableError: the runtime cannot run on this machine.
        UsageError: there is no such bundle, runtime or precision.

    Warns:
        UserWarning: the artifact's int8 sums may saturate on this machine.
    """
    configured = choose_configured(open_bundle(Path(bundle)), runtime, precision, threads)
    choice = configured.choice
    if choice.saturation_risk is not None:
        warnings.warn(f"{choice.title}: {choice.saturation_risk}", stacklevel=2)
    return Predictor(choice, configured.threads, note=configured.note)
