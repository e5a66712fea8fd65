"""Write a bundle as what a server serves: the model repository of a model server, or a page for browsers.

DIR/models is the repository, and DIR/README.md says how it is served and what a client has to do with an image, for
no model server does that. NVIDIA Triton: a folder a model with ``config.pbtxt``, ``labels.txt`` and ``1/`` with the
files under the names that its backend looks for. OpenVINO Model Server: ``config.json``, and a folder a model. For
browsers DIR is a page that does it all (:mod:`dmformer.serve.web`), which any static server serves.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dmformer.bundle.writer import staged
from dmformer.errors import UsageError
from dmformer.names import check_distinct
from dmformer.progress import silent
from dmformer.serve.web import ENGINE, cannot_show, write_page
from dmformer.task import STRIDES, THRESHOLD
from dmformer.text import markdown, markdown_code, pbtxt_string, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bundle.manifest import Artifact, Manifest, Tensor
    from dmformer.bundle.reader import Bundle
    from dmformer.progress import Progress

LABELS = "labels.txt"
_MODELS = "models"
_QUEUE_US = 100  # how long Triton waits for others to share a batch with
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}


@dataclass(frozen=True)
class _Backend:
    """How Triton calls an engine, on what it runs there, and under which name it looks for the main file."""

    name: str
    kind: str
    main: str


_TRITON = {
    "onnx": _Backend("onnxruntime", "KIND_CPU", "model.onnx"),
    "openvino": _Backend("openvino", "KIND_CPU", "model.xml"),
    "tensorrt": _Backend("tensorrt", "KIND_GPU", "model.plan"),
}
# By server, and format that it serves: the name of the main file.
_MAIN_FILES = {
    "triton": {name: backend.main for name, backend in _TRITON.items()},
    "ovms": {"onnx": "model.onnx", "openvino": "model.xml"},
    "web": {"onnx": "model.onnx"},
}
_START = {
    "triton": "docker run --rm -p 8000:8000 -v ./models:/models nvcr.io/nvidia/tritonserver:<version> "
    "tritonserver --model-repository=/models",
    "ovms": "docker run --rm -p 9000:9000 -p 8000:8000 -v ./models:/models openvino/model_server:latest "
    "--config_path /models/config.json --port 9000 --rest_port 8000",
    "web": "python3 -m http.server 8000 --bind 127.0.0.1",
}
SERVERS = tuple(_MAIN_FILES)
# Without the hint the CPU plugin may compute float32 models in bfloat16 on processors that have it.
_PRECISION_HINTS = {"fp32": "f32", "fp16": "f16", "int8": "f32"}


@dataclass(frozen=True)
class Layout:
    """What was written: the folder, a name for each model, and a sentence for each artifact that was left out."""

    output: Path
    models: tuple[str, ...]
    left_out: tuple[str, ...]


def serve_layout(
    server: str,
    bundle: Bundle,
    output: Path,
    *,
    force: bool = False,
    max_batch: int = 8,
    onnxruntime_web: Path | None = None,
    stage: Progress = silent,
) -> Layout:
    """Write what a server serves.

    Args:
        server: ``triton``, ``ovms``, or ``web`` for a page that runs the network in a browser.
        bundle: every file is looked into, and compared with its hash as it is copied.
        output: a new or empty folder.
        force: replace whatever is in the folder.
        max_batch: largest batch that Triton makes of what waits; an engine's own bound goes before it.
        onnxruntime_web: for ``web``, the engine's file as ``npm pack`` writes it; otherwise npm downloads it once.
        stage: told about the download.

    Raises:
        CheckFailed: a file is not what the manifest says, or leads to one that it does not list; or the engine's file
            is another one than expected.
        StageFailed: writing failed.
        UnavailableError: the page's engine is not in the cache and cannot be downloaded here.
        UsageError: no such server, the bundle has nothing for it, two of its models or files would have one name, or
            the folder is not empty.
    """
    if server not in SERVERS:
        raise UsageError(f"server {server!r}; expected {', '.join(SERVERS[:-1])} or {SERVERS[-1]}")
    if onnxruntime_web is not None and server != "web":
        raise UsageError(f"`onnxruntime_web` for {server}; expected it with web alone")
    named, left_out = _choose(server, bundle)

    def replaceable(folder: Path) -> None:
        if not force:
            raise UsageError(f"output {str(folder)!r} is not empty; expected a new folder, or `force` to replace it")

    with staged(output, replaceable) as folder:
        (folder / _MODELS).mkdir()
        for name, artifact in named.items():
            _copy(bundle, artifact, folder / _MODELS / name / "1", server)
        if server == "triton":
            _write_triton(folder / _MODELS, bundle.manifest, named, max_batch)
        elif server == "ovms":
            _write_ovms(folder / _MODELS, named)
        else:
            models = {name: (one, folder / _MODELS / name / "1" / "model.onnx") for name, one in named.items()}
            write_page(folder, bundle.manifest, bundle.golden(), models, engine=onnxruntime_web, stage=stage)
        (folder / "README.md").write_text(_readme(server, bundle.manifest, named, left_out), encoding="utf-8")
    return Layout(output, tuple(named), tuple(left_out))


def _choose(server: str, bundle: Bundle) -> tuple[dict[str, Artifact], list[str]]:
    """Return the artifacts that a server serves by the names of its models, and a sentence for each of the others."""
    named: dict[str, Artifact] = {}
    left_out: list[str] = []
    for artifact in bundle.manifest.artifacts:
        if reason := _unservable(server, bundle.manifest, artifact):
            left_out.append(f"{artifact.format} {artifact.precision}: {reason}")
            continue
        name = _name(bundle.manifest, artifact)
        check_distinct([*named, name])
        named[name] = artifact
    if not named:
        raise UsageError(f"the bundle has nothing that {server} serves: {'; '.join(left_out)}")
    return named, left_out


def _name(manifest: Manifest, artifact: Artifact) -> str:
    """Name a model and its folder: nothing in it leads elsewhere, whatever the manifest calls the architecture."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{manifest.model.arch}_{artifact.format}_{artifact.precision}")


def _unservable(server: str, manifest: Manifest, artifact: Artifact) -> str | None:
    """Say why a server cannot serve an artifact; ``None`` where it can."""
    for tensor in (*manifest.inputs, *manifest.outputs):
        if tensor.dtype not in _TYPES:
            return f"a tensor of {tensor.dtype}; expected {' or '.join(_TYPES)}"
    if artifact.precision not in _PRECISION_HINTS:
        return f"precision {artifact.precision}; expected {', '.join(_PRECISION_HINTS)}"
    if artifact.format not in _MAIN_FILES[server]:
        return f"{server} has no backend for it"
    if server == "web":
        return cannot_show(manifest, artifact)
    if artifact.target is not None and artifact.target.flavour == "rtx":
        return "an engine of TensorRT-RTX; Triton's backend loads those of TensorRT: dmformer build --flavour tensorrt"
    return None


def _copy(bundle: Bundle, artifact: Artifact, folder: Path, server: str) -> None:
    """Copy an artifact's files, each checked: the main one under the name that the server looks for, and the others.

    OpenVINO finds weights by the name of the file that is loaded; ONNX names them as they lie beside it.
    """
    bundle.open_artifact(artifact)
    main = PurePosixPath(_MAIN_FILES[server][artifact.format])
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


def _write_triton(folder: Path, manifest: Manifest, named: dict[str, Artifact], max_batch: int) -> None:
    for name, artifact in named.items():
        (folder / name / "config.pbtxt").write_text(
            _config(manifest, artifact, name, max_batch), encoding="utf-8", newline="\n"
        )
        if _is_labelled(manifest):
            lines = (plain(" ".join(label.split())) for label in manifest.model.classes)
            (folder / name / LABELS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _is_labelled(manifest: Manifest) -> bool:
    """Whether Triton can name the answers: it puts labels to the largest values of a whole output.

    That names classes of an image, but neither those of pixels nor the two that one output tells apart.
    """
    return manifest.model.task == "classification" and bool(manifest.model.classes) and not manifest.one_logit


def _config(manifest: Manifest, artifact: Artifact, name: str, max_batch: int) -> str:
    """``ModelConfig`` (model_config.proto of Triton) in protobuf's text form; dimensions are without the batch."""
    backend = _TRITON[artifact.format]
    (given,) = manifest.inputs
    bound = artifact.target.max_batch if artifact.target is not None else max_batch
    comment = f"# {_tied(artifact)}\n" if artifact.target is not None else ""
    label = f'\n    label_filename: "{LABELS}"' if _is_labelled(manifest) else ""

    def tensor(spec: Tensor, more: str = "") -> str:
        dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in spec.shape[1:])
        name = pbtxt_string(spec.name)
        return f"  {{\n    name: {name}\n    data_type: {_TYPES[spec.dtype]}\n    dims: [ {dims} ]{more}\n  }}"

    outputs = ",\n".join(tensor(output, label) for output in manifest.outputs)
    return (
        f"{comment}name: {pbtxt_string(name)}\n"
        f'backend: "{backend.name}"\n'
        f'default_model_filename: "{backend.main}"\n'
        f"max_batch_size: {bound}\n"
        f"input [\n{tensor(given)}\n]\n"
        f"output [\n{outputs}\n]\n"
        f"instance_group [\n  {{\n    count: 1\n    kind: {backend.kind}\n  }}\n]\n"
        f"dynamic_batching {{\n  max_queue_delay_microseconds: {_QUEUE_US}\n}}\n"
        f'parameters {{\n  key: "dmformer_sha256"\n  value {{ string_value: "{artifact.sha256}" }}\n}}\n'
    )


def _write_ovms(folder: Path, named: dict[str, Artifact]) -> None:
    listing = [
        {
            "config": {
                "name": name,
                "base_path": f"/{_MODELS}/{name}",
                "target_device": "CPU",
                "plugin_config": {
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[artifact.precision],
                },
            }
        }
        for name, artifact in named.items()
    ]
    (folder / "config.json").write_text(json.dumps({"model_config_list": listing}, indent=2) + "\n", encoding="utf-8")


def _tied(artifact: Artifact) -> str:
    target = artifact.target
    assert target is not None
    return plain(
        f"TensorRT {target.version} on {target.platform}, compute capability {', '.join(target.compute_capabilities)}, "
        f"batch {target.min_batch} to {target.max_batch}: Triton must bring this version, and the GPU be one of these"
    )


_FULL_RANGE = "int8 weights of 8 bits, whose sums saturate in OpenVINO on x86 processors without VNNI"


_FOR_BROWSERS = f"""\
Then open http://127.0.0.1:8000 in a browser. Any static server will do, and any path on it: the page asks for nothing
beside this folder. Where it comes by http from another machine, browsers compare no hashes: use https.

One thread computes. Where the server sends `Cross-Origin-Opener-Policy: same-origin` and
`Cross-Origin-Embedder-Policy: require-corp`, up to four do.

The engine is {ENGINE.title}, WebAssembly, under the MIT license. The page decodes PNG files to the bit as Pillow does;
JPEG, WebP, GIF and BMP files are decoded by the browser, whose decoder may differ by a little.
"""


def _readme(server: str, manifest: Manifest, named: dict[str, Artifact], left_out: Sequence[str]) -> str:
    labels = [f"{index}: {markdown(' '.join(label.split()))}" for index, label in enumerate(manifest.model.classes)]
    lines = [
        f"# {markdown(manifest.model.arch)} for {server}",
        "",
        f"    {_START[server]}",
        "",
        *([_FOR_BROWSERS] if server == "web" else ()),
        "## What the page does with an image" if server == "web" else "## Before a request, in the client",
        "",
        *(f"{number}. {step}" for number, step in enumerate(_steps(manifest), 1)),
        "",
        *_answers(manifest),
        "",
        "## Models",
        "",
        *(f"- `{name}`: SHA-256 {artifact.sha256}" for name, artifact in named.items()),
        *(
            f"- `{name}`: {markdown(_tied(artifact))}"
            for name, artifact in named.items()
            if artifact.target is not None
        ),
        *(f"- `{name}`: {_FULL_RANGE}" for name, artifact in named.items() if artifact.full_range),
        *(f"- not here: {markdown(reason)}" for reason in left_out),
    ]
    if labels and manifest.class_count:
        lines += ["", "## Classes", "", *(f"- {label}" for label in labels)]
    return "\n".join(lines) + "\n"


def _steps(manifest: Manifest) -> list[str]:
    """List what a client does with an image before a request."""
    pre, (given,) = manifest.preprocessing, manifest.inputs
    how = f"({pre.interpolation}, as Pillow does it)"
    resized, more = round(pre.image_size / pre.crop_fraction), ""
    if manifest.open_size:
        more = "; other heights and widths can be sent as well"
    fit = [
        f"Resize the shorter side to {resized} pixels {how}.",
        f"Take the centre of {pre.image_size}x{pre.image_size} pixels{more}.",
    ]
    if manifest.open_size and manifest.model.task == "segmentation":
        longer = f"the longer one in proportion, to the nearest multiple of {STRIDES[-1]}"
        fit = [f"Resize the shorter side to {pre.image_size} pixels, {longer} {how}."]
    return [
        f"Decode the image; channels {pre.channels}.",
        *fit,
        f"Divide by 255; for each channel subtract the mean {list(pre.mean)}, divide by the deviation {list(pre.std)}.",
        f"Send {markdown_code(given.name)}, {given.dtype}, (batch, channels, height, width) = {_sides(given)}.",
    ]


def _sides(tensor: Tensor) -> str:
    return f"[{', '.join(markdown(repr(side)) for side in tensor.shape)}]"


_MEANING = {
    "classification": "logits; their softmax is probabilities.",
    "segmentation": "logits of every pixel that was sent; the largest of a pixel's is its class.",
    "features": "the map of a stage.",
}
_ONE_LOGIT = (
    f"one logit; its sigmoid is the probability of class 1, which an image is of above {THRESHOLD}, and otherwise of "
    "class 0."
)
_COMPARE = {
    "classification": "`dmformer predict` does all of this, to compare with.",
    "segmentation": "`dmformer predict` does all of this, to compare with.",
    "features": "`dmformer.load(BUNDLE).outputs(IMAGE)` does all of this in Python, to compare with.",
}


def _answers(manifest: Manifest) -> list[str]:
    """Say what comes back, and how to see whether it is right."""
    task = manifest.model.task
    return [
        *(
            f"Back comes {markdown_code(output.name)}, {output.dtype}, {_sides(output)}: "
            f"{_ONE_LOGIT if manifest.one_logit else _MEANING[task]}"
            for output in manifest.outputs
        ),
        _COMPARE[task],
    ]
