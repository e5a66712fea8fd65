"""A module in a process of its own: whatever it does becomes an error of one line, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dmformer.errors import StageFailed
from dmformer.process import Child
from tests.bundles import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    Script = Callable[[str], None]

READ = "import os, signal, sys, time; order = sys.stdin.buffer.read(); "


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Put a script in the module's place."""

    def replace(code: str) -> None:
        monkeypatch.setattr(Child, "command", staticmethod(lambda _: [sys.executable, "-S", "-c", code]))

    return replace


def is_gone(child: Child) -> bool:
    """Whether not even a zombie of it is left."""
    try:
        os.kill(child._process.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process was ended by signal 9"),
        ("signal.signal(signal.SIGSEGV, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("os.abort()", "the process was ended by signal 6"),
        ("raise RuntimeError('out of luck')", "the process failed: RuntimeError: out of luck"),
        ("raise RuntimeError('two\\nlines')", "the process failed: lines"),
        ("sys.exit('said so')", "the process failed: said so"),
        ("sys.exit(3)", "the process failed: no message"),
        ("sys.stderr.buffer.write(b'\\xff\\xfe\\n\\n'); sys.exit(1)", "the process failed: \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_a_process_that_goes_wrong_is_one_line(script: Script, code: str, expected: str) -> None:
    script(READ + code)
    with Child("any") as child, pytest.raises(StageFailed) as caught:
        child.work(b"order", 60)
    assert expected in one_line(caught.value)
    assert is_gone(child)


@pytest.mark.parametrize(
    ("code", "order"),
    [
        pytest.param(READ + "time.sleep(30)", b"", id="empty order"),
        pytest.param(READ + "time.sleep(30)", b"x" * (1 << 20), id="order of 1 MB"),
        pytest.param("import time; time.sleep(30)", b"order", id="order unread"),
    ],
)
def test_a_process_that_hangs_is_ended(script: Script, code: str, order: bytes) -> None:
    script(code)
    with Child("any") as child:
        with pytest.raises(StageFailed, match="the process did not end within 1 s"):
            child.work(order, 1)
        assert not is_gone(child)
    assert is_gone(child)


def test_a_process_that_hangs_before_it_took_a_large_order_leaves_no_pipe_open(script: Script) -> None:
    script("import time; time.sleep(30)")
    with Child("any") as child, pytest.raises(StageFailed, match="did not end"):
        child.work(b"x" * (1 << 20), 0.2)
    assert is_gone(child)
    pipes = [pipe for pipe in (child._process.stdin, child._process.stderr) if pipe is not None]
    left = [pipe for pipe in pipes if not pipe.closed]
    for pipe in left:
        pipe.close()
    assert not left


def test_a_process_that_ignores_a_polite_end_is_ended(script: Script) -> None:
    script(READ + "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)]; time.sleep(30)")
    with Child("any") as child, pytest.raises(StageFailed):
        child.work(b"", 1)
    assert child._process.returncode == -signal.SIGKILL
    assert is_gone(child)


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_the_order_arrives_whole(script: Script, tmp_path: Path, size: int) -> None:
    order = os.urandom(size)
    script(READ + f"open({str(tmp_path / 'copy')!r}, 'wb').write(order)")
    with Child("any") as child:
        child.work(order, 60)
    assert (tmp_path / "copy").read_bytes() == order
    assert is_gone(child)


@pytest.mark.parametrize("code", ["pass", "import sys; sys.stdin.close()"])
def test_an_order_that_is_not_read_is_no_failure_of_its_own(script: Script, code: str) -> None:
    script(code)
    with Child("any") as child:
        child.work(b"x" * (1 << 20), 60)
    assert child._process.returncode == 0
    assert is_gone(child)


@pytest.mark.parametrize("when", ["before reading", "after reading"])
def test_much_output_does_not_block(script: Script, capfd: pytest.CaptureFixture[str], when: str) -> None:
    noise = "[(sys.stdout.write('o' * 4095 + '\\n'), sys.stderr.write('e' * 4095 + '\\n')) for _ in range(512)]; "
    code = f"import sys; {noise} sys.stdin.buffer.read();" if when == "before reading" else READ + noise
    script(code + "sys.exit('the last line')")
    with Child("any") as child, pytest.raises(StageFailed, match=r"^the process failed: the last line$"):
        child.work(b"x" * (1 << 20), 60)
    assert capfd.readouterr() == ("", "")


def test_warnings_of_a_process_that_did_its_work_are_no_failure(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    script(READ + "sys.stderr.write('be careful\\n')")
    with Child("any") as child:
        child.work(b"", 60)
    assert capfd.readouterr() == ("", "")


def test_it_starts_before_there_is_work(script: Script) -> None:
    script("import sys; sys.stderr.write('started\\n'); sys.stderr.flush(); sys.stdin.read()")
    with Child("any") as child:
        assert child._process.stderr is not None
        assert child._process.stderr.readline() == b"started\n"


@pytest.mark.parametrize("code", [READ, "import time; time.sleep(30)", "pass"], ids=["waits", "sleeps", "ended"])
def test_a_process_that_is_given_no_work_is_ended(script: Script, code: str) -> None:
    script(code)
    with Child("any") as child:
        if code == "pass":
            child._process.wait(60)
    assert is_gone(child)


def test_an_exception_before_the_work_ends_the_process(script: Script) -> None:
    script(READ)
    with pytest.raises(KeyError, match="mine"), Child("any") as child:
        raise KeyError("mine")
    assert is_gone(child)


def test_an_exception_while_it_works_ends_the_process(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        monkeypatch.undo()
        raise SystemExit(143)  # as the command line does on SIGTERM

    script(READ + "time.sleep(30)")
    child = Child("any")
    monkeypatch.setattr(child._process, "communicate", stop)
    with pytest.raises(SystemExit), child:
        child.work(b"", 60)
    assert is_gone(child)


# --- the real command -------------------------------------------------------------------------------------------------


def test_a_module_of_this_package_runs() -> None:
    with Child("dmformer.bench.worker") as child, pytest.raises(StageFailed, match="the process failed: msgspec"):
        child.work(b"no job", 60)


def test_a_module_that_does_not_exist() -> None:
    with Child("dmformer.nonsense") as child, pytest.raises(StageFailed, match=r"dmformer\.nonsense"):
        child.work(b"", 60)


@pytest.mark.parametrize("trap", ["argparse.py", "json/__init__.py", "runpy.py", "sitecustomize.py"])
def test_modules_in_the_working_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    """``json.tool`` has what it takes: it imports argparse, reads standard input and writes a file."""
    path, sprung = tmp_path / trap, tmp_path / "sprung"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"open({str(sprung)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with Child("json.tool") as child:
        child.work(b"[1]", 60)
    assert not sprung.exists()


def test_modules_on_the_path_are_still_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("import sys; open(sys.stdin.read(), 'w').write(repr(sys.path))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Child("mine") as child:
        child.work(str(tmp_path / "told").encode(), 60)
    told = (tmp_path / "told").read_text()
    assert str(tmp_path) in told
    assert "''" not in told
    assert json.dumps(str(Path.cwd())) not in told
