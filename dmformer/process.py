"""Child processes: the whole command line in one (:func:`supervise`), and one function in one (:func:`call`).

Engines parse what a bundle holds in C++, and a file that means harm can make them crash: OpenVINO 2026.4 ends by SIGFPE
on an input of 2^31 columns. A process cannot outlive that, and its parent can: a crash of the command line becomes one
line and an exit code, a crash or hang of a function becomes an error of its stage.

An engine may also never answer, and Python cannot stop native code from within its process. In the command line the
kernel's alarm ends it (:class:`Limited`), and the parent says what hung; a process that does not end when it is told to
is killed after a while.

This module is imported before anything else is, so what takes long to import stands inside functions.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

from dmformer import errors
from dmformer.errors import DMFormerError, StageFailed

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Mapping, Sequence
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
_ENGINE_LIMIT = "DMFORMER_ENGINE_LIMIT_S"
_USUAL_LIMIT_S = 900.0
_LONGEST = 500  # bytes of a sentence that parent and child share
_LONGEST_S = 1e6  # that the system's clocks take
STOP_S = 30.0  # in which a process that is told to end should have ended
# Memory that parent and child share, once there are two: names of temporary files, and what an alarm is set for.
_announced: int | None = None
_awaited: mmap.mmap | None = None


def announce(path: Path) -> Path:
    """Say that a file or folder is temporary before it is made: where this process crashes, its parent removes it."""
    if _announced is not None:
        os.write(_announced, os.fsencode(path.absolute()) + b"\0")
    return path


@contextmanager
def printing_to_stderr() -> Iterator[None]:
    """Let what Python, native code and child processes print in the block go to standard error.

    Standard output is for results: PyTorch's tracing exporter prints its graph there when it fails, and a network of
    one's own whatever its author was looking for.
    """
    streams = (sys.stdout, sys.__stdout__)  # what is written to them in the block is held until they are flushed
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (AttributeError, OSError, ValueError):  # there is no such stream, or it was closed
        with redirect_stdout(sys.stderr):
            yield
        return
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for stream in streams:
            if stream is not None:
                with suppress(OSError, ValueError):  # it was closed, or nobody reads it
                    stream.flush()
        _flush_native()
        os.dup2(kept, 1)
        os.close(kept)


def _flush_native() -> None:
    """Write what native code printed and C's library still holds, as it does where the stream is no terminal."""
    if os.name == "posix":
        import ctypes

        ctypes.CDLL(None).fflush(None)


def engine_limit_s() -> float:
    """Return how many seconds one call of an engine may take; ``DMFORMER_ENGINE_LIMIT_S`` names another number.

    Raises:
        UsageError: it is no number above 0.
    """
    named = os.environ.get(_ENGINE_LIMIT, "") or str(_USUAL_LIMIT_S)
    with suppress(ValueError):
        if (limit := float(named)) > 0:
            return min(limit, _LONGEST_S)
    raise errors.UsageError(f"{_ENGINE_LIMIT} is {named!r}; expected a number of seconds above 0")


class Limited:
    """A block in which an engine is called: in the command line its process ends where that takes too long.

    A context manager, of any number of blocks one after the other; in a block within another the outer one counts. In
    Python, and on systems without the supervising parent, nothing ends: the process is not ours, and nothing less than
    its end stops native code.

    Args:
        doing: which engine does what, for the message.
    """

    __slots__ = ("_doing", "_outermost")

    def __init__(self, doing: str) -> None:
        self._doing = doing.encode(errors="replace")[:_LONGEST]
        self._outermost = False

    def __enter__(self) -> None:
        if _awaited is None or _awaited[0]:
            return
        self._outermost = True
        _awaited[: len(self._doing) + 1] = self._doing + b"\0"
        signal.setitimer(signal.ITIMER_REAL, engine_limit_s())

    def __exit__(self, *_: object) -> None:
        if self._outermost and _awaited is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _awaited[0], self._outermost = 0, False


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
    import mmap

    global _announced, _awaited
    _announced, _awaited = os.memfd_create("announced"), mmap.mmap(-1, mmap.PAGESIZE)
    waited_for = {signal.SIGCHLD, *(signal.Signals[name] for name in _FORWARDED)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as it may be inherited, it would not come
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _end_with(parent)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before - {signal.SIGALRM})
        main()
        return
    told, deadline = 0, float("inf")  # to end: by which signal, and until when it may take
    while True:
        left_s = min(max(deadline - time.monotonic(), 0.0), _LONGEST_S)
        received = signal.sigtimedwait(waited_for, left_s)
        if received is None:
            if told:
                _end_for(child, told)
            continue
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                _end_as(os.waitstatus_to_exitcode(status))
            continue
        if not told and signal.getsignal(received.si_signo) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            told, deadline = received.si_signo, time.monotonic() + STOP_S
        if received.si_code <= 0:  # sent by a process to this one; the terminal tells every process of the group
            os.kill(child, received.si_signo)


def _end_with(parent: int) -> None:
    """Let this process be ended when its parent is killed: nobody would be left to report to."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before that
        os.kill(os.getpid(), signal.SIGTERM)


def _end_for(child: int, told: int) -> NoReturn:
    """End a child that did not end when it was told to, and this process as the child should have ended."""
    os.kill(child, signal.SIGKILL)
    _remove_announced()
    doing = f": {_what_hung()}" if _what_hung() else ""
    sys.stderr.write(f"error: killed, for it did not end within {STOP_S:.0f} s of {signal.Signals(told).name}{doing}\n")
    sys.exit(128 + told)


def _what_hung() -> str:
    assert _awaited is not None
    return _awaited[:].split(b"\0", 1)[0].decode(errors="replace")


def _end_as(code: int) -> NoReturn:
    """End this process as its child ended, with one line where that was a crash."""
    _remove_announced()  # also of a child that was told to end once more while it removed them
    if code >= 0:
        os._exit(code)  # the child has flushed
    name = signal.Signals(-code).name
    if name == "SIGALRM" and _what_hung():
        sys.stderr.write(
            f"error: {_what_hung()}: no end within {engine_limit_s():.0f} s; the engine hangs, or is slow on this "
            f"machine: try another --runtime, or a higher {_ENGINE_LIMIT}\n"
        )
        sys.exit(1)
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
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Child:
    """A process for one call of one function, started at once: it imports the function and waits for its order.

    The order goes in by standard input, the result comes back in a file (native libraries print to standard output),
    both as JSON, in which paths that are no UTF-8 stay what they are. A context manager: leaving it ends the process.

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
        with suppress(subprocess.TimeoutExpired):  # a driver or a file server may keep even what was killed
            self._process.wait(STOP_S)
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
        import json

        import msgspec

        try:
            _, messages = self._process.communicate(_encoded(order), timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimedOut(f"the process did not end within {timeout_s:.0f} s") from error
        code = self._process.returncode
        if code < 0:
            raise Crashed(signal.Signals(-code))
        if code > 0:
            lines = messages.decode(errors="replace").strip().splitlines() or ["no message"]
            raise StageFailed(f"the process failed: {lines[-1]}")
        try:
            failure, content = json.loads(self._result.read_bytes())
            if not failure:
                return msgspec.convert(content, result, str_keys=True)
            message = msgspec.convert(content, str)
        except (OSError, ValueError, TypeError) as error:  # no file, half a file, or of another type
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
    import json
    from pkgutil import resolve_name

    import msgspec

    work = resolve_name(function)
    if prepare:
        resolve_name(prepare)()
    kind = next(iter(get_type_hints(work).values()), Any)
    order = msgspec.convert(json.loads(sys.stdin.buffer.read()), kind, str_keys=True)
    try:
        answer = ("", work(order))
    except DMFormerError as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        answer = (kind.__name__, str(error))
    Path(result).write_bytes(_encoded(answer))


def _encoded(content: Any) -> bytes:
    """Encode as JSON in ASCII, which can say what UTF-8 cannot: bytes of file names that Python keeps as surrogates."""
    import json

    import msgspec

    return json.dumps(msgspec.to_builtins(content, str_keys=True)).encode()
