"""The search itself, on graphs made up for it: it finds any node, in few runs that show little."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmformer.errors import StageFailed
from dmformer.verify.compare import tensor_limits
from dmformer.verify.inner import nearest_to_limit
from dmformer.verify.localize.nodes import Cut, Node, cuts, find_parting, parting_at_once


def chain(count: int, reach: int = 1) -> list[Node]:
    """Nodes that each read the one before, and the one ``reach`` before that as a residual."""
    return [
        Node(f"n{i}", "Op", tuple(dict.fromkeys(f"t{max(i - step, 0)}" for step in (0, reach))), (f"t{i + 1}",))
        for i in range(count)
    ]


def run(nodes: list[Node], broken: int | None) -> dict[str, np.ndarray]:
    """Each node adds up what it reads, over their number; one of them adds an error."""
    values: dict[str, np.ndarray] = {"t0": np.ones((1, 2))}
    for index, node in enumerate(nodes):
        value = sum(values[name] for name in node.inputs) / len(node.inputs) + 0.25
        values[node.outputs[0]] = value + (0.5 if index == broken else 0.0)
    return values


@given(st.integers(1, 60), st.integers(1, 4), st.data())
def test_any_node_is_found_in_logarithmically_many_runs(count: int, reach: int, data: Any) -> None:
    broken = data.draw(st.integers(0, count - 1))
    nodes = chain(count, reach)
    right, wrong = run(nodes, None), run(nodes, broken)
    asked: list[tuple[str, ...]] = []

    def show(names: tuple[str, ...]) -> dict[str, np.ndarray]:
        asked.append(names)
        return {name: wrong[name] for name in names}

    found = cuts(nodes, ["t0"], [f"t{count}"], set(right))
    parting = find_parting(nodes, found, right, dict.fromkeys(right, 1e-3), show)
    assert parting is not None
    assert [node.name for node in parting.nodes] == [f"n{broken}"]
    assert parting.tensor == f"t{broken + 1}"
    assert parting.max_abs == pytest.approx(0.5)
    assert parting.runs == len(asked) <= math.ceil(math.log2(count + 1)) + 1
    assert parting.most_shown == max(map(len, asked)) <= reach + 1
    assert parting.outputs == (f"t{broken + 1}",)
    at_once = parting_at_once(nodes, found, right, dict.fromkeys(right, 1e-3), wrong)
    assert at_once is not None
    assert (at_once.nodes, at_once.tensor) == (parting.nodes, parting.tensor)


def test_cuts_hold_what_crosses_them() -> None:
    nodes = [
        Node("a", "Op", ("x",), ("a1",)),
        Node("b", "Op", ("a1",), ("b1",)),
        Node("c", "Op", ("a1",), ("c1",)),
        Node("unused", "Op", ("b1",), ("u1",)),
        Node("d", "Op", ("b1", "c1"), ("y",)),
    ]
    everything = {"a1", "b1", "c1", "u1", "y"}
    assert cuts(nodes, ["x"], ["y"], everything) == [
        Cut(-1, ("x",)),
        Cut(0, ("a1",)),
        Cut(1, ("a1", "b1")),
        Cut(2, ("b1", "c1")),
        Cut(3, ("b1", "c1")),
        Cut(4, ("y",)),
    ]
    assert [cut.position for cut in cuts(nodes, ["x"], ["y"], everything - {"c1"})] == [-1, 0, 1, 4]


def test_tensors_that_cannot_be_shown_widen_the_place() -> None:
    nodes = chain(8)
    right, wrong = run(nodes, None), run(nodes, 4)
    found = cuts(nodes, ["t0"], ["t8"], set(right) - {"t4", "t5"})
    parting = find_parting(nodes, found, right, dict.fromkeys(right, 1e-3), lambda names: {n: wrong[n] for n in names})
    assert parting is not None
    names = [node.name for node in parting.nodes]
    assert "n4" in names
    assert len(names) > 1


def test_no_difference_is_no_parting() -> None:
    nodes = chain(5)
    right = run(nodes, None)
    found = cuts(nodes, ["t0"], ["t5"], set(right))
    limits = dict.fromkeys(right, 1e-3)
    assert find_parting(nodes, found, right, limits, lambda names: {name: right[name] for name in names}) is None
    assert parting_at_once(nodes, found, right, limits, right) is None


@pytest.mark.parametrize("broken", [np.full((1, 2), np.nan), np.full((1, 2), np.inf), np.zeros((1, 3))])
def test_what_is_no_number_or_of_another_shape_differs(broken: np.ndarray) -> None:
    nodes = chain(3)
    right = run(nodes, None)
    wrong = right | {"t3": broken}
    found = cuts(nodes, ["t0"], ["t3"], set(right))
    parting = find_parting(nodes, found, right, dict.fromkeys(right, 1e9), lambda names: {n: wrong[n] for n in names})
    assert parting is not None
    assert (parting.tensor, parting.max_abs) == ("t3", None)


def test_limits_are_the_emulations_error_times_a_factor() -> None:
    truth = {"a": np.array([1.0, 2.0]), "b": np.array([4.0, 0.0]), "c": np.array([8.0])}
    emulated = {"a": np.array([1.0, 2.5]), "b": np.array([4.0, 0.0]), "c": np.array([np.inf])}
    limits = tensor_limits(truth, emulated, 3.0)
    eps = float(np.finfo(np.float32).eps)
    assert limits == pytest.approx({"a": 1.5, "b": 12 * eps, "c": 24 * eps})
    with pytest.raises(StageFailed, match="tensor 'a' is NaN or infinite in PyTorch itself"):
        tensor_limits({"a": np.array([np.nan])}, emulated, 3.0)


def test_the_tensor_nearest_to_its_limit() -> None:
    limits = {"a": 10.0, "b": 2.0}
    assert nearest_to_limit({"a": 3.0, "b": 1.0}, limits) == "b"
    assert nearest_to_limit({"a": float("nan"), "b": 1.0}, limits) == "a"
