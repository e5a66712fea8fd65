"""A runtime without an engine, for tests of what is built on the contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dmformer.runtimes.base import Availability, Details, Kernel, Runtime, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.runtimes.base import Arrays


class FakeRuntime(Runtime):
    """One input and one output, no artifact; subclasses answer in ``infer`` and may show ``layers``."""

    name = "fake"
    input_spec: ClassVar[TensorSpec] = TensorSpec("x", "float32", ("batch", 2))
    output_spec: ClassVar[TensorSpec] = TensorSpec("y", "float32", ("batch", 2))

    def __init__(self, *, precision: str = "fp32") -> None:
        super().__init__(Path("fake.model"), threads=1, precision=precision)
        self.closed = 0

    @classmethod
    def probe(cls) -> Availability:
        return Availability(True, "1")

    def load(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (self.input_spec,)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.output_spec,)

    @property
    def details(self) -> Details:
        return Details(device="CPU", threads=1, version="1")

    def read_layers(self) -> dict[str, int]:
        return {}

    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        return [Kernel("stages.0.downsample.conv/Conv", "Conv", tuple(1000 for _ in feeds))]
