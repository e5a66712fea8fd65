"""Which models of a server a bundle should be behind, and what they are asked with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.bundle.select import matching_artifacts
from dmformer.data.images import decode_image, encode_png
from dmformer.errors import StageFailed, UnavailableError, UsageError
from dmformer.serve.client import DTYPES, ModelConfiguration, ModelMetadata, UnknownModel
from dmformer.serve.predictor import read_tensor
from dmformer.serve.served import ENCODED_IMAGE, SHA256, ServedSpec
from dmformer.text import shorten, shorten_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.manifest import Artifact, Manifest, Tensor
    from dmformer.serve.client import ServerClient, TensorMetadata


@dataclass(frozen=True)
class ServedTarget:
    """A version of a model of a server, and what it should be.

    Attributes:
        spec: the artifact that should answer.
        model: name of the model.
        version: of the model.
        metadata: what the server says of it.
        configuration: Triton's; ``None`` where the server has none.
    """

    spec: ServedSpec
    model: str
    version: str
    metadata: ModelMetadata
    configuration: ModelConfiguration | None

    @property
    def title(self) -> str:
        """Name and version."""
        return shorten(f"{self.model}:{self.version}" if self.version else self.model)

    @property
    def mismatches(self) -> list[str]:
        """How what the server says of inputs and outputs differs from the manifest; empty where it does not."""
        expected = self.spec
        given = {one.name: one for one in self.metadata.inputs}
        gives = {one.name: one for one in self.metadata.outputs}
        found = []
        if set(given) != {expected.input.name}:
            found.append(f"inputs [{_listed(given)}]; expected {[expected.input.name]}")
        if any(one.name not in gives for one in expected.outputs):
            found.append(f"outputs [{_listed(gives)}]; expected {[one.name for one in expected.outputs]}")
        pairs = [(given.get(expected.input.name), expected.input)]
        pairs += [(gives.get(one.name), one) for one in expected.outputs]
        return found + [reason for served, one in pairs if served is not None and (reason := _mismatch(served, one))]

    @property
    def max_batch(self) -> int | None:
        """The largest batch that the server takes; ``None`` where it does not say."""
        if self.configuration is None:
            return None
        return max(1, self.configuration.max_batch_size)


def find_models(
    manifest: Manifest,
    client: ServerClient,
    model: str | None = None,
    runtimes: Sequence[str] = (),
    precision: str | None = None,
) -> tuple[list[ServedTarget], list[str]]:
    """Find the models of a server that a bundle should be behind, and a sentence for each that is not ready.

    Raises:
        UnavailableError: none of them is ready.
        UsageError: the server has none, the bundle has no such artifact, or nothing tells which one a model should be.
    """
    artifacts = matching_artifacts(manifest, runtimes, [precision] if precision is not None else [])
    specs = [ServedSpec(manifest, artifact, images) for artifact in artifacts for images in (False, True)]
    by_name = {spec.name: spec for spec in specs}
    index = client.models()
    listed = [one.name for one in index or ()]
    expected = [model] if model is not None else [name for name in by_name if index is None or name in listed]
    targets, reasons = [], []
    for name in expected if index is None or model is None or model in listed else []:
        try:
            configuration = client.configuration(name)
            for version in client.model(name).versions or ("",):
                metadata = client.model(name, version)
                spec = by_name.get(name) or _declared(name, artifacts, manifest, metadata, configuration)
                targets.append(ServedTarget(spec, name, version, metadata, configuration))
        except StageFailed as error:
            if isinstance(error, UnknownModel) and index is None and model is None:
                continue  # a name that was only tried
            state = next((f"{one.state} {one.reason}" for one in index or () if one.name == name and one.reason), "")
            reasons.append(f"{error} {shorten(state)}".strip())
    if targets:
        return targets, reasons
    if reasons:
        raise UnavailableError(f"no model is ready: {reasons[0]}")
    has = f"it has {shorten_list(listed) or 'none'}" if index is not None else "it does not list those that it has"
    wanted = shorten(model) if model is not None else f"any of {shorten_list(by_name)}"
    raise UsageError(f"{client.url} has no model {wanted}; {has}: expected `model`, the name of one of them")


def _listed(names: Iterable[str]) -> str:
    return shorten_list(map(repr, sorted(names)))


def _mismatch(served: TensorMetadata, expected: Tensor) -> str | None:
    """Say how a served tensor differs from the expected one; sides that are open may be fixed nowhere."""
    dtype = {"bytes": "object"}.get(expected.dtype, expected.dtype)
    sides = [side if isinstance(side, int) else -1 for side in expected.shape[1:]]
    if DTYPES.get(served.datatype) == dtype and list(served.shape[1:]) == sides:
        return None
    return (
        f"{served.name!r} is {shorten(served.datatype)} {shorten(list(served.shape))}; expected {expected.dtype} "
        f"{list(expected.shape)}"
    )


def _declared(
    name: str,
    artifacts: Sequence[Artifact],
    manifest: Manifest,
    metadata: ModelMetadata,
    configuration: ModelConfiguration | None,
) -> ServedSpec:
    """Return what a model of a foreign name should be: what its configuration says, or the only artifact there is."""
    images = any(one.name == ENCODED_IMAGE for one in metadata.inputs)
    declared = configuration.parameter(SHA256) if configuration is not None else None
    for artifact in artifacts:
        if artifact.sha256 == declared:
            return ServedSpec(manifest, artifact, images)
    precisions = {artifact.precision for artifact in artifacts}
    if len(precisions) != 1:
        some = ", ".join(sorted(precisions))
        raise UsageError(
            f"model {shorten(repr(name))} says nothing of its precision; expected `precision`, one of {some}"
        )
    return ServedSpec(manifest, artifacts[0], images)


def request_rows(spec: ServedSpec, golden: Golden) -> NDArray[Any]:
    """Return the golden images as a model takes them, a row each: tensors, or files of images, (N, 1) objects of bytes.

    Of those files the preprocessing makes the golden pixels.

    Raises:
        UsageError: there are no such images for this preprocessing.
    """
    if not spec.images:
        return golden.inputs
    manifest = spec.manifest
    preprocessing = manifest.preprocessing
    size, channels = golden.images.shape[1], golden.images.shape[3]
    whole = manifest.open_size and manifest.model.task == "segmentation"
    side = size if whole else round(preprocessing.image_size / preprocessing.crop_fraction)
    start = (side - size) // 2
    files = []
    for pixels, expected in zip(golden.images, golden.inputs, strict=True):
        framed = np.zeros((side, side, channels), np.uint8)
        framed[start : start + size, start : start + size] = pixels
        file = encode_png(framed)
        seen = read_tensor(manifest, decode_image(file))[0]
        if seen.shape != expected.shape or not np.allclose(seen, expected, atol=1e-4):
            raise UsageError("no image gives the golden pixels by this preprocessing; ask the model that takes tensors")
        files.append([file])
    return np.array(files, np.object_)
