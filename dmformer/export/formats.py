"""Converters: what each format's files are made from, and the two formats that need no engine to make."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmformer.models.checkpoint import Checkpoint, save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.runtimes.registry import Entry


@dataclass(frozen=True)
class ConversionSource:
    """What a converter may start from: the checkpoint, and the verified ONNX file at the wanted precision."""

    checkpoint: Checkpoint
    onnx: Path
    precision: str


@dataclass(frozen=True)
class Converted:
    """Files that a converter wrote, the one to load first, and the packages that made them."""

    files: tuple[Path, ...]
    built_with: dict[str, str]


def converter(row: Entry) -> Callable[[ConversionSource, Path], Converted]:
    """The function that makes a format: source and an existing, empty folder in, files out."""
    module, _, name = row.converter.partition(":")
    found: Callable[[ConversionSource, Path], Converted] = getattr(importlib.import_module(module), name)
    return found


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of distributions."""
    return {package: importlib.metadata.version(package) for package in packages}


def to_onnx(source: ConversionSource, folder: Path) -> Converted:
    """The verified ONNX file itself."""
    path = folder / "model.onnx"
    shutil.copyfile(source.onnx, path)
    return Converted((path,), versions("torch", "onnx", "onnxsim"))


def to_torch(source: ConversionSource, folder: Path) -> Converted:
    """The checkpoint as ``.safetensors``, for the reference runtime."""
    path = folder / "model.safetensors"
    save_checkpoint(path, source.checkpoint)
    return Converted((path,), versions("torch", "safetensors"))
