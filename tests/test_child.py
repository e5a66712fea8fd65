"""A function in a process of its own: whatever it does becomes an error of one line, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dmformer import errors
from dmformer.errors import DMFormerError, StageFailed
from dmformer.process import Child, call
from tests.bundles import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    Script = Callable[[str], None]

READ = "import os, signal, sys, time; order = sys.stdin.buffer.read(); "
ANSWER = "open(sys.argv[-1], 'w').write('[\"\", \"done\"]'); "


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Put a script in the function's place."""

    def replace(code: str) -> None:
        monkeypatch.setattr(
            Child, "command", staticmethod(lambda *arguments: [sys.executable, "-S", "-c", code, *arguments])
        )

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
        child.call("order", str, 60)
    assert expected in one_line(caught.value)
    assert is_gone(child)


@pytest.mark.parametrize(
    ("code", "order"),
    [
        pytest.param(READ + "time.sleep(30)", "", id="empty order"),
        pytest.param(READ + "time.sleep(30)", "x" * (1 << 20), id="order of 1 MB"),
        pytest.param("import time; time.sleep(30)", "order", id="order unread"),
    ],
)
def test_a_process_that_hangs_is_ended(script: Script, code: str, order: str) -> None:
    script(code)
    with Child("any") as child:
        with pytest.raises(StageFailed, match="the process did not end within 1 s"):
            child.call(order, str, 1)
        assert not is_gone(child)
    assert is_gone(child)


def test_a_process_that_hangs_before_it_took_a_large_order_leaves_no_pipe_open(script: Script) -> None:
    script("import time; time.sleep(30)")
    with Child("any") as child, pytest.raises(StageFailed, match="did not end"):
        child.call("x" * (1 << 20), str, 0.2)
    assert is_gone(child)
    pipes = [pipe for pipe in (child._process.stdin, child._process.stderr) if pipe is not None]
    left = [pipe for pipe in pipes if not pipe.closed]
    for pipe in left:
        pipe.close()
    assert not left


def test_a_process_that_ignores_a_polite_end_is_ended(script: Script) -> None:
    script(READ + "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)]; time.sleep(30)")
    with Child("any") as child, pytest.raises(StageFailed):
        child.call("", str, 1)
    assert child._process.returncode == -signal.SIGKILL
    assert is_gone(child)


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_the_order_arrives_whole(script: Script, tmp_path: Path, size: int) -> None:
    order = os.urandom(size).hex()
    script(READ + f"open({str(tmp_path / 'copy')!r}, 'wb').write(order); {ANSWER}")
    with Child("any") as child:
        assert child.call(order, str, 60) == "done"
    assert json.loads((tmp_path / "copy").read_bytes()) == order
    assert is_gone(child)


@pytest.mark.parametrize("code", ["import sys; ", "import sys; sys.stdin.close(); "])
def test_an_order_that_is_not_read_is_no_failure_of_its_own(script: Script, code: str) -> None:
    script(code + ANSWER)
    with Child("any") as child:
        assert child.call("x" * (1 << 20), str, 60) == "done"
    assert child._process.returncode == 0
    assert is_gone(child)


@pytest.mark.parametrize("when", ["before reading", "after reading"])
def test_much_output_does_not_block(script: Script, capfd: pytest.CaptureFixture[str], when: str) -> None:
    noise = "[(sys.stdout.write('o' * 4095 + '\\n'), sys.stderr.write('e' * 4095 + '\\n')) for _ in range(512)]; "
    code = f"import sys; {noise} sys.stdin.buffer.read();" if when == "before reading" else READ + noise
    script(code + "sys.exit('the last line')")
    with Child("any") as child, pytest.raises(StageFailed, match=r"^the process failed: the last line$"):
        child.call("x" * (1 << 20), str, 60)
    assert capfd.readouterr() == ("", "")


def test_warnings_of_a_process_that_did_its_work_are_no_failure(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    script(READ + "sys.stderr.write('be careful\\n'); " + ANSWER)
    with Child("any") as child:
        assert child.call("", str, 60) == "done"
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
        child.call("", str, 60)
    assert is_gone(child)


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "open(sys.argv[-1], 'w')",
        "open(sys.argv[-1], 'w').write('[')",
        "open(sys.argv[-1], 'w').write('[\"\", 1]')",
    ],
    ids=["nothing", "empty", "half", "of another type"],
)
def test_a_process_that_ends_without_a_result(script: Script, code: str) -> None:
    script(READ + code)
    with Child("any") as child, pytest.raises(StageFailed, match=r"^the process ended without an answer$"):
        child.call("", str, 60)


def test_nothing_of_it_stays(script: Script) -> None:
    script(READ + ANSWER)
    with Child("any") as child:
        assert child.call("", str, 60) == "done"
        assert child._result.is_file()
    assert not child._result.parent.exists()


# --- the real command -------------------------------------------------------------------------------------------------


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes import the tests too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)


def fail(order: tuple[str, str]) -> None:
    name, message = order
    raise getattr(errors, name)(message)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("kind", [DMFormerError, *DMFormerError.__subclasses__()])
def test_a_failure_comes_back_as_it_was_raised(kind: type[DMFormerError]) -> None:
    with pytest.raises(DMFormerError, match=r"^in so many words$") as caught:
        call("tests.test_child:fail", (kind.__name__, "in so many words"), type(None), 60)
    assert type(caught.value) is kind


def echo(order: dict[int, str]) -> dict[int, str]:
    if 0 in order:
        raise StageFailed(order[0])
    return order


@pytest.mark.usefixtures("importable")
def test_names_that_are_no_utf8_come_and_go_as_they_are() -> None:
    name = os.fsdecode(b"caf\xe9.png")
    assert call("tests.test_child:echo", {1: name}, dict[int, str], 60) == {1: name}
    with pytest.raises(StageFailed, match=f"^{name}$"):
        call("tests.test_child:echo", {0: name}, dict[int, str], 60)


@pytest.mark.usefixtures("importable")
def test_an_order_of_another_type_is_refused() -> None:
    with pytest.raises(StageFailed, match=r"the process failed: msgspec\.ValidationError: Expected `array`"):
        call("tests.test_child:fail", "no order", type(None), 60)


@pytest.mark.parametrize("function", ["dmformer.nonsense:f", "dmformer.process:nonsense"])
def test_a_function_that_does_not_exist(function: str) -> None:
    with pytest.raises(StageFailed, match="nonsense"):
        call(function, "", str, 60)


def prepare() -> None:
    os.environ["PREPARED"] = "yes"


def environment(name: str) -> str | None:
    return os.environ.get(name)


@pytest.mark.usefixtures("importable")
def test_it_prepares_before_there_is_an_order() -> None:
    with Child("tests.test_child:environment", prepare="tests.test_child:prepare") as child:
        assert child.call("PREPARED", str, 60) == "yes"


@pytest.mark.usefixtures("importable")
def test_its_environment_is_the_one_that_was_given() -> None:
    given = {**os.environ, "GIVEN": "yes"}
    assert call("tests.test_child:environment", "GIVEN", str, 60, environment=given) == "yes"


@pytest.mark.parametrize("trap", ["pkgutil.py", "json/__init__.py", "msgspec.py", "dmformer/__init__.py", "typing.py"])
def test_modules_in_the_working_folder_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    path, sprung = tmp_path / trap, tmp_path / "sprung"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"open({str(sprung)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert call("json:dumps", [1], str, 60) == "[1]"
    assert not sprung.exists()


def test_modules_on_the_path_are_still_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("import sys\ndef path(order: str) -> list[str]:\n    return sys.path\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    path = call("mine:path", "", list[str], 60)
    assert str(tmp_path) in path
    assert "" not in path
    assert str(Path.cwd()) not in path
