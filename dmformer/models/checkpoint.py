"""Checkpoints: weights on disk, and what can be told from them.

Two kinds of file are read. ``.safetensors`` carries the configuration in its metadata (key ``dmformer``, JSON).
``.pt`` and ``.pth`` are read with ``weights_only=True``, so that a pickle cannot run code; they carry weights only.
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
from torch import Tensor

from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError, first_line
from dmformer.models.dmformer import DMFormerBackbone, DMFormerConfig, build_network, variant_config
from dmformer.models.infer import UNTOLD, infer_config, variant_name
from dmformer.task import INPUT_NAME

METADATA_KEY = "dmformer"
METADATA_VERSION = 1

# What training scripts wrap the weights in; the averaged weights come first, as they are the ones to deploy.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")
_COUNTER = ".num_batches_tracked"
_LISTED = 6
# A tag, and text after it: the length that starts a .safetensors file can begin with the bytes " <" as well.
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z][\s -~]{8}")
# What PyTorch's weights-only reader says of a pickle that is whole but asks for more than tensors.
_WANTS_CODE = re.compile("GLOBAL|Trying to call|Can only create new object|Can only build")


@dataclass(frozen=True)
class Checkpoint:
    """Weights with everything needed to use them.

    Attributes:
        arch: name of the variant, or ``custom`` where the configuration is none of them.
        config: the network's configuration.
        state: float32 tensors by name, ready for ``load_state_dict``.
        preprocessing: how an image becomes the network's input.
        classes: a name for each output; empty where nobody gave names.
        sha256: of the file; ``None`` for weights that came from no file.
        notes: what was assumed, chosen or converted while reading, one sentence each.
        training: recipe, data and accuracy, as the file's metadata has them.
        described: whether configuration, preprocessing and classes are the file's own word.
        open_size: whether it is for images of any height and width (for segmentation, of multiples of 32), and not
            for those of the preprocessing alone.
    """

    arch: str
    config: DMFormerConfig
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
        """Side of the input in pixels; ``None`` where it is open."""
        return None if self.open_size else self.preprocessing.image_size

    @property
    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the input and of what the network gives, in this order; axes that stay open have names."""
        size, config = self.preprocessing.image_size, self.config
        sides: tuple[int | str, ...] = ("height", "width") if self.open_size else (size, size)
        found: dict[str, tuple[int | str, ...]] = {INPUT_NAME: ("batch", config.in_channels, *sides)}
        for name, (channels, *fixed) in zip(config.output_names, config.output_shapes(size, size), strict=True):
            follows = self.open_size and fixed
            found[name] = ("batch", channels, *((f"{name}_height", f"{name}_width") if follows else fixed))
        return found

    def model(self) -> DMFormerBackbone:
        """The network with these weights, in evaluation mode."""
        with torch.device("meta"):  # initial weights, which take a second to draw, would only be overwritten
            model = build_network(self.config)
        counters = {
            k: torch.zeros(v.shape, dtype=v.dtype) for k, v in model.state_dict().items() if k.endswith(_COUNTER)
        }
        weights = {name: tensor.clone() for name, tensor in self.state.items()}
        model.load_state_dict(counters | weights, assign=True)
        return model.eval()


class Metadata(msgspec.Struct, kw_only=True):
    """What a ``.safetensors`` file of this project says of itself."""

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
    raw, metadata_text, sha256 = _read(path)
    notes: list[str] = []
    state = _normalise(_unwrap(raw, path, notes), path, notes)
    metadata = _parse_metadata(metadata_text, path)
    try:
        config = _decide_config(state, metadata, arch, options or {}, fallback or {}, notes)
    except UsageError as error:
        raise UsageError(f"checkpoint {str(path)!r}: {error}") from error
    if config.task == "features":
        state = _without_head(state, notes)
    _check_fit(state, config, path)
    preprocessing = metadata.preprocessing if metadata else default_preprocessing(config)
    if metadata is None:
        notes.append(
            "preprocessing is not in the checkpoint: ImageNet's was assumed "
            f"({preprocessing.image_size} pixels, {preprocessing.interpolation})"
        )
    if len(preprocessing.channels) != config.in_channels:
        raise UsageError(
            f"checkpoint {str(path)!r}: its preprocessing gives channels {preprocessing.channels!r}; "
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
        sha256=sha256,
        notes=tuple(notes),
        training=metadata.training if metadata else {},
        described=metadata is not None,
        open_size=metadata.open_size if metadata else False,
    )


def default_preprocessing(config: DMFormerConfig) -> Preprocessing:
    """ImageNet's evaluation transform; 512 pixels uncropped for segmentation, as on ADE20K.

    One input channel is scaled to -1..1 instead.
    """
    size: dict[str, Any] = {"image_size": 512, "crop_fraction": 1.0} if config.task == "segmentation" else {}
    if config.in_channels == 1:
        return Preprocessing(channels="L", mean=(0.5,), std=(0.5,), **size)
    return Preprocessing(**size)


def _read(path: Path) -> tuple[Any, str | None, str]:
    """The file's content, the text of its metadata, and its SHA-256."""
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise UsageError(f"checkpoint {str(path)!r} ends in {path.suffix!r}; expected .safetensors, .pt or .pth")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"checkpoint {str(path)!r} cannot be read: {error.strerror}; expected a file") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if _PAGE.match(data):
        raise UsageError(f"checkpoint {str(path)!r} is an HTML or XML page, not weights: download it again")
    if suffix == ".safetensors":
        state, text = _read_safetensors(data, path)
        return state, text, sha256
    return _read_pickle(data, path), None, sha256


def _read_safetensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], str | None]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state = load(data)
        # The format: the header's length as a little-endian u64, then the header in JSON.
        header = msgspec.json.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, msgspec.DecodeError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"checkpoint {str(path)!r} is no whole .safetensors file ({first_line(error)}): copy or download it again"
        ) from error
    return state, (header.get("__metadata__") or {}).get(METADATA_KEY)


def _read_pickle(data: bytes, path: Path) -> Any:
    import pickle

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to programmers
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever the code that they reach raises
        if isinstance(error, pickle.UnpicklingError) and _WANTS_CODE.search(str(error)):
            raise UsageError(
                f"checkpoint {str(path)!r} holds more than weights and wants to run code while loading; "
                "it was not loaded: save only its state_dict"
            ) from error
        raise UsageError(
            f"checkpoint {str(path)!r} is truncated, damaged or no PyTorch checkpoint ({_reason(error)}): "
            "copy or download it again"
        ) from error


def _reason(error: Exception) -> str:
    """What PyTorch found wrong, without the advice around it."""
    text = first_line(error)
    _, found, reason = str(error).partition("WeightsUnpickler error: ")
    return ascii((reason.strip().splitlines() or [text])[0] if found else text)[1:-1][:120]


def _unwrap(raw: Any, path: Path, notes: list[str]) -> dict[str, Any]:
    """The mapping of tensors inside whatever a training script saved."""
    current, seen = raw, set()
    while isinstance(current, dict) and id(current) not in seen:
        seen.add(id(current))  # a pickle may hold itself
        found = [key for key in _WRAPPERS if isinstance(current.get(key), dict)]
        if not found:
            break
        if len(found) > 1:
            notes.append(f"the checkpoint holds {', '.join(found)}: {found[0]} was taken")
        current = current[found[0]]
    if not isinstance(current, dict) or not any(isinstance(value, Tensor) for value in current.values()):
        received = (
            f"keys {', '.join(map(_shown, list(current)[:_LISTED]))}" if isinstance(current, dict) else type(current)
        )
        raise UsageError(
            f"checkpoint {str(path)!r} holds no weights ({received}); "
            f"expected tensors by name, or them under {', '.join(_WRAPPERS)}"
        )
    return current


def _strip_prefixes(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return name


def _is_dense_float(value: Tensor) -> bool:
    """Whether the file holds every value of the tensor, in a type that float32 can take over."""
    return (
        value.is_floating_point()
        and value.dtype != torch.float4_e2m1fn_x2  # two values in one byte
        and value.layout == torch.strided
        and not (value.is_meta or value.is_nested)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # not repeated by its strides
    )


def _normalise(wrapped: dict[str, Any], path: Path, notes: list[str]) -> dict[str, Tensor]:
    """Plain names, float32, finite values."""
    state: dict[str, Tensor] = {}
    converted = set()
    for name, value in wrapped.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(
                f"checkpoint {str(path)!r}: entry {name!r} is of type {type(value).__name__}; expected tensors only"
            )
        plain = _strip_prefixes(name)
        if plain in state:
            raise UsageError(f"checkpoint {str(path)!r} holds {plain!r} twice, under different prefixes")
        if plain.endswith(_COUNTER):
            continue
        if not _is_dense_float(value):
            raise UsageError(
                f"checkpoint {str(path)!r}: {_shown(plain)} is {value.dtype}, {value.layout}; expected dense floats"
            )
        if value.dtype != torch.float32:
            converted.add(str(value.dtype).removeprefix("torch."))
        state[plain] = value.detach().to(torch.float32)
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise UsageError(
            f"checkpoint {str(path)!r}: NaN or infinite values in {_some(broken)}; expected finite weights: "
            "the training diverged or the file is damaged"
        )
    if converted:
        notes.append(f"weights of type {', '.join(sorted(converted))} were converted to float32")
    return state


def _parse_metadata(text: str | None, path: Path) -> Metadata | None:
    if text is None:
        return None
    try:
        metadata = msgspec.json.decode(text, type=Metadata)
    except (msgspec.DecodeError, UsageError, RecursionError) as error:
        reason = " ".join(str(error).split())  # it may quote a name that has line breaks
        raise UsageError(f"checkpoint {str(path)!r}: its metadata is damaged: {reason}") from error
    if metadata.version != METADATA_VERSION:
        raise UsageError(
            f"checkpoint {str(path)!r}: metadata version {metadata.version}; expected {METADATA_VERSION}: "
            "use the version of dmformer that wrote it"
        )
    return metadata


def _decide_config(
    state: dict[str, Tensor],
    metadata: Metadata | None,
    arch: str | None,
    options: Mapping[str, Any],
    fallback: Mapping[str, Any],
    notes: list[str],
) -> DMFormerConfig:
    told = metadata.config if metadata is not None else {}
    if arch is not None:  # the shapes are the variant's; the rest may still come from the file
        told = {name: value for name, value in told.items() if name in UNTOLD}
        shaped = {**variant_config(arch).to_dict(), **_class_count(state)}
    elif set(told) >= {field.name for field in fields(DMFormerConfig)}:
        shaped = {}
    else:
        shaped, _ = infer_config(state)
    if options.get("task") == "features":
        options = {**options, "decoder": None, "decoder_widths": []}
    given = {name: value for name, value in fallback.items() if name in UNTOLD} | told | dict(options)
    config = DMFormerConfig.from_dict({**shaped, **given})
    assumed = [name for name in UNTOLD if name not in given]
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


def _without_head(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The stages' tensors alone."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(("norm.", "head.", "decoder."))}
    if len(kept) < len(state):
        notes.append(f"task features: {len(state) - len(kept)} tensors of the head were left out")
    return kept


def _check_fit(state: dict[str, Tensor], config: DMFormerConfig, path: Path) -> None:
    """Compare names and shapes with the network's; meta tensors, so that nothing is allocated for it."""
    try:
        with torch.device("meta"):
            network = build_network(config)
    except (RuntimeError, TypeError) as error:  # a size that no tensor can have
        raise UsageError(f"checkpoint {str(path)!r}: its configuration asks for a network beyond all memory") from error
    expected = {k: tuple(v.shape) for k, v in network.state_dict().items() if not k.endswith(_COUNTER)}
    received = {name: tuple(value.shape) for name, value in state.items()}
    missing = sorted(set(expected) - set(received))
    unexpected = sorted(set(received) - set(expected))
    reshaped = [
        f"{name} (received {received[name]}, expected {expected[name]})"
        for name in sorted(set(expected) & set(received))
        if received[name] != expected[name]
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    if reshaped:
        parts.append(f"{len(reshaped)} of another shape: {_some(reshaped)}")
    if parts:
        raise UsageError(
            f"checkpoint {str(path)!r} does not fit {variant_name(config) or 'the network'}: {'; '.join(parts)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(_shown, names[:_LISTED])) + more


def _shown(name: Any) -> str:
    """A key of the file on one line, whatever it holds."""
    return ascii(str(name))[1:-1]
