"""Find the weights of a network in what a training script saved, and bring them to plain names and float32.

Scripts wrap a state dict in dictionaries (``state_dict``, ``model``, ``ema``), in each other, and their tools put
prefixes before its names (``module.``, ``_orig_mod.``, ``model.``). No list of wrappers is needed: every entry of the
file has a path, keys and names joined by dots, and the weights lie where a path ends in a name of the network's own.
What comes before that name tells sets of weights apart: ``model`` and ``ema.module``, say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmformer.errors import UsageError, first_line
from dmformer.models.pickled import NotDenseError, Pickled, StandIn, is_array, is_module, members_of, to_tensor

COUNTER = "num_batches_tracked"
# What tools count or keep in a state dict: AveragedModel, thop, BatchNorm, modules with a state of their own.
_COUNTERS = ("n_averaged", "total_ops", "total_params", COUNTER, "_extra_state")
# What wrappers put into a name, wherever in the network they sit: DistributedDataParallel and AveragedModel,
# torch.compile, FullyShardedDataParallel, activation checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WORDS = re.compile(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])")
_AVERAGED = {"ema", "swa", "avg", "average", "averaged", "shadow", "polyak"}
# Lightning's WeightAveraging puts the average under state_dict, and what training goes on with under
# current_model_state; other tools say online, raw or original.
_NOT_AVERAGED = {"current", "online", "raw", "original"}
_DEEPEST = 40  # levels
_MOST_MEMORY = 200_000_000  # bytes for the paths of the entries; a small file could repeat one part of it without end
_MOST_LISTED = 6  # names in a message
TOP_LEVEL = "."  # the key of weights that lie under none


@dataclass(frozen=True)
class _Entry:
    """A value in the file.

    Attributes:
        path: keys and names that lead to it, joined by dots.
        value: a tensor, a stand-in or whatever is no container.
        home: path of the dictionary, or of the network that was pickled whole, that it belongs to.
    """

    path: str
    value: Any
    home: str

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, Tensor) or is_array(self.value)


@dataclass
class _Set:
    """Weights of one network.

    Attributes:
        key: what comes before the names of the network's own.
        named: entries with such names, and the names.
        homes: the dictionaries that they come from.
    """

    key: str
    named: list[tuple[str, _Entry]] = field(default_factory=list)
    homes: set[str] = field(default_factory=set)

    @property
    def words(self) -> set[str]:
        return _words(self.key)

    @property
    def averaged(self) -> bool:
        return bool(self.words & _AVERAGED)


def find_state(
    pickled: Pickled,
    own: Callable[[str], bool],
    title: str,
    key: str | None,
    notes: list[str],
    integers: Callable[[str], bool] = lambda _: False,
) -> dict[str, Tensor]:
    """Return the weights by their plain names, in float32.

    Averaged weights are taken where raw ones are beside them, and ``notes`` says so. Nothing is guessed where two sets
    are as good as each other.

    Args:
        pickled: content of the file.
        own: whether the network has a tensor of this name; it may know some of the names only.
        title: begins every message.
        key: takes the set under this key, where the file holds several.
        notes: gets a sentence for each choice and each conversion.
        integers: whether the network has whole numbers under this name, which stay what they are.

    Raises:
        UsageError: there are no weights, or several sets of them and no reason to take one, or they are not dense,
            finite numbers.
    """
    entries = list(_walk(pickled.content, title))
    if not any(entry.is_tensor and re.search(r"\D", entry.path) for entry in entries):  # by names, not positions
        raise UsageError(_without_weights(pickled, title))
    sets, loose = _sort(entries, own)
    if sets:
        chosen = _choose(sets, loose, entries, title, key, notes)
        tensors = _tensors(chosen, title)
        _add_statistics(tensors, chosen, sets, title, notes)
        left = [
            entry.path
            for entry in loose
            if (entry.is_tensor or entry.home in chosen.homes)
            and not entry.path.endswith(COUNTER)
            and not _is_optimizer(entry.path)
        ]
        if left:
            notes.append(f"left out, as no weights of the network: {listed(left)}")
    else:  # whoever compares the names with the network's says what is missing
        tensors = {entry.path: entry.value for entry in entries if entry.is_tensor and not _is_counter(entry.path)}
    return _normalise(tensors, title, notes, integers)


def listed(names: list[str]) -> str:
    """Write names from the file on one line, the first few of them."""
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(map(shown, names[:_MOST_LISTED])) + more


def misfit(received: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Compare the shapes of weights by name with those of a network; nothing where they are the same.

    Counters of batches are neither missed nor expected.
    """
    received, expected = (
        {name: shape for name, shape in shapes.items() if not name.endswith(COUNTER)} for shapes in (received, expected)
    )
    differences = {
        "missing": sorted(set(expected) - set(received)),
        "unexpected": sorted(set(received) - set(expected)),
        "of another shape": [
            f"{name} (received {received[name]}, expected {expected[name]})"
            for name in sorted(set(expected) & set(received))
            if received[name] != expected[name]
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in differences.items() if names)


def shown(name: Any) -> str:
    """Write a text from the file on one line, whatever it holds."""
    return ascii(str(name))[1:-1]


def _walk(content: Any, title: str) -> Iterator[_Entry]:
    """Give every entry, in the order of the file; not what is nested too deeply, as in a container of itself."""
    stack: list[tuple[str, Any, str, bool, int]] = [("", content, "", False, 0)]
    memory = 0
    while stack:
        path, value, home, in_module, depth = stack.pop()
        members = members_of(value)
        if members is None:
            yield _Entry(path, value, home)
        elif depth < _DEEPEST:
            whole, prefix = is_module(value), f"{path}." if path else ""
            inside = home if whole and in_module else path
            names = [name for name in members if isinstance(name, str)]
            memory += sum(len(prefix) + len(name) + 200 for name in names)
            if memory > _MOST_MEMORY:
                raise UsageError(f"{title} holds more than a state dict could; expected one: save only the weights")
            stack += [(prefix + name, members[name], inside, whole, depth + 1) for name in reversed(names)]


def _sort(entries: list[_Entry], own: Callable[[str], bool]) -> tuple[list[_Set], list[_Entry]]:
    """Return the sets of weights in the file, and the entries that are in none."""
    sets: dict[str, _Set] = {}
    others, loose = [], []
    for entry in entries:
        parts = entry.path.split(".")
        for start in range(min(len(parts), _DEEPEST) if entry.is_tensor and not _is_counter(entry.path) else 0):
            name = _plain(parts[start:])
            if parts[start] in _WRAPPERS or not own(name):
                name = ".".join(parts[start:])
                if not own(name):
                    continue
            weights = sets.setdefault(_plain(parts[:start]), _Set(".".join(parts[:start]) or TOP_LEVEL))
            weights.named.append((name, entry))
            weights.homes.add(entry.home)
            break
        else:
            others.append(entry)
    for entry in others:  # what lies beside names of the network's own is compared with it as well
        parts = _plain(entry.path.split(".")).split(".")
        prefixes = (end for end in range(min(len(parts), _DEEPEST) - 1, -1, -1) if ".".join(parts[:end]) in sets)
        end = next(prefixes, None)
        neighbours, name = (None, "") if end is None else (sets[".".join(parts[:end])], ".".join(parts[end:]))
        beside = neighbours is not None and entry.home in neighbours.homes and not _is_counter(name)
        if neighbours and beside and (entry.is_tensor or "." in name) and not _words(name) & _AVERAGED:
            neighbours.named.append((name, entry))
        else:
            loose.append(entry)
    return [weights for weights in sets.values() if not _is_optimizer(weights.key)], loose


def _plain(parts: list[str]) -> str:
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORDS.split(text)}


def _is_optimizer(path: str) -> bool:
    return any(word.startswith("optim") for word in _words(path))


def _is_counter(path: str) -> bool:
    return path.rpartition(".")[2] in _COUNTERS


def _choose(
    sets: list[_Set], loose: list[_Entry], entries: list[_Entry], title: str, key: str | None, notes: list[str]
) -> _Set:
    """Take the averaged weights, or the only ones.

    Raises:
        UsageError: several are as good as each other, or averaged ones are there and cannot be told by name.
    """
    keys = ", ".join(shown(each.key) for each in sets)
    if key is not None:
        sets = [each for each in sets if each.key == key or each.key.startswith(f"{key}.")]
        if not sets:
            raise UsageError(f"{title}: `weights_key` is {key!r}; expected where the file holds weights: {keys}")
    averaged, plain = _ranked(sets, entries)
    best = averaged or plain
    taken = best[0]
    if any(not _same(taken, other, title) for other in best[1:]):
        raise UsageError(
            f"{title} holds different weights under {', '.join(shown(each.key) for each in best)}; expected one set: "
            "choose with `weights_key`, or save those to deploy alone"
        )
    if key is None and not averaged:
        _refuse_unnamed_average(taken, loose, title)
    if averaged and plain:
        notes.append(f"the checkpoint holds {', '.join(shown(s.key) for s in (taken, *plain))}: {taken.key} was taken")
    if averaged or any(entry.path.endswith("n_averaged") and entry.home in taken.homes for entry in loose):
        notes.append(f"averaged weights were taken (key {shown(taken.key)})")
    return taken


def _ranked(sets: list[_Set], entries: list[_Entry]) -> tuple[list[_Set], list[_Set]]:
    """Return the sets of averaged weights, and the others."""
    averaged = [each for each in sets if each.averaged]
    plain = [each for each in sets if not each.averaged]
    by_mmengine = any(entry.path.startswith(("meta.mmengine_version", "message_hub.")) for entry in entries)
    if by_mmengine and plain and averaged and all(each.key.startswith("ema_state_dict") for each in averaged):
        return plain, averaged  # its EMAHook swaps the two before it saves: the average is under state_dict
    raw = [each for each in plain if each.words & _NOT_AVERAGED]
    if raw and len(raw) < len(plain) and not averaged:
        return [each for each in plain if each not in raw], raw
    return averaged, plain


def _same(first: _Set, second: _Set, title: str) -> bool:
    a, b = (_normalise(_tensors(each, title), title, [], lambda _: True) for each in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _refuse_unnamed_average(taken: _Set, loose: list[_Entry], title: str) -> None:
    """Refuse to take raw weights beside averaged ones whose names are not the network's."""
    unnamed = [
        entry.path
        for entry in loose
        if _words(entry.path) & _AVERAGED and not _is_optimizer(entry.path) and _has_values(entry)
    ]
    if unnamed:
        raise UsageError(
            f"{title} holds averaged weights without the network's names ({listed(unnamed)}) beside those of "
            f"{shown(taken.key)}; expected averaged weights by name: copy them into the network and save its state "
            f"dict, or take those of {shown(taken.key)} with `weights_key`"
        )


def _has_values(entry: _Entry) -> bool:
    """Return whether an entry is a tensor of more than one value, which no counter is."""
    if not entry.is_tensor:
        return False
    try:
        return (entry.value if isinstance(entry.value, Tensor) else to_tensor(entry.value)).numel() > 1
    except Exception:  # noqa: BLE001 - whatever it is, it is no counter
        return True


def _tensors(weights: _Set, title: str) -> dict[str, Any]:
    """Return the tensors of a set by name.

    Raises:
        UsageError: one is no tensor, or there twice.
    """
    tensors: dict[str, Any] = {}
    for name, entry in weights.named:
        if not entry.is_tensor:
            kind = entry.value.path if isinstance(entry.value, StandIn) else type(entry.value).__name__
            raise UsageError(f"{title}: entry {shown(name)!r} is of type {shown(kind)}; expected tensors only")
        if name in tensors:
            raise UsageError(f"{title} holds {name!r} twice, under different prefixes")
        tensors[name] = entry.value
    return tensors


def _add_statistics(tensors: dict[str, Any], chosen: _Set, sets: list[_Set], title: str, notes: list[str]) -> None:
    """Give averages of the parameters alone the BatchNorm statistics, which were not averaged."""
    for other in sets if chosen.averaged else ():
        more = {name: value for name, value in _tensors(other, title).items() if name not in tensors}
        if more and not other.averaged and all(name.endswith((".running_mean", ".running_var")) for name in more):
            tensors |= more
            notes.append(f"the averaged weights have no BatchNorm statistics: those of {shown(other.key)} were taken")


def _without_weights(pickled: Pickled, title: str) -> str:
    """Say what a file without any tensor holds."""
    if pickled.names:
        return (
            f"{title} holds no tensors and wants to run code while loading ({listed(sorted(pickled.names))}); none was "
            "run: expected a state dict, torch.save(model.state_dict(), FILE)"
        )
    content = pickled.content
    received = f"keys {listed(list(content))}" if isinstance(content, Mapping) else str(type(content))
    if isinstance(content, StandIn):
        received = content.path
    return f"{title} holds no weights ({received}); expected tensors by name, alone or in dictionaries"


def _is_dense_float(value: Tensor) -> bool:
    """Return whether the file holds every value of the tensor, in a type that converts to float32."""
    return (
        value.is_floating_point()
        and value.dtype != torch.float4_e2m1fn_x2  # two values in one byte
        and value.layout == torch.strided
        and not (value.is_meta or value.is_nested)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # not repeated by its strides
    )


def _normalise(
    tensors: Mapping[str, Any], title: str, notes: list[str], integers: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Return the weights in float32; refuse what is no dense tensor or not finite."""
    state: dict[str, Tensor] = {}
    converted = set()
    for name, value in tensors.items():
        try:
            tensor = value if isinstance(value, Tensor) else to_tensor(value)
        except NotDenseError as error:
            raise UsageError(f"{title}: {shown(name)} is {shown(error)}; expected dense floats") from error
        except Exception as error:  # arguments that make no tensor raise whatever the code that they reach raises
            raise UsageError(
                f"{title} is damaged: {shown(name)} is no tensor ({shown(first_line(error))[:120]}): copy or download "
                "it again"
            ) from error
        if integers(name) and not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized):
            state[name] = tensor.detach()
            continue
        if not _is_dense_float(tensor):
            raise UsageError(f"{title}: {shown(name)} is {tensor.dtype}, {tensor.layout}; expected dense floats")
        if tensor.dtype != torch.float32:
            converted.add(str(tensor.dtype).removeprefix("torch."))
        state[name] = tensor.detach().to(torch.float32)
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise UsageError(
            f"{title}: NaN or infinite values in {listed(broken)}; expected finite weights: "
            "the training diverged or the file is damaged"
        )
    if converted:
        notes.append(f"weights of type {', '.join(sorted(converted))} were converted to float32")
    return state
