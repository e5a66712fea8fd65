"""The manifest: what is in a bundle, as types, from which ``schemas/manifest.json`` is made."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from dmformer.cache import Cached
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError
from dmformer.files import Sha256, decode_json, hash_file, indented_json
from dmformer.machine import Processor
from dmformer.models.specification import KeyMap, ModuleOrigin
from dmformer.names import check_distinct, check_name
from dmformer.runtimes.target import Target
from dmformer.task import FEATURE_NAMES, OUTPUT_NAME, THRESHOLD, Task, class_count

if TYPE_CHECKING:
    from pathlib import Path


SCHEMA_VERSION = 1
PARITY_REPORT = "reports/parity.json"
BENCH_REPORT = "reports/bench.json"
DEFAULT_BUNDLE = "dmformer-bundle"  # the folder of a bundle where none is named
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
GOLDEN = "golden.npz"
MAX_MANIFEST_BYTES = 16 << 20
# Of int8 weights. With 7, sums of products fit the 16 bits in which x86 processors without VNNI add them.
WEIGHT_BITS = SAFE_WEIGHT_BITS, FULL_WEIGHT_BITS = 7, 8

_OUTPUTS: dict[Task, tuple[str, ...]] = {
    "classification": (OUTPUT_NAME,),
    "segmentation": (OUTPUT_NAME,),
    "features": FEATURE_NAMES,
}


# Of what goes into the configuration of servers. A pattern's $ alone would let a last line break pass.
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$(?!\n)", max_length=64)]
TensorName = Annotated[str, Meta(pattern=r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]+$(?!\n)", max_length=512)]


class FileEntry(Struct, frozen=True, kw_only=True):
    """A file of the bundle; ``path`` is relative to the manifest, with forward slashes."""

    path: str
    bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256

    def __post_init__(self) -> None:
        check_name(self.path)


class Accuracy(Struct, frozen=True, kw_only=True):
    """How many right answers there were, as shares from 0 to 1; ``null`` for what was not measured.

    A share is not measured without labels, for another task, or without PyTorch's answers to agree with.

    The intervals are those of 95 % confidence: what the same network may reach on other images of the same kind.

    Attributes:
        images: how many.
        top1: images whose class is the network's first choice.
        top1_interval: lower and upper bound of ``top1``.
        top5: images whose class is among the network's first five.
        top5_interval: lower and upper bound of ``top5``.
        miou: mean over the classes of ``iou``.
        pixel_accuracy: pixels with the right class.
        iou: intersection over union of each class's pixels; ``null`` for a class that occurs nowhere.
        agreement_with_torch: images, or for segmentation pixels, that get the class which PyTorch gives them.
    """

    images: int
    top1: float | None = None
    top1_interval: tuple[float, float] | None = None
    top5: float | None = None
    top5_interval: tuple[float, float] | None = None
    miou: float | None = None
    pixel_accuracy: float | None = None
    iou: tuple[float | None, ...] | None = None
    agreement_with_torch: float | None = None


class Speed(Struct, frozen=True, kw_only=True):
    """Latency of an artifact beside the same runtime's float32 one, measured where the bundle was made, batch 1.

    Attributes:
        p50_ms: median of one inference.
        fp32_p50_ms: median of the float32 artifact in the same run.
        ratio: median over rounds of the first to the second.
        noise_floor: how far the ratio of one configuration to itself was from 1, the median over rounds of the run.
        faster: whether the ratio was below 1 by more than that in every round; neither this nor ``slower`` is a tie.
        slower: whether it was above 1 by more than that in every round.
        cpu: the processor.
    """

    p50_ms: float
    fp32_p50_ms: float
    ratio: float
    noise_floor: float | None
    faster: bool
    slower: bool = False
    cpu: str


class Artifact(Struct, frozen=True, kw_only=True):
    """One model file (or set of files) for one runtime at one precision; the first file is the one to load.

    Attributes:
        format: canonical name.
        precision: canonical name.
        files: all of them.
        built_with: packages and their versions.
        promised_share: least share of the compute layers that run in the precision where the runtime has it, 0..1.
        layers: compute layers by the precision in which they ran where the bundle was made.
        kept_in_fp32: blocks or nodes that stay in float32 against the precision's rule, and why.
        sensitivity: for each block, the error that the precision causes in it alone, over the outputs' spread.
        weight_bits: bits that int8 weights use, 7 or 8; ``null`` where there are none, and in older bundles, whose int8
            weights use 8.
        accuracy: on the calibration images, where there were some.
        points_lost: of accuracy against PyTorch there, in percentage points.
        speed: where a reduced precision was asked for.
        target: what a compiled artifact is tied to; ``null`` for files that any machine with the runtime can load.
        engine_batch: rows that the engine takes at once, where that is fixed: the rows of other batches run in turns of
            so many. ``null`` where one inference takes any batch.
    """

    format: Word
    precision: Word
    files: Annotated[tuple[FileEntry, ...], Meta(min_length=1)]
    built_with: dict[str, str]
    promised_share: Annotated[float, Meta(ge=0, le=1)] = 1.0
    layers: dict[str, int] = {}
    kept_in_fp32: dict[str, str] = {}
    sensitivity: dict[str, float] = {}
    weight_bits: Annotated[int, Meta(ge=7, le=8)] | None = None
    accuracy: Accuracy | None = None
    points_lost: float | None = None
    speed: Speed | None = None
    target: Target | None = None
    engine_batch: Annotated[int, Meta(ge=1)] | None = None

    @property
    def full_range(self) -> bool:
        """Whether it has int8 weights of 8 bits, which some processors multiply wrongly."""
        return self.precision == "int8" and self.weight_bits != SAFE_WEIGHT_BITS

    @property
    def sha256(self) -> str:
        """The file's SHA-256; for several files, that of their listing as ``sha256sum`` prints it."""
        if len(self.files) == 1:
            return self.files[0].sha256
        listing = "".join(f"{file.sha256}  {file.path}\n" for file in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of all its files, in bytes."""
        return sum(file.bytes for file in self.files)


class Tensor(Struct, frozen=True, kw_only=True):
    """An input or output; a dimension that may vary has a name instead of a number."""

    name: TensorName
    dtype: Word
    shape: tuple[int | TensorName, ...]


class Model(Struct, frozen=True, kw_only=True):
    """The network, and where its weights came from.

    Attributes:
        arch: name of the variant, or ``custom``; of a network of one's own, the name of its class.
        config: every field of the network's configuration; of a network of one's own, what it takes and gives.
        task: what the outputs mean.
        classes: a name for each output; empty where the checkpoint has none.
        parameters: number of trained values.
        macs: multiply-accumulates for one image.
        weights: ``random`` marks a model that was never trained, ``module`` weights that a network of one's own came
            with.
        deploy_form: whether the artifacts compute the folded form of the network.
        seed: of random weights.
        checkpoint_sha256: of the source checkpoint; ``null`` for random weights.
        notes: what was assumed while reading the checkpoint.
        training: recipe and accuracy, as the checkpoint's metadata has them.
        threshold: where the network has one output: the probability, its sigmoid, above which an image is of the
            second of two classes. ``null`` for other networks, and in older bundles, where it is 0.5.
        overridden: fields of the preprocessing, and ``classes``, that the export was given instead of the checkpoint's.
        module: where a network of one's own came from; ``null`` for a DMFormer, of this project or recognised as one.
        key_map: the names that a recognised network's tensors have in its checkpoints.
    """

    arch: str
    config: dict[str, Any]
    task: Task
    classes: tuple[str, ...]
    parameters: int
    macs: int
    weights: Literal["checkpoint", "demonstration", "random", "module"]
    deploy_form: bool = False
    seed: int | None = None
    checkpoint_sha256: Sha256 | None = None
    notes: tuple[str, ...] = ()
    training: dict[str, Any] = {}
    threshold: float | None = None
    overridden: tuple[str, ...] = ()
    module: ModuleOrigin | None = None
    key_map: KeyMap | None = None

    @property
    def weights_origin(self) -> str:
        """Where the weights come from, in words."""
        return {
            "checkpoint": f"checkpoint, SHA-256 {self.checkpoint_sha256}",
            "demonstration": "the demonstration checkpoint",
            "random": f"RANDOM, seed {self.seed}: never trained",
            "module": "those that the network of one's own came with",
        }[self.weights]


class Simplification(Struct, frozen=True, kw_only=True):
    """Whether the simplified graph was kept, and why."""

    kept: bool
    reason: str
    nodes_before: int
    nodes_after: int | None = None


class ParityEvidence(Struct, frozen=True, kw_only=True):
    """Summary of the parity checks; the report has each of them."""

    passed: bool
    checks: int
    failed: int
    report: str


class AccuracyEvidence(Struct, frozen=True, kw_only=True):
    """What the artifacts' accuracy was measured against: PyTorch on the calibration images.

    ``label_doubt`` says why their labels may be wrong; ``null`` where nothing speaks against them.
    """

    images: int
    labelled: bool
    max_points_lost: float
    torch: Accuracy
    label_doubt: str | None = None


class LatencyEvidence(Struct, frozen=True, kw_only=True):
    """The run that compared the precisions; the report has each configuration."""

    noise_floor: float | None
    report: str


class ProcessorEvidence(Struct, frozen=True, kw_only=True):
    """How an artifact answered on an emulated processor, which ``dmformer verify --cpu`` notes.

    Attributes:
        processor: name of the emulated processor.
        emulator: name, version and the model that it played.
        engine: package and release that answered.
        format: of the artifact.
        precision: of the artifact.
        artifact_sha256: of the artifact that answered, as :attr:`Artifact.sha256` has it.
        passed: whether every check held.
        checks: how many there were.
        asked: when, in UTC, as in RFC 3339.
    """

    processor: str
    emulator: str
    engine: str
    format: str
    precision: str
    artifact_sha256: Sha256
    passed: bool
    checks: int
    asked: str

    @property
    def subject(self) -> tuple[str, ...]:
        """What it is about: a later answer takes its place."""
        return (self.processor, self.engine, self.format, self.precision)


class Evidence(Struct, frozen=True, kw_only=True):
    """What was measured when the bundle was made, but for what is named in ``cached``: that was measured earlier.

    ``processor`` is where; ``null`` in bundles of versions before this field. ``processors`` are emulated ones that
    were asked later.
    """

    parity: ParityEvidence
    processor: Processor | None = None
    accuracy: AccuracyEvidence | None = None
    latency: LatencyEvidence | None = None
    cached: tuple[Cached, ...] = ()
    processors: tuple[ProcessorEvidence, ...] = ()


class Manifest(Struct, frozen=True, kw_only=True):
    """The content of ``manifest.json``."""

    schema_version: Annotated[int, Meta(ge=1)]
    tool_version: str
    model: Model
    preprocessing: Preprocessing
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    simplification: Simplification
    artifacts: Annotated[tuple[Artifact, ...], Meta(min_length=1)]
    files: tuple[FileEntry, ...]
    evidence: Evidence

    def __post_init__(self) -> None:
        if len(self.inputs) != 1:
            raise UsageError(f"{len(self.inputs)} inputs; expected one")
        self._check_input()
        self._check_outputs()
        kinds = [(artifact.format, artifact.precision) for artifact in self.artifacts]
        if len(set(kinds)) < len(kinds):
            raise UsageError("the same format and precision twice among the artifacts")
        check_distinct([MANIFEST, SIGNATURE, *(entry.path for entry in self.entries)])

    def _check_input(self) -> None:
        size, shape = self.preprocessing.image_size, self.inputs[0].shape
        fits = shape[2:] == (size, size) or (len(shape) == 4 and all(isinstance(side, str) for side in shape[2:]))
        if not fits or shape[1] != len(self.preprocessing.channels):
            raise UsageError(f"an input of shape {shape} for images of {size} pixels")

    def _check_outputs(self) -> None:
        task = self.model.task
        names = tuple(output.name for output in self.outputs)
        named_by_network = task == "features" and self.model.module is not None
        if names != _OUTPUTS[task] and not (named_by_network and names and len({*names}) == len(names)):
            raise UsageError(f"outputs {', '.join(names)}; expected {', '.join(_OUTPUTS[task])}")
        rank = 2 if task == "classification" else 4
        for output in self.outputs:
            if len(output.shape) != rank or not self._fits(output.shape):
                raise UsageError(
                    f"output {output.name!r} of shape {output.shape}; expected {rank} dimensions, a number of channels"
                    + (f", and sides that go with an input of {self.inputs[0].shape}" if rank == 4 else "")
                )
        if self.model.threshold not in (None, THRESHOLD):
            raise UsageError(f"threshold {self.model.threshold}; expected {THRESHOLD}, the only one that is applied")
        if self.model.classes and self.class_count not in (0, len(self.model.classes)):
            raise UsageError(f"{len(self.model.classes)} class names for an output of shape {self.outputs[0].shape}")

    def _fits(self, shape: tuple[int | str, ...]) -> bool:
        """Whether an output of a shape goes with the input: sides are open together."""
        (_, channels, *sides), given = shape, self.inputs[0].shape[2:]
        numbers = [channels, *(side for side in sides if not self.open_size)]
        if self.model.task == "segmentation" and not self.open_size and tuple(sides) != given:
            return False
        return all(isinstance(one, int) and one > 0 for one in numbers) and (
            not self.open_size or all(isinstance(side, str) for side in sides)
        )

    @property
    def entries(self) -> tuple[FileEntry, ...]:
        """Every file that the manifest lists."""
        return (*self.files, *(file for artifact in self.artifacts for file in artifact.files))

    @property
    def class_count(self) -> int:
        """Number of classes that the network tells apart: two with one output; 0 where it gives features."""
        task = self.model.task
        return 0 if task == "features" else class_count(task, int(self.outputs[0].shape[1]))

    @property
    def one_logit(self) -> bool:
        """Whether the network has one output, whose sigmoid is the probability of the second of two classes."""
        return self.model.task == "classification" and self.outputs[0].shape[1] == 1

    @property
    def open_size(self) -> bool:
        """Whether the network takes images of any height and width (of multiples of 32, for segmentation)."""
        return isinstance(self.inputs[0].shape[2], str)

    def encode(self) -> bytes:
        """Return the content of ``manifest.json``."""
        return indented_json(self)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Parse a manifest.

    Raises:
        UsageError: it is no JSON, of another schema version, or lacks or mistypes a field.
    """
    try:
        version = msgspec.json.decode(data, type=_Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{where}: schema version {version}; expected {SCHEMA_VERSION}: use the dmformer that wrote the bundle"
            )
        return decode_json(data, Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is no manifest that this version reads: {error}") from error


class _Versioned(Struct):
    schema_version: int


def file_entry(root: Path, path: Path) -> FileEntry:
    """Describe a file below ``root`` by reading it."""
    sha256, size = hash_file(path)
    return FileEntry(path=path.relative_to(root).as_posix(), bytes=size, sha256=sha256)
