"""PyTorch on the CPU: the reference that every other runtime is compared with."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np

from dmformer._optional import require
from dmformer.errors import CheckFailed, UsageError, first_line
from dmformer.runtimes.base import Details, Runtime, TensorSpec
from dmformer.runtimes.inspector import Inspector, Kernel, precision_of
from dmformer.runtimes.support import Availability, Support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn

    from dmformer.files import OpenFile
    from dmformer.models.checkpoint import Checkpoint
    from dmformer.runtimes.base import Arrays
    from dmformer.runtimes.target import Target


_MOST_HEADER_BYTES = 100 << 20  # of safetensors, as its own parser has it


def _import() -> Any:
    return require("torch", extra="export", purpose="it")


class TorchSupport(Support):
    """PyTorch on this machine."""

    name = "torch"
    package: ClassVar[tuple[str, ...]] = ("torch", "torch/_C", "torch/lib/*torch_cpu.*")
    cannot_replay: ClassVar[str | None] = "PyTorch is what the answers are compared with, and not installed on devices"

    def inspect_files(self, files: Sequence[OpenFile], target: Target | None = None) -> None:
        """Check that it is safetensors: checkpoints come as pickles and as lists of other files as well."""
        del target
        main = files[0]
        length = int.from_bytes(main.data[:8], "little")
        reason = f"a header of {length} bytes in a file of {main.bytes}"
        if 2 <= length <= min(_MOST_HEADER_BYTES, main.bytes - 8):
            try:
                msgspec.json.decode(main.data[8 : 8 + length], type=dict[str, msgspec.Raw])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                reason = first_line(error)
            else:
                return
        raise UsageError(f"{main.path} is damaged, or no .safetensors file: {reason}; export it again")

    def import_engine(self) -> Availability:
        """Take any PyTorch: each has its CPU."""
        return Availability(True, str(_import().__version__))


class TorchInspector(Inspector):
    """Looks at the modules of the network."""

    runtime: TorchRuntime

    def read_layers(self) -> dict[str, int]:
        """Read the type of each layer's weights; eager mode converts nothing."""
        found: Counter[str] = Counter()
        nn = require("torch.nn", extra="export", purpose="it")
        for module in self.runtime.model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                found[precision_of(str(module.weight.dtype).removeprefix("torch."))] += 1
        return dict(found)

    def read_kernels(self, feeds: Sequence[Arrays]) -> list[Kernel]:
        """Time each module without children by hooks, and the rest: sums and products between the modules."""
        times: dict[tuple[str, str], list[int]] = {}
        begun: list[int] = []
        whole: list[int] = []

        def ends(key: tuple[str, str]) -> Any:
            def add(*_: object) -> None:
                taken = times.setdefault(key, [0] * len(feeds))
                taken[len(whole)] += time.perf_counter_ns() - begun.pop()

            return add

        with ExitStack() as hooks:
            for name, module in self.runtime.model.named_modules():
                if next(module.children(), None) is None:
                    key = f"{name}/{type(module).__name__}", type(module).__name__
                    before = module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter_ns()))
                    hooks.callback(before.remove)
                    hooks.callback(module.register_forward_hook(ends(key)).remove)
            for feed in feeds:
                start = time.perf_counter_ns()
                self.runtime.infer(feed)
                whole.append(time.perf_counter_ns() - start)
        rest = np.array(whole) - np.sum(list(times.values()), axis=0)
        times["", "Add, Mul and the like"] = [int(ns) for ns in rest]
        return [Kernel(name, operator, tuple(taken)) for (name, operator), taken in times.items()]


class TorchRuntime(Runtime):
    """Runs a ``.safetensors`` checkpoint in eager mode."""

    support = TorchSupport()
    inspector = TorchInspector
    model: Any = None  # the network, while open
    _checkpoint: Any = None
    _threads_before: int | None = None

    def load(self) -> None:
        """Read the checkpoint and build the network. Threads are a setting of the whole process in PyTorch."""
        torch = _import()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self._checkpoint, self.model = self.read()

    def read(self) -> tuple[Checkpoint, nn.Module]:
        """Return the checkpoint, and the network to run."""
        from dmformer.models.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(self.path)
        if any(file.path == self.path and file.sha256 != checkpoint.sha256 for file in self.files):
            raise CheckFailed(f"{self.path} changed while it was loaded; expected a file that stays: run it again")
        return checkpoint, checkpoint.model()

    def close(self) -> None:
        """Drop the network and give the process its number of threads back."""
        if self._threads_before is not None:
            _import().set_num_threads(self._threads_before)
            self._threads_before = None
        self._checkpoint = None
        self.model = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The network's input; height and width are open where the checkpoint says so."""
        return self._specs[:1]

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The network's outputs; those that follow the input's height and width are open where it is."""
        return self._specs[1:]

    @property
    def _specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, "float32", shape) for name, shape in self._checkpoint.shapes.items())

    @property
    def details(self) -> Details:
        """Device of the weights, and the threads of the process."""
        torch, device = _import(), next(self.model.parameters()).device
        return Details(device=str(device), threads=torch.get_num_threads(), version=str(torch.__version__))

    def infer(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run the network without autograd."""
        torch = _import()
        from dmformer.models.dmformer import outputs_by_name

        (array,) = inputs.values()
        with torch.inference_mode():
            # from_numpy shares memory, wants it writable and knows no negative strides
            result = self.model(torch.from_numpy(np.require(array, requirements=["C", "W"])))
        return {name: output.numpy() for name, output in outputs_by_name(result).items()}


class ModuleRuntime(TorchRuntime):
    """Runs a network that is in memory already, in whatever form."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        super().__init__(Path(checkpoint.arch))
        self._given = checkpoint, model

    def read(self) -> tuple[Checkpoint, nn.Module]:
        """Return what was given."""
        return self._given
