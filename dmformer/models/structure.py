"""The structure of a DMFormer, read from what a network does with its weights."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from dmformer.errors import UsageError
from dmformer.models.config import DMFormerConfig
from dmformer.models.dmformer import FEATURES_ONLY
from dmformer.models.operators import WeightUse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from dmformer.task import Task

T = TypeVar("T")
Shape = tuple[int, ...]

# Kinds of operators in their order, for each needs what the one before it gives; gates stand beside them.
_STEM = "(CN?[rg]?)(CN?[rg]?)(CN?[rg]?)"
_BLOCK = "(N)(P)(D+)(N)(P)(P)(M?)(N)(P)(D?)(P)(M?)"
_BLOCKS = f"((?:{re.sub('[()]', '', _BLOCK)})+)"
_NETWORK = re.compile(f"{_STEM}{_BLOCKS}" + f"(N?N?)(C)(N?){_BLOCKS}" * 3 + "(N?N?)(n?)")
_STEM_KERNELS = [(7, 2), (3, 1), (2, 2)]  # side and stride, which the paper states


class UnlikeError(Exception):
    """A network is no DMFormer; the text says why."""


@dataclass(frozen=True)
class _Block:
    """The operators of a block: lists of one, of none where it has no such layer, and of all branches."""

    norm1: list[WeightUse]
    expand: list[WeightUse]
    branches: list[WeightUse]
    norm: list[WeightUse]
    reduce: list[WeightUse]
    project: list[WeightUse]
    scale1: list[WeightUse]
    norm2: list[WeightUse]
    fc1: list[WeightUse]
    depthwise: list[WeightUse]
    fc2: list[WeightUse]
    scale2: list[WeightUse]
    gate: list[WeightUse]

    @property
    def width(self) -> int:
        return self.expand[0].shape[1]

    @property
    def concat(self) -> bool:
        return self.reduce[0].shape[1] > self.expand[0].shape[0]

    @property
    def ordered_branches(self) -> list[WeightUse]:
        """Where branches are added, their order means nothing; the smallest comes first."""
        return self.branches if self.concat else sorted(self.branches, key=lambda use: (use.shape[2], use.dilation))

    def modules(self) -> Iterator[tuple[str, list[WeightUse]]]:
        """Yield the layers by their names in a block of ours."""
        for name in ("norm1", "scale1", "norm2", "scale2"):
            yield name, getattr(self, name)
        for name in ("expand", "norm", "reduce", "project"):
            yield f"dma.{name}", getattr(self, name)
        for name in ("fc1", "depthwise", "fc2"):
            yield f"ffn.{name}", getattr(self, name)
        for index, branch in enumerate(self.ordered_branches):
            yield f"dma.branches.{index}", [branch]
        for index, layer in enumerate(self.gate, 1):
            yield f"dma.gate.fc{index}", [layer]


class Structure:
    """The stages, the blocks and what is between them.

    Args:
        uses: what the network does with its weights.
        shapes: of its tensors, by name.
        task: what its outputs are for.

    Raises:
        UnlikeError: no DMFormer has its layers in this order, or of these shapes.
    """

    def __init__(self, uses: Sequence[WeightUse], shapes: Mapping[str, Shape], task: Task) -> None:
        if task == "segmentation":
            raise UnlikeError("decoders of networks that label pixels are not searched")
        self.shapes, self.task = shapes, task
        begun = next((place for place, use in enumerate(uses) if use.kind in "PG"), 0)
        path = [use for place, use in enumerate(uses) if use.kind not in ("G" if place < begun else "Grg")]
        found = _NETWORK.fullmatch("".join(use.kind for use in path))
        if found is None:
            raise UnlikeError("its layers do not stand in the order of a DMFormer's")
        pooled = [use for use in uses if use.kind == "G"]
        self.head = [pooled.pop()] if task == "classification" and uses[-1].kind == "G" else []
        parts = [path[slice(*found.span(group))] for group in range(1, len(found.groups()) + 1)]
        self.stem, (stage0, *between), (self.end, self.pooled_norm) = parts[:3], parts[3:-2], parts[-2:]
        self.before, self.convolutions, self.after = between[0::4], between[1::4], between[2::4]
        self.blocks = [_blocks(stage, pooled) for stage in (stage0, *between[3::4])]
        if pooled or len(self.head) != (task == "classification"):
            raise UnlikeError("it has other layers of pooled features than a gate in each block and a classifier")
        if [(conv[0].shape[2], conv[0].stride) for conv in self.stem] != _STEM_KERNELS:
            raise UnlikeError("its stem is not of 7x7, 3x3 and 2x2 kernels with strides of 2, 1 and 2")

    def candidates(self) -> Iterator[tuple[DMFormerConfig, dict[str, str]]]:
        """Yield every configuration with such layers, with our names of the network's tensors by its own.

        Raises:
            UnlikeError: there is none, or it would have a tensor in two places.
        """
        norms = [placed for staged in (False, True) if (placed := self._norms(staged)) is not None]
        if not norms:
            raise UnlikeError("its norms between the stages, and before the classifier, are not in the same places")
        read = self._fields()
        for (chosen, places), gate_input, residual in itertools.product(norms, ("x", "x_prime"), (True, False)):
            searched = {**read, **chosen, "gate_input": gate_input, "inner_residual": residual}
            try:
                config = DMFormerConfig.from_dict(searched)
            except UsageError as error:
                raise UnlikeError(str(error)) from error
            yield config, self._keys(places)

    def _norms(self, staged: bool) -> tuple[dict[str, Any], dict[str, list[WeightUse]]] | None:
        """Read the norms between and after the stages; one may be the stage's, or belong to what follows."""
        places: dict[str, list[WeightUse]] = {}
        first: set[bool] = set()
        last: set[bool] = set()
        for stage, (before, after) in enumerate(zip(self.before, self.after, strict=True)):
            of_stage, of_downsample = before[:staged], before[staged:]
            places |= {f"stages.{stage}.norm": of_stage, f"stages.{stage + 1}.downsample.norm": of_downsample or after}
            first.add(bool(of_downsample))
            last.add(bool(after))
            if len(of_stage) != staged or len(of_downsample + after) > 1:
                return None
        of_stage, of_head = self.end[:staged], self.end[staged:] + self.pooled_norm
        places |= {"stages.3.norm": of_stage, "norm": of_head}
        of_stages = [places[f"stages.{stage}.norm"] for stage in range(4)]
        of_downsamples = [places[f"stages.{stage}.downsample.norm"] for stage in (1, 2, 3)]
        if not (len(first) == len(last) == _kinds(of_stages) == _kinds(of_downsamples) == 1):
            return None
        if len(of_stage) != staged or len(of_head) > len(self.head):
            return None
        chosen = {
            "stage_norm": _norm_of(of_stages),
            "downsample_norm": _norm_of(of_downsamples),
            "downsample_norm_last": last == {True},
            "head_norm": _norm_of([of_head]) if self.head else DMFormerConfig.head_norm,
            "head_norm_pooled": bool(self.pooled_norm),
        }
        return chosen, places

    def _fields(self) -> dict[str, Any]:
        """Read the fields that shapes and attributes tell."""
        blocks = [block for stage in self.blocks for block in stage]
        widths = [_one("widths", (block.width for block in stage)) for stage in self.blocks]
        stem_width = self.stem[0][0].shape[0]
        scales = [scale for block in blocks for scale in (block.scale1, block.scale2)]
        dims = _one("layer scales", (len(self.shapes[scale[0].names["gamma"]]) if scale else None for scale in scales))
        found: dict[str, Any] = {
            "widths": widths,
            "depths": [len(stage) for stage in self.blocks],
            "in_channels": self.stem[0][0].shape[1],
            "stem_width": None if stem_width == widths[0] else stem_width,
            "stem_norms": [_norm_of([[use for use in part if use.kind == "N"]]) for part in self.stem],
            "stem_activations": [_activation(part[-1].kind) for part in self.stem],
            "stem_bias": any("bias" in part[0].names for part in self.stem),
            "downsample_kernel": _one("down-sampling kernels", (conv[0].shape[2] for conv in self.convolutions)),
            "block_norm": _norm_of([norm for block in blocks for norm in (block.norm1, block.norm2)]),
            "expansion": _one("expansions", (_ratio(block.expand[0].shape[0], block.width) for block in blocks)),
            "kernel_sizes": _one("kernels", ([use.shape[2] for use in block.ordered_branches] for block in blocks)),
            "dilations": _one("dilations", ([use.dilation for use in block.ordered_branches] for block in blocks)),
            "branch_bias": any("bias" in branch.names for block in blocks for branch in block.branches),
            "attention_norm": _norm_of([block.norm for block in blocks]),
            "branch_merge": _one("merges", ("concat" if block.concat else "sum" for block in blocks)),
            "gate_reduction": _one("gates", (_ratio(block.width, block.gate[0].shape[0]) for block in blocks)),
            "gate_linear": _one("gates", (len(block.gate[0].shape) == 2 for block in blocks)),
            "layer_scale": None if dims is None else DMFormerConfig.layer_scale,
            "layer_scale_dims": 1 if dims == 1 else DMFormerConfig.layer_scale_dims,
            "ffn_ratios": [
                _one("hidden widths", (block.fc1[0].shape[0] / block.width for block in stage)) for stage in self.blocks
            ],
            "ffn_kernel": _one(
                "kernels", (block.depthwise[0].shape[2] if block.depthwise else None for block in blocks)
            ),
            **(FEATURES_ONLY if self.task == "features" else {"num_classes": self.head[0].shape[0]}),
        }
        for norm, name in (("batch", "batch_norm_eps"), ("layer", "layer_norm_eps")):
            if values := {use.eps for use in self._all() if use.norm == norm}:
                found[name] = _one(f"values of eps ({norm} norm)", values)
        return found

    def _all(self) -> Iterator[WeightUse]:
        for part in (*self.stem, *self.before, *self.convolutions, *self.after, self.end, self.pooled_norm, self.head):
            yield from part
        for block in itertools.chain(*self.blocks):
            for _, uses in block.modules():
                yield from uses

    def _keys(self, norms: Mapping[str, list[WeightUse]]) -> dict[str, str]:
        places = {**norms, "head": self.head}
        for index, (conv, *more) in enumerate(self.stem, 1):
            places[f"stages.0.downsample.conv{index}"] = [conv]
            places[f"stages.0.downsample.norm{index}"] = [use for use in more if use.kind == "N"]
        places |= {f"stages.{stage}.downsample.conv": conv for stage, conv in enumerate(self.convolutions, 1)}
        for stage, blocks in enumerate(self.blocks):
            for index, block in enumerate(blocks):
                places |= {f"stages.{stage}.blocks.{index}.{name}": uses for name, uses in block.modules()}
        keys: dict[str, str] = {}
        for place, uses in places.items():
            for use in uses:
                for role, name in use.names.items():
                    if name in keys:
                        raise UnlikeError(f"it uses {name} twice")
                    keys[name] = f"{place}.{role}"
        return keys


def _blocks(path: Sequence[WeightUse], gates: list[WeightUse]) -> list[_Block]:
    """Divide the operators of a stage into blocks, and take the two layers of each block's gate off a list."""
    blocks = []
    for found in re.finditer(_BLOCK, "".join(use.kind for use in path)):
        parts = [list(path[slice(*found.span(group))]) for group in range(1, len(found.groups()) + 1)]
        if len(gates) < 2:
            raise UnlikeError("it has no gate of two layers in each block")
        parts.append([gates.pop(0), gates.pop(0)])
        blocks.append(_Block(**{field.name: part for field, part in zip(fields(_Block), parts, strict=True)}))
    return blocks


def _one(what: str, values: Iterable[T]) -> T:
    """Return the value that all of several are, which the message calls ``what``.

    Raises:
        UnlikeError: they differ.
    """
    first, *others = values
    if any(other != first for other in others):
        raise UnlikeError(f"its {what} differ from block to block or from stage to stage")
    return first


def _ratio(larger: int, smaller: int) -> int:
    if larger % smaller:
        raise UnlikeError(f"{larger} channels are no multiple of {smaller}")
    return larger // smaller


def _kinds(parts: Iterable[Sequence[WeightUse]]) -> int:
    """Count the kinds of norms, none being one of them, among several places."""
    return len({uses[0].norm if uses else None for uses in parts})


def _norm_of(parts: Iterable[Sequence[WeightUse]]) -> str | None:
    return _one("norms", (uses[0].norm if uses else None for uses in parts))


def _activation(kind: str) -> str | None:
    return {"r": "relu", "g": "gelu"}.get(kind)
