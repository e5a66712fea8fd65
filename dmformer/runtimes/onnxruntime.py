"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dmformer._optional import require
from dmformer.errors import CheckFailed, StageFailed, UsageError
from dmformer.machine import give_memory_back, instructions, on_arm
from dmformer.names import check_name
from dmformer.runtimes.base import Details, Runtime, TensorSpec, smallest_shape, symbolic
from dmformer.runtimes.inspector import Inspector, Kernel, is_compute, precision_of
from dmformer.runtimes.onnx_weights import external_files, refer_to_weights
from dmformer.runtimes.support import Availability, Support

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dmformer.files import OpenFile
    from dmformer.runtimes.base import Arrays
    from dmformer.runtimes.target import Target

_PROVIDER = "CPUExecutionProvider"
_FATAL_ONLY = 4  # errors are raised as well, and told once
_KERNEL = "_kernel_time"  # how the profile marks what is a kernel
_FOLDER = "session.model_external_initializers_file_folder_path"  # where a model in memory has its files
_DTYPES = {"float": "float32", "double": "float64"}  # the others have the names that NumPy gives them


def _import() -> Any:
    return require("onnxruntime", extra="onnxruntime", purpose="it")


class OnnxSupport(Support):
    """onnxruntime and its CPU execution provider on this machine."""

    name = "onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")
    package: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnxruntime/capi/onnxruntime_pybind11_state")

    def inspect_files(self, files: Sequence[OpenFile], target: Target | None = None) -> None:
        """Check that every file in which tensors are kept is one of the artifact's."""
        del target
        main, *others = files
        beside = {file.path for file in others}
        for location in sorted(external_files(main)):
            try:
                check_name(location)
            except UsageError:
                inside = False
            else:
                inside = main.path.parent.joinpath(*PurePosixPath(location).parts) in beside
            if not inside:
                raise CheckFailed(
                    f"{main.path}: keeps weights in {location!r}, which is no file of this artifact in the manifest; "
                    "expected its weights inside"
                )

    def import_engine(self) -> Availability:
        """Refuse builds for other devices, which may lack the CPU provider."""
        ort = _import()
        if _PROVIDER not in ort.get_available_providers():
            return Availability(False, ort.__version__, f"this build of onnxruntime has no {_PROVIDER}")
        return Availability(True, ort.__version__)

    def cannot_compute(self, precision: str) -> str | None:
        """Say that float16 convolutions need Arm with float16, and those in int8 quantised outputs as well."""
        sets = instructions()
        if precision == "fp16" and (not on_arm() or ("asimd" in sets and "asimdhp" not in sets)):  # as on a Cortex-A72
            return "onnxruntime's CPU provider has no float16 convolutions on this processor, and computes in float32"
        if precision == "int8":
            return (
                "onnxruntime computes a convolution in int8 only where its output is quantised too, which this graph "
                "leaves in floating point, and computes in float32"
            )
        return None

    def sums_in_float16(self) -> bool:
        """Say that its float16 convolutions, which Arm's arithmetic of that type alone has, add up in float16."""
        return self.cannot_compute("fp16") is None


class OnnxInspector(Inspector):
    """Reads the file's nodes, and the profiles of sessions made to be profiled."""

    runtime: OnnxRuntime

    def inner_tensors(self) -> frozenset[str]:
        """Return the outputs of the file's nodes."""
        onnx = require("onnx", extra="export", purpose="showing inner tensors")
        model = onnx.load_model_from_string(self.runtime.main_file().data[:])
        return frozenset(name for node in model.graph.node for name in node.output if name)

    def read_layers(self) -> dict[str, int]:
        """Read the profile of one inference, in which each executed kernel has its types."""
        found: Counter[str] = Counter()
        for event in self._profiled(
            [{spec.name: np.zeros(smallest_shape(spec), spec.dtype) for spec in self.runtime.inputs}]
        ):
            details = event["args"]
            if is_compute(details["op_name"]):
                (type_name,) = details["input_type_shape"][0]
                found[precision_of(type_name)] += 1
        return dict(found)

    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Read the profile of a session made for it; it counts in whole microseconds."""
        times: dict[tuple[str, str], list[int]] = {}
        for event in self._profiled(feeds):
            key = event["name"].removesuffix(_KERNEL), event["args"]["op_name"]
            times.setdefault(key, []).append(1000 * event["dur"])
        return [Kernel(name, operator, tuple(taken)) for (name, operator), taken in times.items()]

    def _profiled(self, feeds: Sequence[Arrays]) -> list[dict[str, Any]]:
        """Return what the profile of a new session has of each kernel of each inference."""
        with tempfile.TemporaryDirectory(prefix="dmformer-") as folder:
            options = self.runtime.options()
            options.enable_profiling = True
            options.profile_file_prefix = f"{folder}/profile"
            session = self.runtime.new_session(options)
            for feed in feeds:
                session.run(None, dict(feed))
            events = json.loads(Path(session.end_profiling()).read_bytes())
        return [event for event in events if event.get("name", "").endswith(_KERNEL)]


class OnnxRuntime(Runtime):
    """Runs ``.onnx`` files with the CPU execution provider."""

    support = OnnxSupport()
    inspector = OnnxInspector
    _session: Any = None

    def load(self) -> None:
        """Create the session and make sure that it uses the provider that was asked for."""
        self._session = self.new_session(self.options(), self._tapped() if self.taps else None)
        if self._session.get_providers() != [_PROVIDER]:
            raise StageFailed(f"onnxruntime took {self._session.get_providers()}; expected only {_PROVIDER}")
        self._names = [node.name for node in self._session.get_outputs()]

    def new_session(self, options: Any, model: bytes | None = None) -> Any:
        """Make a session of the file, or of a model in memory.

        Without onnxruntime's fallback, which prints to standard output and tries again.
        """
        file = self.main_file()
        with suppress(ValueError, IndexError):  # onnxruntime has the words for what is wrong with a file
            model = model or refer_to_weights(file)
        with _opened_folder(file.path.parent) as folder:
            options.add_session_config_entry(_FOLDER, folder)
            given = model or bytes(file.data)
            session = _import().InferenceSession(given, options, providers=[_PROVIDER], enable_fallback=0)
        self.check_unchanged(file)  # weights are mapped by their path
        give_memory_back()
        return session

    def _tapped(self) -> bytes:
        """Return the model with the taps among its outputs."""
        onnx = require("onnx", extra="export", purpose="showing inner tensors")
        model = onnx.load_model_from_string(self.main_file().data[:])
        known = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.taps if name not in known)
        data: bytes = model.SerializeToString()
        return data

    def options(self) -> Any:
        """Return the settings of a new session."""
        options = _import().SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        return options

    def close(self) -> None:
        """Drop the session; onnxruntime frees it with its last reference."""
        self._session = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs."""
        return tuple(_spec(node) for node in self._session.get_inputs())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs."""
        return tuple(_spec(node) for node in self._session.get_outputs())

    @property
    def details(self) -> Details:
        """Provider and threads of the session."""
        return Details(
            device=", ".join(self._session.get_providers()),
            threads=self._session.get_session_options().intra_op_num_threads,
            version=_import().__version__,
        )

    @property
    def runs_after_fork(self) -> bool:
        """Whether the session has no pool: a thread of one may hold a lock just then, which nobody would give back."""
        return self.threads == 1

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the session; onnxruntime allocates the outputs anew for each call."""
        return dict(zip(self._names, self._session.run(self._names, dict(inputs)), strict=True))


@contextmanager
def _opened_folder(folder: Path) -> Iterator[str]:
    """Give a path to a folder that stays the same folder, on Linux, wherever its name leads in the meantime."""
    folder = folder.resolve()
    if not sys.platform.startswith("linux"):
        yield str(folder)
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _spec(node: Any) -> TensorSpec:
    dtype = node.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(node.name, _DTYPES.get(dtype, dtype), symbolic(node.shape))
