"""Adding a runtime, as CONTRIBUTING.md describes it: an adapter, a row, a converter; nothing else knows of it.

The runtime added here runs the bundle's ONNX file in the evaluator of the package ``onnx``. Whatever in the program has
a table of its own with an entry for each runtime or format fails here.
"""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import dmformer
from dmformer.assets import SAMPLE_IMAGES
from dmformer.bench.plan import BenchRequest, plan_bench
from dmformer.bundle.reader import open_bundle
from dmformer.device.doctor import examine_machine
from dmformer.export.build import build, cannot_build
from dmformer.export.formats import CONVERTERS, Converted, Converter, versions
from dmformer.runtimes import registry
from dmformer.runtimes.base import Details, Runtime, TensorSpec, symbolic
from dmformer.runtimes.inspector import Inspector, Kernel, is_compute
from dmformer.runtimes.support import Availability, Support
from tests import test_runtimes
from tests.test_runtimes import make, opened, rows  # noqa: F401 - fixtures that the contract's tests ask for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.bundle.reader import Bundle
    from dmformer.export.cached import ExportResult
    from dmformer.export.formats import ConversionSource
    from dmformer.runtimes.base import Arrays
    from tests.conftest import Run

# --- 1. the adapter: support, inspector, runtime ----------------------------------------------------------------------


class EvaluatorSupport(Support):
    name = "evaluator"
    package = ("onnx", "onnx/onnx_cpp2py_export")

    def inspect_files(self, files: object, target: object = None) -> None:
        """Look at nothing."""

    def import_engine(self) -> Availability:
        from dmformer._optional import require

        require("onnx.reference", extra="export", purpose="it").ReferenceEvaluator  # noqa: B018 - may be half installed
        return Availability(True, require("onnx", extra="export", purpose="it").__version__)


class EvaluatorInspector(Inspector):
    runtime: EvaluatorRuntime

    def read_layers(self) -> dict[str, int]:
        computing = [node for node in self.runtime.model.graph.node if is_compute(node.op_type)]
        return dict(Counter("fp32" for _ in computing))

    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        taken = []
        for feed in feeds:
            before = time.perf_counter_ns()
            self.runtime.infer(feed)
            taken.append(time.perf_counter_ns() - before)
        return [Kernel("model", "Model", tuple(taken))]


class EvaluatorRuntime(Runtime):
    support = EvaluatorSupport()
    inspector = EvaluatorInspector
    model: Any = None
    _evaluator: Any = None

    def load(self) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        self.model = onnx.load(self.path)
        self._evaluator = ReferenceEvaluator(self.model)
        self._evaluator.input_names[0]

    def close(self) -> None:
        self.model = self._evaluator = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_spec(value) for value in self.model.graph.input)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_spec(value) for value in self.model.graph.output)

    @property
    def details(self) -> Details:
        import onnx

        return Details(device="CPU", threads=self.threads, version=onnx.__version__)

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._evaluator.run(names, dict(inputs)), strict=True))


def _spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    return TensorSpec(value.name, "float32", symbolic(tuple(size.dim_value or None for size in kind.shape.dim)))


# --- 2. the row, and 3. the converter of its format -------------------------------------------------------------------

ROW = registry.RuntimeEntry("evaluator", ("ev",), f"{__name__}:EvaluatorRuntime", "evaluated", extra="export")


def to_evaluated(source: ConversionSource, folder: Path) -> Converted:
    path = folder / "model.evaluated"
    shutil.copyfile(source.onnx, path)
    return Converted((path,), versions("onnx"))


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "ENTRIES", (*registry.ENTRIES, ROW))
        patch.setitem(CONVERTERS, ROW.format, Converter(f"{__name__}:to_evaluated"))
        yield


# --- what follows from them -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(exported: ExportResult, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demonstration bundle, with the new format built into it by this program."""
    folder = tmp_path_factory.mktemp("new") / "demo"
    shutil.copytree(exported.output, folder)
    before = open_bundle(folder)
    (offered,) = (
        one for one in examine_machine(before, partial(cannot_build, before)).artifacts if one.format == ROW.format
    )
    assert (offered.held, offered.buildable) == (False, True)
    assert build(folder, ROW.format).parity.passed
    return type("Exported", (), {"output": folder})


@pytest.fixture
def row() -> registry.RuntimeEntry:
    return ROW


def contract() -> Iterator[Any]:
    """Every test of the contract, with each combination of its parameters other than the row."""
    for name, test in vars(test_runtimes).items():
        marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        if not any(mark is test_runtimes.every_runtime.mark for mark in marks):
            continue
        others = [mark.args for mark in marks if mark.args[0] != "row"]
        for values in itertools.product(*(values for _, values in others)):
            given = dict(zip((names for names, _ in others), values, strict=True))
            yield pytest.param(test, given, id="-".join([name, *map(str, values)]))


@pytest.mark.parametrize(("test", "given"), list(contract()))
def test_the_contract_holds(test: Callable[..., None], given: dict[str, Any], request: pytest.FixtureRequest) -> None:
    names = [name for name in inspect.signature(test).parameters if name not in given]
    test(**given, **{name: request.getfixturevalue(name) for name in names})


@pytest.mark.parametrize("damage", test_runtimes.DAMAGES)
def test_a_damaged_file_is_one_line(damage: str, opened: Bundle, tmp_path: Path) -> None:  # noqa: F811
    test_runtimes.test_damaged_artifacts(ROW, 0, damage, opened, tmp_path)


def test_the_contract_has_many_tests() -> None:
    assert len(list(contract())) > 20


def test_doctor_knows_it(inline: Callable[..., Run], exported: ExportResult) -> None:
    found = json.loads(inline("doctor", exported.output, "--json").out)
    (runtime,) = (one for one in found["runtimes"] if one["name"] == ROW.name)
    assert runtime["available"]
    (artifact,) = (one for one in found["artifacts"] if one["format"] == ROW.format)
    assert (artifact["runtime"], artifact["held"], artifact["runs"]) == (ROW.name, True, True)
    assert ROW.name in inline("doctor", exported.output).out


def test_verify_compares_it(inline: Callable[..., Run], exported: ExportResult) -> None:
    found = dmformer.verify(exported.output, runtimes=["EV"])
    assert found.passed
    assert {"runtime", "rows", "precision"} <= {check.stage for check in found.checks if check.runtime == ROW.name}
    run = inline("verify", exported.output, "--runtime", ROW.name)
    assert run.code == 0, run.err


def test_bench_plans_it(exported: ExportResult) -> None:
    plan = plan_bench(exported.output, BenchRequest(runtimes=["ev"]))
    assert {configuration.runtime for configuration in plan.configurations} == {ROW.name}
    plan = plan_bench(exported.output, BenchRequest())
    assert ROW.name in {configuration.runtime for configuration in plan.configurations}


def test_predict_answers_with_it(inline: Callable[..., Run], exported: ExportResult) -> None:
    images = sorted(SAMPLE_IMAGES.glob("*.png"))[:2]
    answers = []
    for name in (ROW.name, "onnxruntime"):
        run = inline("predict", exported.output, *images, "--runtime", name, "--json", "-")
        assert run.code == 0, run.err
        answers.append([image["classes"][0]["index"] for image in json.loads(run.out)["predictions"]])
    assert answers[0] == answers[1]


def test_inspect_shows_it(inline: Callable[..., Run], exported: ExportResult) -> None:
    assert ROW.format in inline("inspect", exported.output).out


def test_an_export_takes_its_format(inline: Callable[..., Run]) -> None:
    run = inline("export", "--format", "ev", "--dry-run")
    assert run.code == 0, run.err
    assert ROW.format in run.out + run.err
