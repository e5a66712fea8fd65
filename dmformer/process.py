"""A module of this package in a process of its own: native code that crashes or hangs becomes an error of a stage.

The command line in a child process, so that a crash of native code becomes one line and an exit code.

Engines parse what a bundle holds in C++, and a file that means harm can make them crash: OpenVINO 2026.4 ends by SIGFPE
on an input of 2^31 columns. A process cannot outlive that, and its parent can. Linux only, where the parent can tell
what the terminal sent, which its child has got as well; elsewhere the command line runs as it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dmformer.errors import StageFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self


_CRASHES = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS")
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
_PR_SET_PDEATHSIG = 1
_announced: int | None = None  # memory that parent and child share, once there are two


def announce(path: Path) -> Path:
    """Say that a file or folder is temporary before it is made: where this process crashes, its parent removes it."""
    if _announced is not None:
        os.write(_announced, os.fsencode(path.absolute()) + b"\0")
    return path


def supervise(main: Callable[[], None]) -> None:
    """Run the command line in a child process and end as it ended; legal while there is one thread.

    Args:
        main: the command line, which ends by raising :class:`SystemExit`.
    """
    if not sys.platform.startswith("linux"):
        main()
        return
    global _announced  # noqa: PLW0603 - one process has one parent
    _announced = os.memfd_create("announced")
    waited_for = {signal.SIGCHLD, *(signal.Signals[name] for name in _FORWARDED)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as it may be inherited, it would not come
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _end_with(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        main()
        return
    while True:
        told = signal.sigwaitinfo(waited_for)
        if told.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                _end_as(os.waitstatus_to_exitcode(status))
        elif told.si_code <= 0:  # sent by a process to this one; the terminal tells every process of the group
            os.kill(child, told.si_signo)


def _end_with(parent: int) -> None:
    """Stop when the parent is killed: nobody would be left to tell."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before that
        os.kill(os.getpid(), signal.SIGTERM)


def _end_as(code: int) -> NoReturn:
    if code >= 0:
        os._exit(code)  # the child has flushed and cleaned up
    _remove_announced()
    name = signal.Signals(-code).name
    if name in _CRASHES:
        sys.stderr.write(
            f"error: native code crashed ({name}): an engine, on a file that it cannot take; expected the files that "
            "were exported: run dmformer check and verify, or another --runtime\n"
        )
        sys.exit(1)
    if name == "SIGKILL":
        sys.stderr.write("error: killed (SIGKILL), as systems do that run out of memory; expected more memory\n")
        sys.exit(1)
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    sys.exit(128 - code)


def _remove_announced() -> None:
    """What the child would have removed."""
    assert _announced is not None
    for name in os.pread(_announced, os.fstat(_announced).st_size, 0).split(b"\0")[:-1]:
        path = Path(os.fsdecode(name))
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
