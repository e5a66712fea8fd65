"""The pictures of the page to sign off: each mark stands where its figure is."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.figure import Figure

from dmformer.bundle.manifest import Artifact, FileEntry
from dmformer.page.svg import BAD
from dmformer.signoff import pictures
from dmformer.signoff.pictures import CheckRow, Share, share_of_limit
from tests.paper_bundle import check


def marks(axes: Any, marker: str) -> list[tuple[float, float]]:
    found = [line for line in axes.get_lines() if line.get_marker() == marker]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in found]


@pytest.mark.parametrize("narrow", [False, True])
def test_checks_stand_at_their_share_of_the_limit(narrow: bool) -> None:
    failed = check("x", "int8", 3.0, passed=False)
    rows = [
        CheckRow(label="held", checks=[(0, check("x", "fp32", 0.25)), (0, check("x", "fp32", 0.0))]),
        CheckRow(label="failed", checks=[(0, failed), (0, check("x", "int8", None))]),
    ]
    figure = Figure()
    pictures._draw_checks(figure, narrow, rows, ())
    (axes,) = figure.axes
    assert marks(axes, "o") == [(0.25, 0), (pictures._LOW, 0)]
    assert marks(axes, "X") == [(3.0, 1)]
    assert marks(axes, "|") == [(pictures._LOW, 1)]
    (limit,) = [line for line in axes.get_lines() if list(line.get_xdata()) == [1, 1]]
    assert limit.get_color() == BAD
    assert axes.get_xscale() == "log"
    names = axes.texts if narrow else axes.get_yticklabels()
    assert [name.get_text() for name in names if name.get_color() == BAD] == ["failed"]


def test_several_sources_stand_beside_each_other() -> None:
    rows = [CheckRow(label="x", checks=[(place, check("x", "fp32", 0.25)) for place in range(2)])]
    figure = Figure()
    pictures._draw_checks(figure, False, rows, ("here", "there"))
    (first, second) = marks(figure.axes[0], "o")
    assert first[0] == second[0]
    assert first[1] < second[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["here", "there"]


@pytest.mark.parametrize(
    ("max_abs", "limit", "expected"),
    [(0.5, 2.0, 0.25), (None, 2.0, None), (0.5, None, None), (0.0, 0.0, 0.0), (1.0, 0.0, math.inf)],
)
def test_the_share_of_the_limit(max_abs: float | None, limit: float | None, expected: float | None) -> None:
    assert share_of_limit(check("x", "fp32", None, max_abs=max_abs, limit=limit)) == expected


def test_layers_are_drawn_as_they_were_counted() -> None:
    file = FileEntry(path="x", bytes=1, sha256="0" * 64)
    artifact = Artifact(
        format="onnx", precision="int8", files=(file,), built_with={}, layers={"int8": 30, "fp32": 10},
        promised_share=0.6,
    )  # fmt: skip
    figure = Figure()
    pictures._draw_layers(figure, False, [("onnx int8", artifact)])
    (axes,) = figure.axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0.0, 75.0), (75.0, 25.0)]
    assert marks(axes, "None")[0][0] == 60.0


def test_accuracies_are_drawn_with_their_intervals() -> None:
    figure = Figure()
    pictures._draw_accuracy(figure, False, [Share(label="x", kind="top-1", value=0.75, interval=(0.5, 0.875))])
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[50.0, 87.5], [75.0]]


def test_sensitivity_is_drawn_with_the_largest_first() -> None:
    (picture,) = pictures.sensitivity_pictures({"int8": {"small": 0.125, "large": 0.5}, "fp16": {}})
    assert picture.wide.index("large") < picture.wide.index("small")
    figure = Figure()
    pictures._draw_sensitivity(figure, False, [("large", 0.5), ("small", 0.125)], "int8")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [50.0, 12.5]
