"""The page beside a model repository: how it is served, and what a client has to do with an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmformer import __version__
from dmformer.layouts.web import ENGINE
from dmformer.runtimes import registry
from dmformer.serve.served import CLASS_INDEX, CLASS_MAP, CLASS_NAME, ENCODED_IMAGE, PROBABILITIES
from dmformer.task import STRIDES, THRESHOLD
from dmformer.text import markdown, markdown_code, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.bundle.manifest import Artifact, Manifest, Tensor
    from dmformer.serve.served import ServedSpec

_FULL_RANGE = "int8 weights of 8 bits, whose sums saturate in OpenVINO on x86 processors without VNNI"
_START = {
    "triton": "docker run --rm -p 8000:8000 -p 8001:8001 -v ./models:/models nvcr.io/nvidia/tritonserver:<version> "
    "tritonserver --model-repository=/models",
    "ovms": "docker run --rm -p 9000:9000 -p 8000:8000 -v ./models:/models openvino/model_server:latest "
    "--config_path /models/config.json --port 9000 --rest_port 8000",
    "web": "python3 -m http.server 8000 --bind 127.0.0.1",
}
_FOR_BROWSERS = f"""\
Then open http://127.0.0.1:8000 in a browser. Any static server will do, and any path on it: the page asks for nothing
beside this folder. Where it comes by http from another machine, browsers compare no hashes: use https.

One thread computes. Where the server sends `Cross-Origin-Opener-Policy: same-origin` and
`Cross-Origin-Embedder-Policy: require-corp`, up to four do.

The engine is {ENGINE.title}, WebAssembly, under the MIT license. The page decodes PNG files to the bit as Pillow does;
JPEG, WebP, GIF and BMP files are decoded by the browser, whose decoder may differ by a little.
"""
_FOR_CLIENTS = """\
What the server answers is compared with PyTorch's answers by

    dmformer verify BUNDLE --server http://localhost:8000
"""
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


def readme(server: str, models: Sequence[ServedSpec], left_out: Sequence[str], *, python: bool) -> str:
    """Return the page in Markdown.

    Args:
        server: that loads the repository.
        models: of the repository, of one bundle.
        left_out: a sentence for each artifact that is not among them.
        python: whether this tool answers, in Triton's Python backend.
    """
    manifest = models[0].manifest
    labels = [f"{index}: {markdown(' '.join(label.split()))}" for index, label in enumerate(manifest.model.classes)]
    tied_models = [model for model in models if model.artifact.target is not None]
    lines = [
        f"# {markdown(manifest.model.arch)} for {server}",
        "",
        f"    {_START[server]}",
        "",
        *(_python_lines(models) if python else ()),
        _FOR_BROWSERS if server == "web" else _FOR_CLIENTS,
        *(_image_lines(manifest) if any(model.images for model in models) else ()),
        "## What the page does with an image" if server == "web" else "## Before a request, in the client",
        "",
        *(f"{number}. {step}" for number, step in enumerate(_steps(manifest), 1)),
        "",
        *_answers(manifest),
        "",
        "## Models",
        "",
        *(f"- `{model.name}`: SHA-256 {model.artifact.sha256}" for model in models),
        *(f"- `{model.name}`: {markdown(tied(model.artifact))}" for model in tied_models),
        *(f"- `{model.name}`: {_FULL_RANGE}" for model in models if model.artifact.full_range),
        *(f"- not here: {markdown(reason)}" for reason in left_out),
    ]
    if labels and manifest.class_count:
        lines += ["", "## Classes", "", *(f"- {label}" for label in labels)]
    return "\n".join(lines) + "\n"


def tied(artifact: Artifact) -> str:
    """Say what a compiled artifact is tied to."""
    target = artifact.target
    assert target is not None
    return plain(
        f"TensorRT {target.version} on {target.platform}, compute capability {', '.join(target.compute_capabilities)}, "
        f"batch {target.min_batch} to {target.max_batch}: Triton must bring this version, and the GPU be one of these"
    )


def _python_lines(models: Sequence[ServedSpec]) -> list[str]:
    """Say what the Python that the backend starts has to have."""
    rows = [registry.reader_of(model.artifact.format) for model in models]
    extras = ",".join(dict.fromkeys(row.extra for row in rows if row is not None))
    return [
        "Each model is answered by dmformer in Triton's Python backend: install it, in an image of your own, for the",
        "Python that the backend starts (NumPy 1, for the backend's stub sends empty answers with NumPy 2 in releases",
        "that were built for NumPy 1; such a model is refused when it is loaded):",
        "",
        f"    pip install 'dmformer[{extras}]=={__version__}' 'numpy<2'",
        "",
        "Triton loads every model of a repository, and each uses all cores: name the one that is asked,",
        f"`--model-control-mode=explicit --load-model={models[0].name}`.",
        "",
    ]


def _image_lines(manifest: Manifest) -> list[str]:
    """Say what models take that prepare images themselves."""
    name = f"`{CLASS_NAME}`, " if manifest.model.classes else ""
    classes = {
        "classification": f"`{CLASS_INDEX}`, {name}`{PROBABILITIES}`, the logits",
        "segmentation": f"`{CLASS_MAP}`, the class of each pixel that the network saw, the logits",
        "features": "the maps",
    }[manifest.model.task]
    return [
        "## Files of images, prepared by the server",
        "",
        f"Models named `…_images` take `{ENCODED_IMAGE}`, BYTES (batch, 1): the bytes of a JPEG, PNG or other file.",
        f"Back come {classes}, and {markdown_code(manifest.inputs[0].name)}, the tensor that the network saw: ask for",
        "those that you need. The steps below are done by the server.",
        "",
    ]


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
