"""Key maps: files that lead from the names in somebody's own checkpoint to those of the same DMFormer here.

They are written where a network of one's own was recognised, and let its checkpoints be used without its code.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from dmformer.errors import UsageError, first_line
from dmformer.files import indented_json
from dmformer.models.config import DMFormerConfig
from dmformer.models.dmformer import build_network
from dmformer.models.specification import KeyMap
from dmformer.models.state_dict import COUNTER, listed, misfit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor


def read_key_map(path: Path) -> KeyMap:
    """Read a key map and check that it leads to every tensor of its network, and to each once.

    Raises:
        UsageError: the file cannot be read, is no key map, or leads to names that are missing, unknown or repeated.
    """
    title = f"`key_map` {str(path)!r}"
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
        key_map = msgspec.convert(values, KeyMap)
    except OSError as error:
        raise UsageError(
            f"{title} cannot be read: {error.strerror}; expected a file that `save_key_map` wrote"
        ) from error
    except (ValueError, RecursionError) as error:  # of UTF-8, JSON, msgspec and repeats
        raise UsageError(f"{title} is no key map ({first_line(error)}); expected what `save_key_map` wrote") from error
    try:
        check_key_map(key_map)
    except UsageError as error:
        raise UsageError(f"{title}: {error}") from error
    return key_map


def write_key_map(path: Path, key_map: KeyMap) -> None:
    """Write a key map as JSON; :func:`read_key_map` reads it back.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.write_bytes(indented_json(key_map))
    except OSError as error:
        raise UsageError(
            f"`save_key_map` {str(path)!r}: {error.strerror}; expected a file in an existing folder"
        ) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse("repeated", _repeated(name for name, _ in pairs))
    return dict(pairs)


def check_key_map(key_map: KeyMap) -> None:
    """Check the names that a map leads to against those of its network.

    Raises:
        UsageError: the configuration is none, or names are missing, unknown, repeated or no bias that could be zero.
    """
    expected = network_shapes(DMFormerConfig.from_dict(key_map.config))
    given = [*key_map.keys.values(), *key_map.zeros]
    _refuse("repeated", _repeated(given))
    _refuse("repeated", _repeated([*key_map.keys, *key_map.unused]))
    _refuse("missing", sorted(set(expected) - set(given)))
    _refuse("unknown", sorted(set(given) - set(expected)))
    _refuse("zero, and no bias", [name for name in key_map.zeros if not name.endswith(".bias")])


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _refuse(what: str, names: list[str]) -> None:
    if names:
        raise UsageError(f"{len(names)} names are {what}: {listed(names)}; expected each tensor of the network once")


@functools.lru_cache(maxsize=8)
def network_shapes(config: DMFormerConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a network's tensors by name, without counters of batches; nothing is allocated for it.

    Raises:
        UsageError: a tensor would be larger than any that there can be.
    """
    try:
        with torch.device("meta"):
            state = build_network(config).state_dict()
    except (RuntimeError, TypeError) as error:
        raise UsageError("its configuration asks for a network beyond all memory") from error
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith(COUNTER)}


def translate(state: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Return the weights of somebody's own network under the names and in the shapes of ours.

    Raises:
        UsageError: tensors are missing, unexpected or of another shape.
    """
    expected = network_shapes(DMFormerConfig.from_dict(key_map.config))
    received = {name: _without_ones(value.shape) for name, value in state.items() if name not in key_map.unused}
    own = {name: _without_ones(expected[ours]) for name, ours in key_map.keys.items()}
    if differences := misfit(received, own):
        raise UsageError(f"the weights do not fit the key map, dimensions of one aside: {differences}")
    translated = {ours: state[name].reshape(expected[ours]) for name, ours in key_map.keys.items()}
    like = next(iter(translated.values()))
    return translated | {name: like.new_zeros(expected[name]) for name in key_map.zeros}


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)
