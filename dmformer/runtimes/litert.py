"""LiteRT, formerly TensorFlow Lite, on the CPU: its interpreter with the kernels of XNNPACK."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dmformer._optional import require
from dmformer.errors import StageFailed, UsageError
from dmformer.runtimes.base import Details, Runtime, TensorSpec, symbolic
from dmformer.runtimes.inspector import Inspector, Kernel, precision_of
from dmformer.runtimes.support import Availability, Support

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dmformer.files import OpenFile
    from dmformer.runtimes.base import Arrays
    from dmformer.runtimes.target import Target

_COMPUTING = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL")
_IDENTIFIER = b"TFL3"  # at byte 4 of a file


def _import() -> Any:
    package = require("ai_edge_litert", extra="litert", purpose="it")
    require("ai_edge_litert.interpreter", extra="litert", purpose="it")
    return package.interpreter


class LiteRtSupport(Support):
    """LiteRT's interpreter on this machine."""

    name = "litert"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    refused: ClassVar[Mapping[str, str]] = {
        "int8": "ai-edge-quantizer rounds six times as coarsely as the int8 of the ONNX file, and gains no speed; "
        "docs/measurements.md has the figures"
    }
    package: ClassVar[tuple[str, ...]] = ("ai_edge_litert", "ai_edge_litert/libpywrap_litert_common")
    reads_onnx: ClassVar[bool] = False

    def inspect_files(self, files: Sequence[OpenFile], target: Target | None = None) -> None:
        """Check that it begins as a .tflite file does."""
        del target
        if files[0].data[4:8] != _IDENTIFIER:
            raise UsageError(f"{files[0].path} is damaged, or no .tflite file; export it again")

    def import_engine(self) -> Availability:
        """Make sure that the interpreter is there."""
        _import().Interpreter  # noqa: B018 - may be half installed
        return Availability(True, _version())

    def cannot_compute(self, precision: str) -> str | None:
        """Say that weights in float16 are computed with in float32."""
        if precision != "fp16":
            return None
        return "litert keeps weights in float16 here, and computes in float32"


def _version() -> str:
    from importlib import metadata

    return metadata.version("ai-edge-litert")


class LiteRtInspector(Inspector):
    """Reads the interpreter's operators; of their times and inner tensors it shows nothing."""

    runtime: LiteRtRuntime

    def read_layers(self) -> dict[str, int]:
        """Count the compute operators by the type of what they give: weights of fewer bits are expanded before."""
        interpreter = self.runtime.interpreter
        types = {tensor["index"]: np.dtype(tensor["dtype"]).name for tensor in interpreter.get_tensor_details()}
        operators = [one for one in interpreter._get_ops_details() if one["op_name"] in _COMPUTING]  # noqa: SLF001
        return dict(Counter(precision_of(types[one["outputs"][0]]) for one in operators))

    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Time the whole network: the package has no profiler."""
        taken = []
        for feed in feeds:
            before = time.perf_counter_ns()
            self.runtime.infer(feed)
            taken.append(time.perf_counter_ns() - before)
        return [Kernel("model", "Model", tuple(taken))]


class LiteRtRuntime(Runtime):
    """Runs a ``.tflite`` file by its only signature; a batch row by row, because files are made for one row.

    The arrays are (N, C, H, W), as in every other format.
    """

    support = LiteRtSupport()
    inspector = LiteRtInspector
    interpreter: Any = None
    _inputs: dict[str, int]
    _outputs: dict[str, int]

    def load(self) -> None:
        """Read the file and plan its memory."""
        content = self.main_file().data[:]
        if content[4:8] != _IDENTIFIER:
            raise StageFailed(f"{self.path.name} is no .tflite file; expected the one that was exported")
        self.interpreter = _import().Interpreter(model_content=content, num_threads=self.threads)
        self.interpreter.allocate_tensors()
        (signature,) = self.interpreter.get_signature_list()
        runner = self.interpreter.get_signature_runner(signature)
        self._inputs = {name: one["index"] for name, one in runner.get_input_details().items()}
        self._outputs = {name: one["index"] for name, one in runner.get_output_details().items()}

    def close(self) -> None:
        """Drop the interpreter; it is freed with its last reference."""
        self.interpreter = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The signature's inputs."""
        return self._specs(self._inputs, self.interpreter.get_input_details())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The signature's outputs."""
        return self._specs(self._outputs, self.interpreter.get_output_details())

    @property
    def details(self) -> Details:
        """What was asked for: the interpreter tells neither device nor threads."""
        return Details(device="CPU", threads=self.threads, version=_version())

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run row by row; the interpreter copies what it gives."""
        rows: dict[str, list[NDArray[Any]]] = {name: [] for name in self._outputs}
        for row in range(len(next(iter(inputs.values())))):
            for name, array in inputs.items():
                self.interpreter.set_tensor(self._inputs[name], np.ascontiguousarray(array[row : row + 1]))
            self.interpreter.invoke()
            for name, arrays in rows.items():
                arrays.append(self.interpreter.get_tensor(self._outputs[name]))
        return {name: np.concatenate(arrays) for name, arrays in rows.items()}

    def _specs(self, indices: Mapping[str, int], details: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
        shown = {one["index"]: one for one in details}
        return tuple(
            TensorSpec(
                name,
                np.dtype(shown[index]["dtype"]).name,
                symbolic((None, *(int(size) for size in shown[index]["shape"][1:]))),
            )
            for name, index in indices.items()
        )
