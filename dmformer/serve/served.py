"""What a model behind a server is called, takes and gives: one description for its layout, the server and its clients.

An artifact is served in two ways. *Tensors*: what the network takes and gives. *Images*: the bytes of an image file in;
classes, the network's outputs and the tensor that it saw come out, so that a client can check the preprocessing too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dmformer.bundle.manifest import Artifact, Manifest, Tensor
from dmformer.task import OUTPUT_NAME

ENCODED_IMAGE = "encoded_image"  # the bytes of an image file, one a row
PROBABILITIES = "probabilities"  # of each class
CLASS_INDEX = "class_index"  # the most likely class
CLASS_NAME = "class_name"
CLASS_MAP = "class_map"  # the class of each pixel that the network saw
# Parameters of a model's configuration in Triton.
SHA256 = "dmformer_sha256"
FORMAT = "dmformer_format"
THREADS = "dmformer_threads"  # of one inference, where this was tuned
MACHINE = "dmformer_machine"  # on which the threads were tuned
PRECISION = "dmformer_precision"
INPUT_KIND = "dmformer_input"  # _TENSORS or _IMAGES
_TENSORS, _IMAGES = "tensors", "images"
_SUFFIX = "_images"


@dataclass(frozen=True)
class ServedSpec:
    """An artifact as a server offers it.

    Attributes:
        manifest: of the bundle.
        artifact: what answers.
        images: whether it takes files of images instead of tensors.
    """

    manifest: Manifest
    artifact: Artifact
    images: bool = False

    @property
    def name(self) -> str:
        """Name of the model and of its folder: nothing in it leads elsewhere, whatever the architecture is called."""
        arch, artifact = self.manifest.model.arch, self.artifact
        named = re.sub(r"[^A-Za-z0-9_-]", "_", f"{arch}_{artifact.format}_{artifact.precision}")
        return f"{named}{_SUFFIX}" if self.images else named

    @property
    def input(self) -> Tensor:
        """What the model takes; the first dimension is the batch."""
        (given,) = self.manifest.inputs
        return Tensor(name=ENCODED_IMAGE, dtype="bytes", shape=(given.shape[0], 1)) if self.images else given

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What the model gives; the first dimension is the batch."""
        manifest = self.manifest
        return (*_classes(manifest), *manifest.outputs, *manifest.inputs) if self.images else manifest.outputs

    @property
    def labelled(self) -> str | None:
        """The output whose largest values Triton can name by labels: one value for each class; ``None`` without.

        That names classes of an image, but neither those of pixels nor the two that one output tells apart.
        """
        model = self.manifest.model
        if model.task != "classification" or not model.classes:
            return None
        if self.images:
            return PROBABILITIES
        return None if self.manifest.one_logit else OUTPUT_NAME

    @property
    def parameters(self) -> dict[str, str]:
        """What the model's configuration says of the artifact."""
        return {
            SHA256: self.artifact.sha256,
            FORMAT: self.artifact.format,
            PRECISION: self.artifact.precision,
            INPUT_KIND: _IMAGES if self.images else _TENSORS,
        }


def _classes(manifest: Manifest) -> tuple[Tensor, ...]:
    """What is made of the network's outputs for those who want no logits."""
    batch, task = manifest.inputs[0].shape[0], manifest.model.task
    if task == "segmentation":
        return (Tensor(name=CLASS_MAP, dtype="int32", shape=(batch, *manifest.outputs[0].shape[2:])),)
    if task == "features":
        return ()
    named = (Tensor(name=CLASS_NAME, dtype="bytes", shape=(batch, 1)),) if manifest.model.classes else ()
    return (
        Tensor(name=CLASS_INDEX, dtype="int32", shape=(batch, 1)),
        *named,
        Tensor(name=PROBABILITIES, dtype="float32", shape=(batch, manifest.class_count)),
    )


def reads_images(parameters: dict[str, str]) -> bool:
    """Return whether a model with these parameters of its configuration takes files of images."""
    return parameters[INPUT_KIND] == _IMAGES
