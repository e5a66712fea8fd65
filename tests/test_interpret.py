"""The executors' operators against onnxruntime's, on graphs of one node, and on whole networks of open size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from dmformer.verify.executors import by_reference, emulated, exact

if TYPE_CHECKING:
    from onnx import ModelProto

    from dmformer.export.cached import ExportResult

SIZES = ((6, 10), (5, 7), (1, 3))


def graph(operator: str, inputs: dict[str, np.ndarray | None], **attributes: Any) -> ModelProto:
    """``x`` is given; other inputs are constants, and ``None`` one that is left out."""
    node = helper.make_node(
        operator, ["x", *(name if value is not None else "" for name, value in inputs.items())], ["y"], "node/it"
    )
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    made = helper.make_graph(
        [node],
        "one",
        [given],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(value, name) for name, value in inputs.items() if value is not None],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def both(model: ModelProto, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    return dict(emulated(model, {"x": x}))["y"], np.asarray(expected)


def resize(scales: tuple[float, float] | None, sizes: tuple[int, ...] | None, **attributes: Any) -> ModelProto:
    return graph(
        "Resize",
        {
            "roi": None,
            "scales": None if scales is None else np.array([1, 1, *scales], np.float32),
            **({} if sizes is None else {"sizes": np.array(sizes, np.int64)}),
        },
        **attributes,
    )


LINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def image(size: tuple[int, int], count: int = 2) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 3, *size)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scales", [(2.0, 2.0), (4.0, 4.0), (8.0, 8.0), (2.0, 4.0)])
@pytest.mark.parametrize("how", [LINEAR, NEAREST], ids=["linear", "nearest"])
def test_enlargement_by_a_factor(how: dict[str, Any], scales: tuple[float, float], size: tuple[int, int]) -> None:
    found, expected = both(resize(scales, None, **how), image(size))
    assert found.shape == (2, 3, round(size[0] * scales[0]), round(size[1] * scales[1]))
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_enlargement_to_a_size(size: tuple[int, int]) -> None:
    found, expected = both(resize(None, (1, 3, 7, 10), **LINEAR), image(size, count=1))
    assert found.shape == (1, 3, 7, 10)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_in_float64_it_is_the_same_but_finer() -> None:
    x = image((6, 10))
    for how in (LINEAR, NEAREST):
        model = resize((4.0, 4.0), None, **how)
        truth = dict(exact(model, {"x": x.astype(np.float64)}))["y"]
        assert truth.dtype == np.float64
        np.testing.assert_allclose(truth, both(model, x)[1], atol=2e-6)


@pytest.mark.parametrize(
    "how",
    [
        LINEAR | {"coordinate_transformation_mode": "align_corners"},
        LINEAR | {"coordinate_transformation_mode": "asymmetric"},
        NEAREST | {"nearest_mode": "ceil"},
        NEAREST | {"coordinate_transformation_mode": "half_pixel"},
        {"mode": "cubic", "coordinate_transformation_mode": "half_pixel"},
        {},
    ],
)
def test_another_way_to_enlarge_is_left_to_onnx_and_not_taken_for_one_of_these(how: dict[str, Any]) -> None:
    ours, expected = both(resize((2.0, 2.0), None, **how), image((4, 4)))
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("Shape", {}, {}),
        ("Transpose", {}, {"perm": [0, 1, 3, 2]}),
        ("Reshape", {"shape": np.array([0, -1, 5], np.int64)}, {}),
        ("Squeeze", {"axes": np.array([0], np.int64)}, {}),
        ("Unsqueeze", {"axes": np.array([1], np.int64)}, {}),
        ("Gather", {"indices": np.array([2, 0], np.int64)}, {"axis": 1}),
        ("Expand", {"shape": np.array([2, 3, 4, 5], np.int64)}, {}),
        ("Div", {"by": np.array(3, np.float32)}, {}),
        ("Sub", {"less": np.array(3, np.float32)}, {}),
        ("Less", {"than": np.array(0.5, np.float32)}, {}),
        ("GreaterOrEqual", {"than": np.array(0.5, np.float32)}, {}),
        ("Cast", {}, {"to": TensorProto.INT64}),
        (
            "Slice",
            {
                "starts": np.array([1], np.int64),
                "ends": np.array([9], np.int64),
                "axes": np.array([3], np.int64),
                "steps": np.array([2], np.int64),
            },
            {},
        ),
        ("Concat", {"more": np.ones((1, 3, 4, 2), np.float32)}, {"axis": 3}),
        ("MatMul", {"right": np.ones((5, 2), np.float32)}, {}),
    ],
)
def test_operators_on_shapes(operator: str, inputs: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    found, expected = both(graph(operator, dict(inputs), **attributes), 3 * image((4, 5), count=1))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_operator_that_no_dmformer_has_is_left_to_onnx() -> None:
    model = graph("Tanh", {})
    assert by_reference(model) == ["Tanh"]
    x = image((2, 2))
    np.testing.assert_allclose(dict(emulated(model, {"x": x}))["y"], np.tanh(x), atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (96, 64)])
def test_a_whole_network_of_open_size(segmentation_open: ExportResult, size: tuple[int, int]) -> None:
    path = segmentation_open.output / "onnx/fp32/model.onnx"
    x = image(size, count=1)
    (expected,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": x})
    found = dict(emulated(onnx.load(path), {"image": x}))["logits"]
    assert found.shape == (1, 11, *size)
    np.testing.assert_allclose(found, expected, atol=1e-4)
