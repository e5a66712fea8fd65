"""The command line in a child process, so that a crash of native code becomes one line and an exit code.

Engines parse what a bundle holds in C++, and a file that means harm can make them crash: OpenVINO 2026.4 ends by SIGFPE
on an input of 2^31 columns. A process cannot outlive that, and its parent can. Linux only, where the parent can tell
what the terminal sent, which its child has got as well; elsewhere the command line runs as it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

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
