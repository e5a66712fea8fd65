"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmformer._optional import require
from dmformer.errors import StageFailed, first_line
from dmformer.runtimes.base import Availability, Details, Runtime, TensorSpec, symbolic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dmformer.runtimes.base import Arrays

_PROVIDER = "CPUExecutionProvider"
_ERRORS_ONLY = 3
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


def _import() -> Any:
    return require("onnxruntime", extra="onnxruntime", purpose="it")


class OnnxRuntime(Runtime):
    """Runs ``.onnx`` files with the CPU execution provider."""

    name = "onnxruntime"
    _session: Any = None

    @classmethod
    def probe(cls) -> Availability:
        """Whether onnxruntime is installed and has its CPU provider."""
        try:
            ort = _import()
            version, providers = ort.__version__, ort.get_available_providers()
        except Exception as error:  # noqa: BLE001 - a half installed engine fails in ways of its own
            return Availability(False, reason=first_line(error))
        if _PROVIDER not in providers:
            return Availability(False, version, f"this build of onnxruntime has no {_PROVIDER}")
        return Availability(True, version)

    def load(self) -> None:
        """Create the session and make sure that it uses the provider that was asked for."""
        ort = _import()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        self._session = ort.InferenceSession(str(self.path), options, providers=[_PROVIDER])
        self._session.disable_fallback()
        if self._session.get_providers() != [_PROVIDER]:
            raise StageFailed(f"onnxruntime took {self._session.get_providers()}; expected only {_PROVIDER}")

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
            precision=self.precision,
            threads=self._session.get_session_options().intra_op_num_threads,
            version=_import().__version__,
        )

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the session; onnxruntime allocates the outputs anew for each call."""
        names = [node.name for node in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def _spec(node: Any) -> TensorSpec:
    return TensorSpec(node.name, _DTYPES.get(node.type, node.type), symbolic(node.shape))
