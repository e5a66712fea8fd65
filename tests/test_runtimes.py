"""The contract of a runtime, held to every row of the registry on the demonstration bundle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dmformer.bundle.reader import open_bundle
from dmformer.errors import DMFormerError, StageFailed, UnavailableError, UsageError
from dmformer.runtimes import registry
from dmformer.runtimes.base import TensorSpec, symbolic
from dmformer.runtimes.target import FLAVOURS
from tests import gpu_double
from tests.conftest import LITERT

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dmformer.bundle.manifest import Artifact
    from dmformer.bundle.reader import Bundle
    from dmformer.export.cached import ExportResult
    from dmformer.runtimes.base import Runtime

    Make = Callable[..., Runtime]

every_runtime = pytest.mark.parametrize("row", registry.ENTRIES, ids=lambda row: row.name)


def engines_of(row: registry.RuntimeEntry) -> tuple[str, ...]:
    """The packages that a row's adapter imports, each of which does."""
    return registry.support(row).package[:1] or tuple(flavour.module for flavour in FLAVOURS)


def usable(row: registry.RuntimeEntry) -> type[Runtime]:
    """The adapter of a row, or a skip with the reason why it cannot run here."""
    kind = registry.adapter(row)
    status = kind.support.probe()
    if not status.available:
        pytest.skip(status.reason or f"{row.name} cannot run here")
    return kind


def artifact_of(bundle: Bundle, row: registry.RuntimeEntry) -> Artifact:
    found = bundle.artifacts(row.format)
    assert found, f"the demonstration bundle has nothing for {row.name}"
    return found[0]


@pytest.fixture
def opened(exported: ExportResult, request: pytest.FixtureRequest) -> Bundle:
    """The demonstration; for a format that it has not, a bundle with that."""
    row = getattr(request.node, "callspec", None) and request.node.callspec.params.get("row")
    if row is None or row.format not in ("ncnn", "litert"):
        return open_bundle(exported.output)
    return open_bundle(LITERT if row.format == "litert" else request.getfixturevalue("with_ncnn"))


@pytest.fixture
def make(row: registry.RuntimeEntry, opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes runtimes, not yet open, over the row's artifact."""
    target = None
    if row.name == "tensorrt":  # a double stands for the GPU; the tests marked gpu have the real one
        gpu_double.install(monkeypatch)
        path, target = gpu_double.plan_of(opened.load_path(artifact_of(opened, registry.entry("ort"))), tmp_path)
    else:
        path = opened.load_path(artifact_of(opened, row))
    kind = usable(row)

    def made(*, threads: int | None = 1, **options: Any) -> Runtime:
        return kind(path, target=target, threads=threads, **options)  # more would wait for a core that is busy

    return made


@pytest.fixture
def rows(opened: Bundle) -> NDArray[np.float32]:
    return opened.golden().inputs


@every_runtime
def test_specs_are_those_of_the_manifest(make: Make, opened: Bundle) -> None:
    with make() as runtime:
        for found, expected in ((runtime.inputs, opened.manifest.inputs), (runtime.outputs, opened.manifest.outputs)):
            assert [(spec.name, spec.dtype) for spec in found] == [(spec.name, spec.dtype) for spec in expected]
            for spec, wanted in zip(found, expected, strict=True):
                assert isinstance(spec.shape[0], str)
                assert spec.shape[1:] == wanted.shape[1:]


@every_runtime
def test_batches_of_any_size_answer_as_pytorch_did(make: Make, opened: Bundle) -> None:
    golden = opened.golden()
    (output,) = golden.outputs
    with make(threads=None) as runtime:  # all cores, as users have it
        for batch in (1, 2, 5, 3):
            result = runtime.run({runtime.inputs[0].name: golden.inputs[:batch]})
            assert list(result) == [output]
            assert result[output].shape == golden.outputs[output][:batch].shape
            assert result[output].dtype == np.float32
            np.testing.assert_allclose(result[output], golden.outputs[output][:batch], rtol=1e-3, atol=1e-3)


@every_runtime
def test_results_are_the_callers_to_keep(make: Make, rows: NDArray[np.float32]) -> None:
    with make() as runtime:
        name, output = runtime.inputs[0].name, runtime.outputs[0].name
        first = runtime.run({name: rows[:2]})[output]
        before = first.copy()
        second = runtime.run({name: rows[2:4]})[output]
        assert not np.array_equal(before, second), "the inputs must differ, or this shows nothing"
        assert not np.shares_memory(first, second)
        np.testing.assert_array_equal(first, before)
        first += 1
        np.testing.assert_array_equal(runtime.run({name: rows[:2]})[output], before)
    np.testing.assert_array_equal(first, before + 1)


LAYOUTS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "fortran": np.asfortranarray,
    "channels last": lambda array: np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "every second": lambda array: np.repeat(array, 2, axis=0)[::2],
    "backwards": lambda array: np.ascontiguousarray(array[::-1])[::-1],
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape),
}


@every_runtime
@pytest.mark.parametrize("writable", [True, False])
def test_inputs_of_any_layout(make: Make, rows: NDArray[np.float32], writable: bool) -> None:
    with make() as runtime:
        name, output = runtime.inputs[0].name, runtime.outputs[0].name
        for layout, arrange in LAYOUTS.items():
            array = arrange(rows[:3])
            if layout != "broadcast":
                array.flags.writeable = writable
            plain = np.array(array, order="C")
            found = runtime.run({name: array})[output]
            expected = runtime.run({name: plain})[output]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=layout)
            np.testing.assert_array_equal(array, plain)


@every_runtime
def test_read_only_inputs(make: Make, rows: NDArray[np.float32]) -> None:
    locked = rows[:2].copy()
    locked.flags.writeable = False
    with make() as runtime:
        name, output = runtime.inputs[0].name, runtime.outputs[0].name
        expected = runtime.run({name: rows[:2]})[output]
        np.testing.assert_array_equal(runtime.run({name: locked})[output], expected)
    assert not locked.flags.writeable
    np.testing.assert_array_equal(locked, rows[:2])


WRONG: dict[str, Callable[[str, NDArray[Any]], dict[str, Any]]] = {
    "no input": lambda _, __: {},
    "another name": lambda name, good: {name + "_": good},
    "one too many": lambda name, good: {name: good, "more": good},
    "float64": lambda name, good: {name: good.astype(np.float64)},
    "float16": lambda name, good: {name: good.astype(np.float16)},
    "uint8": lambda name, good: {name: good.astype(np.uint8)},
    "other byte order": lambda name, good: {name: good.astype(">f4")},
    "rank 3": lambda name, good: {name: good[0]},
    "rank 5": lambda name, good: {name: good[None]},
    "rank 0": lambda name, _: {name: np.float32(1).reshape(())},
    "one channel": lambda name, good: {name: good[:, :1]},
    "too small": lambda name, good: {name: np.ascontiguousarray(good[..., :-1])},
    "too large": lambda name, good: {name: np.pad(good, ((0, 0), (0, 0), (0, 1), (0, 1)))},
    "empty batch": lambda name, good: {name: good[:0]},
    "a list": lambda name, good: {name: good.tolist()},
}


@every_runtime
def test_wrong_inputs_are_refused(make: Make, rows: NDArray[np.float32]) -> None:
    with make() as runtime:
        name = runtime.inputs[0].name
        for wrong, inputs in WRONG.items():
            with pytest.raises(UsageError, match="expected") as caught:
                runtime.run(inputs(name, rows[:1]))
                pytest.fail(f"{wrong}: taken as it is")
            assert "\n" not in str(caught.value), wrong
            runtime.run({name: rows[:1]})  # and it still works


@every_runtime
def test_run_is_legal_only_inside_the_block(make: Make, rows: NDArray[np.float32]) -> None:
    runtime = make()
    with pytest.raises(StageFailed, match="not open"):
        runtime.run({"input": rows[:1]})
    with runtime:
        name = runtime.inputs[0].name
    with pytest.raises(StageFailed, match="not open"):
        runtime.run({name: rows[:1]})


@every_runtime
def test_entering_again_after_leaving(make: Make, rows: NDArray[np.float32]) -> None:
    runtime = make()
    answers = []
    for _ in range(2):
        with runtime:
            answers.append(runtime.run({runtime.inputs[0].name: rows[:1]})[runtime.outputs[0].name])
    np.testing.assert_array_equal(*answers)


@every_runtime
def test_an_error_in_the_block_closes_and_passes_through(make: Make) -> None:
    runtime = make()
    with pytest.raises(KeyError), runtime:
        raise KeyError
    with pytest.raises(StageFailed, match="not open"):
        runtime.run({})


@every_runtime
def test_what_the_engine_raises_is_one_line(
    make: Make, rows: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as runtime:

        def broken(inputs: Any) -> Any:
            raise RuntimeError("\n\nfirst of it\nand more\n")

        monkeypatch.setattr(runtime, "infer", broken)
        with pytest.raises(StageFailed, match=f"{runtime.name} failed while running .*: first of it$"):
            runtime.run({runtime.inputs[0].name: rows[:1]})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is no model\n" * 40),
    "truncated": truncate,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def damaged_files() -> list[Any]:
    """Each row with each of its files, by number: openvino and ncnn have two."""
    counts = {"openvino": 2, "ncnn": 2}
    return [
        pytest.param(row, index, id=f"{row.name}-{index}")
        for row in registry.ENTRIES
        for index in range(counts.get(row.name, 1))
    ]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("row", "index"), damaged_files())
def test_damaged_artifacts(row: registry.RuntimeEntry, index: int, damage: str, opened: Bundle, tmp_path: Path) -> None:
    kind = usable(row)
    files = [opened.root / entry.path for entry in artifact_of(opened, row).files]
    copies = [Path(shutil.copy(path, tmp_path / path.name)) for path in files]
    DAMAGES[damage](copies[index])
    runtime = kind(copies[0])
    with pytest.raises(DMFormerError) as caught, runtime:
        pass
    assert "\n" not in str(caught.value)
    assert str(caught.value).strip()
    runtime.close()  # legal any number of times
    with kind(files[0]):
        pass  # one that failed spoils no other


@every_runtime
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_what_was_asked_for(make: Make, threads: int) -> None:
    with make(threads=threads) as runtime:
        assert runtime.details.threads == threads


@every_runtime
def test_threads_left_open_are_the_usable_cores(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmformer.runtimes.base.usable_cores", lambda: 1)
    with make(threads=None) as runtime:
        assert runtime.details.threads == 1


@every_runtime
@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_is_wrong_usage(make: Make, threads: int) -> None:
    with pytest.raises(UsageError, match="expected 1 to"):
        make(threads=threads)


@every_runtime
def test_details_are_read_back(make: Make) -> None:
    with make() as runtime:
        details = runtime.details
        assert ("NVIDIA Double (SM 8.9)" if runtime.name == "tensorrt" else "cpu") in (
            details.device if runtime.name == "tensorrt" else details.device.lower()
        )
        assert details.version == runtime.support.probe().version


def refused_precisions() -> list[Any]:
    """Each row with each precision that it does not take."""
    return [
        pytest.param(row, precision, id=f"{row.name}-{precision}")
        for row in registry.ENTRIES
        for precision in ("fp32", "fp16", "int8", "bf16", "FP32", "")
        if precision not in registry.support(row).precisions
    ]


@pytest.mark.parametrize(("row", "precision"), refused_precisions())
def test_a_precision_that_it_cannot_honour_is_refused(make: Make, row: registry.RuntimeEntry, precision: str) -> None:
    expected = ", ".join(registry.support(row).precisions)
    with (
        pytest.raises(StageFailed, match=f"{row.name} cannot honour precision {precision!r}; expected {expected}$"),
        make(precision=precision),
    ):
        pass


@every_runtime
def test_precisions_begin_with_float32_and_repeat_none(row: registry.RuntimeEntry) -> None:
    precisions = registry.support(row).precisions
    assert precisions[0] == "fp32"
    assert len(set(precisions)) == len(precisions)
    assert set(precisions) <= {"fp32", "fp16", "int8"}


@every_runtime
def test_a_missing_engine_is_a_reason_with_the_command(
    row: registry.RuntimeEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in engines_of(row):
        monkeypatch.setitem(sys.modules, engine, None)
    status = registry.support(row).probe()
    assert not status.available
    assert status.reason is not None
    assert f"pip install 'dmformer[{row.extra}]'" in status.reason
    assert "\n" not in status.reason


@every_runtime
def test_a_missing_engine_says_what_can_run(row: registry.RuntimeEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [
        other.name for other in registry.ENTRIES if other is not row and registry.support(other).probe().available
    ]
    for engine in engines_of(row):
        monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(UnavailableError, match=f"runtime {row.name} cannot run") as caught:
        registry.available_adapter(row)
    assert caught.value.exit_code == 3
    for name in others:
        assert name in str(caught.value).partition("what can run here")[2]


@every_runtime
def test_no_engine_at_all(row: registry.RuntimeEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in (engine for each in registry.ENTRIES for engine in engines_of(each)):
        monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(UnavailableError) as caught:
        registry.available_adapter(row)
    assert "what can run here" not in str(caught.value)


class Hollow:
    """What is left of a package whose files were removed: it imports, and has nothing."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"module has no attribute {name!r}")


@every_runtime
def test_a_half_installed_engine_is_a_reason(row: registry.RuntimeEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in engines_of(row):
        monkeypatch.setitem(sys.modules, engine, Hollow())
    status = registry.support(row).probe()
    assert not status.available
    assert status.reason


@every_runtime
def test_names_aliases_and_formats_resolve_in_any_case(row: registry.RuntimeEntry) -> None:
    for name in (row.name, *row.aliases):
        assert registry.entry(name) is registry.entry(name.upper()) is registry.entry(name.title()) is row
    for name in (row.format, row.name, *row.aliases):
        assert registry.entry_of_format(name) is registry.entry_of_format(name.upper()) is row


@pytest.mark.parametrize("name", ["", "tensorflow", "all", "ort ", "onnx-runtime"])
def test_unknown_names_are_wrong_usage(name: str) -> None:
    for resolve in (registry.entry, registry.entry_of_format):
        with pytest.raises(UsageError, match=f"{name!r}; expected one of") as caught:
            resolve(name)
        assert all(alias in str(caught.value) for row in registry.ENTRIES for alias in row.aliases)


def test_rows_are_unambiguous_and_whole() -> None:
    names = [name for row in registry.ENTRIES for name in {row.name, row.format, *row.aliases}]
    assert len(names) == len(set(names))
    for row in registry.ENTRIES:
        assert registry.support(row).name == row.name


def test_another_provider_in_onnxruntime_is_a_failure(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    row = registry.entry("onnxruntime")
    kind = usable(row)
    import onnxruntime

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: ["OtherExecutionProvider"])
    with (
        pytest.raises(StageFailed, match=r"OtherExecutionProvider.*expected only CPU"),
        kind(opened.load_path(artifact_of(opened, row))),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("EXECUTION_DEVICES", ["GPU.0"], "GPU.0 at f32"),
        ("EXECUTION_DEVICES", ["CPU", "GPU.0"], "CPU, GPU.0 at f32"),
        ("INFERENCE_PRECISION_HINT", "bf16", "CPU at bf16"),
    ],
)
def test_another_device_or_precision_in_openvino_is_a_failure(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, found: str
) -> None:
    row = registry.entry("openvino")
    kind = usable(row)
    import openvino

    read_back = openvino.CompiledModel.get_property
    wrong = getattr(openvino.Type, value) if isinstance(value, str) else value

    def changed(model: Any, asked: str) -> Any:
        return wrong if asked == name else read_back(model, asked)

    monkeypatch.setattr(openvino.CompiledModel, "get_property", changed)
    with (
        pytest.raises(StageFailed, match=f"compiled for {found}; expected CPU at f32$"),
        kind(opened.load_path(artifact_of(opened, row))),
    ):
        pass


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_engine_without_its_processor_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = usable(registry.entry(name))
    if name == "onnxruntime":
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["OtherExecutionProvider"])
    else:
        bare = type("Core", (), {"available_devices": ["GPU"]})
        monkeypatch.setattr("dmformer.runtimes.openvino.core", bare)
    status = kind.support.probe()
    assert not status.available
    assert status.version
    assert status.reason is not None
    assert "has no CPU" in status.reason


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from dmformer.runtimes.openvino import OpenVinoRuntime
opened = [OpenVinoRuntime(Path(sys.argv[1])) for _ in range(2)]
for runtime in opened:
    runtime.__enter__()
for runtime in opened:  # not the last one first
    runtime.__exit__(None, None, None)
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    sys.exit(7)
"""


def test_openvino_leaves_signals_to_python(opened: Bundle) -> None:
    """Plugins freed in the order of their making leave a stack for signal handlers that is gone."""
    row = registry.entry("openvino")
    usable(row)
    path = opened.load_path(artifact_of(opened, row))
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(path)], check=False, timeout=120)
    assert done.returncode == 7


@pytest.mark.parametrize("ends", ["well", "in the block", "while loading"])
def test_pytorch_gives_the_process_its_threads_back(
    opened: Bundle, tmp_path: Path, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = registry.entry("torch")
    kind = usable(row)
    import torch

    before = torch.get_num_threads()
    wanted = before + 1
    path = opened.load_path(artifact_of(opened, row))
    try:
        if ends == "well":
            with kind(path, threads=wanted):
                assert torch.get_num_threads() == wanted
        elif ends == "in the block":
            with pytest.raises(KeyError), kind(path, threads=wanted):
                raise KeyError
        else:
            with pytest.raises(DMFormerError), kind(tmp_path / "none.safetensors", threads=wanted):
                pass
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([1, 3, 32, 32], (1, 3, 32, 32)),
        (["n", 3, -1, 0], ("batch", 3, "dim2", "dim3")),
        ([None, None], ("batch", "dim1")),
        ((), ()),
    ],
)
def test_symbolic(shape: Any, expected: tuple[int | str, ...]) -> None:
    assert symbolic(shape) == expected
    assert TensorSpec("x", "float32", symbolic(shape)).shape == expected
