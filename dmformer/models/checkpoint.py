"""Checkpoints: weights on disk, with the configuration and the preprocessing that they are for.

This project's ``.safetensors`` carry the configuration in their metadata (key ``dmformer``, JSON). What other training
scripts leave (``models/checkpoint_file.py`` reads it) has weights only, and ``models/infer.py`` infers the
configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from dmformer.data.description import InputDescription, description_beside
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError
from dmformer.models.checkpoint_file import METADATA_KEY, read_weights, title_of
from dmformer.models.config import DMFormerConfig
from dmformer.models.dmformer import FEATURES_ONLY, variant_config
from dmformer.models.infer import HIDDEN_FIELDS, infer_config, variant_name
from dmformer.models.key_map import network_shapes, translate
from dmformer.models.specification import KeyMap, NetworkSpecification
from dmformer.models.state_dict import misfit
from dmformer.task import INPUT_NAME, THRESHOLD, class_count

METADATA_VERSION = 1

# A name of the network's own, which tells where in a file its weights are.
_OWN_NAME = re.compile(r"stages\.\d+\.(downsample|blocks\.\d+)\.")


# Fields that every version writes; those that it does not know have their defaults in the networks that it writes.
_ALWAYS_WRITTEN = {"widths", "depths", "dilations", "gate_input", "inner_residual", "batch_norm_eps"}


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a network with everything that is needed to use them.

    Attributes:
        arch: name of the variant, or ``custom`` where the configuration is none of them.
        config: the network's configuration, or the specification of a network of one's own.
        state: tensors by name, ready for ``load_state_dict``.
        preprocessing: how an image becomes the network's input.
        classes: a name for each output; empty where nobody gave names.
        sha256: SHA-256 of the file; ``None`` for weights that came from no file.
        notes: what was assumed, chosen or converted while reading, one sentence each.
        training: recipe, data and accuracy, as the file's metadata has them.
        described: whether the file has metadata, so that configuration, preprocessing and classes come from it.
        open_size: whether the network is for images of any height and width (for segmentation, of multiples of 32),
            and not only for the size of the preprocessing.
        overridden: fields of the preprocessing, and ``classes``, that were given instead of the file's.
        key_map: of weights that somebody's own network had under other names.
    """

    arch: str
    config: NetworkSpecification
    state: dict[str, Tensor] = field(repr=False)
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()
    sha256: str | None = None
    notes: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    described: bool = False
    open_size: bool = False
    overridden: tuple[str, ...] = ()
    key_map: KeyMap | None = None

    @property
    def side(self) -> int | None:
        """Return the side of the input in pixels; ``None`` where it is open."""
        return None if self.open_size else self.preprocessing.image_size

    @property
    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Return the shapes of the input and of the outputs by name, in this order; axes that stay open have names."""
        size, config = self.preprocessing.image_size, self.config
        sides: tuple[int | str, ...] = ("height", "width") if self.open_size else (size, size)
        shapes: dict[str, tuple[int | str, ...]] = {INPUT_NAME: ("batch", config.in_channels, *sides)}
        for name, (channels, *fixed) in zip(config.output_names, config.output_shapes(size, size), strict=True):
            is_open = self.open_size and fixed
            shapes[name] = ("batch", channels, *((f"{name}_height", f"{name}_width") if is_open else fixed))
        return shapes

    def model(self) -> nn.Module:
        """Return the network with these weights, in evaluation mode."""
        return self.config.build(self.state)


class Metadata(msgspec.Struct, kw_only=True):
    """The metadata of a ``.safetensors`` file of this project: a checkpoint without its weights."""

    version: int
    arch: str
    config: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()
    training: dict[str, Any] = {}
    open_size: bool = False


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a ``.safetensors`` file; :func:`load_checkpoint` reads it back, configuration and all."""
    from safetensors.torch import save

    metadata = Metadata(
        version=METADATA_VERSION,
        arch=checkpoint.arch,
        config=checkpoint.config.to_dict(),
        preprocessing=checkpoint.preprocessing,
        classes=checkpoint.classes,
        training=dict(checkpoint.training),
        open_size=checkpoint.open_size,
    )
    state = {name: tensor.detach().contiguous() for name, tensor in sorted(checkpoint.state.items())}
    path.write_bytes(save(state, metadata={METADATA_KEY: msgspec.json.encode(metadata, order="sorted").decode()}))


def load_checkpoint(
    path: str | Path,
    arch: str | None = None,
    options: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    fallback: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    description: InputDescription | None = None,
    classes: Sequence[str] = (),
    key_map: KeyMap | None = None,
) -> Checkpoint:
    """Read a checkpoint and check it against the network it is for.

    The configuration comes, in this order, from ``options``, from the file's metadata or the ``key_map``, from
    ``arch``, from the names
    and shapes of the tensors, and from the defaults; what was left to the defaults is listed in ``notes``. So do
    preprocessing and names of classes: from the arguments, from the file's metadata, where it has none from a file
    beside it (:mod:`dmformer.data.description`), and from the defaults.

    Args:
        path: a file of safetensors or PyTorch (``.safetensors``, ``.pth``, ``.ckpt``, ``.bin`` …; its content counts,
            not its name), or the index or the folder of one in shards.
        arch: a variant's name; inferred where it is not given.
        options: fields of :class:`DMFormerConfig` that override what the file says.
        image_size: replaces the preprocessing's input size, in pixels.
        fallback: fields of :class:`DMFormerConfig` to take instead of the defaults where nothing tells them.
        weights_key: where in the file the weights are, like ``ema`` or ``model``, where it holds several; by default
            averaged weights are taken.
        preprocessing: fields of :class:`Preprocessing` that override what the file says, in JSON types.
        description: what another library's file says of the preprocessing, instead of metadata and files beside it.
        classes: a name for each output, instead of those in the file.
        key_map: the file's names beside ours, and the configuration; a file with metadata has our names already.

    Raises:
        UsageError: the file is missing, truncated or of another kind; it holds several sets of weights and nothing
            says which to take; they are not finite, or do not fit the network; or the network has not as many outputs
            as classes are named.
    """
    path = Path(path)
    title = title_of(path)
    theirs = {} if key_map is None else key_map.keys
    file = read_weights(path, lambda name: name in theirs or _OWN_NAME.match(name) is not None, weights_key)
    state, notes = file.state, list(file.notes)
    metadata = None if file.metadata is None else _parse_metadata(file.metadata, title)
    from_file = {} if metadata is None else metadata.config
    try:
        if metadata is None and key_map is not None:
            state, from_file = translate(state, key_map), key_map.config
        config = _decide_config(state, from_file, arch, options or {}, fallback or {}, notes)
    except UsageError as error:
        raise UsageError(f"{title}: {error}") from error
    if config.task == "features":
        stages = {name: value for name, value in state.items() if not name.startswith(("norm.", "head.", "decoder."))}
        if len(stages) < len(state):
            notes.append(f"task features: {len(state) - len(stages)} tensors of the head were left out")
        state = stages
    try:
        shapes = network_shapes(config)
    except UsageError as error:
        raise UsageError(f"{title}: {error}") from error
    _check_names(state, shapes, title, variant_name(config) or "the network")
    beside = description_beside(path) if description is None and metadata is None else None
    given = dict(preprocessing or {}) | ({} if image_size is None else {"image_size": image_size})
    decided, named = decide_input(config, metadata, description or beside, given, notes)
    if len(decided.channels) != config.in_channels:
        raise UsageError(
            f"{title}: its preprocessing gives channels {decided.channels!r}; "
            f"expected as many as the network's {config.in_channels}"
        )
    named = checked_classes(classes or named, config)
    notes += sigmoid_note(config)
    overridden = {*given, *(description.fields if description else ())} - {"image_size"}
    if classes or (description is not None and description.classes):
        overridden.add("classes")
    return Checkpoint(
        arch=variant_name(config) or "custom",
        config=config,
        state=state,
        preprocessing=decided,
        classes=named,
        sha256=file.sha256,
        notes=tuple(notes),
        training=metadata.training if metadata else {},
        described=metadata is not None,
        open_size=metadata.open_size if metadata else False,
        overridden=tuple(sorted(overridden)),
        key_map=key_map if metadata is None else None,
    )


def decide_input(
    config: NetworkSpecification,
    metadata: Metadata | None,
    description: InputDescription | None,
    given: Mapping[str, Any],
    notes: list[str],
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return preprocessing and names of classes: as given, else as described, else of the file, else the usual."""
    named = metadata.classes if metadata and _fits(metadata.classes, config) else ()
    usual = metadata.preprocessing if metadata else default_preprocessing(config)
    assumed = set() if metadata else set(msgspec.to_builtins(usual)) - set(given)
    if description is not None:
        usual = usual.with_fields(description.fields)
        assumed -= set(description.fields)
        notes += [f"preprocessing was read from {str(description.source)!r}", *description.notes]
        if _fits(description.classes, config):
            named = description.classes
        elif description.classes:
            count = f"{len(description.classes)} names of classes for {config.num_classes} outputs"
            notes.append(f"{description.source.name} has {count}: they were left out")
    decided = usual.with_fields(given)
    if assumed:
        notes.append(
            f"preprocessing is not in the checkpoint, so the usual was assumed: {decided.describe(assumed)}; "
            f"images are seen with {decided.image_size} pixels a side"
        )
    if told := set(given) - {"image_size"}:
        notes.append(f"preprocessing as it was given: {decided.describe(told)}")
    return decided, named


def sigmoid_note(config: NetworkSpecification) -> list[str]:
    """Return what is to be said of a classifier with one output; nothing of others."""
    if config.task == "classification" and config.num_classes == 1:
        return [f"one output: its sigmoid is the probability of class 1 of two, with the threshold {THRESHOLD}"]
    return []


def checked_classes(classes: Sequence[str], config: NetworkSpecification) -> tuple[str, ...]:
    """Return a name for each class that a network tells apart, or none; one output tells two, and may have one name.

    Raises:
        UsageError: there are more or fewer.
    """
    if not classes or _fits(classes, config):
        names = tuple(classes)
        return (f"not {names[0]}", *names) if len(names) == 1 and config.task == "classification" else names
    expected = f"one for each of the network's {config.num_classes}"
    if config.num_classes == 1:
        expected = "one or two for the network's only output, the name of class 1 last"
    raise UsageError(f"{len(classes)} names of classes; expected {expected}")


def _fits(classes: Sequence[str], config: NetworkSpecification) -> bool:
    return len(classes) in (config.num_classes, class_count(config.task, config.num_classes))


def default_preprocessing(config: NetworkSpecification) -> Preprocessing:
    """Return ImageNet's evaluation transform; for segmentation with 512 pixels uncropped, as on ADE20K.

    A network of one input channel gets values scaled to -1..1.
    """
    size: dict[str, Any] = {"image_size": 512, "crop_fraction": 1.0} if config.task == "segmentation" else {}
    if config.in_channels == 1:
        return Preprocessing(channels="L", mean=(0.5,), std=(0.5,), **size)
    return Preprocessing(**size)


def _parse_metadata(text: str, title: str) -> Metadata:
    try:
        metadata = msgspec.json.decode(text, type=Metadata)
    except (msgspec.DecodeError, UsageError, RecursionError) as error:
        reason = " ".join(str(error).split())  # it may quote a name that has line breaks
        raise UsageError(f"{title}: its metadata is damaged: {reason}") from error
    if metadata.version != METADATA_VERSION:
        raise UsageError(
            f"{title}: metadata version {metadata.version}; expected {METADATA_VERSION}: "
            "use the version of dmformer that wrote it"
        )
    return metadata


def _decide_config(
    state: dict[str, Tensor],
    from_file: Mapping[str, Any],
    arch: str | None,
    options: Mapping[str, Any],
    fallback: Mapping[str, Any],
    notes: list[str],
) -> DMFormerConfig:
    whole = False
    if arch is not None:  # the shapes are the variant's; the rest may still come from the file
        from_file = {name: value for name, value in from_file.items() if name in HIDDEN_FIELDS}
        from_shapes = {**variant_config(arch).to_dict(), **_class_count(state)}
    elif whole := from_file.keys() >= _ALWAYS_WRITTEN:
        from_shapes = {}
    else:
        from_shapes = infer_config(state)
    if options.get("task") == "features":
        options = {**options, **FEATURES_ONLY}
    given = {name: value for name, value in fallback.items() if name in HIDDEN_FIELDS} | dict(from_file) | dict(options)
    config = DMFormerConfig.from_dict({**from_shapes, **given})
    assumed = [name for name in HIDDEN_FIELDS if name not in given and name not in _without_effect(config)]
    if assumed and not whole:
        values = ", ".join(f"{name}={msgspec.json.encode(config.to_dict()[name]).decode()}" for name in assumed)
        notes.append(f"not told by the checkpoint, so the defaults were assumed: {values}")
    return config


def _without_effect(config: DMFormerConfig) -> set[str]:
    """Return the fields that change nothing in a network without LayerNorm."""
    return set() if config.has("layer") else {"layer_norm_eps", "head_norm_pooled"}


def _class_count(state: dict[str, Tensor]) -> dict[str, int]:
    for name, rank in (("head.weight", 2), ("decoder.classifier.conv.weight", 4)):
        last = state.get(name)
        if last is not None and last.ndim == rank:
            return {"num_classes": last.shape[0]}
    return {}


def _check_names(
    received: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], title: str, what: str
) -> None:
    """Compare names and shapes of weights with those of a network, which messages call ``what``."""
    if differences := misfit({name: tuple(value.shape) for name, value in received.items()}, expected):
        raise UsageError(f"{title} does not fit {what}: {differences}")


def load_weights_(
    network: nn.Module, path: Path, network_title: str, weights_key: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Load the weights of a file into a network of one's own, in place; all of them have to fit.

    Args:
        network: whose names and shapes are expected.
        path: a file as :func:`load_checkpoint` takes it.
        network_title: what the network is called in messages.
        weights_key: where in the file the weights are, where it holds several sets.

    Returns:
        The file's SHA-256, and what was chosen or converted while reading, one sentence each.

    Raises:
        UsageError: the file cannot be used, or does not fit the network.
    """
    own = network.state_dict()
    # Tables of indices and the like stay what they are; a DMFormer has none.
    integers = {name for name, value in own.items() if not value.is_floating_point()}
    file = read_weights(path, own.__contains__, weights_key, integers.__contains__)
    # A tensor with two names of the network's may be in the file under one of them: safetensors writes it once.
    same = {(value.data_ptr(), value.shape): file.state[name] for name, value in own.items() if name in file.state}
    for name, value in own.items():
        if name not in file.state and value.numel() and (value.data_ptr(), value.shape) in same:
            file.state[name] = same[value.data_ptr(), value.shape]
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    title = f"{title_of(path)}, of another network or of other `module_options`,"
    _check_names(file.state, shapes, title, network_title)
    network.load_state_dict(file.state, strict=False)  # counters of batches may be missing
    return file.sha256, file.notes
