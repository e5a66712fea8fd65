"""Checkpoints: weights on disk, with the configuration and the preprocessing that they are for.

Two kinds of file are read. ``.safetensors`` carries the configuration in its metadata (key ``dmformer``, JSON).
``.pt`` and ``.pth`` are read with ``weights_only=True``, so that a pickle cannot run code; they carry weights only, and
``models/infer.py`` infers the configuration.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError, first_line
from dmformer.models.dmformer import (
    FEATURES_ONLY,
    DMFormerConfig,
    build_network,
    variant_config,
)
from dmformer.models.infer import HIDDEN_FIELDS, infer_config, variant_name
from dmformer.models.specification import NetworkSpecification
from dmformer.task import INPUT_NAME

METADATA_KEY = "dmformer"
METADATA_VERSION = 1

# What training scripts wrap the weights in; the averaged weights come first, as they are the ones to deploy.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# What DistributedDataParallel and torch.compile put before the names.
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
_COUNTER = ".num_batches_tracked"
_MOST_LISTED = 6  # names in a message
# A tag, and text after it: the length that starts a .safetensors file can begin with the bytes " <" as well.
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z][\s -~]{8}")
# What PyTorch's weights-only reader says of a pickle that is whole but asks for more than tensors.
_WANTS_CODE = re.compile("GLOBAL|Trying to call|Can only create new object|Can only build")


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
) -> Checkpoint:
    """Read a checkpoint and check it against the network it is for.

    The configuration comes, in this order, from ``options``, from the file's metadata, from ``arch``, from the names
    and shapes of the tensors, and from the defaults; what was left to the defaults is listed in ``notes``.

    Args:
        path: a ``.safetensors``, ``.pt`` or ``.pth`` file.
        arch: a variant's name; inferred where it is not given.
        options: fields of :class:`DMFormerConfig` that override what the file says.
        image_size: replaces the preprocessing's input size, in pixels.
        fallback: fields of :class:`DMFormerConfig` to take instead of the defaults where nothing tells them.

    Raises:
        UsageError: the file is missing, truncated, of another kind, wants to run code, holds values that are not
            finite, or does not fit the network.
    """
    path = Path(path)
    title = f"checkpoint {str(path)!r}"  # begins every message
    data = _read(path, title)
    notes: list[str] = []
    metadata = None
    if path.suffix.lower() == ".safetensors":
        content, metadata = _parse_safetensors(data, title)
    else:
        content = _parse_pickle(data, title)
    state = _normalise(_unwrap(content, title, notes), title, notes)
    try:
        config = _decide_config(state, metadata, arch, options or {}, fallback or {}, notes)
    except UsageError as error:
        raise UsageError(f"{title}: {error}") from error
    if config.task == "features":
        stages = {name: value for name, value in state.items() if not name.startswith(("norm.", "head.", "decoder."))}
        if len(stages) < len(state):
            notes.append(f"task features: {len(state) - len(stages)} tensors of the head were left out")
        state = stages
    _check_fit(state, config, title)
    preprocessing = metadata.preprocessing if metadata else default_preprocessing(config)
    if metadata is None:
        notes.append(
            "preprocessing is not in the checkpoint: ImageNet's was assumed "
            f"({preprocessing.image_size} pixels, {preprocessing.interpolation})"
        )
    if len(preprocessing.channels) != config.in_channels:
        raise UsageError(
            f"{title}: its preprocessing gives channels {preprocessing.channels!r}; "
            f"expected as many as the network's {config.in_channels}"
        )
    if image_size is not None:
        preprocessing = preprocessing.resized_to(image_size)
    classes = metadata.classes if metadata and len(metadata.classes) == config.num_classes else ()
    return Checkpoint(
        arch=variant_name(config) or "custom",
        config=config,
        state=state,
        preprocessing=preprocessing,
        classes=classes,
        sha256=hashlib.sha256(data).hexdigest(),
        notes=tuple(notes),
        training=metadata.training if metadata else {},
        described=metadata is not None,
        open_size=metadata.open_size if metadata else False,
    )


def default_preprocessing(config: NetworkSpecification) -> Preprocessing:
    """Return ImageNet's evaluation transform; for segmentation with 512 pixels uncropped, as on ADE20K.

    A network of one input channel gets values scaled to -1..1.
    """
    size: dict[str, Any] = {"image_size": 512, "crop_fraction": 1.0} if config.task == "segmentation" else {}
    if config.in_channels == 1:
        return Preprocessing(channels="L", mean=(0.5,), std=(0.5,), **size)
    return Preprocessing(**size)


def _read(path: Path, title: str) -> bytes:
    """Read the file, of a kind that is known by its suffix."""
    if path.suffix.lower() not in (".safetensors", ".pt", ".pth"):
        raise UsageError(f"{title} ends in {path.suffix!r}; expected .safetensors, .pt or .pth")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{title} cannot be read: {error.strerror}; expected a file") from error
    if _PAGE.match(data):
        raise UsageError(f"{title} is an HTML or XML page, not weights: download it again")
    return data


def _parse_safetensors(data: bytes, title: str) -> tuple[dict[str, Tensor], Metadata | None]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state = load(data)
        # The format: the header's length as a little-endian u64, then the header in JSON.
        header = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, msgspec.DecodeError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"{title} is no whole .safetensors file ({first_line(error)}): copy or download it again"
        ) from error
    text = (header.get("__metadata__") or {}).get(METADATA_KEY)
    return state, None if text is None else _parse_metadata(text, title)


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


def _parse_pickle(data: bytes, title: str) -> Any:
    import pickle

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to programmers
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever the code that they reach raises
        if isinstance(error, pickle.UnpicklingError) and _WANTS_CODE.search(str(error)):
            raise UsageError(
                f"{title} holds more than weights and wants to run code while loading; "
                "it was not loaded: save only its state_dict"
            ) from error
        raise UsageError(
            f"{title} is truncated, damaged or no PyTorch checkpoint ({_reason(error)}): copy or download it again"
        ) from error


def _reason(error: Exception) -> str:
    """Return what PyTorch says is wrong, without the advice around it."""
    _, marker, reason = str(error).partition("WeightsUnpickler error: ")
    lines = reason.strip().splitlines() if marker else []
    return _shown(lines[0] if lines else first_line(error))[:120]


def _unwrap(content: Any, title: str, notes: list[str]) -> dict[str, Any]:
    """Return the mapping of tensors inside whatever a training script saved."""
    current, seen = content, set()
    while isinstance(current, dict) and id(current) not in seen:
        seen.add(id(current))  # a pickle may hold itself
        wrappers = [key for key in _WRAPPERS if isinstance(current.get(key), dict)]
        if not wrappers:
            break
        if len(wrappers) > 1:
            notes.append(f"the checkpoint holds {', '.join(wrappers)}: {wrappers[0]} was taken")
        current = current[wrappers[0]]
    if not isinstance(current, dict) or not any(isinstance(value, Tensor) for value in current.values()):
        received = str(type(current))
        if isinstance(current, dict):
            received = f"keys {', '.join(map(_shown, list(current)[:_MOST_LISTED]))}"
        raise UsageError(
            f"{title} holds no weights ({received}); expected tensors by name, or them under {', '.join(_WRAPPERS)}"
        )
    return current


def _is_dense_float(value: Tensor) -> bool:
    """Return whether the file holds every value of the tensor, in a type that converts to float32."""
    return (
        value.is_floating_point()
        and value.dtype != torch.float4_e2m1fn_x2  # two values in one byte
        and value.layout == torch.strided
        and not (value.is_meta or value.is_nested)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # not repeated by its strides
    )


def _normalise(tensors: dict[str, Any], title: str, notes: list[str]) -> dict[str, Tensor]:
    """Return the weights under plain names, in float32; refuse what is no tensor, repeated or not finite."""
    state: dict[str, Tensor] = {}
    converted = set()
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(f"{title}: entry {name!r} is of type {type(value).__name__}; expected tensors only")
        plain = _PREFIXES.sub("", name)
        if plain in state:
            raise UsageError(f"{title} holds {plain!r} twice, under different prefixes")
        if plain.endswith(_COUNTER):
            continue
        if not _is_dense_float(value):
            raise UsageError(f"{title}: {_shown(plain)} is {value.dtype}, {value.layout}; expected dense floats")
        if value.dtype != torch.float32:
            converted.add(str(value.dtype).removeprefix("torch."))
        state[plain] = value.detach().to(torch.float32)
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise UsageError(
            f"{title}: NaN or infinite values in {_some(broken)}; expected finite weights: "
            "the training diverged or the file is damaged"
        )
    if converted:
        notes.append(f"weights of type {', '.join(sorted(converted))} were converted to float32")
    return state


def _decide_config(
    state: dict[str, Tensor],
    metadata: Metadata | None,
    arch: str | None,
    options: Mapping[str, Any],
    fallback: Mapping[str, Any],
    notes: list[str],
) -> DMFormerConfig:
    from_file = metadata.config if metadata is not None else {}
    if arch is not None:  # the shapes are the variant's; the rest may still come from the file
        from_file = {name: value for name, value in from_file.items() if name in HIDDEN_FIELDS}
        from_shapes = {**variant_config(arch).to_dict(), **_class_count(state)}
    elif set(from_file) >= {field.name for field in fields(DMFormerConfig)}:
        from_shapes = {}
    else:
        from_shapes = infer_config(state)
    if options.get("task") == "features":
        options = {**options, **FEATURES_ONLY}
    given = {name: value for name, value in fallback.items() if name in HIDDEN_FIELDS} | from_file | dict(options)
    config = DMFormerConfig.from_dict({**from_shapes, **given})
    assumed = [name for name in HIDDEN_FIELDS if name not in given]
    if assumed:
        values = ", ".join(f"{name}={msgspec.json.encode(config.to_dict()[name]).decode()}" for name in assumed)
        notes.append(f"not told by the checkpoint, so the defaults were assumed: {values}")
    return config


def _class_count(state: dict[str, Tensor]) -> dict[str, int]:
    for name, rank in (("head.weight", 2), ("decoder.classifier.conv.weight", 4)):
        last = state.get(name)
        if last is not None and last.ndim == rank:
            return {"num_classes": last.shape[0]}
    return {}


def _check_fit(state: dict[str, Tensor], config: DMFormerConfig, title: str) -> None:
    """Compare names and shapes with the network's; meta tensors, so that nothing is allocated for it."""
    try:
        with torch.device("meta"):
            network = build_network(config)
    except (RuntimeError, TypeError) as error:  # a size that no tensor can have
        raise UsageError(f"{title}: its configuration asks for a network beyond all memory") from error
    _check_names(state, network.state_dict(), title, variant_name(config) or "the network")


def _check_names(state: Mapping[str, Tensor], network: Mapping[str, Tensor], title: str, network_title: str) -> None:
    """Compare names and shapes of weights with those of a network; counters of batches are not missed."""
    expected = {k: tuple(v.shape) for k, v in network.items() if not k.endswith(_COUNTER)}
    received = {name: tuple(value.shape) for name, value in state.items()}
    differences = {
        "missing": sorted(set(expected) - set(received)),
        "unexpected": sorted(set(received) - set(expected)),
        "of another shape": [
            f"{name} (received {received[name]}, expected {expected[name]})"
            for name in sorted(set(expected) & set(received))
            if received[name] != expected[name]
        ],
    }
    if parts := [f"{len(names)} {kind}: {_some(names)}" for kind, names in differences.items() if names]:
        raise UsageError(f"{title} does not fit {network_title}: {'; '.join(parts)}")


def load_weights_(network: nn.Module, path: Path, network_title: str) -> tuple[str, tuple[str, ...]]:
    """Load the weights of a file into a network of one's own, in place; all of them have to fit.

    Args:
        network: whose names and shapes are expected.
        path: a ``.safetensors``, ``.pt`` or ``.pth`` file, as :func:`load_checkpoint` takes it.
        network_title: what the network is called in messages.

    Returns:
        The file's SHA-256, and what was chosen or converted while reading, one sentence each.

    Raises:
        UsageError: the file cannot be used, or does not fit the network.
    """
    title = f"checkpoint {str(path)!r}"
    data = _read(path, title)
    notes: list[str] = []
    is_plain = path.suffix.lower() == ".safetensors"
    content = _parse_safetensors(data, title)[0] if is_plain else _parse_pickle(data, title)
    tensors = _unwrap(content, title, notes)
    own = network.state_dict()
    # Tables of indices and the like, of which a DMFormer has none.
    numbers = {
        plain: value
        for name, value in tensors.items()
        if isinstance(value, Tensor) and (plain := _PREFIXES.sub("", str(name))) in own
        if not (plain.endswith(_COUNTER) or own[plain].is_floating_point() or value.is_floating_point())
    }
    rest = {name: value for name, value in tensors.items() if _PREFIXES.sub("", str(name)) not in numbers}
    state = {**_normalise(rest, title, notes), **numbers}
    _check_names(state, own, title, network_title)
    network.load_state_dict(state, strict=False)  # counters of batches may be missing
    return hashlib.sha256(data).hexdigest(), tuple(notes)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(map(_shown, names[:_MOST_LISTED])) + more


def _shown(name: Any) -> str:
    """Write a text from the file on one line, whatever it holds."""
    return ascii(str(name))[1:-1]
