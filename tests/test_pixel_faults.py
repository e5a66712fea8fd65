"""Every fault seeded in a network that labels pixels is caught, and where it sits in a node it is found there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.fault_kinds import Fault
from benchmarks.fault_kinds_elsewhere import IN_BUNDLES, PRECISION
from benchmarks.fault_kinds_pixels import ANNOTATIONS, IN_DECODER
from benchmarks.faults import Bench
from dmformer.assets import SEGMENTATION_CHECKPOINT

if TYPE_CHECKING:
    from dmformer.export.cached import ExportResult


# Whole benches of faults.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trusted_once")]


@pytest.fixture(scope="module")
def bench(segmentation: ExportResult, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(segmentation.output, tmp_path_factory.mktemp("faults"), SEGMENTATION_CHECKPOINT)


def test_kinds_have_names_of_their_own() -> None:
    names = [fault.name for fault in (*IN_BUNDLES, *PRECISION, *IN_DECODER, *ANNOTATIONS)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("fault", IN_DECODER, ids=lambda fault: fault.name)
def test_a_fault_in_a_bundle_is_caught_and_found(bench: Bench, fault: Fault) -> None:
    found = bench.in_bundle(fault)
    assert found.caught
    assert found.located, (found.modules, found.said)


@pytest.mark.parametrize("fault", ANNOTATIONS, ids=lambda fault: fault.name)
def test_a_fault_in_annotations_is_told(bench: Bench, fault: Fault) -> None:
    assert bench.in_eval(fault).caught


def test_without_a_fault_nothing_is_caught(bench: Bench) -> None:
    clean = Fault("graph", "none", "up", lambda _: [])
    assert not bench.in_bundle(clean).caught
    assert not bench.in_eval(clean).caught
