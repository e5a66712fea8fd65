"""ncnn on the CPU.

A network of ncnn is two files: a ``.param`` of text, which lists the layers, and a ``.bin`` of their weights in that
order, without names or sizes. ncnn believes both, and ends the process where they do not go together; so they are read
here first. Converting (:mod:`dmformer.export.formats.ncnn`) gives inputs, outputs and inner tensors the names of the
ONNX file, and writes the size of the input beside its name.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dmformer._optional import require
from dmformer.errors import StageFailed, UsageError
from dmformer.files import utf8_path
from dmformer.machine import instructions
from dmformer.runtimes.base import Details, Runtime, TensorSpec, smallest_shape, symbolic
from dmformer.runtimes.inspector import Inspector, Kernel
from dmformer.runtimes.support import Availability, Support

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from dmformer.files import OpenFile
    from dmformer.runtimes.base import Arrays
    from dmformer.runtimes.target import Target

_MAGIC = "7767517"
_MOST_LAYERS = 1 << 16
COMPUTING = ("Convolution", "ConvolutionDepthWise", "Deconvolution", "DeconvolutionDepthWise", "InnerProduct", "Gemm")
# Where the parameters of a layer have its number of outputs, whether it has a bias, and its number of weights.
_WEIGHTS = dict.fromkeys(COMPUTING[:4], (0, 5, 6)) | {"InnerProduct": (0, 1, 2)}
FEATURE_MASK, IN_FLOAT32 = 31, 3  # a parameter of every layer: of float16, neither arithmetic nor storage there
# Layers that have no values in the .bin; of any other, nothing is said about where its values begin and end.
_WITHOUT_VALUES = frozenset(
    ("BinaryOp", "Clip", "Concat", "Crop", "Eltwise", "ExpandDims", "Flatten", "GELU", "HardSigmoid", "HardSwish",
     "Input", "Interp", "MatMul", "Noop", "Padding", "Permute", "PixelShuffle", "Pooling", "ReLU", "Reduction",
     "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Swish", "TanH", "UnaryOp")
)  # fmt: skip
FLOAT16 = b"\x47\x6b\x30\x01"
_TYPES = {bytes(4): (4, "float32"), FLOAT16: (2, "float16")}  # how weights begin, and the bytes of each value
# Each is set, whatever its default is in the installed version.
_REDUCING = ("fp16_packed", "fp16_storage", "fp16_arithmetic")
_NEVER = ("bf16_packed", "bf16_storage", "int8_packed", "int8_storage", "int8_arithmetic", "int8_inference")


@dataclass(frozen=True)
class NcnnLayer:
    """One line of a ``.param``: a layer, the tensors that it reads and gives, and its parameters by their numbers."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: dict[int, str] = field(default_factory=dict)

    def number(self, at: int) -> int:
        """Return a parameter that is a whole number; one that is not there is 0."""
        return int(self.parameters.get(at, "0"))

    def line(self) -> str:
        """Write the line."""
        tensors = (*self.inputs, *self.outputs)
        parameters = (f"{at}={value}" for at, value in self.parameters.items())
        counts = str(len(self.inputs)), str(len(self.outputs))
        return " ".join((f"{self.operator:<24}", f"{self.name:<24}", *counts, *tensors, *parameters))


@dataclass(frozen=True)
class Weights:
    """The weights of one layer: where their values are in the ``.bin``, in bytes, and of which type they are."""

    layer: NcnnLayer
    first: int
    last: int
    dtype: str


def read_param(text: str) -> list[NcnnLayer]:
    """Read a ``.param``.

    Raises:
        ValueError: it is none, or its layers do not go together.
    """
    lines = text.split("\n")
    if lines[0].strip() != _MAGIC or len(lines) < 2:
        raise ValueError(f"the file does not begin with {_MAGIC}, as a .param of ncnn does")
    try:
        counts = tuple(map(int, lines[1].split()))
        layers = [_read_layer(line) for line in lines[2:] if line.strip()]
    except (ValueError, IndexError) as error:
        raise ValueError(f"no .param of ncnn: {error}") from error
    made: set[str] = set()
    for layer in layers:
        if missing := [name for name in layer.inputs if name not in made]:
            raise ValueError(f"layer {layer.name} reads {missing[0]!r}, which no layer before it gives")
        if twice := [name for name in layer.outputs if name in made]:
            raise ValueError(f"layer {layer.name} gives {twice[0]!r}, which a layer before it gives as well")
        made.update(layer.outputs)
    if counts != (len(layers), len(made)) or len(layers) > _MOST_LAYERS or not made:
        raise ValueError(f"the file says {lines[1].strip()!r}; it has {len(layers)} layers and {len(made)} tensors")
    return layers


def write_param(layers: Sequence[NcnnLayer]) -> str:
    """Write a ``.param``."""
    tensors = sum(len(layer.outputs) for layer in layers)
    return "\n".join([_MAGIC, f"{len(layers)} {tensors}", *(layer.line() for layer in layers), ""])


def _read_layer(line: str) -> NcnnLayer:
    operator, name, reads, gives, *rest = line.split()
    ends = int(reads), int(reads) + int(gives)
    if min(ends) < 0 or ends[1] > len(rest):
        raise ValueError(f"layer {name} with {reads} and {gives} tensors, of which the line names {len(rest)}")
    parameters = {}
    for word in rest[ends[1] :]:
        at, _, value = word.partition("=")
        parameters[int(at)] = value
    return NcnnLayer(operator, name, tuple(rest[: ends[0]]), tuple(rest[ends[0] : ends[1]]), parameters)


def locate_weights(layers: Sequence[NcnnLayer], data: bytes) -> list[Weights]:
    """Find the weights of each layer in the content of a ``.bin``.

    What follows a layer of a kind that is not known here is left out.

    Raises:
        ValueError: the file is too short or too long for the layers.
    """
    found: list[Weights] = []
    at = 0
    for layer in layers:
        if layer.operator not in _WEIGHTS:
            if layer.operator not in _WITHOUT_VALUES:
                return found
            continue
        outputs, bias, count = (layer.number(place) for place in _WEIGHTS[layer.operator])
        if outputs < 1 or count < 1 or at + 4 > len(data):
            raise ValueError(f"layer {layer.name} has {outputs} outputs and {count} weights from byte {at} on")
        begins = data[at : at + 4]
        if begins not in _TYPES:
            raise ValueError(f"the weights of layer {layer.name} begin with {begins!r}; expected float32 or float16")
        size, dtype = _TYPES[begins]
        found.append(Weights(layer, at + 4, at + 4 + count * size, dtype))
        at += 4 + (count * size + 3) // 4 * 4 + (4 * outputs if bias else 0)
        if at > len(data):
            raise ValueError(f"the weights end at byte {len(data)}, within those of layer {layer.name}")
    if at != len(data):
        raise ValueError(f"the weights have {len(data)} bytes; the layers have {at}")
    return found


def _import() -> Any:
    return require("ncnn", extra="ncnn", purpose="it")


class NcnnSupport(Support):
    """ncnn's CPU layers on this machine."""

    name = "ncnn"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    refused: ClassVar[Mapping[str, str]] = {
        "int8": "the quantiser of ncnn (its programs ncnn2table and ncnn2int8) is in none of its Python packages"
    }
    package: ClassVar[tuple[str, ...]] = ("ncnn", "ncnn/ncnn")
    reads_onnx: ClassVar[bool] = False

    def inspect_files(self, files: Sequence[OpenFile], target: Target | None = None) -> None:
        """Check that both files are there and go together."""
        del target
        param = files[0]
        weights = [file for file in files if file.path == param.path.with_suffix(".bin")]
        if not weights:
            raise UsageError(f"{param.path} has no .bin beside it; expected both files: export it again")
        try:
            locate_weights(read_param(param.data[:].decode("ascii")), weights[0].data[:])
        except ValueError as error:
            raise UsageError(f"{param.path}, or its .bin, is damaged: {error}; export it again") from error

    def import_engine(self) -> Availability:
        """Make sure that the package has what runs a network."""
        ncnn = _import()
        ncnn.Net().create_extractor  # noqa: B018 - may be half installed
        return Availability(True, ncnn.__version__)

    def cannot_compute(self, precision: str) -> str | None:
        """Say that float16 arithmetic is there on Arm with its half-precision instructions only."""
        if precision != "fp16" or "asimdhp" in instructions():
            return None
        return "ncnn has no float16 arithmetic on this processor, and computes in float32"

    def sums_in_float16(self) -> bool:
        """Say that its layers add up in float16 wherever they compute in it."""
        return self.cannot_compute("fp16") is None


class NcnnInspector(Inspector):
    """Reads the loaded layers, and extracts the tensors one after another."""

    runtime: NcnnRuntime

    def inner_tensors(self) -> frozenset[str]:
        """Return the names that conversion gave: those of the ONNX file."""
        return frozenset(name for layer in self.runtime.layers for name in layer.outputs if not name.isdecimal())

    def read_layers(self) -> dict[str, int]:
        """Count the compute layers, in the types that the loaded network's options and their own kernels allow."""
        options = self.runtime.net.opt
        half = options.use_fp16_storage and options.use_fp16_arithmetic
        kept = {layer.name for layer in self.runtime.layers if layer.number(FEATURE_MASK)}
        loaded = [layer for layer in self.runtime.net.layers() if layer.type in COMPUTING]
        in_half = [half and layer.support_fp16_storage and layer.name not in kept for layer in loaded]
        return dict(Counter("fp16" if is_half else "fp32" for is_half in in_half))

    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Time each layer by extracting what it gives when all that it reads is there.

        Extracting unpacks a tensor, which an inference does not; of the rows of a batch the times are added.
        """
        layers = [layer for layer in self.runtime.layers if layer.operator not in ("Input", "Split")]
        times: list[list[int]] = [[0] * len(feeds) for _ in layers]
        for at, feed in enumerate(feeds):
            for extractor in self.runtime.started(feed, light=False):
                for layer, taken in zip(layers, times, strict=True):
                    before = time.perf_counter_ns()
                    self.runtime.extract(extractor, layer.outputs[0])
                    taken[at] += time.perf_counter_ns() - before
        return [
            Kernel(layer.outputs[0] if layer.outputs[0].startswith("/") else layer.name, layer.operator, tuple(taken))
            for layer, taken in zip(layers, times, strict=True)
        ]


class NcnnRuntime(Runtime):
    """Runs a ``.param`` with the ``.bin`` beside it; a batch row by row, because ncnn's networks have no batch."""

    support = NcnnSupport()
    inspector = NcnnInspector
    net: Any = None
    layers: tuple[NcnnLayer, ...] = ()
    _outputs: tuple[TensorSpec, ...] = ()

    def load(self) -> None:
        """Check both files, and load them with every option of precision set."""
        param, weights = self.main_file(), self.open_file(self.path.with_suffix(".bin"))
        if weights is None:
            raise StageFailed(f"{self.path.name} has no .bin beside it; expected both files that were exported")
        text = param.data[:].decode("ascii")
        self.layers = tuple(read_param(text))
        locate_weights(self.layers, weights.data[:])
        self.net = _import().Net()
        half = self.precision == "fp16" and not self.support.cannot_compute("fp16")
        wanted = dict.fromkeys(_REDUCING, half) | dict.fromkeys(_NEVER, False) | {"vulkan_compute": False}
        # Winograd's sums of large parts lose in float16 what the precision has: 3x3 kernels were 26 times as far off.
        wanted["winograd_convolution"] = not half
        for name, value in wanted.items():
            if hasattr(self.net.opt, f"use_{name}"):  # older versions have fewer
                setattr(self.net.opt, f"use_{name}", value)
        self.net.opt.num_threads = self.threads
        # The package takes weights by their path only: it would cut bytes in memory at the first zero.
        if self.net.load_param_mem(text) or self.net.load_model(str(utf8_path(weights.path))):
            raise StageFailed("ncnn refused the files; expected those that were exported")
        self.check_unchanged(weights)
        if self.net.opt.use_fp16_arithmetic is not half:
            raise StageFailed(f"ncnn took float16 arithmetic {'off' if half else 'on'}; expected the other")
        self._outputs = ()

    def close(self) -> None:
        """Drop the network; ncnn frees it with its last reference."""
        self.net = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The layers that are inputs, of the size that their parameters have."""
        return tuple(_spec(layer) for layer in self.layers if layer.operator == "Input")

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What no layer reads, and the taps; of the shapes that they have for a black image, as ncnn keeps none."""
        if not self._outputs:
            black = {spec.name: np.zeros(smallest_shape(spec), spec.dtype) for spec in self.inputs}
            is_open = any(isinstance(side, str) for spec in self.inputs for side in spec.shape[2:])
            self._outputs = tuple(
                TensorSpec(name, str(array.dtype), _shape(array.shape, is_open))
                for name, array in self.infer(black).items()
            )
        return self._outputs

    @property
    def details(self) -> Details:
        """Threads of the loaded network's options."""
        return Details(device="CPU", threads=self.net.opt.num_threads, version=_import().__version__)

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run row by row."""
        read = {name for layer in self.layers for name in layer.inputs}
        given = [name for layer in self.layers for name in layer.outputs if name not in read]
        names = dict.fromkeys((*given, *(tap for tap in self.taps if self._shows(tap))))
        rows: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
        for extractor in self.started(inputs, light=not self.taps):
            for name, arrays in rows.items():
                arrays.append(self.extract(extractor, name))
        return {name: np.stack(arrays) for name, arrays in rows.items()}

    def _shows(self, name: str) -> bool:
        return any(name in layer.outputs for layer in self.layers)

    def started(self, inputs: Arrays, *, light: bool) -> Iterator[Any]:
        """Yield what runs each row of a batch; with ``light`` it frees tensors that are no longer read."""
        ncnn = _import()
        for row in range(len(next(iter(inputs.values())))):
            extractor = self.net.create_extractor()
            extractor.set_light_mode(light)
            for name, array in inputs.items():
                values = np.ascontiguousarray(array[row])  # has to outlive the Mat, which refers to its memory
                if extractor.input(name, ncnn.Mat(values).clone()):  # into channels aligned as ncnn's kernels want
                    raise StageFailed(f"ncnn refused the input {name!r}")
            yield extractor

    def extract(self, extractor: Any, name: str) -> NDArray[Any]:
        """Return a copy of a tensor of one row."""
        code, tensor = extractor.extract(name)
        if code or tensor.empty():
            raise StageFailed(f"ncnn gave no {name!r} (code {code})")
        return np.array(tensor)


def _spec(layer: NcnnLayer) -> TensorSpec:
    """Return the input that a layer is: its parameters are width, height and channels, 0 where they are open."""
    return TensorSpec(layer.outputs[0], "float32", symbolic((None, *(layer.number(at) for at in (2, 1, 0)))))


def _shape(shape: tuple[int, ...], is_open: bool) -> tuple[int | str, ...]:
    return symbolic((None, *(None if is_open and axis > 0 else size for axis, size in enumerate(shape[1:]))))
