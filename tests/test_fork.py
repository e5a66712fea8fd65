"""A predictor that was loaded before ``os.fork()``: the child answers, or says so in one line, and ends."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from dmformer.assets import SAMPLE_IMAGES

if TYPE_CHECKING:
    from tests.conftest import Made

SCRIPT = """
import os, sys, threading
import dmformer
bundle, image, runtime, threads, state = sys.argv[1:]
with dmformer.load(bundle, runtime=runtime, threads=int(threads)) as p:
    right = p.predict(image)[0].classes[0].index
    if state == "busy":  # as if another thread was in the engine
        p.runtime.turn.acquire()
    if state == "closed":  # the engine is still in the process
        p.__exit__(None, None, None)
    child = os.fork()
    if child == 0:
        try:
            print("right" if p.predict(image)[0].classes[0].index == right else "wrong", flush=True)
        except dmformer.errors.StageFailed as error:
            print("refused", error, flush=True)
        sys.exit(7)  # with all that an interpreter frees at its end
    if state == "busy":
        p.runtime.turn.release()
    if state == "closed":
        p.__enter__()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert p.predict(image)[0].classes[0].index == right
"""


@pytest.mark.parametrize(
    ("runtime", "threads", "state", "answer"),
    [
        ("onnxruntime", 1, "", "right"),
        ("onnxruntime", 1, "busy", "refused runtime onnxruntime was loaded before this process"),
        ("onnxruntime", 2, "", "refused runtime onnxruntime was loaded before this process"),
        ("openvino", 1, "", "refused runtime openvino was loaded before this process"),
        ("openvino", 2, "", "refused runtime openvino was loaded before this process"),
        ("openvino", 2, "closed", "refused runtime openvino is not open"),
        ("onnxruntime", 2, "closed", "refused runtime onnxruntime is not open"),
        pytest.param("torch", 2, "", "refused runtime torch was loaded before this process", marks=pytest.mark.slow),
    ],
)
def test_a_forked_process_answers_or_says_so_and_ends(
    made: Made, runtime: str, threads: int, state: str, answer: str
) -> None:
    command = [sys.executable, "-c", SCRIPT, made.bundle, SAMPLE_IMAGES / "7.png", runtime, str(threads), state]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line]
    assert line.startswith(answer)
