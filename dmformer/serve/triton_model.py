"""What Triton's Python backend calls: a model of a bundle, answered by this tool's own predictor.

The backend starts a process, the stub, for each instance of a model; it imports ``1/model.py`` of the model's folder,
which imports :class:`TritonPythonModel` from here. The artifact lies beside it in ``bundle``: what was exported, but no
other artifact. Triton makes batches of what waits; rows of requests whose images have one size are run at once.

A request that cannot be answered gets an error of its own, and the others of its batch are answered all the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import choose
from dmformer.bundle.settings import machine_key
from dmformer.data.images import decode_image
from dmformer.errors import CheckFailed, DMFormerError, StageFailed, UnavailableError, UsageError, first_line
from dmformer.machine import usable_cores
from dmformer.runtimes import registry
from dmformer.serve.predictor import Predictor, read_tensor, softmax
from dmformer.serve.served import (
    CLASS_INDEX,
    CLASS_MAP,
    CLASS_NAME,
    ENCODED_IMAGE,
    FORMAT,
    MACHINE,
    PRECISION,
    PROBABILITIES,
    SHA256,
    THREADS,
    reads_images,
)
from dmformer.task import OUTPUT_NAME, class_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Outputs = dict[str, NDArray[Any]]

BUNDLE = "bundle"  # beside model.py


class TritonPythonModel:
    """The class that the backend looks for; it calls the methods by these names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact.

        Raises:
            Exception: it cannot be loaded, or answers would come back empty; Triton says why, and the model is not
                ready.
        """
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        check_numpy(self._triton)
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        instances = sum(int(group.get("count", 1)) for group in config["instance_group"])
        bundle = open_bundle(Path(args["model_repository"]) / args["model_version"] / BUNDLE)
        row = registry.entry_of_format(parameters[FORMAT])
        choice = choose(bundle, row.name, parameters[PRECISION])
        if choice.artifact.sha256 != parameters[SHA256]:
            raise CheckFailed(
                f"artifact {choice.artifact.sha256[:12]}…; the configuration says {parameters[SHA256][:12]}…: "
                "lay the bundle out again"
            )
        # Threads count on the machine that they were tuned on. Each instance is a process: together they use the cores.
        tuned_here = parameters.get(MACHINE) == machine_key()
        threads = int(parameters[THREADS]) if tuned_here else max(1, usable_cores() // instances)
        self._predictor = Predictor(choice, threads=threads)
        self._answers = BatchAnswers(self._predictor, images=reads_images(parameters))
        self._predictor.__enter__()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, each by a response of its own."""
        triton = self._triton
        given = [_result_or_error(self._read, request) for request in requests]
        responses = []
        for request, answer in zip(requests, self._answers.answer(given), strict=True):
            tensors = answer
            if not isinstance(answer, DMFormerError):
                tensors = _result_or_error(self._tensors, request, answer)
            if isinstance(tensors, DMFormerError):
                responses.append(triton.InferenceResponse(error=triton.TritonError(str(tensors))))
            else:
                responses.append(triton.InferenceResponse(output_tensors=tensors))
        return responses

    def finalize(self) -> None:
        """Free the engine."""
        self._predictor.__exit__(None, None, None)

    def _read(self, request: Any) -> NDArray[Any]:
        tensor = self._triton.get_input_tensor_by_name(request, self._answers.input_name)
        if tensor is None:
            raise UsageError(f"a request without {self._answers.input_name!r}; expected that input")
        rows: NDArray[Any] = tensor.as_numpy()
        return rows

    def _tensors(self, request: Any, answer: Outputs) -> list[Any]:
        wanted = request.requested_output_names()
        return [self._triton.Tensor(name, answer[name]) for name in answer if name in wanted]


def check_numpy(triton: Any) -> None:
    """Refuse a NumPy with which the stub would send empty answers without an error.

    A stub that was built for NumPy 1 misreads the size of NumPy 2's elements, and takes a tensor for one of no bytes.

    Raises:
        UnavailableError: it is such a one.
    """
    sent = np.arange(1, 5, dtype=np.float32)
    returned = triton.Tensor.from_dlpack("check", triton.Tensor("check", sent).to_dlpack()).as_numpy()
    if not np.array_equal(returned, sent):
        raise UnavailableError(
            f"NumPy {np.__version__} does not go with this Python backend, whose answers would be empty; expected "
            "NumPy 1, for which its stub was built: pip install 'numpy<2'"
        )


class BatchAnswers:
    """Answers to the requests of a batch.

    Args:
        predictor: open while it is asked.
        images: whether the requests bring files of images instead of tensors.
    """

    def __init__(self, predictor: Predictor, *, images: bool) -> None:
        self._predictor, self._images = predictor, images
        self.input_name = ENCODED_IMAGE if images else predictor.manifest.inputs[0].name

    def answer(self, requests: Sequence[NDArray[Any] | DMFormerError]) -> list[Outputs | DMFormerError]:
        """Return an array for each output of each request, or why there are none.

        Args:
            requests: rows of each: tensors (N, C, H, W), or (N, 1) of the bytes of image files; or why they cannot be
                read, which is the answer then.
        """
        tensors: list[Any] = [
            rows if isinstance(rows, DMFormerError) else _result_or_error(self._read_tensors, rows) for rows in requests
        ]
        answers: list[Outputs | DMFormerError] = [StageFailed("not asked")] * len(requests)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for place, tensor in enumerate(tensors):
            if isinstance(tensor, DMFormerError):
                answers[place] = tensor
            else:
                by_size.setdefault(tensor.shape[1:], []).append(place)
        for places in by_size.values():
            for place, answer in zip(places, self._run([tensors[place] for place in places]), strict=True):
                answers[place] = answer
        return answers

    def _read_tensors(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Return what the network sees, (N, C, H, W)."""
        if not len(rows):
            raise UsageError("a request of no rows; expected at least one")
        if not self._images:
            return rows
        seen = [read_tensor(self._predictor.manifest, decode_image(data)) for data in rows.reshape(-1)]
        if len({tensor.shape for tensor in seen}) > 1:
            raise UsageError("images of several sizes in one request; expected one size, or a request for each")
        return np.concatenate(seen)

    def _run(self, tensors: Sequence[NDArray[np.float32]]) -> list[Outputs | DMFormerError]:
        """Run the rows of requests at once; where that fails, those of each request alone."""
        found = _result_or_error(lambda: self._predictor.run(np.concatenate(tensors)))
        if isinstance(found, DMFormerError):
            if len(tensors) == 1:
                return [found]
            return [answer for tensor in tensors for answer in self._run([tensor])]
        ends = np.cumsum([len(tensor) for tensor in tensors])
        answers: list[Outputs | DMFormerError] = []
        for tensor, end in zip(tensors, ends, strict=True):
            part = {name: array[end - len(tensor) : end] for name, array in found.items()}
            answers.append(_result_or_error(self._complete, part, tensor))
        return answers

    def _complete(self, outputs: Outputs, tensor: NDArray[np.float32]) -> Outputs:
        """Check the network's outputs; add what is made of them, and the tensor, where images were given."""
        for name, array in outputs.items():
            if not np.isfinite(array).all():
                raise StageFailed(f"output {name!r} is NaN or infinite; expected numbers: is the input finite?")
        if not self._images:
            return outputs
        manifest = self._predictor.manifest
        return {**self._classes(outputs), **outputs, manifest.inputs[0].name: tensor}

    def _classes(self, outputs: Outputs) -> Outputs:
        model = self._predictor.manifest.model
        if model.task == "features":
            return {}
        logits = class_logits(outputs[OUTPUT_NAME])
        chosen = logits.argmax(1).astype(np.int32)  # (N, classes, …) -> (N, …); ties go to the lower class
        if model.task == "segmentation":
            return {CLASS_MAP: chosen}
        named = {CLASS_NAME: np.array([[model.classes[i].encode()] for i in chosen], np.object_)}
        return {
            CLASS_INDEX: chosen[:, None],
            **(named if model.classes else {}),
            PROBABILITIES: softmax(logits).astype(np.float32),
        }


def _result_or_error(run: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call gives, or how it failed, whatever it was: one request must not end the server's process."""
    try:
        return run(*arguments)
    except DMFormerError as error:
        return error
    except Exception as error:  # noqa: BLE001
        return StageFailed(f"{type(error).__name__}: {first_line(error)}")
