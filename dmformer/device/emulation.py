"""Run a function of this tool on a processor that is not here: QEMU's user mode over a root file system.

QEMU computes what the processor computes, and ends the process by SIGILL at an instruction that the processor lacks. It
needs neither an administrator's rights nor containers: ``-L`` names a folder in which paths are looked for first, among
them a ``/proc/cpuinfo`` of the processor. Whatever else the process sees is this machine's: the kernel, /sys, the time.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

import dmformer
from dmformer.device.crash import explain, locate_fault
from dmformer.device.installation import DEBIAN_PYTHON, Platform, lay_out_debian, temporary_folder
from dmformer.device.processors import EmulatedProcessor
from dmformer.errors import StageFailed, UnavailableError, UsageError
from dmformer.machine import usable_cores
from dmformer.process import Child, Crashed, call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dmformer.cache import Cache

Result = TypeVar("Result")

NOT_SHOWN = (
    "emulation tells answers and missing instructions, not speed; the processes see this machine's kernel, /sys and "
    "caches; AVX-512 and AMX are not emulated"
)
# What is shown of a board's root file system, beside its lib folders. QEMU looks for every path there first: its /tmp
# or /home would hide this machine's, which have the bundle and the packages.
_SHOWN = frozenset(("usr", "bin", "sbin", "etc"))
_PROBE_S = 120.0
_PROBE = "import os, sys; print(*sys.version_info[:2], os.confstr('CS_GNU_LIBC_VERSION'))"


@dataclass(frozen=True)
class Machine:
    """Where Python runs: this machine, or a processor that QEMU plays.

    Attributes:
        interpreter: the command that runs Python there.
        fits: what wheels have to fit there.
        processor: ``None`` for this machine's own.
        emulator: name and version, and the model that it plays.
    """

    interpreter: tuple[str, ...]
    fits: Platform
    processor: EmulatedProcessor | None = None
    emulator: str | None = None

    def call(self, function: str, order: Any, result: type[Result], timeout_s: float, packages: Path) -> Result:
        """Call a function of this tool there; see :class:`dmformer.process.Child`.

        Args:
            function: ``module:function``.
            order: its argument.
            result: type of what it returns.
            timeout_s: seconds that it may take.
            packages: folder of the Python packages that are used, beside this tool's own files.

        Raises:
            DMFormerError: the function raised it.
            StageFailed: the process crashed, and where; it took too long, or left no result.
        """
        own = packages / "dmformer"
        if not own.exists():
            own.symlink_to(Path(dmformer.__file__).parent)
        environment = self._environment(packages)
        try:
            return call(function, order, result, timeout_s, environment, self.interpreter)
        except Crashed as error:
            if self.processor is None:
                raise
            with temporary_folder() as scratch:
                _, *arguments = Child.command(function, "", str(scratch / "result.json"))
                fault = locate_fault(
                    [*self.interpreter, *arguments], msgspec.json.encode(order), environment, timeout_s, scratch
                )
            raise StageFailed(explain(error.signal, fault, self.processor)) from error

    def _environment(self, packages: Path) -> dict[str, str]:
        """Return the environment of a process there; what names this machine's processor or libraries stays here."""
        inherited = dict(os.environ)
        if self.processor is not None:
            kept = ("PATH", "HOME", "LANG", "TMPDIR")
            inherited = {name: value for name, value in os.environ.items() if name in kept or "DMFORMER" in name}
        return {**inherited, "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}


def this_machine() -> Machine:
    """Return this machine, with this interpreter but none of its packages."""
    return Machine((sys.executable, "-S"), Platform.here())


@contextmanager
def emulated_machine(processor: EmulatedProcessor, root: Path | None, cache: Cache) -> Iterator[Machine]:
    """Give a machine with an emulated processor for the length of the block.

    Args:
        processor: what to play.
        root: a root file system with Python; otherwise a small Debian is laid out.
        cache: where its packages are kept.

    Raises:
        UnavailableError: QEMU is not here or does not know the processor, or Debian's packages cannot be had.
        UsageError: the root file system has no Python for the processor.
    """
    qemu, model = _emulator(processor)
    with temporary_folder() as scratch:
        system = scratch / "root"
        system.mkdir()
        if root is None:
            lay_out_debian(processor.architecture, system, cache)
            python = system / DEBIAN_PYTHON
        else:
            python = system / _python_in(root).relative_to(root)
            for entry in root.iterdir():
                if entry.name in _SHOWN or entry.name.startswith("lib"):
                    # A link to /usr/lib is to that of the board, where it has one, and not to this machine's.
                    own = root / str(entry.readlink()).lstrip("/") if entry.is_symlink() else entry
                    (system / entry.name).symlink_to((own if own.exists() else entry).resolve())
        (system / "proc").mkdir(exist_ok=True)
        (system / "proc/cpuinfo").write_text(processor.cpuinfo(usable_cores()), encoding="utf-8")
        interpreter = (qemu, "-cpu", model, "-L", str(system), str(python), "-S")
        fits = _probe(interpreter, processor, root)
        yield Machine(interpreter, fits, processor, f"QEMU {_version(qemu)}, {model}")


def _emulator(processor: EmulatedProcessor) -> tuple[str, str]:
    """Return QEMU's program for a processor, and the first of the processor's models that it knows."""
    install = "run: apt-get install qemu-user-static"
    if not sys.platform.startswith("linux"):
        raise UnavailableError(
            f"emulation needs QEMU's user mode, which is for Linux only; this is {platform.system()}"
        )
    names = (f"qemu-{processor.architecture}-static", f"qemu-{processor.architecture}")
    qemu = next((path for name in names if (path := shutil.which(name))), None)
    if qemu is None:
        raise UnavailableError(f"emulation of {processor.name} needs {names[0]}, which is not installed; {install}")
    listed = subprocess.run([qemu, "-cpu", "help"], capture_output=True, text=True, check=False).stdout.split()
    model = next((model for model in processor.models if model in listed), None)
    if model is None:
        raise UnavailableError(f"QEMU {_version(qemu)} has no {processor.models[0]}; expected a newer QEMU: {install}")
    return qemu, model


def _version(qemu: str) -> str:
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version ([\d.]+)", said)
    return found[1] if found else "of an unknown version"


def _python_in(root: Path) -> Path:
    """Return the newest Python 3 of a root file system."""
    found = [path for folder in ("usr/bin", "usr/local/bin") for path in (root / folder).glob("python3.*")]
    versions = {int(match[1]): path for path in found if (match := re.fullmatch(r"python3\.(\d+)", path.name))}
    if not versions:
        raise UsageError(f"`root` {str(root)!r} has no usr/bin/python3.N; expected a root file system with Python")
    return versions[max(versions)]


def _probe(interpreter: tuple[str, ...], processor: EmulatedProcessor, root: Path | None) -> Platform:
    """Start Python there, and return what wheels have to fit."""
    try:
        done = subprocess.run(
            [*interpreter, "-c", _PROBE], env={}, capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
        said = done.stderr.strip() or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        raise StageFailed(f"Python on {processor.name} did not start within {_PROBE_S:.0f} s") from None
    found = re.fullmatch(r"(\d+) (\d+) glibc 2\.(\d+)\s*", done.stdout)
    if found is None:
        where = "Debian" if root is None else f"`root` {str(root)!r}"
        kind = StageFailed if root is None else UsageError
        raise kind(
            f"the Python of {where} does not start on {processor.name} ({said.splitlines()[-1]}); expected a root file "
            f"system for {processor.architecture} with the GNU C library"
        )
    return Platform.linux(processor.architecture, f"{found[1]}.{found[2]}", int(found[3]))
