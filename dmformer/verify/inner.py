"""Inside an artifact: each layer of the network, and each tensor of a file at a reduced precision.

Outputs alone hide a fault in a layer that matters little for the images at hand; the layer itself does not. Tensors
keep the name that the exporter gave them (``/stages.2/blocks/blocks.4/ffn/act/Gelu_output_0``) through simplification
and conversion, and that leads to the module (``stages.2.blocks.4.ffn.act``).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dmformer.bundle.golden import FIRST_AND_LAST, Golden
from dmformer.errors import DMFormerError, StageFailed, UnavailableError
from dmformer.runtimes.inspector import module_path
from dmformer.verify.answers import Answers
from dmformer.verify.compare import (
    TENSOR_FACTORS,
    Comparison,
    Limit,
    Reference,
    largest_difference,
    largest_value,
    limits_from_errors,
)
from dmformer.verify.executors import (
    Emulation,
    by_reference,
    emulated,
    exact,
    graph_outputs,
    input_name,
    input_peaks,
    literal,
    round_layers_,
)
from dmformer.verify.parity import check_answers, references
from dmformer.verify.reference import in_double, torch_outputs
from dmformer.verify.report import PYTORCH, Check

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from numpy.typing import NDArray
    from onnx import ModelProto
    from torch import Tensor, nn

    from dmformer.runtimes.base import Runtime

_LEAST_SHOWN = 0.8  # of the layers with weights; what has no tensor of its own (identities) is not missed


class ModuleTruth:
    """What each layer of a network gives for a few images, in float64, and how far it may be from that in float32.

    Args:
        model: the network in the form that was traced.
        rows: images, (N, C, H, W).
    """

    def __init__(self, model: nn.Module, rows: NDArray[np.float32]) -> None:
        self.rows = rows
        single = _layer_outputs(model, rows)
        self.truth: dict[str, NDArray[np.float32]] = {}
        peaks: dict[str, float] = {}
        errors: dict[str, float] = {}

        def measure(name: str, in_float64: NDArray[np.float64]) -> None:
            """What is kept is rounded to float32: all layers in float64 take gigabytes at 512 pixels."""
            if name in single:
                peaks[name] = largest_value(in_float64)
                errors[name] = largest_difference(single.pop(name), in_float64)
                self.truth[name] = in_float64.astype(np.float32)

        for name in _unaffected(model, single, rows):
            single.pop(name)
        _watch_layers(in_double(model), rows.astype(np.float64), measure)
        if not self.truth:
            raise StageFailed("no layer of the network gives one tensor; expected some that can be compared")
        self.limits = limits_from_errors(peaks, errors, TENSOR_FACTORS["fp32"])
        modules = dict(model.named_modules())
        self._weighted = {
            name for name in self.truth if next(modules[name].parameters(recurse=False), None) is not None
        }
        self._following = dict(itertools.pairwise(self.truth))

    def check(self, runtime: Callable[[tuple[str, ...]], Runtime]) -> Check | str:
        """Compare the layers of an artifact in float32 with the network's; or say why they cannot be compared.

        Args:
            runtime: makes the runtime, not yet open, that shows the inner tensors named.
        """
        plain = runtime(())
        try:
            with plain:
                tensors = self._tensors(plain.inspect().inner_tensors())
            shown = set(tensors.values())
            shown |= {following for module, following in self._following.items() if module in shown}
            if self._is_too_little(shown):
                return self._too_few(plain, len(set(tensors.values())))
            with runtime(tuple(tensors)) as opened:
                (name,) = (spec.name for spec in opened.inputs)
                answered = opened.run_rows({name: self.rows})
        except UnavailableError as error:
            return f"layers in {plain.name}: {error}"
        except DMFormerError as error:
            return Check.of("layers", plain.name, "fp32", len(self.rows), Comparison(False, reason=str(error)))
        distances, scaled, seen = self._distances(tensors, answered)
        if self._is_too_little(seen):
            return self._too_few(plain, len(seen))
        folded = self._folded(distances, scaled)
        distances = {module: distance for module, distance in distances.items() if module not in folded}
        if not distances:
            return self._too_few(plain, 0)
        left_out = f"; {len(folded)} layers have a scale folded into them" if folded else ""
        return _check_each(
            ("layers", plain.name, "fp32", len(self.rows), PYTORCH),
            distances,
            self.limits,
            lambda module, beyond: f"{beyond} of {len(distances)} layers differ, the first is module {module}: by",
            f"float32 noise of module {{}} in PyTorch, {len(self.rows)} images{left_out}",
        )

    def _is_too_little(self, shown: Collection[str]) -> bool:
        return not shown or len(self._weighted & set(shown)) < _LEAST_SHOWN * len(self._weighted)

    def _too_few(self, runtime: Runtime, seen: int) -> str:
        return f"layers in {runtime.name}: {seen} of {len(self.truth)} can be seen"

    def _tensors(self, inner: frozenset[str]) -> dict[str, str]:
        """Return the module that each tensor is called after."""
        return {name: module for name in sorted(inner) if (module := module_path(name)) in self.truth}

    def _distances(
        self, tensors: Mapping[str, str], answered: Mapping[str, NDArray[Any]]
    ) -> tuple[dict[str, float], set[str], set[str]]:
        """How far each layer is from the truth, in the order in which layers run; which are a multiple of it; all seen.

        Seen is what a tensor of its shape may stand for, right or wrong: a fault must not pass for a layer unseen.
        A layer of several operators has several tensors, of which one is what it gives: the nearest to the truth among
        those of its shape. A layer without one, whose tensors have other shapes, is left out.

        The exporter and the simplifier fold what is linear (a norm, a layer scale) into the convolution before it,
        whose tensor then stands for the layer that follows, which has none of its own.
        """
        found: dict[str, float] = {}
        scaled: set[str] = set()
        seen: set[str] = set()
        shown = set(tensors.values())
        for tensor, module in tensors.items():
            array = answered[tensor]
            following = self._following.get(module)
            candidates = [module] if following is None or following in shown else [module, following]
            fitting = [one for one in candidates if array.shape == self.truth[one].shape and array.dtype.kind == "f"]
            if not fitting:
                continue
            seen.update(fitting)
            far = {one: largest_difference(array, self.truth[one]) for one in fitting}
            multiples = [one for one in fitting if _is_scaled(array, self.truth[one], self.limits[one])]
            right = [one for one in fitting if far[one] <= self.limits[one]]
            for one in right or [*multiples, *fitting][:1]:
                if one not in found or not found[one] <= far[one]:
                    found[one] = far[one]
            if not right:
                scaled.update(multiples[:1])
        return {module: found[module] for module in self.truth if module in found}, scaled, seen

    def _folded(self, distances: Mapping[str, float], scaled: set[str]) -> set[str]:
        """Return the layers into which a scale was folded that lies outside of any module, and follows them.

        They give a multiple of the truth in each channel, and a layer after them is right. Where a layer is wrong in
        another way, the last of them before it is under suspicion: a fault that multiplies channels looks the same, and
        what is right after it may be a branch beside it.
        """
        order = list(distances)
        right = {module for module in order if distances[module] <= self.limits[module]}
        until = next((place for place, module in enumerate(order) if module not in right | scaled), len(order))
        multiples = [
            module
            for place, module in enumerate(order[:until])
            if module not in right and right & set(order[place + 1 : until])
        ]
        suspect = next((module for module in reversed(order[:until]) if module not in right), None)
        return {module for module in multiples if until == len(order) or module != suspect}


def _is_scaled(array: NDArray[Any], truth: NDArray[Any], limit: float) -> bool:
    """Whether maps are the true ones times a scale and plus a shift for each channel, within a limit."""
    if array.ndim != 4 or not np.isfinite(array).all():
        return False
    ours, exact_maps = (np.moveaxis(one, 1, 0).reshape(one.shape[1], -1).astype(np.float64) for one in (array, truth))
    centred = exact_maps - exact_maps.mean(1, keepdims=True)
    spread = np.maximum((centred**2).sum(1, keepdims=True), np.finfo(np.float64).tiny)
    scale = (ours * centred).sum(1, keepdims=True) / spread
    rest = np.abs(ours - ours.mean(1, keepdims=True) - scale * centred)
    return bool((rest <= limit * np.maximum(1.0, np.abs(scale))).all())


def _layer_outputs(model: nn.Module, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What each module without children gives, in the order in which they run; those that run twice are left out."""
    found: dict[str, NDArray[Any]] = {}
    repeated: set[str] = set()

    def keep(name: str, output: NDArray[Any]) -> None:
        if name in found:
            repeated.add(name)
        found[name] = output.copy()

    _watch_layers(model, rows, keep)
    return {name: output for name, output in found.items() if name not in repeated}


def _unaffected(model: nn.Module, answered: Mapping[str, NDArray[Any]], rows: NDArray[Any]) -> set[str]:
    """Name the layers that answer alike whatever the image is, which a file holds as constants."""
    found: set[str] = set()

    def compare(name: str, output: NDArray[Any]) -> None:
        if name in answered and np.array_equal(output, answered[name]):
            found.add(name)

    _watch_layers(model, 1 - rows, compare)
    return found


def _watch_layers(model: nn.Module, rows: NDArray[Any], watch: Callable[[str, NDArray[Any]], None]) -> None:
    """Run a network, and call ``watch`` with the name and the output of each module without children.

    Modules that give no tensor of floating-point numbers, or several, are passed over.
    """
    import torch

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def look(_module: nn.Module, _given: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                watch(name, output.numpy())

        return look

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        with torch.inference_mode():
            model(torch.from_numpy(rows))
    finally:
        for one in hooks:
            one.remove()


def check_reduced(
    reduced: ModelProto,
    float32: ModelProto,
    emulation: Emulation,
    form: nn.Module,
    golden: Golden,
    calibration: Iterable[NDArray[np.float32]] = (),
) -> tuple[Golden, list[Check]]:
    """Judge an ONNX file at a reduced precision before any engine sees it, by its outputs and by each of its tensors.

    Args:
        reduced: the file.
        float32: the file that it was made from.
        emulation: of the file.
        form: the network in the form that was traced; it is rounded in place.
        golden: with the float32 file's answers.
        calibration: for int8, batches of images on which PyTorch checks how far the inputs of layers reach: ranges that
            fall short of that would hide in limits that are made with them.

    Returns:
        Golden outputs with those at the precision, and the checks: against PyTorch and against the float32 file.

    Raises:
        StageFailed: answers at the precision are not finite, or it drowns what outputs differ by between images.
    """
    precision = emulation.precision
    if precision == "int8":
        peaks = input_peaks(form, emulation.modules, calibration)
        emulation = replace(
            emulation, peaks={name: max(peak, emulation.peaks.get(name, 0.0)) for name, peak in peaks.items()}
        )
    # Only of rows that run by themselves is it known which part of an inner tensor is theirs.
    ends, shown = list(FIRST_AND_LAST), dict(literal(reduced, {input_name(reduced): golden.first_and_last}))
    between = np.delete(golden.inputs, ends, axis=0)
    outputs = {name: shown[name] for name in golden.outputs}
    if len(between):
        rest = graph_outputs(reduced, literal(reduced, {input_name(reduced): between}))
        outputs = {name: np.concatenate([array[:1], rest[name], array[1:]]) for name, array in outputs.items()}
    tensors = check_tensors(float32, emulation, golden.first_and_last, shown)
    round_layers_(form, emulation)
    completed = _completed(golden, outputs, form, float32, emulation)
    if golden.other_size is not None:
        outputs = graph_outputs(reduced, literal(reduced, {input_name(reduced): golden.other_size.inputs}))
        completed = replace(completed, other_size=_completed(golden.other_size, outputs, form, float32, emulation))
    checks = []
    for size, part in completed.sizes.items():
        try:
            pytorch = references(part, precision)[0]
        except StageFailed as error:
            raise StageFailed(f"{error}; it begins at {tensors.reason}" if tensors.reason else str(error)) from error
        before = Reference("onnx fp32", part.files["fp32"], pytorch.limits)
        answers = Answers("onnxruntime", precision, {len(part.inputs): dict(part.files[precision])})
        checks += check_answers("reduced", answers, [pytorch, before], size)
    return completed, [*checks, tensors]


def _completed(
    golden: Golden,
    outputs: Mapping[str, NDArray[Any]],
    rounded: nn.Module,
    float32: ModelProto,
    emulation: Emulation,
) -> Golden:
    """Golden outputs with the literal ones of the file at a precision, and those that the precision is emulated with.

    These are of the network that was rounded, and at fp16 of the float32 graph with sums in float16 as well.
    """
    precision, sums = emulation.precision, golden.float16_sums
    emulated_outputs = golden.thinned(torch_outputs(rounded, golden.inputs))
    if precision == "fp16":
        summing = replace(emulation, float16_sums=True)
        sums = golden.thinned(graph_outputs(float32, emulated(float32, {input_name(float32): golden.inputs}, summing)))
    return replace(
        golden,
        files=golden.files | {precision: golden.thinned(outputs)},
        emulated=golden.emulated | {precision: emulated_outputs},
        float16_sums=sums,
    )


def check_tensors(
    float32: ModelProto, emulation: Emulation, rows: NDArray[np.float32], shown: Mapping[str, NDArray[Any]]
) -> Check:
    """Compare every tensor of a file at a reduced precision with the float32 graph's, within the precision's error.

    A fault in one layer that hardly shows in the outputs shows here.

    Args:
        float32: the graph that the file was made from.
        emulation: of the file.
        rows: the first and the last of the golden images, (2, C, H, W).
        shown: every tensor that the file makes of them, executed literally.
    """
    inputs, precision = {input_name(float32): rows}, emulation.precision
    peaks: dict[str, float] = {}
    errors: dict[str, float] = {}
    distances: dict[str, float] = {}
    # Side by side, so that no more is held than the next nodes read.
    for (name, truth), (_, rounded) in zip(exact(float32, inputs), emulated(float32, inputs, emulation), strict=True):
        peaks[name], errors[name] = largest_value(truth), largest_difference(rounded, truth)
        array = shown.get(name)
        if array is not None and array.dtype.kind == "f":  # of shapes and positions it has nothing to reduce
            distances[name] = largest_difference(array, truth)
    nodes = {name: node.name for node in float32.graph.node for name in node.output}
    return _check_each(
        ("tensors", "onnxruntime", precision, len(rows), "onnx fp32"),
        distances,
        limits_from_errors(peaks, errors, TENSOR_FACTORS[precision]),
        lambda name, _beyond: f"{nodes[name]}: tensor {name} differs by",
        f"the error of tensor {{}} at {precision}, emulated in PyTorch{_helped(float32)}",
    )


def _helped(graph: ModelProto) -> str:
    """Name the operators that are not emulated in PyTorch."""
    operators = by_reference(graph)
    return f" ({', '.join(operators)} by ONNX's reference implementation)" if operators else ""


def _check_each(
    row: tuple[str, str, str, int, str],
    distances: Mapping[str, float],
    limits: Mapping[str, float],
    reason: Callable[[str, int], str],
    limit_source: str,
) -> Check:
    """One check for many tensors, with the figures of the first beyond its limit, or of the nearest to it.

    Args:
        row: stage, runtime, precision, batch, and what they are compared with.
        distances: the largest difference in each tensor, in the order in which they are computed.
        limits: the largest allowed in each.
        reason: what failed, up to the difference, for the first beyond its limit and how many are.
        limit_source: what the limit is a multiple of, with ``{}`` for the tensor.
    """
    stage, runtime, precision, batch, against = row
    if not distances:
        nothing = Comparison(False, reason="no tensor of the file stands for one of the network; nothing was compared")
        return Check.of(stage, runtime, precision, batch, nothing, against=against)
    beyond = [name for name, distance in distances.items() if not distance <= limits[name]]
    name = beyond[0] if beyond else nearest_to_limit(distances, limits)
    distance = distances[name]
    comparison = Comparison(
        not beyond,
        max_abs=distance if np.isfinite(distance) else None,
        reason=f"{reason(name, len(beyond))} {distance:.3g}, limit {limits[name]:.3g}" if beyond else None,
    )
    limit = Limit(limits[name], f"{TENSOR_FACTORS[precision]:g} x {limit_source.format(name)}")
    return Check.of(stage, runtime, precision, batch, comparison, limit, against)


def nearest_to_limit(distances: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """The tensor whose difference is nearest to its limit, or furthest beyond it."""
    return max(distances, key=lambda name: distances[name] / limits[name] if np.isfinite(distances[name]) else np.inf)
