"""A module of this package in a process of its own: native code that crashes or hangs becomes an error of a stage."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from dmformer.errors import StageFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self


class Child:
    """A process that runs a module, started at once; it waits for its work on standard input.

    A context manager: leaving it ends the process.

    Args:
        module: of this package, run as ``__main__``.
        inherit: file descriptors that the process gets too, under the same numbers.
        environment: of the process; otherwise that of this one.
    """

    def __init__(self, module: str, inherit: Sequence[int] = (), environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            self.command(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=tuple(inherit),
            env=environment,
        )

    @staticmethod
    def command(module: str) -> list[str]:
        """The command that runs a module of this package.

        ``python -m`` would look for modules in the working folder first, which is the user's.
        """
        code = (
            "import sys; sys.path[:1] = [folder for folder in sys.path[:1] if folder]; "
            f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        )
        return [sys.executable, "-c", code]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stderr):
            with suppress(OSError, ValueError):  # another thread may still be in work()
                if pipe is not None:
                    pipe.close()

    def work(self, order: bytes, timeout_s: float) -> None:
        """Hand the work over and wait for the process to end. Legal once.

        Raises:
            StageFailed: it was ended by a signal, failed, or took longer than ``timeout_s`` seconds.
        """
        try:
            _, said = self._process.communicate(order, timeout_s)
        except subprocess.TimeoutExpired as error:
            raise StageFailed(f"the process did not end within {timeout_s:.0f} s") from error
        code = self._process.returncode
        if code < 0:
            raise StageFailed(f"the process was ended by signal {-code} ({signal.Signals(-code).name})")
        if code > 0:
            lines = said.decode(errors="replace").strip().splitlines() or ["no message"]
            raise StageFailed(f"the process failed: {lines[-1]}")
