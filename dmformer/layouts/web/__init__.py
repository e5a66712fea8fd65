"""A page that runs a network in a browser: a folder that any static server sends.

The page's scripts lie beside this file. They prepare an image as :mod:`dmformer.data.preprocessing` does, draw classes
in the colours of :mod:`dmformer.data.overlay`, and make the checks of :mod:`dmformer.verify.parity` on the golden
answers. Limits, colours and everything else that is computed from the bundle are computed here, and written to
``layout.json`` and ``golden.bin``. The engine is onnxruntime-web, as its authors put it into the npm registry.
"""

from __future__ import annotations

import tarfile
from importlib import resources
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

from dmformer.bundle.manifest import FileEntry, file_entry
from dmformer.cache import open_cache
from dmformer.data.overlay import DIMMED, OPACITY, class_colours
from dmformer.device.installation import NpmPackage, temporary_folder
from dmformer.errors import UnavailableError
from dmformer.progress import silent
from dmformer.task import STRIDES, Task
from dmformer.text import plain
from dmformer.verify.answers import batch_sizes
from dmformer.verify.compare import Limit
from dmformer.verify.parity import references, tensor_limit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.manifest import Artifact, Manifest
    from dmformer.progress import Progress

ENGINE = NpmPackage(
    "onnxruntime-web",
    "1.30.0",
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61",
)
_ENGINE_FOLDER = "onnxruntime-web"
# Under names that every server sends as JavaScript: some do not know .mjs.
_ENGINE_FILES = {
    "ort.wasm.min.mjs": "ort.wasm.min.js",
    "ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
    "ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}
_ENGINE_LICENSE = "onnxruntime-web.LICENSE"  # its archive in the registry has none
_SCRIPTS = ("index.html", "style.css", "start.js", "page.js", "images.js", "checks.js")
_ALIGNED = 8  # bytes: what a view of numbers asks of where it begins
_NOT_CHECKED = "precision: onnxruntime-web does not tell in which type a layer ran"


class _Array(Struct, frozen=True, kw_only=True):
    """Where in ``golden.bin`` an array is: its type, its shape and its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Reference(Struct, frozen=True, kw_only=True):
    """What answers are compared with, as :class:`dmformer.verify.compare.Reference`."""

    name: str
    outputs: dict[str, _Array]
    limits: dict[str, Limit]


class _Model(Struct, frozen=True, kw_only=True):
    """A model that the page can run, and what its answers are compared with."""

    name: str
    title: str
    file: FileEntry
    references: tuple[_Reference, ...]
    other_references: tuple[_Reference, ...]


class _OtherSize(Struct, frozen=True, kw_only=True):
    """Images of another height and width, where these are open."""

    size: str
    inputs: _Array
    strides: dict[str, int]


class _Golden(Struct, frozen=True, kw_only=True):
    """The golden images; ``limit`` is that of preprocessed tensors, ``batches`` how many images are asked at once."""

    file: FileEntry
    batches: tuple[int, ...]
    images: _Array
    inputs: _Array
    limit: Limit
    strides: dict[str, int]
    sources: tuple[_Array, ...]
    source_pixels: _Array | None
    other: _OtherSize | None


class _Page(Struct, frozen=True, kw_only=True):
    """The content of ``layout.json``."""

    title: str
    about: str
    engine: str
    task: Task
    input: str
    output: str
    open_size: bool
    multiple: int
    classes: tuple[str, ...]
    colours: list[list[int]]
    opacity: float
    dimmed: float
    preprocessing: dict[str, Any]
    models: tuple[_Model, ...]
    golden: _Golden
    skipped: tuple[str, ...]


def cannot_show(manifest: Manifest, artifact: Artifact) -> str | None:
    """Say why a page cannot run an artifact or show its answers; ``None`` where it can."""
    if manifest.model.task == "features":
        return "features are no classes, which the page could show"
    if len(artifact.files) > 1:
        return "weights in a file beside the ONNX file, which a page does not load; expected them inside"
    return None


def write_page(
    folder: Path,
    manifest: Manifest,
    golden: Golden,
    models: Mapping[str, tuple[Artifact, Path]],
    *,
    engine: Path | None = None,
    stage: Progress = silent,
) -> None:
    """Write the page, its engine and the golden answers into a folder that has the models.

    Args:
        folder: of the layout.
        manifest: of the bundle.
        golden: the bundle's golden images and answers.
        models: by name, each artifact and its file below ``folder``.
        engine: the file that ``npm pack`` wrote of :data:`ENGINE`; otherwise it is downloaded, or taken from the cache.
        stage: told about the download.

    Raises:
        CheckFailed: the engine's file is another one than expected.
        UnavailableError: the engine is not in the cache and cannot be downloaded here.
        UsageError: the bundle has no golden answers for a model.
    """
    for name in _SCRIPTS:
        (folder / name).write_bytes(resources.files(__package__).joinpath(name).read_bytes())
    with stage(ENGINE.title):
        _write_engine(folder / _ENGINE_FOLDER, engine)
    arrays = _Arrays(folder / "golden.bin")
    described = tuple(_model(folder, name, model, golden, arrays) for name, model in models.items())
    parts = _golden(golden, arrays)
    arrays.write()
    page = _Page(
        title=plain(f"{manifest.model.arch} in this browser"),
        about=_about(manifest),
        engine=ENGINE.version,
        task=manifest.model.task,
        input=manifest.inputs[0].name,
        output=manifest.outputs[0].name,
        open_size=manifest.open_size,
        multiple=STRIDES[-1],
        classes=tuple(plain(name) for name in manifest.model.classes),
        colours=class_colours(manifest.class_count).tolist(),
        opacity=OPACITY,
        dimmed=DIMMED,
        preprocessing=msgspec.to_builtins(manifest.preprocessing),
        models=described,
        golden=_Golden(file=file_entry(folder, arrays.path), **parts),
        skipped=(_NOT_CHECKED,),
    )
    (folder / "layout.json").write_bytes(msgspec.json.encode(page))


def _about(manifest: Manifest) -> str:
    size = manifest.preprocessing.image_size
    classes = f"{manifest.class_count} classes"
    return f"{manifest.model.task}, {classes}; images of {size} × {size} pixels"  # noqa: RUF001 - a page for people


def _write_engine(folder: Path, archive: Path | None) -> None:
    folder.mkdir()
    for name, content in _read_engine(archive).items():
        (folder / name).write_bytes(content)
    license_text = resources.files(__package__).joinpath(_ENGINE_LICENSE).read_bytes()
    (folder / "LICENSE").write_bytes(license_text)


def _read_engine(archive: Path | None) -> dict[str, bytes]:
    """Return the engine's files by our names: all that happens in the temporary folder, whose errors are its own."""
    found = {}
    with temporary_folder() as scratch:
        try:
            path = ENGINE.download(scratch, open_cache()) if archive is None else ENGINE.check(archive)
        except UnavailableError as error:
            raise UnavailableError(f"{error}, given as `onnxruntime_web`") from error
        with tarfile.open(path) as packed:
            for name, ours in _ENGINE_FILES.items():
                content = packed.extractfile(f"package/dist/{name}")
                assert content is not None  # its hash was compared
                with content:
                    found[ours] = content.read()
    return found


def _model(folder: Path, name: str, model: tuple[Artifact, Path], golden: Golden, arrays: _Arrays) -> _Model:
    (artifact, path), other = model, golden.other_size
    return _Model(
        name=name,
        title=f"{artifact.format} {artifact.precision}",
        file=file_entry(folder, path),
        references=_references(golden, artifact.precision, arrays),
        other_references=() if other is None else _references(other, artifact.precision, arrays),
    )


def _references(golden: Golden, precision: str, arrays: _Arrays) -> tuple[_Reference, ...]:
    return tuple(
        _Reference(
            name=one.name,
            outputs={name: arrays.add(array) for name, array in one.outputs.items()},
            limits=dict(one.limits),
        )
        for one in references(golden, precision)
    )


def _golden(golden: Golden, arrays: _Arrays) -> dict[str, Any]:
    other, pixels = golden.other_size, golden.source_pixels
    return {
        "batches": batch_sizes(golden.inputs),
        "images": arrays.add(golden.images),
        "inputs": arrays.add(golden.inputs),
        "limit": tensor_limit(golden.inputs),
        "strides": golden.strides,
        "sources": tuple(map(arrays.add, golden.sources)),
        "source_pixels": None if pixels is None else arrays.add(pixels),
        "other": other and _OtherSize(size=other.size, inputs=arrays.add(other.inputs), strides=other.strides),
    }


class _Arrays:
    """Arrays one after another in a file; equal ones once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = bytearray()
        self._places: dict[bytes, int] = {}

    def add(self, array: NDArray[Any]) -> _Array:
        """Append an array, row by row and little-endian."""
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        if data not in self._places:
            self._content += bytes(-len(self._content) % _ALIGNED)
            self._places[data] = len(self._content)
            self._content += data
        return _Array(dtype=array.dtype.name, shape=array.shape, offset=self._places[data])

    def write(self) -> None:
        self.path.write_bytes(self._content)
