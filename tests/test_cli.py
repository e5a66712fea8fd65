"""The command line as users have it: exit codes, one line for each failure, JSON, and the last bundle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator

import dmformer
from dmformer.assets import SAMPLE_IMAGES
from dmformer.bundle.manifest import MANIFEST
from dmformer.bundle.reader import open_bundle
from dmformer.files import hash_file
from dmformer.runtimes.cuda import driver_missing
from tests.bundles import rewrite
from tests.paper_bundle import write_bundle
from tests.test_rooms import imported
from tests.tiers import first

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Made, Run

    Cli = Callable[..., Run]

SCHEMAS = Path(dmformer.__file__).parent / "schemas"
COMMANDS = (
    "export", "verify", "bench", "eval", "predict", "inspect", "report", "doctor", "sign", "check", "pack", "unpack",
    "tune",
)  # fmt: skip
DIGIT = SAMPLE_IMAGES / "3.png"


@pytest.fixture
def spoilt(made: Made, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made.bundle, tmp_path / "spoilt"))


def valid(text: str, schema: str) -> Any:
    """The document, once it was found to be one JSON document and valid."""
    document = json.loads(text)
    Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text(encoding="utf-8"))).validate(document)
    return document


def hidden(folder: Path, engine: str, error: str) -> str:
    """A PYTHONPATH on which an engine fails to import."""
    folder.mkdir()
    (folder / f"{engine}.py").write_text(f"raise {error}\n")
    return str(folder)


# --- without a bundle -------------------------------------------------------------------------------------------------


def test_without_arguments_there_is_help(cli: Cli, inline: Cli) -> None:
    bare, asked = cli(), inline("--help")
    assert (bare.code, bare.err) == (0, "")
    assert bare.out == asked.out
    assert all(command in bare.out for command in COMMANDS)


def test_version(cli: Cli) -> None:
    run = cli("--version")
    assert (run.code, run.out.split(), run.err) == (0, ["dmformer", dmformer.__version__], "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["exprot"], "exprot"),
        (["--nonsense"], "--nonsense"),
        (["verify", "--nonsense"], "--nonsense"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--batch", "many"], "--batch"),
        (["bench", "--threads", "0"], "--threads"),
        (["bench", "--duration", "long"], "--duration"),
        (["predict"], "IMAGE"),
        (["predict", "--top-k", "0", DIGIT], "--top-k"),
        (["inspect", "a", "b"], "unexpected"),
        (["inspect", "nowhere"], "no bundle at 'nowhere'"),
        (["verify"], "no bundle named"),
        (["bench"], "dmformer export"),
        (["predict", DIGIT], "no bundle named"),
        (["doctor", "nowhere"], "no bundle at"),
        (["verify", "--json"], "--json"),
        (["report"], "nothing to write; expected --html FILE, --bom FILE or both"),
        (["report", "--html", "x", "--bom", "x"], "expected two files"),
        (["report", "--html", "nowhere/x.html"], "expected a file in a folder that exists"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_2(inline: Cli, arguments: list[object], expected: str) -> None:
    run = inline(*arguments)
    assert run.code == 2
    assert expected in run.error_line
    assert run.out == ""


@pytest.mark.parametrize("arguments", [["--debug", "inspect", "nowhere"], ["inspect", "nowhere", "--debug"]])
def test_debug_anywhere_gives_the_traceback_and_the_same_code(cli: Cli, arguments: list[str]) -> None:
    run = cli(*arguments)
    assert run.code == 2
    assert "Traceback" in run.err
    assert run.err.splitlines()[-1].startswith("error: no bundle at")


def test_debug_is_known_to_every_command(inline: Cli) -> None:
    for command in ("", *COMMANDS, "build", "cache", "serve-layout", "train"):
        run = inline(*command.split(), "--debug", "--nonsense")
        assert run.code == 2
        assert "error: No such option: --nonsense" in run.err
        assert "Traceback" in run.err


def test_debug_alone_is_help(inline: Cli) -> None:
    assert "Usage" in inline("--debug").out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--precision", "int4"], "int4"),
        (["--format", "coreml"], "coreml"),
        (["--weights", "missing.safetensors"], "missing.safetensors"),
        (["--weights", "text.safetensors"], "text.safetensors"),
        (["--weights", "text.pth"], "text.pth"),
        (["--arch", "resnet"], "resnet"),
        (["--model-option", "dilations"], "KEY=VALUE"),
        (["--precision", "bf16"], "precision 'bf16'; expected one of fp32, fp16, int8, or auto"),
        (["--precision", "auto", "--precision", "fp16"], "precision auto with fp16; expected it alone"),
        (["--precision", "int8", "--format", "torch"], "leave --format torch out"),
        (["--precision", "int8", "--arch", "dmformer_nano"], "expected --calibration, a folder"),
        (["--max-accuracy-drop", "-1"], "--max-accuracy-drop is -1"),
        (["--max-accuracy-drop", "lots"], "--max-accuracy-drop"),
        (["--precision", "int8", "--calibration", "nowhere"], "nowhere"),
        (["--precision", "int8", "--calibration", "empty"], "empty"),
        (
            ["--precision", "int8", "--calibration", "strange"],
            "strange/cat: no class of the network; expected one of 0",
        ),
        (["--precision", "int8", "--calibration", "mixed"], "beside the class folders"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_export_of_what_cannot_be_used_is_2_and_writes_nothing(
    inline: Cli, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    for name in ("text.safetensors", "text.pth"):
        (tmp_path / name).write_text("these are no weights\n")
    for name in ("empty", "strange/cat", "strange/1", "mixed/3"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("strange/cat", "strange/1", "mixed/3", "mixed"):
        shutil.copy(DIGIT, tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    run = inline("export", *arguments)
    assert run.code == 2, run.err
    assert expected in run.error_line
    assert sorted(path for path in tmp_path.rglob("*") if "state" not in path.parts) == before


def test_export_into_a_foreign_folder_is_2(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("mine")
    run = cli("export", "--output", "photos")
    assert run.code == 2
    assert "other things in it" in run.error_line
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["1.jpg"]


def test_export_dry_run_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    run = cli("export", "--dry-run", "--format", "ov", "--output", "out")
    assert run.code == 0
    assert "openvino/fp32/" in run.out
    assert "demonstration checkpoint" in run.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_export_dry_run_lists_every_precision(cli: Cli, inline: Cli, tmp_path: Path) -> None:
    precisions = ("--precision", "int8", "--precision", "fp16")
    run = cli("export", "--dry-run", "--format", "onnx", "--format", "ov", *precisions, "--output", "out")
    assert run.code == 0, run.err
    artifacts = [f"{name}/{precision}/" for name in ("onnx", "openvino") for precision in ("int8", "fp16")]
    assert run.out.split() == ["manifest.json", "golden.npz", *artifacts, "reports/parity.json", "reports/bench.json"]
    automatic = inline("export", "--dry-run", "--precision", "auto")
    assert [line for line in automatic.out.split() if line.endswith("/")] == ["onnx/fp32/", "onnx/fp16/", "onnx/int8/"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_export_without_the_deploy_form_leaves_the_norms(inline: Cli, made: Made, tmp_path: Path) -> None:
    import onnx

    run = inline("export", "--no-deploy-form", "--format", "all", "--output", "b")
    assert run.code == 0, run.err
    made_of_all = [artifact.format for artifact in open_bundle(tmp_path / "b").manifest.artifacts]
    assert made_of_all == ["torch", "onnx", "openvino", "ncnn"]
    norms = [
        sum(node.op_type == "BatchNormalization" for node in onnx.load(folder / "onnx/fp32/model.onnx").graph.node)
        for folder in (made.bundle, tmp_path / "b")
    ]
    assert norms[0] == 0
    assert norms[1] > 0
    forms = [open_bundle(folder).manifest.model.deploy_form for folder in (made.bundle, tmp_path / "b")]
    assert forms == [True, False]


def test_doctor(cli: Cli, inline: Cli, made: Made) -> None:
    run = cli("doctor", "--json")
    assert (run.code, run.err) == (0, "")
    assert not valid(run.out, "doctor")["artifacts"]
    document = valid(inline("doctor", made.bundle, "--json").out, "doctor")
    held = [artifact["format"] for artifact in document["artifacts"] if artifact["held"]]
    assert held == ["torch", "onnx", "openvino"]  # besides what can be built here


def test_doctor_says_what_each_artifact_can_do_here(inline: Cli, spoilt: Path) -> None:
    def doctor() -> dict[tuple[str, str], Any]:
        found = valid(inline("doctor", spoilt, "--json").out, "doctor")["artifacts"]
        return {(artifact["format"], artifact["precision"]): artifact for artifact in found}

    held = [artifact for artifact in doctor().values() if artifact["held"]]
    assert [artifact["runs"] for artifact in held] == [True, True, True]
    assert [artifact["chosen"] for artifact in held] == [True, False, False]
    assert [artifact["reason"] for artifact in held] == [None, None, None]

    def newer(content: dict[str, Any]) -> None:
        _, onnx, openvino = content["artifacts"]
        content["artifacts"] = [onnx, {**openvino, "built_with": {"openvino": "9999.1"}}]

    rewrite(spoilt, newer)
    found = doctor()
    assert "older versions may not read" in found["openvino", "fp32"]["reason"]
    rewrite(spoilt, lambda content: content["artifacts"].pop())
    found = doctor()
    built = found["openvino", "fp32"]
    assert (built["held"], built["runs"], built["buildable"]) == (False, False, True)
    assert ("torch", "fp32") not in found
    said = " ".join(inline("doctor", spoilt).out.split())
    assert "runs here; --runtime auto takes it" in said
    assert f"not in the bundle; can be built here: dmformer build {spoilt} --format openvino" in said


def test_doctor_weighs_memory_and_instructions(inline: Cli, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmformer.device.doctor.available_memory", lambda: 1_000_000)
    monkeypatch.setattr("dmformer.runtimes.support.instructions", lambda: frozenset(("sse2",)))
    monkeypatch.setattr("dmformer.runtimes.support.platform.machine", lambda: "x86_64")
    found = valid(inline("doctor", made.bundle, "--json").out, "doctor")
    _, onnx, openvino, *_ = found["artifacts"]
    assert not onnx["runs"]
    assert "of memory are available" in onnx["reason"]
    assert not onnx["buildable"]
    assert openvino["reason"] == "openvino needs sse4_2, which this processor lacks"
    assert not openvino["buildable"]


def test_doctor_says_why_an_engine_does_not_run(inline: Cli, spoilt: Path) -> None:
    target = {"flavour": "rtx", "version": "1.0", "compute_capabilities": ["8.9"], "platform": "linux-x86_64"}
    target |= {"gpu": None, "min_batch": 1, "opt_batch": 1, "max_batch": 8, "workspace_mb": None, "build_s": 1.0}

    def add(content: dict[str, Any]) -> None:
        files = [{"path": "tensorrt/fp32/model.plan", "bytes": 1, "sha256": "0" * 64}]
        named = {"format": "tensorrt", "files": files, "target": {**target, "onnx_sha256": "0" * 64}}
        engine = {**content["artifacts"][1], **named}
        content["artifacts"].append(engine)

    rewrite(spoilt, add)
    artifacts = valid(inline("doctor", spoilt, "--json").out, "doctor")["artifacts"]
    found = [artifact for artifact in artifacts if artifact["held"]][-1]
    assert (found["format"], found["held"], found["runs"]) == ("tensorrt", True, False)
    assert found["reason"]
    if not found["buildable"]:
        assert found["not_buildable"]


def test_doctor_imports_no_engine_that_is_whole(made: Made) -> None:
    code = """
from dmformer.cli import main
sys.argv = ["dmformer", "doctor", sys.argv[1]]
try:
    main()
except SystemExit as ended:
    assert not ended.code
"""
    engines = {"torch", "onnx", "onnxsim", "onnxruntime", "openvino"}
    engines |= set() if driver_missing() is None else {"tensorrt_rtx", "tensorrt", "cuda"}
    assert not imported(code, made.bundle) & engines


def test_doctor_works_on_a_broken_installation(cli: Cli, made: Made, tmp_path: Path) -> None:
    path = hidden(
        tmp_path / "path", "openvino", "OSError('libfoo.so: cannot open')"
    )  # others: a runtime that cannot run
    run = cli("doctor", made.bundle, "--json", PYTHONPATH=path)
    assert run.code == 0, run.err
    document = valid(run.out, "doctor")
    found = {runtime["name"]: runtime for runtime in document["runtimes"]}
    assert not found["openvino"]["available"]
    assert found["onnxruntime"]["available"]
    assert "libfoo.so: cannot open" in found["openvino"]["reason"]
    assert {artifact["format"]: artifact["runs"] for artifact in document["artifacts"]}["openvino"] is False


# --- on a bundle ------------------------------------------------------------------------------------------------------


def test_export_says_what_it_did(made: Made) -> None:
    assert "demonstration checkpoint" in made.done.stderr
    assert "Traceback" not in made.done.stderr
    assert "Parity with PyTorch" in made.done.stdout
    assert [artifact.format for artifact in open_bundle(made.bundle).manifest.artifacts] == [
        "torch",
        "onnx",
        "openvino",
    ]


def test_the_last_bundle_is_found_in_its_working_folder(cli: Cli, inline: Cli, made: Made, tmp_path: Path) -> None:
    run = cli("inspect", "--json", cwd=made.folder, XDG_STATE_HOME=made.state)
    assert run.code == 0
    assert str(made.bundle) in run.err
    assert run.out == inline("inspect", made.bundle, "--json").out
    elsewhere = inline("inspect", cwd=tmp_path, XDG_STATE_HOME=made.state)
    assert elsewhere.code == 2
    assert "no bundle named" in elsewhere.error_line


def test_inspect(cli: Cli, inline: Cli, made: Made) -> None:
    run = cli("inspect", made.bundle, "--json")
    assert (run.code, run.err) == (0, "")
    assert valid(run.out, "manifest") == json.loads((made.bundle / MANIFEST).read_bytes())
    assert "dmformer_nano" in inline("inspect", made.bundle).out


def test_verify(cli: Cli, inline: Cli, made: Made, tmp_path: Path) -> None:
    piped = cli("verify", made.bundle, "--runtime", "ort", "--json", "-")
    assert piped.code == 0
    assert valid(piped.out, "verify")["passed"]
    assert "Parity with PyTorch" in piped.err
    filed = inline("verify", made.bundle, "--runtime", "ort", "--json", "report.json")
    assert filed.code == 0
    assert "Parity with PyTorch" in filed.out
    document = valid((tmp_path / "report.json").read_text(), "verify")
    assert {check["runtime"] for check in document["checks"]} == {"numpy", "onnxruntime"}


@pytest.mark.parametrize("command", ["verify", "bench", "predict"])
@pytest.mark.parametrize("target", ["nowhere/report.json", "."])
def test_a_report_that_cannot_be_written_is_found_first(inline: Cli, made: Made, command: str, target: str) -> None:
    images = [DIGIT] if command == "predict" else []
    run = inline(command, made.bundle, *images, "--json", target)
    assert run.code == 2
    assert target in run.error_line
    assert run.out == ""
    assert run.err == run.error_line + "\n"  # no stage was begun


def test_verify_of_a_tampered_artifact_is_1(inline: Cli, spoilt: Path) -> None:
    with (spoilt / "onnx/fp32/model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"tampered")
    for arguments in (["verify"], ["bench"], ["predict"]):
        images = [DIGIT] if arguments == ["predict"] else []
        run = inline(*arguments, spoilt, *images, "--runtime", "ort")
        assert run.code == 1
        assert "changed or damaged" in run.error_line


def test_verify_of_another_model_with_hashes_that_fit_is_1(cli: Cli, spoilt: Path) -> None:
    import onnx
    from onnx import numpy_helper

    path = spoilt / "onnx/fp32/model.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f":
            tensor.CopyFrom(numpy_helper.from_array(values * values.dtype.type(1.1), tensor.name))
    onnx.save(model, path)
    content = json.loads((spoilt / MANIFEST).read_bytes())
    (entry,) = next(artifact["files"] for artifact in content["artifacts"] if artifact["format"] == "onnx")
    entry["sha256"], entry["bytes"] = hash_file(path)
    (spoilt / MANIFEST).write_text(json.dumps(content))
    run = cli("verify", spoilt, "--runtime", "ort", "--json", "report.json")
    assert run.code == 1
    assert "6 of 14 checks failed; first: runtime in onnxruntime fp32 at batch 1, against PyTorch" in run.error_line
    rows = [line for line in run.out.splitlines() if line.startswith((" FAILED", " ok"))]
    assert rows[0].split()[0] == "FAILED"
    assert rows[-1].split()[0] == "ok"
    assert not valid((spoilt.parent / "report.json").read_text(), "verify")["passed"]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("verify", "ImportError('none')"),
        pytest.param("bench", "OSError('no library')", marks=pytest.mark.slow),
        pytest.param("predict", "RuntimeError('abi')", marks=pytest.mark.slow),
    ],
)
def test_a_runtime_that_cannot_run_is_3(cli: Cli, made: Made, tmp_path: Path, command: str, error: str) -> None:
    images = [DIGIT] if command == "predict" else []
    path = hidden(tmp_path / "path", "openvino", error)
    run = cli(command, made.bundle, *images, "--runtime", "ov", PYTHONPATH=path)
    assert run.code == 3, run.err
    assert "openvino cannot run on this machine" in run.error_line
    assert "onnxruntime" in run.error_line


def test_export_without_pytorch_is_3(cli: Cli, tmp_path: Path) -> None:
    run = cli("export", PYTHONPATH=hidden(tmp_path / "path", "torch", "ModuleNotFoundError('none', name='torch')"))
    assert run.code == 3
    assert "pip install 'dmformer[export]'" in run.error_line


@pytest.mark.parametrize("runtime", ["torch", "ort", "openvino"])
def test_predict_reads_the_digits(inline: Cli, made: Made, runtime: str) -> None:
    images = sorted(SAMPLE_IMAGES.glob("*.png"))
    run = inline("predict", made.bundle, *images, "--runtime", runtime, "--json", "-")
    assert run.code == 0, run.err
    document = valid(run.out, "predict")
    read = {Path(found["image"]).stem: found["classes"][0]["name"] for found in document["predictions"]}
    assert len(read) == 10
    assert all(digit == name for digit, name in read.items()), read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.png", None),
        ("text.png", b"no image\n"),
        ("empty.png", b""),
        ("broken.png", DIGIT.read_bytes()[: DIGIT.stat().st_size // 2]),
    ],
)
def test_predict_names_the_image_it_cannot_read(
    inline: Cli, made: Made, tmp_path: Path, name: str, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    run = inline("predict", made.bundle, DIGIT, name, "--runtime", "ort")
    assert run.code == 2
    assert name in run.error_line
    assert run.out == ""


def test_predict_wants_an_image_and_names_that_are_known(inline: Cli, made: Made) -> None:
    for arguments, expected in (
        ([], "no image given"),
        ([DIGIT, "--runtime", "coreml"], "unknown runtime 'coreml'"),
        ([DIGIT, "--precision", "int8"], "nothing at int8"),
    ):
        run = inline("predict", made.bundle, *arguments)
        assert run.code == 2
        assert expected in run.error_line


@pytest.mark.parametrize("encoding", first(1, ["ascii", "latin-1", "utf-8"]))
def test_predict_where_output_has_another_encoding(cli: Cli, made: Made, encoding: str) -> None:
    run = cli("predict", made.bundle, DIGIT, "--runtime", "ort", PYTHONIOENCODING=encoding)
    assert run.code == 0, run.err
    assert "3.png" in run.out


@pytest.mark.slow
def test_bench(inline: Cli, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("dmformer.bench.api"), "ROUNDS", 1)
    run = inline("bench", made.bundle, "--runtime", "ort", "--duration", "0.05", "--threads", "1", "--json", "-")
    assert run.code == 0, run.err
    (row,) = valid(run.out, "bench")["results"]
    assert (row["runtime"], row["threads"]) == ("onnxruntime", 1)
    assert "Latency of dmformer_nano" in run.err


@pytest.mark.parametrize("arguments", [["--duration", "0"], ["--duration", "nan"], ["--runtime", "coreml"]])
def test_bench_of_what_cannot_be_used_is_2(inline: Cli, made: Made, arguments: list[str]) -> None:
    run = inline("bench", made.bundle, *arguments)
    assert run.code == 2
    assert run.error_line


@pytest.mark.parametrize(
    "arguments", first(2, [["--help"], ["inspect", "BUNDLE", "--json"], ["inspect", "BUNDLE"], ["doctor"]])
)
def test_output_that_is_closed_early_gives_no_traceback(made: Made, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "dmformer", *(str(made.bundle) if a == "BUNDLE" else a for a in arguments)]
    reading, writing = os.pipe()
    os.close(reading)  # closed before anything is written, so that the first write fails
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writing)
    assert done.stderr == ""
    assert done.returncode not in (0, 2, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_export_that_is_stopped_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    folder, temporary = tmp_path / "work", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "dmformer", "export", "--output", "b"]
    environment = {**os.environ, "TMPDIR": str(temporary), "XDG_STATE_HOME": str(tmp_path / "state")}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(1200):  # until it is in the middle of the work
            if any(folder.iterdir()) or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert said.endswith("stopped\n") == (number == signal.SIGINT)
    assert list(folder.iterdir()) == []
    assert [path for path in temporary.iterdir() if path.name.startswith("dmformer-")] == []


def test_a_stop_in_code_that_a_library_made_is_one_too(tmp_path: Path) -> None:
    """Python remembers a KeyboardInterrupt that comes out of exec(), and would end by the signal in the end."""
    text = """
from dmformer import cli

@cli.app.command()
def hang():
    exec("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")

cli.main()
"""
    (tmp_path / "stopped.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "stopped", "hang"]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "stopped\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "--precision", "auto", "--arch", "dmformer_nano"], "expected --calibration, a folder of them"),
        (["export", "--task", "segmentation", "--image-size", "80"], "--image-size 80 for segmentation"),
        (["export", "--target", "sm89"], "expected --format trt as well"),
    ],
)
def test_messages_name_flags(inline: Cli, arguments: list[str], said: str, tmp_path: Path) -> None:
    run = inline(*arguments, "--output", tmp_path / "b")
    assert run.code == 2
    assert said in run.error_line
    assert "`" not in run.error_line


def test_notes_name_flags_too(inline: Cli, tmp_path: Path) -> None:
    run = inline("export", "--format", "all", "--dynamic-size", "--dry-run", "--output", tmp_path / "b")
    assert "tensorrt: format tensorrt with open height and width" in run.err
    assert "without --dynamic-size" in run.err
    assert "`" not in run.err


def test_debug_shows_the_traceback_of_wrong_usage(cli: Cli) -> None:
    assert "Traceback" in cli("export", "--nonsense", "--debug").err


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("checkpoint", "checkpoint, SHA-256 cccc"),
        ("demonstration", "the demonstration checkpoint"),
        ("random", "RANDOM, seed None: never trained"),
        ("module", "those that the network of one's own came with"),
    ],
)
def test_inspect_says_where_weights_come_from(inline: Cli, tmp_path: Path, weights: str, expected: str) -> None:
    run = inline("inspect", write_bundle(tmp_path / "b", weights=weights))
    assert run.code == 0, run.err
    assert expected in run.out
