"""An image in, classes and probabilities out, through any runtime of a bundle."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import Choice, cannot_run, select
from dmformer.data.images import load_pixels
from dmformer.errors import StageFailed
from dmformer.runtimes import registry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from typing_extensions import Self

    from dmformer.bundle.reader import Bundle

AUTO = "auto"
_BATCH = 8


class ClassProbability(Struct, frozen=True, kw_only=True):
    """One class: its index, its name where the checkpoint has names, and the softmax of its logit (0..1)."""

    index: int
    name: str | None
    probability: float


class Prediction(Struct, frozen=True, kw_only=True):
    """The most likely classes of one image, most likely first."""

    image: str
    classes: tuple[ClassProbability, ...]


class PredictReport(Struct, frozen=True, kw_only=True):
    """What ``predict`` writes as JSON."""

    runtime: str
    precision: str
    predictions: tuple[Prediction, ...]


class Predictor:
    """Classifies image files, ``batch`` at a time. A context manager.

    Any number of threads may call :meth:`predict`: images are decoded side by side, inferences run one after another,
    each with all the threads of the engine. Leaving the context waits for the inference that runs.
    """

    def __init__(self, choice: Choice, threads: int | None = None, batch: int = _BATCH) -> None:
        self.batch = batch
        self.bundle = choice.bundle  # a packed one lasts as long as this
        self.manifest = choice.bundle.manifest
        self.runtime = choice.runtime(threads)
        self._turn = threading.Lock()  # an engine's request or execution context is one thread's at a time

    def __enter__(self) -> Self:
        self.runtime.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._turn:
            self.runtime.__exit__(kind, error, traceback)

    def predict(self, images: str | Path | Sequence[str | Path], top_k: int = 5) -> list[Prediction]:
        """Classify image files.

        Raises:
            UsageError: an image cannot be read; the message names it.
            StageFailed: the runtime failed, or answered with NaN or infinity.
        """
        paths = [Path(image) for image in ([images] if isinstance(images, (str, Path)) else images)]
        preprocessing = self.manifest.preprocessing
        (output,) = self.manifest.outputs
        predictions = []
        for start in range(0, len(paths), self.batch):
            batch = paths[start : start + self.batch]
            inputs = preprocessing.normalize(load_pixels(batch, preprocessing))
            with self._turn:
                logits = self.runtime.run_rows({self.manifest.inputs[0].name: inputs})[output.name]
            predictions += [self._top(path, row, top_k) for path, row in zip(batch, logits, strict=True)]
        return predictions

    def _top(self, path: Path, logits: np.ndarray, top_k: int) -> Prediction:
        if not np.isfinite(logits).all():
            raise StageFailed(f"{self.runtime.name} answers {path} with NaN or infinity; expected finite logits")
        scaled = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = scaled / scaled.sum()
        names = self.manifest.model.classes
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        return Prediction(
            image=str(path),
            classes=tuple(
                ClassProbability(index=int(i), name=names[i] if names else None, probability=float(probabilities[i]))
                for i in order
            ),
        )


def load(
    bundle: str | Path, runtime: str | None = None, precision: str | None = None, threads: int | None = None
) -> Predictor:
    """A bundle as a predictor: ``with dmformer.load("dmformer-bundle") as p: p.predict(["image.png"])``.

    Args:
        bundle: the bundle's folder.
        runtime: a runtime's name; otherwise, or with ``auto``, the first one of the bundle, in the order in which they
            were exported, that can run on this machine.
        precision: of the artifact; otherwise the first one there is.
        threads: for one inference; otherwise all cores.

    Raises:
        CheckFailed: a file is not what the manifest says.
        UnavailableError: the runtime cannot run on this machine.
        UsageError: there is no such bundle, runtime or precision.
    """
    return Predictor(choose(open_bundle(Path(bundle)), runtime, precision), threads)


def choose(bundle: Bundle, runtime: str | None, precision: str | None) -> Choice:
    """The runtime that was named, or the first artifact, in the manifest's order, that can run on this machine."""
    precisions = [precision] if precision else []
    if runtime is not None and runtime.lower() == AUTO:
        runtime = None
    if runtime is None:
        for artifact in bundle.manifest.artifacts:
            row = registry.reader_of(artifact.format)
            fits = row is not None and precision in (None, artifact.precision)
            if row is not None and fits and cannot_run(row, artifact) is None:
                return Choice(artifact, row, bundle)
    chosen, _ = select(bundle, [runtime] if runtime else [], precisions)
    return chosen[0]
