"""What never answers ends, in one line that says what hung: engines, processes, other threads, pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from dmformer.assets import SAMPLE_IMAGES
from dmformer.errors import StageFailed, UsageError
from dmformer.process import engine_limit_s
from dmformer.serve.predictor import load

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Made

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the supervising parent")

# As native code hangs: with the interpreter's lock held, so that no signal handler and no thread of Python runs.
HANG = (
    "import ctypes, sys; lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64); "
    "hang = lambda *_: (lock(mutex), lock(mutex)); "
)
RUN = "from dmformer.__main__ import main; main()"
STUCK = {
    "onnxruntime running model.onnx": "from dmformer.runtimes.onnxruntime import OnnxRuntime as R; R.infer = hang; ",
    "onnxruntime loading model.onnx": "from dmformer.runtimes.onnxruntime import OnnxRuntime as R; R.load = hang; ",
    "importing onnxruntime": "from dmformer.runtimes.onnxruntime import OnnxSupport as S; S.import_engine = hang; ",
}


def supervised(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("command", "doing"),
    [
        ("verify", "onnxruntime running model.onnx"),
        ("predict", "importing onnxruntime"),
        *(pytest.param(command, doing, marks=pytest.mark.slow) for command in ("predict", "verify") for doing in STUCK),
    ],
)
def test_an_engine_that_hangs_ends_the_command_in_one_line(made: Made, command: str, doing: str) -> None:
    images = [SAMPLE_IMAGES / "7.png"] if command == "predict" else []
    arguments = (command, made.bundle, *images, "--runtime", "ort")
    process = supervised(HANG + STUCK[doing] + RUN, *arguments, DMFORMER_ENGINE_LIMIT_S="3")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"error: {doing}: no end within 3 s; the engine hangs, or")


@pytest.mark.slow
def test_an_engine_that_answers_is_not_ended(made: Made) -> None:
    code = f"import time; {RUN.removesuffix('main()')}import dmformer.commands.predict as p; main()"
    process = supervised(code, "predict", made.bundle, SAMPLE_IMAGES / "7.png", DMFORMER_ENGINE_LIMIT_S="30")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "7" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_does_not_end_when_it_is_told_to_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        f"{HANG}import signal, dmformer.process as p; p.STOP_S = 1; left = p.Path(sys.argv[1]); "
        "[signal.signal(n, lambda *_: sys.exit(0)) for n in (signal.SIGTERM, signal.SIGINT)]; "
        "p.supervise(lambda: (p.announce(left).write_text(''), print(flush=True), hang()))"
    )
    process = supervised(code, tmp_path / "half")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)  # until it hangs
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, (tmp_path / "half").exists()) == (128 + number, False)
    assert err == f"error: killed, for it did not end within 1 s of {number.name}\n"


def test_a_hang_up_that_nohup_ignores_kills_nothing() -> None:
    code = (
        "import signal, time, dmformer.process as p; p.STOP_S = 0.2; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "p.supervise(lambda: (print(flush=True), time.sleep(1.5), exit(5)))"
    )
    process = supervised(code)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 5


@pytest.mark.parametrize("named", ["soon", "0", "-3", "nan"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("DMFORMER_ENGINE_LIMIT_S", named)
    with pytest.raises(UsageError, match=f"DMFORMER_ENGINE_LIMIT_S is '{named}'; expected a number of seconds above 0"):
        engine_limit_s()


def test_a_thread_does_not_wait_for_another_for_good(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load(made.bundle, runtime="ort")
    with predictor:
        predictor.runtime.turn.acquire()
        monkeypatch.setenv("DMFORMER_ENGINE_LIMIT_S", "0.1")
        with pytest.raises(StageFailed, match=r"has been running model\.onnx for another thread for 0 s"):
            predictor.predict(SAMPLE_IMAGES / "7.png")
        predictor.runtime.turn.release()
        assert predictor.predict(SAMPLE_IMAGES / "7.png")
