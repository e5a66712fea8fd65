"""Every seeded fault is caught, and where it sits in a node it is found there; its case shows it alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import dmformer
from benchmarks import faults
from benchmarks.faults import IN_BUNDLES, PRECISION, Bench, Fault
from dmformer.assets import DEMONSTRATION_CHECKPOINT
from dmformer.bundle.reader import open_bundle
from dmformer.export import diagnose as diagnosing
from dmformer.export.diagnose import diagnose
from dmformer.progress import silent
from dmformer.verify.case import run_case

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.export.pipeline import ExportResult
    from dmformer.verify.findings import Finding

BY_NAME = {fault.name: fault for fault in (*IN_BUNDLES, *PRECISION)}


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Any:
    """The graph that is trusted is the same for every fault of one checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        trusted = diagnosing._trusted
        known: dict[str, Any] = {}

        def once(bundle: Any, report: Any, weights: Any, scratch: Any) -> Any:
            if str(weights) not in known:
                known[str(weights)] = trusted(bundle, report, weights, scratch)
            return known[str(weights)]

        patch.setattr(diagnosing, "_trusted", once)
        yield


@pytest.fixture(scope="module")
def bench(exported: ExportResult, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(exported.output, tmp_path_factory.mktemp("faults"))


def test_there_are_enough_kinds() -> None:
    assert len(BY_NAME) == len(IN_BUNDLES) + len(PRECISION) >= 24
    assert {fault.kind.split()[0] for fault in BY_NAME.values()} == {
        "weights",
        "graph",
        "engine",
        "precision",
        "preprocessing",
        "batching",
    }


@pytest.mark.parametrize("fault", IN_BUNDLES, ids=lambda fault: fault.name)
def test_a_fault_in_a_bundle_is_caught_and_found(bench: Bench, fault: Fault) -> None:
    found = bench.in_bundle(fault)
    assert found.caught
    assert found.located, (found.modules, found.said)


@pytest.mark.parametrize("fault", PRECISION, ids=lambda fault: fault.name)
def test_a_fault_in_a_precision_is_caught_and_found(bench: Bench, fault: Fault) -> None:
    found = bench.in_precision(fault)
    assert found.caught
    assert found.located, (found.modules, found.said)


def test_without_a_fault_nothing_is_caught(bench: Bench) -> None:
    clean = bench.in_bundle(Fault("weights", "none", "head", lambda _: []))
    assert not clean.caught
    assert clean.modules == ()
    for precision in ("fp16", "int8"):
        assert not bench.in_precision(Fault(f"precision {precision}", "none", None, lambda _: [])).caught


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_clean_export_raises_no_alarm(seed: int, tmp_path: Path) -> None:
    assert faults.clean(seed, tmp_path) == []


def find(bundle: Path, fault: Fault, cases: Path) -> Finding:
    """The one finding about a bundle that is spoilt in place."""
    fault.inject(bundle)
    opened = open_bundle(bundle)
    report = dmformer.verify(opened, runtimes=[fault.runtime], weights=DEMONSTRATION_CHECKPOINT)
    (finding,) = diagnose(opened, report, weights=DEMONSTRATION_CHECKPOINT, folder=cases, stage=silent).findings
    return finding


@pytest.mark.parametrize(
    ("name", "at_fault", "difference"),
    [
        ("a dilation of 1", "file", "dilations is [1, 1]; expected [2, 2]"),
        ("1 % of a kernel", "file", "128 of 128 values differ, by up to"),
        ("a lost ReLU", "file", "is Identity; expected Relu"),
        ("a NaN", "file", "holds 1 values that are NaN or infinite"),
        ("a residual from the wrong place", "file", "reads /stages.2/blocks/blocks.0/Add_1_output_0; expected"),
        ("a weight in OpenVINO's own file", "artifact", None),
    ],
)
def test_a_finding_says_whose_fault_it_is_and_its_case_shows_it(
    bundle: Path, tmp_path: Path, name: str, at_fault: str, difference: str | None
) -> None:
    finding = find(bundle, BY_NAME[name], tmp_path / "cases")
    assert finding.at_fault == at_fault
    assert finding.module == BY_NAME[name].module
    if difference is None:
        assert finding.differences == ()
    else:
        assert any(difference in line for line in finding.differences), finding.differences
    assert finding.runs <= 8
    assert finding.most_shown <= 4
    assert finding.case is not None
    case = tmp_path / "cases" / f"{finding.runtime}-fp32"
    assert any(not check.passed for check in run_case(case))


def test_a_wrong_kernel_is_the_engines_fault(bundle: Path, tmp_path: Path) -> None:
    fault = BY_NAME["a kernel that computes another GELU"]
    with pytest.MonkeyPatch.context() as patch:
        for one in fault.inject(bundle):
            patch.setattr(one.getter(), one.attribute, one.new)
        opened = open_bundle(bundle)
        report = dmformer.verify(opened, runtimes=["ort"], weights=DEMONSTRATION_CHECKPOINT)
        found = diagnose(opened, report, weights=DEMONSTRATION_CHECKPOINT, folder=tmp_path / "c", stage=silent)
        (finding,) = found.findings
        assert finding.at_fault == "engine"
        assert any(not check.passed for check in run_case(tmp_path / "c/onnxruntime-fp32"))
    # The same case where the engine is right.
    assert all(check.passed for check in run_case(tmp_path / "c/onnxruntime-fp32"))
