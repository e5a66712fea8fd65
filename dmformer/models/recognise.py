"""Recognise a network of one's own that is a DMFormer: the same function, whatever its modules are called.

1. The network is run once, and what it does with its weights is noted, operator by operator (``models/operators.py``).
2. A DMFormer's operators stand in one order, whoever wrote it, for each needs what the one before it gives. A regular
   expression over their kinds finds the stages and blocks, and their shapes give the configuration.
3. What shapes do not tell (what the gate pools, the residual inside the attention, which of two norms a norm is) is
   searched: each configuration is built, and accepted only where it answers as the network does, in float64 to 1e-10 of
   the largest answer.

Trained weights may hide a difference: with layer scales of 1e-6 no block can be heard. So both networks are compared
with other weights first, drawn at random for both alike, so that every tensor is heard, on images of noise of two
strengths; then with the network's own.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from dmformer.errors import UsageError, first_line
from dmformer.models.config import DMFormerConfig
from dmformer.models.dmformer import outputs_by_name
from dmformer.models.infer import variant_name
from dmformer.models.key_map import check_key_map, network_shapes, translate
from dmformer.models.operators import WeightUse, weight_uses
from dmformer.models.specification import KeyMap
from dmformer.models.state_dict import COUNTER, listed
from dmformer.models.structure import Structure, UnlikeError
from dmformer.process import printing_to_stderr

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dmformer.models.checkpoint import Checkpoint

T = TypeVar("T")

RECOGNISED, NOT_RECOGNISED = "recognised as DMFormer", "not recognised as a DMFormer"

_SAME = 1e-10  # of the largest answer, in float64
_HEARD = 1e-6  # of the largest answer: two images have to differ by more
_SIZE = 64  # pixels a side: the last stage's maps have 2 by 2 positions
_SEED = 20230604
_STRENGTHS = (1.0, 20.0)  # of the images of noise
# Of random weights by what they are for; others, biases and means, have both signs.
_RANGES = {"weight": (0.6, 1.4), "running_var": (0.7, 1.5), "gamma": (0.2, 0.5)}


def recognise(checkpoint: Checkpoint) -> Checkpoint:
    """Return a network of one's own as the DMFormer that it is, or as it is where it is none; a note says which.

    Args:
        checkpoint: of a network of one's own; its code is run.
    """
    try:
        with printing_to_stderr():
            key_map = _key_map(checkpoint)
    except UnlikeError as reason:
        note = f"{NOT_RECOGNISED} ({reason}): it is exported as it is, without deploy form and format torch"
        return replace(checkpoint, notes=(*checkpoint.notes, note))
    config = DMFormerConfig.from_dict(key_map.config)
    return replace(
        checkpoint,
        arch=variant_name(config) or "custom",
        config=config,
        state=translate(checkpoint.state, key_map),
        notes=(*checkpoint.notes, f"{RECOGNISED}: {_described(config)}"),
        key_map=key_map,
    )


def _described(config: DMFormerConfig) -> str:
    """Name the widths and depths of a configuration, and what differs from the defaults."""
    usual = DMFormerConfig().to_dict()
    shown = {
        name: value
        for name, value in config.to_dict().items()
        if name in ("widths", "depths", "num_classes") or value != usual[name]
    }
    return ", ".join(f"{name}={msgspec.json.encode(value).decode()}" for name, value in shown.items())


def _key_map(checkpoint: Checkpoint) -> KeyMap:
    """Find the configuration, and the names of its tensors.

    Raises:
        UnlikeError: there is none.
    """
    specification, size = checkpoint.config, checkpoint.preprocessing.image_size
    network = specification.build(checkpoint.state).double()
    small = _noise(specification.in_channels, _SIZE)
    try:
        uses, foreign = _running(lambda: weight_uses(network, small))
    except UnlikeError:  # it may be made for its own size alone
        small = _noise(specification.in_channels, size)
        uses, foreign = _running(lambda: weight_uses(network, small))
    if foreign:
        raise UnlikeError(f"it has operators that a DMFormer does not have: {listed(sorted(foreign))}")
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(COUNTER)}
    structure = Structure(uses, {name: tuple(tensor.shape) for name, tensor in state.items()}, specification.task)
    own = {name: tensor.clone() for name, tensor in state.items()}
    questions = [(_drawn(uses, own, seed), strength * small) for seed, strength in enumerate(_STRENGTHS)]
    answers = [_answers(network, *question) for question in questions]
    if not all(map(_heard, itertools.chain(*(one.values() for one in answers)))):
        raise UnlikeError("its answers hardly depend on the image, with random weights")
    questions.append((own, _noise(specification.in_channels, size)))
    answers.append(_answers(network, *questions[-1]))
    for config, keys in structure.candidates():
        key_map = _checked(config, keys, own)
        if all(_same(_ours(key_map, *one), expected) for one, expected in zip(questions, answers, strict=True)):
            return key_map
    raise UnlikeError("its layers stand as in a DMFormer, but no configuration gives the same answers")


def _noise(channels: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn((2, channels, size, size), dtype=torch.float64, generator=generator)


def _running(ask: Callable[[], T]) -> T:
    """Ask somebody's code, and take whatever it raises for an answer."""
    try:
        return ask()
    except Exception as error:
        raise UnlikeError(f"asked in float64 it raised {type(error).__name__}: {first_line(error)}") from error


def _answers(network: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    network.load_state_dict(weights, strict=False)  # counters of batches are not among them

    def ask() -> dict[str, Tensor]:
        with torch.no_grad():
            return outputs_by_name(network(images))

    return _running(ask)


def _ours(key_map: KeyMap, weights: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    translated = translate(weights, key_map)
    return _answers(DMFormerConfig.from_dict(key_map.config).build(translated), translated, images)


def _heard(answer: Tensor) -> bool:
    return bool(torch.isfinite(answer).all() and (answer[0] - answer[1]).abs().max() > _HEARD * answer.abs().max())


def _same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape
        and bool((ours[name] - theirs[name]).abs().max() <= _SAME * theirs[name].abs().max())
        for name in theirs
    )


def _drawn(uses: Sequence[WeightUse], state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw weights of which every one can be heard in the answers, for the tensors that are used."""
    generator = torch.Generator().manual_seed(seed)

    drawn = dict(state)
    for use in uses:
        for role, name in use.names.items():
            shape = state[name].shape
            if role == "weight" and use.kind not in "Nn":
                # What a layer gives is about as large as what it takes, so that no gate of a deep network is shut.
                spread = (len(state[name]) / state[name].numel()) ** 0.5
                drawn[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
            else:
                low, high = _RANGES.get(role, (-0.5, 0.5))
                drawn[name] = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    return drawn


def _checked(config: DMFormerConfig, keys: dict[str, str], state: Mapping[str, Tensor]) -> KeyMap:
    """Return the map of a configuration's names, once every tensor has a place and its shape.

    Raises:
        UnlikeError: one has not.
    """
    try:
        zeros = [name for name in network_shapes(config) if name not in keys.values() and name.endswith(".bias")]
        key_map = KeyMap(
            config=config.to_dict(),
            keys=keys,
            zeros=tuple(zeros),
            unused=tuple(name for name in state if name not in keys),
        )
        check_key_map(key_map)
        translate(state, key_map)
    except UsageError as error:
        raise UnlikeError(str(error)) from error
    return key_map
