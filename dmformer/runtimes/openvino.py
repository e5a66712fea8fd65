"""OpenVINO on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer._optional import require
from dmformer.errors import StageFailed, first_line
from dmformer.runtimes.base import Availability, Details, Runtime, TensorSpec, symbolic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dmformer.runtimes.base import Arrays

_DEVICE = "CPU"
# Without the hint OpenVINO may compute in bfloat16 on processors that have it.
_PRECISION_HINT = {"fp32": "f32"}


def _import() -> Any:
    return require("openvino", extra="openvino", purpose="it")


class OpenVinoRuntime(Runtime):
    """Runs OpenVINO IR (``.xml`` with its ``.bin``) on the CPU plugin."""

    name = "openvino"
    _request: Any = None
    _model: Any = None

    @classmethod
    def probe(cls) -> Availability:
        """Whether openvino is installed and its CPU plugin loads."""
        try:
            ov = _import()
            version, devices = ov.__version__.split("-")[0], ov.Core().available_devices
        except Exception as error:  # noqa: BLE001 - a half installed engine fails in ways of its own
            return Availability(False, reason=first_line(error))
        if _DEVICE not in devices:
            return Availability(False, version, f"this installation of openvino has no {_DEVICE} plugin")
        return Availability(True, version)

    def load(self) -> None:
        """Compile the model and make sure that device, precision and threads are those asked for."""
        ov = _import()
        wanted = _PRECISION_HINT[self.precision]
        core = ov.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": wanted,
            "INFERENCE_NUM_THREADS": self.threads,
        }
        self._model = core.compile_model(core.read_model(str(self.path)), _DEVICE, settings)
        self._request = self._model.create_infer_request()
        used = self.details
        if used.device != _DEVICE or used.precision != self.precision:
            raise StageFailed(
                f"openvino compiled for {used.device} at {used.precision}; expected {_DEVICE} at {self.precision}"
            )

    def close(self) -> None:
        """Drop request and model; OpenVINO frees them with their last reference."""
        self._request = None
        self._model = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs."""
        return tuple(_spec(port) for port in self._model.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs."""
        return tuple(_spec(port) for port in self._model.outputs)

    @property
    def details(self) -> Details:
        """Device, precision and threads that the compiled model reports."""
        hint = self._model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        names = {ov_name: ours for ours, ov_name in _PRECISION_HINT.items()}
        return Details(
            device=", ".join(self._model.get_property("EXECUTION_DEVICES")),
            precision=names.get(hint, hint),
            threads=int(self._model.get_property("INFERENCE_NUM_THREADS")),
            version=_import().__version__.split("-")[0],
        )

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run one request; the outputs are copied out of its buffers."""
        results = self._request.infer(dict(inputs), share_inputs=True)
        return {port.get_any_name(): np.array(array) for port, array in results.items()}


def _spec(port: Any) -> TensorSpec:
    shape = [size.get_length() if size.is_static else -1 for size in port.get_partial_shape()]
    return TensorSpec(port.get_any_name(), np.dtype(port.get_element_type().to_dtype()).name, symbolic(shape))
