"""What a runtime can do on this machine, asked without an artifact: is its engine there, and which arithmetic has it.

Importing an engine takes longer than everything else that ``doctor`` asks of it, so :meth:`Support.quick_probe` looks
at its files instead: what pip wrote down when it installed the package (``RECORD``: every file with its size) is
compared with what is there. Missing and cut libraries show, and those for another processor or Python, as in a copied
environment. Whether an engine loads is known only once it was loaded.
"""

from __future__ import annotations

import csv
import platform
import re
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dmformer.errors import UnavailableError, first_line
from dmformer.machine import instructions
from dmformer.process import Limited

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dmformer.files import OpenFile
    from dmformer.runtimes.target import Target

_LIBRARY = re.compile(r"\.(so|pyd|dylib|dll)(\.[\w.]+)?$")


@dataclass(frozen=True)
class Availability:
    """Whether a runtime can work on this machine: its version, or why not and what to do.

    ``untried`` says what was taken on trust, where something was; ``broken`` marks an engine that failed in a way of
    its own, where others say that they are not installed or not for this machine.
    """

    available: bool
    version: str | None = None
    reason: str | None = None
    untried: str | None = None
    broken: bool = False


class Support(ABC):
    """What one runtime can do on this machine.

    Nothing here takes an artifact or changes anything, and every question may be asked where the engine is missing.

    Attributes:
        name: canonical name of the runtime.
        precisions: of the artifacts that it takes, float32 first.
        refused: why it does not take a precision that others do, where that needs saying.
        package: arguments of :func:`intact_version`; without them :meth:`quick_probe` imports the engine.
        cannot_replay: why its answers cannot be asked for elsewhere, on an emulated processor or with another release.
        reads_onnx: whether the runtime takes ONNX files too, beside those of its own format.
        instructions: by processor, instruction sets without which the engine cannot start, in Linux's names.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    refused: ClassVar[Mapping[str, str]] = {}
    package: ClassVar[tuple[str, ...]] = ()
    cannot_replay: ClassVar[str | None] = None
    reads_onnx: ClassVar[bool] = True
    instructions: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @abstractmethod
    def import_engine(self) -> Availability:
        """Import the engine and say what it offers; may raise whatever an engine that is half installed raises."""

    @abstractmethod
    def inspect_files(self, files: Sequence[OpenFile], target: Target | None = None) -> None:
        """Check, without the engine, that files are of the format that the runtime reads, and lead it to no other file.

        Engines choose by content or by name what they take a file for, and read further files that it names or that lie
        beside it. So this looks at the content, whatever a file is called.

        Args:
            files: all of an artifact, the one to load first.
            target: what the artifact is tied to, where it is compiled.

        Raises:
            CheckFailed: a file leads to one that is not among them, or contradicts the target.
            UsageError: a file is of another format, or damaged.
        """

    def probe(self) -> Availability:
        """Return whether the engine is installed and loads here. Does not raise."""
        try:
            with Limited(f"importing {self.name}"):
                return self.import_engine()
        except UnavailableError as error:
            return Availability(False, reason=str(error))
        except Exception as error:  # noqa: BLE001 - a half installed engine fails in ways of its own
            return Availability(False, reason=first_line(error), broken=True)

    def quick_probe(self) -> Availability:
        """Return what :meth:`probe` would, without importing an engine whose files are intact. Does not raise."""
        missing = sorted(set(self.instructions.get(platform.machine().lower(), ())) - instructions())
        if missing and instructions():  # importing it could end this process
            return Availability(False, reason=f"{self.name} needs {', '.join(missing)}, which this processor lacks")
        version = intact_version(*self.package) if self.package else None
        if version is not None:
            return Availability(True, version, untried="its libraries are whole; it was not loaded")
        return self.probe()

    def cannot_compute(self, precision: str) -> str | None:
        """Return why the engine has no arithmetic of a precision here, or has it for few layers, and runs it anyway.

        ``None`` where it has. The layers without are computed in float32: slower, not wrong, and to be said aloud.
        """
        del precision
        return None

    def sums_in_float16(self) -> bool:
        """Return whether products of float16 numbers are added up in float16 here, and not in float32.

        Such answers are right, and further from PyTorch's: their limits are derived from an emulation that does so too.
        """
        return False

    def saturates(self) -> str | None:
        """Return why sums of products with int8 weights of 8 bits may saturate in this engine on this machine.

        ``None`` where they do not. Such answers are wrong, not slow; weights of 7 bits are right everywhere.
        """
        return None

    def cannot_load(self, target: Target | None) -> str | None:
        """Return why an artifact with this target cannot run on this machine; ``None`` where it can, as far as known.

        Takes less than a second and loads nothing.
        """
        del target
        return None

    def peak_gops(self, precision: str, threads: int) -> float | None:
        """Measure what the engine attains at a precision on a large, regular product, in 10^9 operations a second.

        ``None`` where NumPy's matrix product serves as the limit (float32), and where nothing is known. A multiply and
        an add are two operations.
        """
        del precision, threads
        return None


def intact_version(package: str, extension: str, *libraries: str) -> str | None:
    """Return the version of an installed package whose libraries are all as recorded; ``None`` where nothing tells.

    ``None`` also where it is imported already, so that it can be asked itself, and where pip did not install it.

    Args:
        package: import name, and name of the distribution.
        extension: path of its extension module below the folder of all packages, without suffix.
        libraries: patterns of libraries that must be among its files, below the same folder.
    """
    if package in sys.modules:
        return None
    with suppress(ImportError, ValueError, OSError, metadata.PackageNotFoundError):
        spec, distribution = find_spec(package), metadata.distribution(package)
        main = Path(str(distribution.locate_file(f"{package}/__init__.py")))
        record = distribution.read_text("RECORD")
        if spec is None or spec.origin is None or record is None or not main.samefile(spec.origin):
            return None  # not installed, or another package of the same name comes first
        lines = (line for line in record.splitlines() if _LIBRARY.search(line.partition(",")[0]))
        recorded = {name: int(size) if size else None for name, _, size in csv.reader(lines)}  # sizes in bytes
        wanted = [[extension + suffix for suffix in EXTENSION_SUFFIXES], *([pattern] for pattern in libraries)]
        if not all(any(fnmatch(name, one) for name in recorded for one in patterns) for patterns in wanted):
            return None
        for name, size in recorded.items():
            path = Path(str(distribution.locate_file(name)))
            if path.stat().st_size != size or _processor_of(path) != _processor_of(Path(sys.executable)):
                return None
        return distribution.version
    return None


def _processor_of(path: Path) -> bytes | None:
    """Return word size, byte order and machine from an ELF header; ``None`` on systems without ELF."""
    with path.open("rb") as file:
        header = file.read(20)
    return header[4:6] + header[18:20] if header.startswith(b"\x7fELF") else None
