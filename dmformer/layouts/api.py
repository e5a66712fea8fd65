"""Write a bundle as what a server serves: the model repository of a model server, or a page for browsers.

DIR/models is the repository, and DIR/README.md says how it is served and what a client has to do. NVIDIA Triton: a
folder a model with ``config.pbtxt``, ``labels.txt`` and ``1/``, which has the files under the names that its backend
looks for; for the Python backend ``model.py`` and the bundle. OpenVINO Model Server: ``config.json``, and a folder a
model. For browsers DIR is a page that does it all (:mod:`dmformer.layouts.web`), which any static server serves.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dmformer.bundle.manifest import GOLDEN, MANIFEST, SIGNATURE
from dmformer.bundle.reader import read_manifest, read_signature_file
from dmformer.bundle.select import matching_artifacts
from dmformer.bundle.settings import machine_settings, taken_note
from dmformer.bundle.writer import staged
from dmformer.data.images import encode_png
from dmformer.errors import CheckFailed, UsageError
from dmformer.layouts.readme import readme, tied
from dmformer.layouts.triton_config import FLOATS, Batching, TritonBackend, encoded_string, write_config
from dmformer.layouts.web import cannot_show, write_page
from dmformer.names import check_distinct
from dmformer.progress import silent
from dmformer.runtimes import registry
from dmformer.serve.served import ServedSpec
from dmformer.serve.triton_model import BUNDLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bundle.manifest import Artifact, Manifest
    from dmformer.bundle.reader import Bundle
    from dmformer.progress import Progress

# What Triton calls: each engine's own backend, or this tool in its Python backend.
ENGINES, PYTHON = "engines", "python"
BACKENDS = (ENGINES, PYTHON)
_MODELS = "models"
_MAX_BATCH = 8
_MOST = (1 << 31) - 1  # Triton's configuration has numbers of 32 bits
_ENGINES = {
    "onnx": TritonBackend("onnxruntime", "KIND_CPU", "model.onnx"),
    "openvino": TritonBackend("openvino", "KIND_CPU", "model.xml"),
    "tensorrt": TritonBackend("tensorrt", "KIND_GPU", "model.plan"),
}
_PYTHON = TritonBackend("python", "KIND_CPU", "model.py")
_MODEL_PY = '''\
"""What Triton's Python backend loads; dmformer must be found by the Python that the backend starts."""

import os
import sys

# The backend's stub may be built to ignore its environment.
named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
sys.path[:0] = [folder for folder in named if folder and folder not in sys.path]

from dmformer.serve.triton_model import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''
# By server, and format that it serves: the name of the main file.
_MAIN_FILES = {
    "triton": {name: backend.main for name, backend in _ENGINES.items()},
    "ovms": {"onnx": "model.onnx", "openvino": "model.xml"},
    "web": {"onnx": "model.onnx"},
}
SERVERS = tuple(_MAIN_FILES)
# Without the hint the CPU plugin may compute float32 models in bfloat16 on processors that have it.
_PRECISION_HINTS = {"fp32": "f32", "fp16": "f16", "int8": "f32"}


@dataclass(frozen=True)
class Layout:
    """What was written.

    Attributes:
        output: the folder.
        models: a name for each.
        left_out: a sentence for each artifact that was left out.
        note: how this machine's settings were taken, or why not; ``None`` without any.
    """

    output: Path
    models: tuple[str, ...]
    left_out: tuple[str, ...]
    note: str | None = None


def serve_layout(
    server: str,
    bundle: Bundle,
    output: Path,
    *,
    force: bool = False,
    backend: str = ENGINES,
    images: bool = False,
    max_batch: int | None = None,
    instances: int = 1,
    runtimes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    onnxruntime_web: Path | None = None,
    stage: Progress = silent,
) -> Layout:
    """Write what a server serves.

    Args:
        server: ``triton``, ``ovms``, or ``web`` for a page that runs the network in a browser.
        bundle: every file is looked into, and compared with its hash as it is copied.
        output: a new or empty folder.
        force: replace whatever is in the folder.
        backend: ``engines`` for the server's own backends, or ``python`` for this tool in Triton's Python backend.
            Where there is one instance, and neither a runtime nor a precision is asked for, what ``dmformer tune
            --write`` has kept for this machine decides which model comes first, and with how many threads it answers
            on a machine like this one; whether its runtime can run here is not asked.
        images: with ``python``, serve each artifact a second time, with files of images in and classes out.
        max_batch: largest batch that Triton makes of what waits, otherwise 8; an engine's own bound goes before it.
        instances: with ``python``, processes of each model, which share the cores.
        runtimes: names of runtimes whose artifacts are served; otherwise all.
        precisions: of the artifacts that are served; otherwise all.
        onnxruntime_web: for ``web``, the engine's file as ``npm pack`` writes it; otherwise npm downloads it once.
        stage: told about the download.

    Raises:
        CheckFailed: a file is not what the manifest says, or leads to one that it does not list; or the engine's file
            is another one than expected.
        StageFailed: writing failed.
        UnavailableError: the page's engine is not in the cache and cannot be downloaded here.
        UsageError: no such server, the bundle has nothing for it, two of its models or files would have one name, or
            the folder is not empty, or has the bundle in it.
    """
    python, batching = backend == PYTHON, Batching(_MAX_BATCH if max_batch is None else max_batch, instances)
    _check(server, backend, batching, images)
    for name, given, only in (("max_batch", max_batch, "triton"), ("onnxruntime_web", onnxruntime_web, "web")):
        if given is not None and server != only:
            raise UsageError(f"`{name}` for {server}; expected it with {only} alone")
    models, left_out = _models(
        server, bundle.manifest, matching_artifacts(bundle.manifest, runtimes, precisions), python, images
    )
    threads, note = None, None
    if python and not runtimes and not precisions and instances == 1:
        threads, note = _put_tuned_first(bundle, models)

    with staged(output, partial(_check_replaceable, bundle=bundle, force=force)) as folder:
        (folder / _MODELS).mkdir()
        for model in models:
            target = folder / _MODELS / model.name
            if python:
                first = model.artifact is models[0].artifact
                _write_python(bundle, model, target, replace(batching, threads=threads) if first else batching)
            else:
                _write_engine(bundle, model, target, server, batching)
        if server == "ovms":
            _write_ovms(folder / _MODELS, models)
        elif server == "web":
            shown = {one.name: (one.artifact, folder / _MODELS / one.name / "1" / "model.onnx") for one in models}
            write_page(folder, bundle.manifest, bundle.golden(), shown, engine=onnxruntime_web, stage=stage)
        text = readme(server, models, left_out, python=python)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return Layout(output, tuple(model.name for model in models), tuple(left_out), note)


def _check_replaceable(folder: Path, bundle: Bundle, force: bool) -> None:
    """Refuse to replace a folder that has the bundle in it, or any that is not empty without ``force``."""
    if bundle.source.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"output {str(folder)!r} has the bundle in it, which would be lost; expected another folder")
    if not force:
        raise UsageError(f"output {str(folder)!r} is not empty; expected a new folder, or `force` to replace it")


def _check(server: str, backend: str, batching: Batching, images: bool) -> None:
    """Refuse what does not go together."""
    if server not in SERVERS:
        raise UsageError(f"server {server!r}; expected {', '.join(SERVERS[:-1])} or {SERVERS[-1]}")
    if backend not in BACKENDS or (backend == PYTHON and server != "triton"):
        raise UsageError(f"`backend` {backend!r} for {server}; expected {ENGINES}, or for triton {PYTHON}")
    if (images or batching.instances != 1) and backend != PYTHON:
        raise UsageError(f"`images` or `instances` with `backend` {backend}; expected {PYTHON}: engines decode nothing")
    if min(batching.max_batch, batching.instances) < 1 or max(batching.max_batch, batching.instances) > _MOST:
        numbers = f"`max_batch` {batching.max_batch}, `instances` {batching.instances}"
        raise UsageError(f"{numbers}; expected at least 1, and at most {_MOST}")


def _put_tuned_first(bundle: Bundle, models: list[ServedSpec]) -> tuple[int | None, str | None]:
    """Move the models of this machine's settings to the front.

    Returns:
        Their threads, ``None`` where no model is one of the settings; and what is said of the settings.
    """
    settings, note = machine_settings(bundle)
    if settings is None:
        return None, note

    def is_tuned(model: ServedSpec) -> bool:
        row = registry.reader_of(model.artifact.format)
        return row is not None and (row.name, model.artifact.precision) == (settings.runtime, settings.precision)

    models.sort(key=is_tuned, reverse=True)
    if not is_tuned(models[0]):
        return None, None
    threads = settings.threads * settings.streams
    return threads, taken_note(bundle, settings, threads)


def _models(
    server: str, manifest: Manifest, artifacts: Sequence[Artifact], python: bool, images: bool
) -> tuple[list[ServedSpec], list[str]]:
    """Return the models that are served, and a sentence for each artifact that is not.

    Raises:
        UsageError: there are none, or two would have one name.
    """
    models: list[ServedSpec] = []
    left_out = []
    for artifact in artifacts:
        if reason := (_unanswerable if python else _unservable)(server, manifest, artifact):
            left_out.append(f"{artifact.format} {artifact.precision}: {reason}")
            continue
        models += [ServedSpec(manifest, artifact, kind) for kind in ((False, True) if images else (False,))]
        check_distinct(model.name for model in models)
    if not models:
        raise UsageError(f"the bundle has nothing that {server} serves: {'; '.join(left_out)}")
    return models, left_out


def _unanswerable(server: str, manifest: Manifest, artifact: Artifact) -> str | None:
    """Say why this tool cannot answer for an artifact in a server; ``None`` where it can."""
    del server
    if artifact.format == "torch":
        return "the reference, which needs PyTorch; expected another runtime"
    if registry.reader_of(artifact.format) is None:
        return "this version of dmformer has no runtime for it"
    return _foreign_tensor(manifest)


def _unservable(server: str, manifest: Manifest, artifact: Artifact) -> str | None:
    """Say why a server's own backends cannot serve an artifact; ``None`` where one can."""
    if reason := _foreign_tensor(manifest):
        return reason
    if artifact.precision not in _PRECISION_HINTS:
        return f"precision {artifact.precision}; expected {', '.join(_PRECISION_HINTS)}"
    if artifact.format not in _MAIN_FILES[server]:
        return f"{server} has no backend for it"
    if server == "web":
        return cannot_show(manifest, artifact)
    if artifact.target is not None and artifact.target.flavour == "rtx":
        return "an engine of TensorRT-RTX; Triton's backend loads those of TensorRT: dmformer build --flavour tensorrt"
    return None


def _foreign_tensor(manifest: Manifest) -> str | None:
    """Say which tensor is of a type that no server is told of; ``None`` where there is none."""
    return next(
        (
            f"a tensor of {tensor.dtype}; expected {' or '.join(FLOATS)}"
            for tensor in (*manifest.inputs, *manifest.outputs)
            if tensor.dtype not in FLOATS
        ),
        None,
    )


def _write_engine(bundle: Bundle, model: ServedSpec, folder: Path, server: str, batching: Batching) -> None:
    """Write the folder of a model that an engine's own backend answers."""
    artifact = model.artifact
    _copy(bundle, artifact, folder / "1", _MAIN_FILES[server][artifact.format])
    if server != "triton":
        return
    backend, target = _ENGINES[artifact.format], artifact.target
    if target is None:
        write_config(folder, model, backend, batching)
    else:
        write_config(folder, model, backend, Batching(target.max_batch), tied(artifact))


def _write_python(bundle: Bundle, model: ServedSpec, folder: Path, batching: Batching) -> None:
    """Write the folder of a model that this tool answers: what its predictor reads of the bundle, and ``model.py``."""
    artifact, version = model.artifact, folder / "1"
    manifest, signature = read_manifest(bundle.root), read_signature_file(bundle.root)
    if hashlib.sha256(manifest).hexdigest() != bundle.manifest_sha256:
        raise CheckFailed(f"{bundle.root} changed while it was copied; run it again")
    bundle.open_artifact(artifact)
    (version / BUNDLE).mkdir(parents=True)
    (version / BUNDLE / MANIFEST).write_bytes(manifest)
    if signature is not None:
        (version / BUNDLE / SIGNATURE).write_bytes(signature)
    golden = [entry for entry in bundle.manifest.files if entry.path == GOLDEN]
    for entry in (*golden, *artifact.files):
        bundle.copy(entry, version / BUNDLE / entry.path)
    (version / _PYTHON.main).write_text(_MODEL_PY, encoding="utf-8")
    first = bundle.golden()
    warm_up = encoded_string(encode_png(first.images[0])) if model.images else first.inputs[:1].tobytes()
    write_config(folder, model, _PYTHON, batching, warm_up=warm_up)


def _copy(bundle: Bundle, artifact: Artifact, folder: Path, main_file: str) -> None:
    """Copy an artifact's files, each checked: the main one under the name that the server looks for, and the others.

    OpenVINO finds weights by the name of the file that is loaded; ONNX names them as they lie beside it.
    """
    bundle.open_artifact(artifact)
    main = PurePosixPath(main_file)
    loaded = PurePosixPath(artifact.files[0].path)
    targets = {artifact.files[0]: str(main)}
    for entry in artifact.files[1:]:
        path = PurePosixPath(entry.path)
        if artifact.format == "openvino" and path == loaded.with_suffix(".bin"):
            targets[entry] = str(main.with_suffix(".bin"))
        else:
            targets[entry] = str(path.relative_to(loaded.parent)) if path.is_relative_to(loaded.parent) else path.name
    check_distinct(targets.values())
    for entry, target in targets.items():
        bundle.copy(entry, folder / target)


def _write_ovms(folder: Path, models: Sequence[ServedSpec]) -> None:
    listing = [
        {
            "config": {
                "name": model.name,
                "base_path": f"/{_MODELS}/{model.name}",
                "target_device": "CPU",
                "plugin_config": {
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[model.artifact.precision],
                },
            }
        }
        for model in models
    ]
    (folder / "config.json").write_text(json.dumps({"model_config_list": listing}, indent=2) + "\n", encoding="utf-8")
