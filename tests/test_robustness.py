"""Damaged and hostile input, by the hundred: an exit code of the table, one line, and nothing else touched."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from dmformer.assets import SAMPLE_IMAGES
from dmformer.bundle.manifest import MANIFEST
from dmformer.bundle.reader import open_bundle
from dmformer.errors import UsageError
from tests import mutants
from tests.bundles import adopt, one_line, rewrite
from tests.conftest import LITERT, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Run

    Cli = Callable[..., Run]

DIGIT = SAMPLE_IMAGES / "7.png"


def sensible(code: int, said: str) -> str:
    """The line of a command that was refused; empty where it was not."""
    assert code in (0, 1, 2, 3), said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    assert "a defect of dmformer" not in said
    assert len(lines) == (code != 0), said
    return "".join(lines)


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- manifests --------------------------------------------------------------------------------------------------------


def few_files(bundle: Path) -> None:
    """A bundle of a manifest that lists next to nothing, so that the manifest is what is tested."""

    def shorten(content: dict[str, Any]) -> None:
        content["artifacts"] = content["artifacts"][1:2]
        content["files"] = content["files"][1:]

    kept = {MANIFEST, mutants.ONNX, "reports/parity.json"}
    rewrite(bundle, shorten)
    for name in everything(bundle):
        if name not in kept:
            (bundle / name).unlink()


@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_mutated_manifests(inline: Cli, bundle: Path, kind: str, tmp_path: Path) -> None:
    """A hundred of each kind."""
    few_files(bundle)
    path = bundle / MANIFEST
    data = path.read_bytes()
    others = {name: content for name, content in everything(tmp_path).items() if not name.endswith(MANIFEST)}
    refused = 0
    for number in range(100):
        generator = random.Random(f"{kind} {number}")
        if kind == "bytes":
            path.write_bytes(mutants.changed_bytes(data, generator))
        else:
            content = json.loads(data)
            for _ in range(generator.choice((1, 1, 2, 4))):
                mutants.changed_json(content, generator)
            path.write_text(json.dumps(content), encoding="utf-8")
        try:
            open_bundle(bundle)
        except UsageError as error:
            refused += 1
            one_line(error)
            continue
        for command in ("inspect", "check"):
            run = inline(command, bundle)
            assert run.code in ((0,) if command == "inspect" else (0, 1))
            sensible(run.code, run.out + run.err)
    assert 20 < refused < 98
    assert {name: content for name, content in everything(tmp_path).items() if not name.endswith(MANIFEST)} == others


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_mutated_checkpoints(tmp_path: Path, form: str) -> None:
    """One hundred of each form; half of the changes are in the header."""
    import torch
    from safetensors.torch import save

    from dmformer.models.checkpoint import load_checkpoint
    from tests.networks import tiny

    stored = io.BytesIO()
    if form == "safetensors":
        stored.write(save({name: value.contiguous() for name, value in tiny().state_dict().items()}))
    else:
        torch.save(tiny().state_dict(), stored, _use_new_zipfile_serialization=form == "zip")
    data = stored.getvalue()
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    refused = []
    for number in range(100):
        generator = random.Random(f"{form} {number}")
        positions = range(2000) if number % 2 else None
        path.write_bytes(mutants.changed_bytes(data, generator, positions))
        try:
            load_checkpoint(path)
        except UsageError as error:
            refused.append(error)
    assert 20 < len(refused) < 100
    assert all(map(one_line, refused))
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


# --- models -----------------------------------------------------------------------------------------------------------


def test_mutated_onnx_files_under_the_old_hash(inline: Cli, bundle: Path) -> None:
    """Thirty: found before anything parses them."""
    path = bundle / mutants.ONNX
    data = path.read_bytes()
    for number in range(30):
        changed = mutants.changed_bytes(data, random.Random(number))
        path.write_bytes(changed)
        run = inline("predict", bundle, DIGIT, "--runtime", "ort")
        line = sensible(run.code, run.out + run.err)
        if changed != data:
            assert "changed or damaged" in line


def outcomes(bundle: Path, command: str, kind: str, count: int) -> tuple[list[int], list[int]]:
    """Exit codes of the mutants that ended well, and the numbers of those that ended the process."""
    codes: list[int] = []
    crashed: list[int] = []
    while len(codes) + len(crashed) < count:
        first = len(codes) + len(crashed)
        done = subprocess.run(
            [sys.executable, "-m", "tests.mutants", bundle, command, kind, str(first), str(count)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=500,
            check=False,
        )
        found = [json.loads(line) for line in done.stdout.splitlines()]
        for each in found:
            sensible(each["code"], each["said"])
        codes += [each["code"] for each in found]
        if done.returncode:
            assert done.returncode < 0, done.stderr
            crashed.append(first + len(found))
    return codes, crashed


def contained(bundle: Path, command: str, kind: str, number: int, cli: Cli) -> None:
    """What ends a process is one line and exit code 1 of the command line."""
    data = (bundle / mutants.FILES[kind]).read_bytes()
    mutant = bundle.parent / "again"
    shutil.copytree(bundle, mutant)
    mutants.mutate(mutant, kind, number, mutants.mutator(kind, data))
    run = cli(*[argument.replace("BUNDLE", str(mutant)) for argument in command.split()])
    assert run.code in (0, 1)  # memory is not bounded here
    sensible(run.code, run.err)
    shutil.rmtree(mutant)


PREDICT = f"predict BUNDLE {DIGIT} --runtime "
BUILD = "build BUNDLE --format ov"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kind", "count"),
    [
        (PREDICT + "ort", "onnx", 50),
        (PREDICT + "ort", "graph", 40),
        (PREDICT + "ov", "xml", 40),
        (BUILD, "onnx", 15),
        (BUILD, "graph", 15),
        (PREDICT + "ncnn", "param", 40),
        (PREDICT + "ncnn", "numbers", 40),
        (PREDICT + "ncnn", "bin", 20),
        (PREDICT + "litert", "tflite", 40),
    ],
    ids=lambda value: None if isinstance(value, int) else value.partition(" --")[2] or value,
)
def test_mutated_models_under_a_hash_that_fits(
    cli: Cli, bundle: Path, command: str, kind: str, count: int, request: pytest.FixtureRequest
) -> None:
    """The engine gets them; it refuses them, or answers, or its crash is contained."""
    if kind in ("param", "numbers", "bin", "tflite"):
        shutil.rmtree(bundle)
        shutil.copytree(LITERT if kind == "tflite" else request.getfixturevalue("with_ncnn"), bundle)
    before = everything(bundle)
    codes, crashed = outcomes(bundle, command, kind, count)
    assert {1, 2} & set(codes)  # what is looked into before the engine gets it is refused as unusable
    for number in crashed[:2]:
        contained(bundle, command, kind, number, cli)
    assert everything(bundle) == before


# --- crashes of native code -------------------------------------------------------------------------------------------

SUPERVISED = """
import os, signal, sys, time
from dmformer.process import supervise
def main():
    {0}
supervise(main)
"""


def supervised(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISED.format(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="crashes are contained on Linux only")


@linux
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGFPE", "SIGABRT", "SIGBUS", "SIGILL", "SIGKILL"])
def test_a_crash_is_one_line_and_1(name: str) -> None:
    process = supervised(f"os.kill(os.getpid(), signal.{name})")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert name in sensible(1, err)
    assert len(err.splitlines()) == 1


@linux
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGSEGV)", "sys.exit(130)"])
def test_what_a_process_leaves_is_removed(end: str, tmp_path: Path) -> None:
    """By a crash, or where a second Ctrl-C interrupts its removal; what was renamed or never made does no harm."""
    process = supervised(
        "from pathlib import Path; from dmformer.process import announce; "
        f"root = Path({str(tmp_path)!r}); "
        "names = [announce(root / name) for name in ('folder', 'file', 'renamed', 'never made')]; "
        "(names[0] / 'inner').mkdir(parents=True); names[1].touch(); names[2].touch(); names[2].rename(root / 'kept'); "
        f"{end}"
    )
    process.communicate(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@linux
@pytest.mark.parametrize("code", [0, 1, 2, 3, 130, 141])
def test_other_exit_codes_stay(code: int) -> None:
    process = supervised(f"print('said'); sys.exit({code})")
    assert process.communicate(timeout=60) == ("said\n", "")
    assert process.returncode == code


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_child(number: signal.Signals) -> None:
    """Though it is sent to the process that the shell knows."""
    process = supervised(
        "seen = []; [signal.signal(n, lambda n, _: seen.append(n)) for n in (1, 2, 15)]; "
        "print('ready', flush=True); [time.sleep(0.02) for _ in iter(lambda: not seen, False)]; "
        "time.sleep(0.2); print(len(seen)); sys.exit(5)"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert out == "1\n"
    assert process.returncode == 5


@linux
def test_a_process_does_not_outlive_its_parent() -> None:
    process = supervised("print(os.getpid(), flush=True); time.sleep(60)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=60)  # until the pipes are closed, the child's as well
    for _ in range(500):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("it still runs")


@pytest.mark.slow
def test_a_graph_that_makes_an_engine_crash(cli: Cli, bundle: Path) -> None:
    """A convolution over 2^29 columns: OpenVINO 2026.4 ends by SIGFPE while it compiles it."""
    from onnx import helper

    path = bundle / mutants.ONNX
    weight = helper.make_tensor("weight", 1, [64, 32, 3, 3], [1.0] * (64 * 32 * 9))
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["image", "weight"], ["logits"], pads=[1] * 4)],
            "wide",
            [helper.make_tensor_value_info("image", 1, ["batch", 32, 2, 1 << 29])],
            [helper.make_tensor_value_info("logits", 1, None)],
            [weight],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    path.write_bytes(model.SerializeToString())
    adopt(bundle, mutants.ONNX)
    before = everything(bundle)
    run = cli("build", bundle, "--format", "ov")
    assert run.code == 1
    assert run.error_line  # of the crash, or of a later OpenVINO's refusal
    assert everything(bundle) == before
    # The lock's file stays: removing it is for who holds the lock, and nobody does any more.
    assert {path.name for path in bundle.parent.iterdir()} <= {"bundle", ".bundle-lock"}
