"""What a run needs to go on after it was killed, and how it is kept.

Random draws are functions of the seed, the step and the image, and the learning rate is one of the step, so that no
generator, sampler or scheduler has a state: the step says it all. What is left is the weights, their average, the
optimizer and the scale of the loss.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import TYPE_CHECKING, Any

import torch

from dmformer.errors import StageFailed, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VERSION = 1


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: after a crash there is the old one or the new one, whole.

    Raises:
        StageFailed: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StageFailed(f"{path} could not be written: {error.strerror}") from error


def save_snapshot(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a snapshot.

    Args:
        path: the file, which is replaced.
        identity: what makes the run the run that it is, of JSON types; compared when it is resumed.
        state: tensors, numbers and containers of them.

    Raises:
        StageFailed: it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "identity": dict(identity), "state": dict(state)}, buffer)
    write_atomically(path, buffer.getvalue())


def load_snapshot(path: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The state of the run that ``identity`` describes; read without running code from the file.

    Raises:
        UsageError: there is none, it is damaged, or it is of a run that is another in some way: all are named.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        version, before, state = content["version"], content["identity"], content["state"]
    except FileNotFoundError as error:
        raise UsageError(f"nothing to resume: no {path}; expected the folder of a run that was interrupted") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"snapshot {path} cannot be read ({first_line(error)}); start anew in another folder"
        ) from error
    if version != VERSION:
        raise UsageError(f"snapshot {path} is of version {version}; expected {VERSION}: resume with the older dmformer")
    changed = [
        f"{name} is {identity.get(name)!r}, was {before.get(name)!r}"
        for name in sorted({*identity, *before})
        if identity.get(name) != before.get(name)
    ]
    if changed:
        raise UsageError(f"--resume: {'; '.join(changed)}; expected the options that the run was started with")
    found: dict[str, Any] = state
    return found
