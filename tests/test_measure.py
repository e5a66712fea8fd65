"""Timing in one process: settling, one stream, several at once."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
import pytest

from dmformer.bench import measure
from dmformer.bench.measure import Extent, Measurement, network_alone, settled
from dmformer.bench.plan import BRIEF_WARM_UP, WARM_UP
from dmformer.errors import StageFailed
from dmformer.runtimes.base import Details, TensorSpec
from tests.fakes import FakeInspector, FakeRuntime, FakeSupport


def noisy(spread: float, count: int) -> list[int]:
    values = 1e6 * (1 + spread * np.random.default_rng(0).uniform(-1, 1, count))
    return [int(value) for value in values]


@pytest.mark.parametrize(
    ("latencies", "expected"),
    [
        pytest.param([], False, id="nothing"),
        pytest.param([100] * 14, False, id="too few"),
        pytest.param([100] * 15, True, id="flat"),
        pytest.param([100_000 - 200 * i for i in range(100)], False, id="falling"),
        pytest.param([100_000 + 200 * i for i in range(100)], False, id="rising"),
        pytest.param([9000 - 80 * i for i in range(100)] + [1000] * 60, True, id="falling, then flat"),
        pytest.param([1000] * 60 + [1000 + 50 * i for i in range(60)], False, id="flat, then rising"),
        pytest.param(noisy(0.01, 100), True, id="a little noise"),
        pytest.param(noisy(0.9, 60), False, id="much noise"),
        pytest.param(([100] * 9 + [100_000]) * 10, True, id="lonely spikes"),
        pytest.param([1000] * 10 + [1030] * 5, True, id="within 3 %"),
        pytest.param([1000] * 10 + [1031] * 5, False, id="beyond 3 %"),
        pytest.param([1000] * 80 + [1031] * 10 + [1000] * 10, False, id="window of a tenth"),
        pytest.param([9999] + [1000] * 15, True, id="only the last windows"),
    ],
)
def test_settled(latencies: list[int], expected: bool) -> None:
    assert settled(latencies) is expected


QUICK = msgspec.structs.replace(WARM_UP, least_s=0.0)
QUICK_AND_BRIEF = msgspec.structs.replace(BRIEF_WARM_UP, least_s=0.0)


def test_a_warm_up_that_never_settles_gives_up() -> None:
    latencies = iter(range(1_000, 100_000_000, 1_000))
    calls: list[int] = []

    def call() -> int:
        calls.append(next(latencies) ** 2)
        return calls[-1]

    assert measure._warm_up(call, Extent(0, 0, warm_up=QUICK)) is False
    assert len(calls) == WARM_UP.least_calls


def test_a_brief_warm_up_takes_fewer_calls() -> None:
    calls: list[int] = []

    def call() -> int:
        calls.append(1000)
        return calls[-1]

    assert measure._warm_up(call, Extent(0, 0, warm_up=QUICK_AND_BRIEF)) is True
    assert len(calls) == BRIEF_WARM_UP.least_calls < WARM_UP.least_calls


# --- timing one runtime -----------------------------------------------------------------------------------------------


class Shown(FakeInspector):
    """Shows the layers that its runtime was given, and counts how often it was asked."""

    runtime: Fake

    def read_layers(self) -> dict[str, int]:
        self.runtime.proofs += 1
        return self.runtime.shown


class Fake(FakeRuntime):
    """Notes what it is called with."""

    inspector = Shown
    input_spec = TensorSpec("x", "float32", ("batch", 2))
    output_spec = TensorSpec("y", "float32", ("batch", 2))

    def __init__(self, *, threads_used: int = 1, precision: str = "fp32", layers: dict[str, int] | None = None) -> None:
        super().__init__(precision=precision)
        self.threads_used = threads_used
        self.shown = {"fp32": 9} if layers is None else layers
        self.seen: list[np.ndarray] = []
        self.proofs = 0

    @property
    def details(self) -> Details:
        return Details(device="CPU", threads=self.threads_used, version="1")

    def infer(self, inputs: Any) -> Any:
        self.seen.append(inputs["x"])
        return {"y": inputs["x"] + 1}


ROWS = np.arange(10, dtype=np.float32).reshape(5, 2)


def timed(
    runtime: Fake, batch: int = 1, duration_s: float = 0.0, least_calls: int = 1, promised: float | None = None
) -> Measurement:
    """One stream over :data:`ROWS`."""
    asked = network_alone(runtime, "x", ROWS, batch)
    return measure.measure([(runtime, asked)], Extent(duration_s, least_calls, warm_up=QUICK), promised)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up that settles at once."""
    monkeypatch.setattr(measure, "settled", lambda latencies, _window: len(latencies) >= 1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("batch", "least_calls"), [(1, 30), (2, 7), (12, 1)])
def test_calls_are_counted_apart(batch: int, least_calls: int) -> None:
    runtime = Fake()
    found = timed(runtime, batch, least_calls=least_calls)
    assert len(found.latencies_ns) == least_calls
    assert len(runtime.seen) == 1 + WARM_UP.least_calls + least_calls
    assert all(len(array) == batch for array in runtime.seen)
    assert all(sample > 0 for sample in found.latencies_ns)
    assert runtime.closed == 1
    assert (found.device, found.threads, found.version, found.stable) == ("CPU", 1, "1", True)
    assert found.load_ms > 0
    assert found.first_inference_ms > 0
    assert found.peak_rss_mb > 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("batch", [1, 2, 5, 12])
def test_inputs_differ_from_call_to_call(batch: int) -> None:
    runtime = Fake()
    timed(runtime, batch, least_calls=5)
    for one, other in zip(runtime.seen, runtime.seen[1:], strict=False):
        assert not np.array_equal(one, other)
    assert {float(array[0, 0]) for array in runtime.seen} == {0, 2, 4, 6, 8}


@pytest.mark.usefixtures("quick")
def test_the_duration_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    found = timed(Fake(), 1, 50.0, 3)
    assert 20 <= len(found.latencies_ns) <= 30  # the clock is read twice for each call


def test_other_threads_than_asked_are_not_timed() -> None:
    runtime = Fake(threads_used=2)
    with pytest.raises(StageFailed, match="fake runs on 2 threads; expected 1"):
        timed(runtime)
    assert not runtime.seen
    assert runtime.closed == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("promised", "proofs"), [(None, 0), (0.0, 1), (1.0, 1)])
def test_the_proof_of_the_precision_is_asked_for_or_left_out(promised: float | None, proofs: int) -> None:
    runtime = Fake(layers={"fp32": 7})
    found = timed(runtime, promised=promised)
    assert runtime.proofs == proofs
    assert found.layers == ({"fp32": 7} if proofs else {})


@pytest.mark.parametrize(
    ("layers", "promised", "expected"),
    [
        ({"fp16": 8, "fp32": 2}, 0.9, "fp16 in 80% of 10 compute layers .8 fp16, 2 fp32.; promised 90%"),
        ({"fp32": 10}, 1.0, "fp16 in 0%"),
        ({}, 0.5, "no compute layer"),
    ],
)
def test_fewer_layers_than_promised_are_not_timed(layers: dict[str, int], promised: float, expected: str) -> None:
    runtime = Fake(precision="fp16", layers=layers)
    with pytest.raises(StageFailed, match=expected):
        timed(runtime, promised=promised)
    assert not runtime.seen
    assert runtime.closed == 1


@pytest.mark.usefixtures("quick")
def test_as_many_layers_as_promised_are_timed() -> None:
    found = timed(Fake(precision="fp16", layers={"fp16": 9, "fp32": 1}), promised=0.9)
    assert found.layers == {"fp16": 9, "fp32": 1}


@pytest.mark.usefixtures("quick")
def test_a_runtime_that_says_why_it_cannot_compute_a_precision_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Frank(FakeSupport):
        def cannot_compute(self, precision: str) -> str | None:
            return "no such arithmetic" if precision == "fp16" else None

    monkeypatch.setattr(Fake, "support", Frank())

    found = timed(Fake(precision="fp16", layers={"fp32": 10}), promised=1.0)
    assert found.layers == {"fp32": 10}
    with pytest.raises(StageFailed, match="fp32 in 0%"):  # the reason is one of that precision only
        timed(Fake(precision="fp32", layers={"fp16": 10}), promised=1.0)


def test_nothing_is_timed_after_the_deadline() -> None:
    runtime = Fake()
    extent = Extent(duration_s=60, least_calls=1_000_000, deadline_s=time.perf_counter() + 0.2)
    found = measure.measure([(runtime, network_alone(runtime, "x", ROWS, 1))], extent)
    assert not found.stable
    assert found.cut
    assert len(found.latencies_ns) >= 1
    assert found.wall_ns == sum(found.latencies_ns)


# --- several streams --------------------------------------------------------------------------------------------------


class Slow(Fake):
    """Notes how many calls were under way at once, of all that share the list."""

    def __init__(self, under_way: list[int]) -> None:
        super().__init__()
        self.under_way = under_way
        self.most = 0

    def infer(self, inputs: Any) -> Any:
        self.under_way.append(1)
        self.most = max(self.most, len(self.under_way))
        time.sleep(0.002)
        self.under_way.pop()
        return super().infer(inputs)


def side_by_side(runtimes: list[Any], least_calls: int = 12) -> Measurement:
    streams = [(runtime, network_alone(runtime, "x", ROWS, 1)) for runtime in runtimes]
    return measure.measure(streams, Extent(0.0, least_calls, warm_up=QUICK))


@pytest.mark.usefixtures("quick")
def test_streams_run_at_once() -> None:
    under_way: list[int] = []
    runtimes = [Slow(under_way) for _ in range(3)]
    found = side_by_side(runtimes)
    assert max(runtime.most for runtime in runtimes) == 3
    assert len(found.latencies_ns) >= 12
    assert 0 < found.wall_ns < sum(found.latencies_ns)
    assert all(len(runtime.seen) > WARM_UP.least_calls for runtime in runtimes)
    assert [runtime.closed for runtime in runtimes] == [1, 1, 1]


class Breaking(Fake):
    """Fails after some calls."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def infer(self, inputs: Any) -> Any:
        if len(self.seen) >= self.after:
            raise RuntimeError("out of luck")
        return super().infer(inputs)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("after", [3, 40], ids=["while warming up", "while timed"])
def test_a_stream_that_fails_ends_all(after: int) -> None:
    runtimes = [Fake(), Breaking(after), Fake()]
    with pytest.raises(StageFailed, match=r"fake failed while running .*: out of luck"):
        side_by_side(runtimes, least_calls=10**9)
    assert [runtime.closed for runtime in runtimes] == [1, 1, 1]
