"""Child processes: the whole command line in one (:func:`supervise`), and one function in one (:func:`call`).

Engines parse what a bundle holds in C++, and a file that means harm can make them crash: OpenVINO 2026.4 ends by SIGFPE
on an input of 2^31 columns. A process cannot outlive that, and its parent can: a crash of the command line becomes one
line and an exit code, a crash or hang of a function becomes an error of its stage.

This module is imported before anything else is, so what takes long to import stands inside functions.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

from dmformer import errors
from dmformer.errors import DMFormerError, StageFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

Result = TypeVar("Result")


class Crashed(StageFailed):
    """A process was ended by a signal."""

    def __init__(self, signal: signal.Signals) -> None:
        super().__init__(f"the process was ended by signal {int(signal)} ({signal.name})")
        self.signal = signal


class TimedOut(StageFailed):
    """A process did not end in time."""


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

    On Linux only, where the parent can tell what the terminal sent, which its child has got as well; elsewhere the
    command line runs as it is.

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
        received = signal.sigwaitinfo(waited_for)
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                _end_as(os.waitstatus_to_exitcode(status))
        elif received.si_code <= 0:  # sent by a process to this one; the terminal tells every process of the group
            os.kill(child, received.si_signo)


def _end_with(parent: int) -> None:
    """Let this process be ended when its parent is killed: nobody would be left to report to."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before that
        os.kill(os.getpid(), signal.SIGTERM)


def _end_as(code: int) -> NoReturn:
    """End this process as its child ended, with one line where that was a crash."""
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
    """Remove the temporary files and folders that the child would have removed."""
    assert _announced is not None
    for name in os.pread(_announced, os.fstat(_announced).st_size, 0).split(b"\0")[:-1]:
        path = Path(os.fsdecode(name))
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Child:
    """A process for one call of one function, started at once: it imports the function and waits for its order.

    The order goes in by standard input, the result comes back in a file (native libraries print to standard output),
    both as JSON. A context manager: leaving it ends the process.

    Args:
        function: ``module:function``, which takes an order of the type that its parameter is annotated with, and
            returns a result; both are what msgspec encodes.
        prepare: ``module:function`` without parameters, called before the order is there: for imports that take long.
        inherit: file descriptors that the process gets too, under the same numbers.
        environment: of the process; otherwise that of this one.
        interpreter: the command that runs Python; otherwise this process's.
    """

    def __init__(
        self,
        function: str,
        *,
        prepare: str = "",
        inherit: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        interpreter: Sequence[str] = (),
    ) -> None:
        import tempfile

        self._folder = tempfile.TemporaryDirectory(prefix="dmformer-")
        self._result = Path(self._folder.name) / "result.json"
        python, *arguments = self.command(function, prepare, str(self._result))
        self._process = subprocess.Popen(
            [*(interpreter or [python]), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=tuple(inherit),
            env=environment,
        )

    @staticmethod
    def command(function: str, prepare: str, result: str) -> list[str]:
        """The command that answers a call of a function.

        ``python -m`` would look for modules in the working folder first, which is the user's.
        """
        code = (
            "import sys; sys.path[:1] = [folder for folder in sys.path[:1] if folder]; "
            "from dmformer.process import _answer; _answer(*sys.argv[1:])"
        )
        return [sys.executable, "-c", code, function, prepare, result]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stderr):
            with suppress(OSError, ValueError):  # another thread may still be in call()
                if pipe is not None:
                    pipe.close()
        self._folder.cleanup()

    def call(self, order: Any, result: type[Result], timeout_s: float) -> Result:
        """Hand the order over, wait for the process to end, and return what the function returned. Legal once.

        Args:
            order: the function's argument.
            result: type of what it returns.
            timeout_s: seconds that it may take.

        Raises:
            DMFormerError: the function raised it; the class and the message are the function's.
            StageFailed: it raised something else, or the process crashed, took too long or left no result.
        """
        import msgspec

        try:
            _, messages = self._process.communicate(msgspec.json.encode(order), timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimedOut(f"the process did not end within {timeout_s:.0f} s") from error
        code = self._process.returncode
        if code < 0:
            raise Crashed(signal.Signals(-code))
        if code > 0:
            lines = messages.decode(errors="replace").strip().splitlines() or ["no message"]
            raise StageFailed(f"the process failed: {lines[-1]}")
        try:
            failure, content = msgspec.json.decode(self._result.read_bytes(), type=tuple[str, msgspec.Raw])
            if not failure:
                return msgspec.json.decode(content, type=result)
            message = msgspec.json.decode(content, type=str)
        except (OSError, msgspec.DecodeError) as error:
            raise StageFailed("the process ended without an answer") from error
        raise getattr(errors, failure)(message)


def call(
    function: str,
    order: Any,
    result: type[Result],
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    interpreter: Sequence[str] = (),
) -> Result:
    """Call a function in a process of its own that is started for it; see :class:`Child`."""
    with Child(function, environment=environment, interpreter=interpreter) as child:
        return child.call(order, result, timeout_s)


def _answer(function: str, prepare: str, result: str) -> None:
    """What the process does: read the order, call the function, write ``[class of the failure or "", content]``."""
    from pkgutil import resolve_name

    import msgspec

    work = resolve_name(function)
    if prepare:
        resolve_name(prepare)()
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=next(iter(get_type_hints(work).values()), Any))
    try:
        answer = ("", work(order))
    except DMFormerError as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        answer = (kind.__name__, str(error))
    Path(result).write_bytes(msgspec.json.encode(answer))
