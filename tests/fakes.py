"""A runtime without an engine, for tests of what is built on the contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dmformer.runtimes.base import Details, Runtime, TensorSpec
from dmformer.runtimes.inspector import Inspector, Kernel
from dmformer.runtimes.support import Availability, Support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.runtimes.base import Arrays


class FakeSupport(Support):
    """An engine that is always there."""

    name = "fake"
    precisions = ("fp32", "fp16")

    def inspect_files(self, files: object, target: object = None) -> None:
        """There are no files."""

    def import_engine(self) -> Availability:
        return Availability(True, "1")


class FakeInspector(Inspector):
    """Shows no layer, and one kernel."""

    def read_layers(self) -> dict[str, int]:
        return {}

    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        return [Kernel("stages.0.downsample.conv/Conv", "Conv", tuple(1000 for _ in feeds))]


class FakeRuntime(Runtime):
    """One input and one output, no artifact; subclasses answer in ``infer``."""

    support: ClassVar[Support] = FakeSupport()
    inspector: ClassVar[type[Inspector]] = FakeInspector
    input_spec: ClassVar[TensorSpec] = TensorSpec("x", "float32", ("batch", 2))
    output_spec: ClassVar[TensorSpec] = TensorSpec("y", "float32", ("batch", 2))

    def __init__(self, *, precision: str = "fp32") -> None:
        super().__init__(Path("fake.model"), threads=1, precision=precision)
        self.closed = 0

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
