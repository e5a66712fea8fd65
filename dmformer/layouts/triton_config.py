"""``config.pbtxt``: Triton's ``ModelConfig`` (model_config.proto) in protobuf's text form, and what lies beside it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmformer.bundle.settings import machine_key
from dmformer.serve.served import MACHINE, THREADS
from dmformer.text import pbtxt_string, plain

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.bundle.manifest import Tensor
    from dmformer.serve.served import ServedSpec

LABELS = "labels.txt"
FLOATS = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}  # of networks
_TYPES = {**FLOATS, "int32": "TYPE_INT32", "bytes": "TYPE_STRING"}
_WARM_UP = "golden"
_ALL_BATCHES = 8  # up to this largest batch, every size is warmed up
_QUEUE_US = 100  # how long Triton waits for others to share a batch with


@dataclass(frozen=True)
class TritonBackend:
    """How Triton calls an engine, on what it runs there, and under which name it looks for the main file."""

    name: str
    kind: str
    main: str


@dataclass(frozen=True)
class Batching:
    """How many rows and processes answer at once.

    Attributes:
        max_batch: largest batch that Triton makes of what waits.
        instances: copies of the model that answer side by side.
        threads: for one inference of this tool's predictor, on this machine alone; ``None``, and on another machine,
            the instances share the cores.
    """

    max_batch: int
    instances: int = 1
    threads: int | None = None


def write_config(
    folder: Path,
    served: ServedSpec,
    backend: TritonBackend,
    batching: Batching,
    comment: str | None = None,
    warm_up: bytes | None = None,
) -> None:
    """Write the configuration of a model into its folder, with labels and what it is warmed up with.

    Args:
        folder: of the model.
        served: what it is.
        backend: that runs it.
        batching: how many answer at once.
        comment: for people, one line.
        warm_up: one row of its input, as the protocol's binary form has it: what Triton asks before it says that the
            model is ready.
    """
    text = _config(served, backend, batching, comment, warm=warm_up is not None)
    (folder / "config.pbtxt").write_text(text, encoding="utf-8", newline="\n")
    if served.labelled:
        lines = (plain(" ".join(label.split())) for label in served.manifest.model.classes)
        (folder / LABELS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if warm_up is not None:
        (folder / "warmup").mkdir()
        (folder / "warmup" / _WARM_UP).write_bytes(warm_up)


def encoded_string(value: bytes) -> bytes:
    """Return an element of a tensor of strings as the protocol's binary form has it: its length, then its bytes."""
    return struct.pack("<I", len(value)) + value


def _config(served: ServedSpec, backend: TritonBackend, batching: Batching, comment: str | None, *, warm: bool) -> str:
    """Return the text; dimensions are without the batch."""
    outputs = ",\n".join(_tensor(output, served.labelled) for output in served.outputs)
    main = f'default_model_filename: "{backend.main}"\n'
    threads = {} if batching.threads is None else {THREADS: str(batching.threads), MACHINE: machine_key()}
    parameters = "".join(
        f'parameters {{\n  key: "{key}"\n  value {{ string_value: {pbtxt_string(value)} }}\n}}\n'
        for key, value in {**served.parameters, **threads}.items()
    )
    return (
        f"{f'# {comment}' + chr(10) if comment else ''}name: {pbtxt_string(served.name)}\n"
        f'backend: "{backend.name}"\n'
        f"{main}"
        f"max_batch_size: {batching.max_batch}\n"
        f"input [\n{_tensor(served.input)}\n]\n"
        f"output [\n{outputs}\n]\n"
        f"instance_group [\n  {{\n    count: {batching.instances}\n    kind: {backend.kind}\n  }}\n]\n"
        f"dynamic_batching {{\n  max_queue_delay_microseconds: {_QUEUE_US}\n}}\n"
        f"{_warm_up(served, batching.max_batch) if warm else ''}"
        f"{parameters}"
    )


def _tensor(spec: Tensor, labelled: str | None = None) -> str:
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in spec.shape[1:])
    label = f'\n    label_filename: "{LABELS}"' if spec.name == labelled else ""
    fields = f"name: {pbtxt_string(spec.name)}\n    data_type: {_TYPES[spec.dtype]}\n    dims: [ {dims} ]{label}"
    return f"  {{\n    {fields}\n  }}"


def _warm_up(served: ServedSpec, max_batch: int) -> str:
    """Return the requests that each instance answers before the model is ready: engines compile for a size of batch."""
    given, side = served.input, served.manifest.preprocessing.image_size
    dims = ", ".join(str(size if isinstance(size, int) else side) for size in given.shape[1:])
    value = f'data_type: {_TYPES[given.dtype]}\n        dims: [ {dims} ]\n        input_data_file: "{_WARM_UP}"'
    sizes = range(1, max_batch + 1) if max_batch <= _ALL_BATCHES else (1, 2, 4, 8, max_batch)
    requests = (
        f'  {{\n    name: "{_WARM_UP} {size}"\n    batch_size: {size}\n    inputs {{\n'
        f"      key: {pbtxt_string(given.name)}\n      value {{\n        {value}\n      }}\n    }}\n  }}"
        for size in sizes
    )
    return "model_warmup [\n" + ",\n".join(requests) + "\n]\n"
