"""What an export has to know of a network, whether it is ours or somebody's own, and what leads from one to the other.

No PyTorch is needed to read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from dmformer.task import Task


class ModuleOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a network of one's own came from.

    Attributes:
        reference: file or Python module, and the name in it: ``my_network.py:build``.
        options: arguments that it was made with.
        source_sha256: SHA-256 of the file that defines it; ``null`` where there is no such file.
    """

    reference: str
    options: dict[str, Any] = {}
    source_sha256: str | None = None


class KeyMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The names of somebody's own DMFormer beside those of the same network here.

    Attributes:
        version: of this layout.
        config: fields of ``DMFormerConfig``, in JSON types.
        keys: for each tensor of the own network its name here. Shapes are equal but for dimensions of one.
        zeros: biases here that the own network does not have; they are zero.
        unused: tensors of the own network that take no part in what it computes.
    """

    version: Literal[1] = 1
    config: dict[str, Any]
    keys: dict[str, str]
    zeros: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


class NetworkSpecification(Protocol):
    """What a network takes and gives, and how to make it anew."""

    @property
    def task(self) -> Task:
        """What its outputs mean."""

    @property
    def in_channels(self) -> int:
        """Channels of the input image, 1 or 3."""

    @property
    def num_classes(self) -> int:
        """Number of classes that it tells apart; of no meaning for task ``features``."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what it gives, in order."""

    @property
    def origin(self) -> ModuleOrigin | None:
        """Where a network of one's own came from; ``None`` for a DMFormer of this project."""

    def output_shapes(self, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of what it gives for one image of so many pixels, without the batch."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything that says which network it is, as a dictionary of JSON types."""

    def build(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return the network anew with these weights, which it does not share, in evaluation mode."""

    def block_of(self, node: str) -> str | None:
        """Return the block that an ONNX node belongs to, by the node's name ``MODULE/OPERATOR``."""
