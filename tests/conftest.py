"""Fixtures shared by the tests: one bundle of the demonstration checkpoint, and the command line as users have it."""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from tests.workers import QUICK, script_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Self

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.reader import Bundle
    from dmformer.export.cached import ExportResult
    from dmformer.export.precisions import Calibration
    from dmformer.export.steps import TimedArtifacts
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.progress import Progress
    from dmformer.task import Task
    from tests.workers import Worker

os.environ["DMFORMER_CACHE"] = ""  # no cache: tests patch what an export does, and nobody's own one is to be read
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: workers whose OpenMP threads outnumber the cores wait for one another at every operator.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
# A tiny network with random weights, exported with litert-torch, which takes 2 GB and a minute: formats=["litert"]
# of the variant dmformer_nano at 32 pixels, with the widths and depths of tests/networks.py and ten classes.
LITERT = Path(__file__).parent / "data" / "litert"

Result = TypeVar("Result")


# Fixtures that export, run commands in processes of their own, or install.
WAITED_FOR = {
    *("made", "exported", "bundle", "cli", "inline", "device", "reduced", "reduced_bundle", "full_range"),
    *("segmentation", "segmentation_bundle", "segmentation_open", "features_open", "segmentation_reduced", "quick"),
    "one_output",
    *("own_exported", "recognised_export", "with_ncnn"),
}

# Modules whose tests export, train or ask a whole network again and again.
WAITING = {
    *("bundle_writer", "cache", "cli", "deploy", "export", "fp16", "int8", "parity", "readme", "robustness"),
    *("scenes_checkpoint", "task_export", "train"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what waits; the slow tests come first, so that at the end no worker sits alone with one of them."""
    for item in items:
        if WAITED_FOR & set(getattr(item, "fixturenames", ())) or item.path.stem.removeprefix("test_") in WAITING:
            item.add_marker("medium")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Result]) -> Result:
    """What ``make`` gives for a new folder: made by the worker that asks first, and read by the others."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make(factory.mktemp(name))
    folder = factory.getbasetemp().parent / name  # one above each worker's own
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        kept = folder.with_suffix(".pickle")
        if not kept.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed to make it
            folder.mkdir()
            kept.write_bytes(pickle.dumps(make(folder)))
        made: Result = pickle.loads(kept.read_bytes())
        return made


@dataclass(frozen=True)
class Run:
    """What a command did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The one line that says what is wrong; fails where there is a traceback or not just one line."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def pytest_configure() -> None:
    """Shells start background jobs with Ctrl-C ignored, which child processes would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Run]:
    """Run ``dmformer`` in a process and a working folder of its own, with a home of its own."""

    def run(*arguments: object, cwd: Path = tmp_path, **environment: str) -> Run:
        inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # xdist sets it
        done = subprocess.run(
            [sys.executable, "-m", "dmformer", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**inherited, "XDG_STATE_HOME": str(tmp_path / "state"), **environment},
            timeout=300,
            check=False,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def inline(tmp_path: Path) -> Callable[..., Run]:
    """As ``cli``, but in this process, which has the engines' imports behind it: seconds less for each command.

    For what a command says and does; not for signals, closed pipes, encodings, or what a process imports.
    """
    from dmformer.cli import main

    def run(*arguments: object, cwd: Path = tmp_path, **environment: str) -> Run:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        handler = signal.getsignal(signal.SIGTERM)  # the command line sets its own
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.delenv("COLUMNS", raising=False)  # xdist sets it
            patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["dmformer", *map(str, arguments)])
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            try:
                with pytest.raises(SystemExit) as ended:
                    main()
            finally:
                signal.signal(signal.SIGTERM, handler)
        assert isinstance(ended.value.code, int)
        said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
        return Run(ended.value.code, *said)

    return run


@dataclass(frozen=True)
class Made:
    """One export by the command line: the folder it ran in, its home, and what it said."""

    folder: Path
    state: str
    done: subprocess.CompletedProcess[str]

    @property
    def bundle(self) -> Path:
        return self.folder / "made here"


FORMATS = ("--format", "torch", "--format", "onnx", "--format", "ov", "--format", "ort")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same as ``exported`` by the command line, in a process with another hash seed; not to be written into."""

    def make(folder: Path) -> Made:
        work, state = folder / "work", str(folder / "state")
        work.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "dmformer", "export", *FORMATS, "--output", "made here"],
            capture_output=True,
            text=True,
            cwd=work,
            env={**os.environ, "XDG_STATE_HOME": state, "PYTHONHASHSEED": "7"},
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Made(work, state, done)

    return made_once(tmp_path_factory, "command-line", make)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The demonstration checkpoint in every format that runs on any machine; shared, so not to be written into."""
    import dmformer

    def make(folder: Path) -> ExportResult:
        return dmformer.export(formats=["torch", "onnx", "openvino"], output=folder / "demo")

    return made_once(tmp_path_factory, "exported", make)


@pytest.fixture(scope="session")
def with_ncnn(exported: ExportResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration bundle with ncnn built into it; shared, so not to be written into."""
    from dmformer.export.build import build

    def make(folder: Path) -> Path:
        copy = Path(shutil.copytree(exported.output, folder / "demo"))
        build(copy, "ncnn")
        return copy

    return made_once(tmp_path_factory, "with-ncnn", make)


@pytest.fixture
def bundle(exported: ExportResult, tmp_path: Path) -> Path:
    """A copy of the demonstration bundle that a test may spoil."""
    return Path(shutil.copytree(exported.output, tmp_path / "bundle"))


class NoSimplifier:
    """In place of onnxsim's process, which takes seconds: the graph stays as it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def simplify(self, source: Path, destination: Path) -> None:
        shutil.copyfile(source, destination)


def timed_as(ratios: Mapping[tuple[str, str], float]) -> Callable[[Bundle, Progress], TimedArtifacts]:
    """In place of ``time_artifacts``: speeds that were not measured, by format and precision; others are as fp32.

    The noise floor is 0.05.
    """
    from msgspec.structs import replace

    from dmformer.bench.report import BenchReport
    from dmformer.bundle.manifest import Speed
    from dmformer.export.steps import TimedArtifacts

    def compare(bundle: Bundle, stage: Progress) -> TimedArtifacts:
        artifacts = []
        for artifact in bundle.manifest.artifacts:
            ratio = ratios.get((artifact.format, artifact.precision), 1.0)
            speed = Speed(p50_ms=ratio, fp32_p50_ms=1.0, ratio=ratio, noise_floor=0.05, faster=ratio < 0.95, cpu="none")
            artifacts.append(replace(artifact, speed=speed))
        return TimedArtifacts(tuple(artifacts), BenchReport(environment={"cpu": "none"}, results=(), noise_floor=0.05))

    return compare


@pytest.fixture(scope="session")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the calibration images of each digit, in folders named after their classes."""
    from dmformer.assets import CALIBRATION_IMAGES

    folder = tmp_path_factory.mktemp("few")
    for digit in map(str, range(10)):
        (folder / digit).mkdir()
        for path in sorted((CALIBRATION_IMAGES / digit).iterdir())[:3]:
            shutil.copy(path, folder / digit)
    return folder


def exported_quickly(folder: Path, **options: Any) -> ExportResult:
    """An export of the demonstration checkpoint without onnxsim and timing."""
    import dmformer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("dmformer.export.steps"), "time_artifacts", timed_as({}))
        patch.setattr(import_module("dmformer.export.graph"), "Simplifier", NoSimplifier)
        return dmformer.export(output=folder / "demo", **options)


@pytest.fixture(scope="session")
def reduced(tmp_path_factory: pytest.TempPathFactory, few_images: Path) -> ExportResult:
    """The demonstration checkpoint at every precision, without onnxsim and timing; shared, not to be spoilt."""

    def make(folder: Path) -> ExportResult:
        return exported_quickly(
            folder,
            formats=["onnx", "openvino"],
            precisions=["fp32", "fp16", "int8"],
            calibration=few_images,
            max_accuracy_drop=5,
        )

    return made_once(tmp_path_factory, "reduced", make)


@pytest.fixture(scope="session")
def full_range(tmp_path_factory: pytest.TempPathFactory, few_images: Path) -> ExportResult:
    """The same at int8 with weights of 8 bits, whatever its checks say on this processor; not to be spoilt."""

    def make(folder: Path) -> ExportResult:
        return exported_quickly(
            folder,
            formats=["openvino", "onnx"],
            precisions=["int8", "fp32"],
            weight_bits=8,
            calibration=few_images,
            max_accuracy_drop=100,
            force=True,
        )

    return made_once(tmp_path_factory, "full-range", make)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports without onnxsim and without timing."""
    from dmformer.export import graph, steps

    monkeypatch.setattr(graph, "Simplifier", NoSimplifier)
    monkeypatch.setattr(steps, "time_artifacts", timed_as({}))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; Debian's package is enough."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def web_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """onnxruntime-web's file, as npm writes it."""
    from dmformer.cache import Cache
    from dmformer.errors import UnavailableError
    from dmformer.layouts.web import ENGINE

    try:
        return made_once(tmp_path_factory, "onnxruntime-web", lambda folder: ENGINE.download(folder, Cache()))
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def web_page(exported: ExportResult, web_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the demonstration bundle; shared, so not to be written into."""
    from dmformer.bundle.reader import open_bundle
    from dmformer.layouts.api import serve_layout

    folder = tmp_path_factory.mktemp("web") / "digits"
    serve_layout("web", open_bundle(exported.output), folder, onnxruntime_web=web_engine)
    return folder


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    from dmformer.assets import DEMONSTRATION_CHECKPOINT
    from dmformer.models.checkpoint import load_checkpoint

    return load_checkpoint(DEMONSTRATION_CHECKPOINT)


@pytest.fixture(scope="session")
def golden(checkpoint: Checkpoint) -> Golden:
    from tests.precisions import golden_of

    return golden_of(checkpoint)


@pytest.fixture(scope="session")
def calibration(checkpoint: Checkpoint, few_images: Path) -> Calibration:
    from dmformer.data.images import image_set
    from tests.precisions import calibration_of

    return calibration_of(checkpoint, image_set(few_images, checkpoint.preprocessing, checkpoint.classes, 10))


@pytest.fixture(scope="module")
def trusted_once() -> Iterator[None]:
    """What is trusted, graph, layers and PyTorch's answers, is the same for every fault of one checkpoint."""
    from dmformer.verify import api, localize

    known: dict[tuple[object, str], Any] = {}

    def once(make: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(bundle: Bundle, *arguments: Any) -> Any:
            key = (make, bundle.manifest.model.checkpoint_sha256)
            if key not in known:
                known[key] = make(bundle, *arguments)
            return known[key]

        return remembered

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((localize, "_trusted"), (api, "_layers"), (api, "_recompute")):
            patch.setattr(module, name, once(getattr(module, name)))
        yield


@pytest.fixture
def reduced_bundle(reduced: ExportResult, tmp_path: Path) -> Path:
    """A copy of the bundle with every precision that a test may spoil."""
    return Path(shutil.copytree(reduced.output, tmp_path / "reduced"))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """``bench`` with a script in the place of its worker; gives the list of the jobs that it was given."""
    return lambda script=QUICK: script_workers(monkeypatch, script)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images to train on, of two classes; not to be written into."""
    from tests.training import write_colours

    folder = tmp_path_factory.mktemp("colours")
    write_colours(folder)
    return folder


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the shipped scenes in ADE20K's folders: ten to calibrate with, three that the network has not seen."""
    from dmformer.assets import SCENES

    folder = tmp_path_factory.mktemp("scenes")
    shutil.copy(SCENES / "classes.txt", folder)
    for part, count in (("training", 10), ("validation", 3)):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
            for path in sorted((SCENES / kind / part).iterdir())[:count]:
                shutil.copy(path, folder / kind / part)
    return folder


@pytest.fixture(scope="session")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The demonstration for segmentation in every format that runs on any machine; shared, not to be written into."""
    import dmformer

    def make(folder: Path) -> ExportResult:
        return dmformer.export(
            task="segmentation", formats=["torch", "onnx", "openvino"], output=folder / "segmentation"
        )

    return made_once(tmp_path_factory, "segmentation", make)


@pytest.fixture
def segmentation_bundle(segmentation: ExportResult, tmp_path: Path) -> Path:
    """A copy of the segmentation bundle that a test may spoil."""
    return Path(shutil.copytree(segmentation.output, tmp_path / "segmentation"))


@pytest.fixture(scope="session")
def segmentation_open(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The same with height and width left open, at 32 pixels, without onnxsim; shared, not to be written into."""
    return made_once(tmp_path_factory, "segmentation-open", lambda folder: _export_open("segmentation", folder))


@pytest.fixture(scope="session")
def features_open(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The stages' maps with height and width left open, without onnxsim; shared, not to be written into."""
    return made_once(tmp_path_factory, "features-open", lambda folder: _export_open("features", folder))


def _export_open(task: Task, folder: Path) -> ExportResult:
    import dmformer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("dmformer.export.graph"), "Simplifier", NoSimplifier)
        return dmformer.export(
            task=task, open_size=True, image_size=32, formats=["torch", "onnx"], output=folder / task
        )


@pytest.fixture(scope="session")
def segmentation_reduced(tmp_path_factory: pytest.TempPathFactory, few_scenes: Path) -> ExportResult:
    """The demonstration for segmentation at every precision, without onnxsim and timing; shared, not to be spoilt."""
    import dmformer

    def make(folder: Path) -> ExportResult:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(import_module("dmformer.export.steps"), "time_artifacts", timed_as({}))
            patch.setattr(import_module("dmformer.export.graph"), "Simplifier", NoSimplifier)
            return dmformer.export(
                task="segmentation",
                formats=["onnx"],
                precisions=["fp32", "fp16", "int8"],
                calibration=few_scenes,
                max_accuracy_drop=2,
                output=folder / "segmentation",
            )

    return made_once(tmp_path_factory, "segmentation-reduced", make)
