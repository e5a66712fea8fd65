"""Preprocessing and names of classes, as other libraries write them beside their weights.

Read are timm's ``config.json`` (``pretrained_cfg``), Hugging Face's ``preprocessor_config.json``, and the
``data_preprocessor`` of OpenMMLab's configurations (JSON, or Python, which is parsed and never run).
"""

from __future__ import annotations

import ast
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dmformer.data.preprocessing import Interpolation
from dmformer.errors import UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

_BESIDE = ("preprocessor_config.json", "config.json")
_LABELS = ("label_names", "labels", "id2label")  # timm, older timm, Hugging Face
# Pillow's numbers of its filters, which Hugging Face's files have.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class InputDescription:
    """What a file beside the weights says of a network's input and outputs.

    Attributes:
        source: the file.
        fields: of :class:`dmformer.data.preprocessing.Preprocessing`, as far as the file has them.
        classes: a name for each output; empty where the file has none.
        notes: a sentence for each thing that the file asks for and that is done in another way here.
    """

    source: Path
    fields: Mapping[str, Any]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plain_name(name: str) -> str:
    """Return a name as it is compared and kept: accents in one form (NFC), bytes that are no UTF-8 escaped."""
    return unicodedata.normalize("NFC", name).encode("utf-8", "backslashreplace").decode()


def read_description(path: Path) -> InputDescription:
    """Read a file that describes a network's preprocessing.

    Raises:
        UsageError: it cannot be read, or describes no preprocessing that can be followed; the message names it.
    """
    content = _python(path) if path.suffix.lower() == ".py" else _json(path)
    found = _described(path, content)
    if found is None:
        raise UsageError(
            f"{path}: no preprocessing in it; expected a timm config.json (pretrained_cfg), a preprocessor_config.json "
            "of Hugging Face, or a configuration with data_preprocessor"
        )
    filters = get_args(Interpolation)
    if found.fields.get("interpolation", filters[0]) not in filters:
        raise UsageError(f"{path}: interpolation {found.fields['interpolation']!r}; expected {' or '.join(filters)}")
    return found


def description_beside(weights: Path) -> InputDescription | None:
    """Read what lies in the folder of the weights under a name that only such files have; ``None`` without one.

    Raises:
        UsageError: the file has such a name, and cannot be read or followed.
    """
    for name in _BESIDE:
        path = weights.with_name(name)
        if not path.is_file():
            continue
        if name == "config.json":  # many programs write one
            try:
                content = _json(path)
            except UsageError:
                continue
            if not isinstance(content, dict) or not isinstance(content.get("pretrained_cfg"), dict):
                continue
        return read_description(path)
    return None


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read names of classes: one a line, or as JSON a list, or a dictionary from index to name.

    Raises:
        UsageError: the file cannot be read, or holds no names.
    """
    text = _text(path)
    names: Sequence[Any] = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        content = _json(path)
        if isinstance(content, dict):
            content = next((content[key] for key in _LABELS if key in content), content)
        names = _names(path, content)
    if not names:
        raise UsageError(f"{path}: no name of a class in it; expected one a line, or a JSON list or dictionary")
    return tuple(plain_name(name) for name in names)


def _names(path: Path, content: Any) -> list[str]:
    """Names from a list, or in the order of their indices from a dictionary."""
    if isinstance(content, dict):
        try:
            by_index = {int(index): name for index, name in content.items()}
        except ValueError as error:
            raise UsageError(f"{path}: {first_line(error)}; expected names of classes by index, 0 to …") from error
        if sorted(by_index) != list(range(len(content))):
            raise UsageError(f"{path}: indices of classes with gaps or twice; expected 0 to {len(content) - 1}")
        content = [by_index[index] for index in sorted(by_index)]
    if not isinstance(content, list) or not all(isinstance(name, str) and name.strip() for name in content):
        raise UsageError(f"{path}: no list of names; expected texts, or a dictionary from index to text")
    return [name.strip() for name in content]


def _described(path: Path, content: Any) -> InputDescription | None:
    if not isinstance(content, dict):
        return None
    model = content.get("model")
    for holder in (content, model if isinstance(model, dict) else {}):
        for key in ("data_preprocessor", "img_norm_cfg"):  # the second in versions before mmengine
            if isinstance(holder.get(key), dict):
                return _openmmlab(path, holder[key])
    if isinstance(content.get("pretrained_cfg"), dict):
        return _timm(path, content["pretrained_cfg"], content)
    if {"image_mean", "image_processor_type", "feature_extractor_type", "do_normalize"} & set(content):
        return _hugging_face(path, content)
    if {"mean", "std"} <= set(content):
        return _timm(path, content, content)
    return None


def _timm(path: Path, given: dict[str, Any], around: dict[str, Any]) -> InputDescription:
    fields: dict[str, Any] = {}
    notes = []
    for ours, theirs in (("mean", "mean"), ("std", "std"), ("interpolation", "interpolation")):
        if given.get(theirs) is not None:
            fields[ours] = given[theirs]
    if given.get("crop_pct") is not None:
        fields["crop_fraction"] = given["crop_pct"]
    size = given.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        fields["image_size"] = _square(path, size[1:])
        fields |= {"channels": "RGB"} if size[0] == 3 else {}
    if given.get("crop_mode", "center") != "center":
        notes.append(f"crop_mode {given['crop_mode']!r} (here: the shorter side resized, the centre cropped)")
    labels = next((holder[key] for holder in (given, around) for key in _LABELS if holder.get(key)), None)
    return InputDescription(path, fields, tuple(_names(path, labels)) if labels else (), _differently(path, notes))


def _hugging_face(path: Path, given: dict[str, Any]) -> InputDescription:
    fields: dict[str, Any] = {}
    notes = []
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    mean, std = given.get("image_mean"), given.get("image_std")
    if not given.get("do_normalize", True):
        mean, std = 0.0, 1.0
    if mean is not None and std is not None:
        shift = 1 if given.get("rescale_offset") else 0  # values are -1..1 before the mean is subtracted
        fields |= _scaled(path, [value + shift for value in _numbers(path, mean)], _numbers(path, std), factor)
    if len(fields.get("mean", ())) == 3:
        fields["channels"] = "RGB"
    if given.get("do_flip_channel_order"):
        fields["channels"] = "BGR"
    if given.get("resample") is not None:
        fields["interpolation"] = _FILTERS.get(given["resample"], given["resample"])
    size, crop = given.get("size"), given.get("crop_size")
    shorter = size.get("shortest_edge") if isinstance(size, dict) else size
    if given.get("crop_pct") is not None and isinstance(shorter, int) and shorter < 384:  # ConvNeXt's processor
        fields |= {"image_size": shorter, "crop_fraction": given["crop_pct"]}
    elif given.get("do_center_crop") and crop is not None and isinstance(shorter, int):
        side = _square(path, crop)
        fields |= {"image_size": side, "crop_fraction": min(1.0, side / shorter)}
    elif size is not None:
        fields |= {"image_size": shorter if isinstance(shorter, int) else _square(path, size), "crop_fraction": 1.0}
        notes.append("images resized without keeping their proportions (here: the shorter side, the centre cropped)")
    return InputDescription(path, fields, notes=_differently(path, notes))


def _openmmlab(path: Path, given: dict[str, Any]) -> InputDescription:
    fields: dict[str, Any] = {}
    if "mean" in given or "std" in given:
        fields |= _scaled(path, _numbers(path, given.get("mean")), _numbers(path, given.get("std")), 1.0)
    if len(fields.get("mean", (0, 0, 0))) == 3:
        # Its readers give BGR, which the network sees unless the channels are exchanged.
        rgb = given.get("bgr_to_rgb") or given.get("to_rgb")
        fields["channels"] = "RGB" if rgb else "BGR"
    more = "resizing and cropping are in its pipeline, which is not read: give image size, crop and interpolation"
    return InputDescription(path, fields, notes=(f"{path.name}: {more}",))


def _scaled(path: Path, mean: list[float], std: list[float], factor: float) -> dict[str, Any]:
    """Mean and deviation on the scale 0..1, from those of pixels (0..255) that were multiplied by a factor."""
    if type(factor) not in (int, float) or not factor > 0:
        raise UsageError(f"{path}: pixels are multiplied by {factor!r}; expected a positive number")
    return {"mean": [value / (255 * factor) for value in mean], "std": [value / (255 * factor) for value in std]}


def _numbers(path: Path, given: Any) -> list[float]:
    values = given if isinstance(given, list) else [given]
    if not values or not all(type(value) in (int, float) for value in values):
        raise UsageError(f"{path}: mean or deviation {given!r}; expected a number for each channel")
    return [float(value) for value in values]


def _square(path: Path, size: Any) -> int:
    sides = list(size.values()) if isinstance(size, dict) else size if isinstance(size, list) else [size]
    if len(set(map(str, sides))) != 1 or type(sides[0]) is not int:
        raise UsageError(f"{path}: input of {size!r}; expected a square")
    return int(sides[0])


def _differently(path: Path, notes: list[str]) -> tuple[str, ...]:
    return tuple(f"{path.name} asks for {note}" for note in notes)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte-order mark is no letter
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UsageError(f"{path} cannot be read: {reason}; expected a text file in UTF-8") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: {first_line(error)}; expected JSON") from error


def _python(path: Path) -> dict[str, Any]:
    """The literal values that a configuration in Python assigns; nothing of it is run."""
    try:
        tree = ast.parse(_text(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: {first_line(error)}; expected a configuration in Python") from error
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = _literal(node.value)
    return found


def _literal(node: ast.expr) -> Any:
    """The value of an expression of literals and ``dict(...)``; ``None`` for any other part."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _literal(word.value) for word in node.keywords if word.arg is not None}
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _literal(key) for key in node.keys]
        return {key: _literal(value) for key, value in zip(keys, node.values, strict=True) if isinstance(key, str)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(value) for value in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # [127.5] * 3
        values, count = _literal(node.left), _literal(node.right)
        return values * count if isinstance(values, list) and type(count) is int and 0 < count < 8 else None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
