"""``verify --cpu`` and ``--engine``: the golden answers asked for elsewhere, with stand-ins for QEMU and pip."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

import dmformer
from dmformer.bundle import writer
from dmformer.bundle.integrity import sign_bundle
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.writer import pack
from dmformer.device.emulation import NOT_SHOWN, Machine
from dmformer.errors import StageFailed, UnavailableError, UsageError
from dmformer.process import TimedOut
from dmformer.verify import replay
from dmformer.verify.replay import find_first_bad
from tests.bundles import rewrite
from tests.emulators import StandIns, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dmformer.export.cached import ExportResult
    from dmformer.progress import Advance
    from dmformer.verify.report import Check, ParityReport
    from tests.conftest import Run


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """The stand-ins, which have onnxruntime 1.32.0 as the release of this machine."""
    monkeypatch.setattr(replay.metadata, "version", lambda _: "1.32.0")
    return stand_in(tmp_path / "tools", monkeypatch)


def asked(report: ParityReport) -> dict[str, list[Check]]:
    """The checks by processor."""
    found: dict[str, list[Check]] = {}
    for check in report.checks:
        found.setdefault(check.processor or "here", []).append(check)
    return found


# --- on an emulated processor -----------------------------------------------------------------------------------------


def test_the_same_rows_as_on_a_device_with_the_processor(tools: StandIns, bundle: Path) -> None:
    notes: list[str] = []
    report = dmformer.verify(bundle, runtimes=["ort"], cpus=["cortex-a72", "Cortex-A76"], note=notes.append)
    assert report.passed
    here = dmformer.verify(bundle, runtimes=["ort"])
    for name in ("cortex-a72", "cortex-a76"):
        rows = asked(report)[name]
        assert [(one.stage, one.batch, one.limit) for one in rows] == [(o.stage, o.batch, o.limit) for o in here.checks]
        assert {one.engine for one in rows if one.runtime == "onnxruntime"} == {"onnxruntime 1.32.0"}
    assert NOT_SHOWN in report.skipped
    first, second = report.replays
    assert (first.processor, first.emulator) == ("cortex-a72", "QEMU 7.2.22, cortex-a72")
    assert first.packages == {"numpy": "2.0.0", "onnxruntime": "1.32.0"}
    assert second.processor == "cortex-a76"
    assert notes == [f"noted in the evidence of {bundle / 'manifest.json'}"]


@pytest.mark.slow
def test_the_evidence_has_the_last_answer_of_each_processor(tools: StandIns, bundle: Path) -> None:
    for _ in range(2):
        dmformer.verify(bundle, runtimes=["ort"], cpus=["cortex-a72"])
    tools.crash("SIGILL")
    dmformer.verify(bundle, runtimes=["ort"], cpus=["cortex-a76"])
    opened = open_bundle(bundle)
    opened.check_all()
    noted = opened.manifest.evidence.processors
    assert [(one.processor, one.precision, one.passed) for one in noted] == [
        ("cortex-a72", "fp32", True),
        ("cortex-a76", "fp32", False),
    ]
    (artifact,) = opened.artifacts("onnx")
    assert {one.artifact_sha256 for one in noted} == {artifact.sha256}
    rewrite(bundle, lambda content: content["evidence"]["processors"][0].update(artifact_sha256="0" * 64))
    dmformer.verify(bundle, runtimes=["ort"], cpus=["neoverse-n1"])
    assert [one.processor for one in open_bundle(bundle).manifest.evidence.processors] == ["cortex-a76", "neoverse-n1"]


@pytest.mark.slow
def test_a_signed_or_packed_bundle_stays_as_it_is(tools: StandIns, bundle: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    packed = pack(open_bundle(bundle), tmp_path / "packed.dmf")
    sign_bundle(bundle, Ed25519PrivateKey.generate())
    for path, why in ((bundle, "is signed"), (packed, "is packed")):
        kept = (path / "manifest.json" if path.is_dir() else path).read_bytes()
        notes: list[str] = []
        assert dmformer.verify(path, runtimes=["ort"], cpus=["cortex-a72"], note=notes.append).passed
        assert len(notes) == 1
        assert notes[0].startswith("not noted in the bundle: ")
        assert why in notes[0]
        assert (path / "manifest.json" if path.is_dir() else path).read_bytes() == kept


@pytest.mark.slow
def test_a_run_that_ends_while_another_writes_the_bundle_keeps_its_report(tools: StandIns, bundle: Path) -> None:
    notes: list[str] = []
    with writer._locked(bundle.resolve()):
        assert dmformer.verify(bundle, runtimes=["ort"], cpus=["cortex-a72"], note=notes.append).passed
    assert len(notes) == 1
    assert notes[0].startswith("not noted in the bundle: ")
    assert "another" in notes[0]


def test_a_crash_is_a_failed_check_and_hides_no_other(tools: StandIns, bundle: Path) -> None:
    tools.crash("SIGSEGV")
    report = dmformer.verify(bundle, runtimes=["ort"], cpus=["cortex-a72", "cortex-a53"])
    assert [check.processor for check in report.checks] == ["cortex-a72", "cortex-a53"]
    for check in report.checks:
        assert not check.passed
        assert check.reason is not None
        assert check.reason.startswith("the process was ended by signal 11 (SIGSEGV)")
        assert check.reason.endswith(", in stage 'start Python'")


def test_a_time_out_names_the_stage(tools: StandIns, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: Machine, __: str, order: replay.ReplayOrder, *___: object) -> ParityReport:
        with Path(order.stages).open("a") as file:
            file.write("import onnxruntime\n")
        raise TimedOut("the process did not end within 1800 s")

    monkeypatch.setattr(Machine, "call", slow)
    (check,) = dmformer.verify(bundle, runtimes=["ort"], cpus=["cortex-a72"]).checks
    assert check.reason == "the process did not end within 1800 s, in stage 'import onnxruntime'"


def test_the_stages_are_written_where_it_runs(bundle: Path, tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    order = replay.ReplayOrder(bundle=str(bundle), runtime="onnxruntime", precision="fp32", stages=str(stages))
    assert replay.replay_artifact(order).passed
    said = stages.read_text().splitlines()
    assert said == ["import onnxruntime", "integrity", "preprocessing", "onnxruntime fp32"]


def test_a_wrong_answer_there_fails(tools: StandIns, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: Machine, __: str, order: replay.ReplayOrder, *___: object) -> ParityReport:
        report = replay.replay_artifact(order)
        return replace(report, checks=tuple(replace(one, passed=False, reason="0.7 for 2.74") for one in report.checks))

    monkeypatch.setattr(Machine, "call", wrong)
    report = dmformer.verify(bundle, runtimes=["ort"], cpus=["cortex-a72"])
    assert not report.passed
    assert not report.replays[0].passed


def test_no_wheel_is_a_failed_check(tools: StandIns, bundle: Path) -> None:
    (check,) = dmformer.verify(bundle, runtimes=["ort"], cpus=["cortex-a72"], engines=["onnxruntime==9.9"]).checks
    assert not check.passed
    assert check.engine == "onnxruntime 9.9"
    assert check.reason is not None
    assert check.reason.startswith("no release of onnxruntime==9.9 for aarch64, Python 3.")


@pytest.mark.slow
def test_preprocessing_is_checked_once(tools: StandIns, reduced_bundle: Path) -> None:
    report = dmformer.verify(reduced_bundle, runtimes=["ort"], cpus=["cortex-a72"])
    assert [check.stage for check in report.checks if check.runtime == "numpy"] == ["pixels", "preprocessing"]
    assert {check.precision for check in report.checks if check.runtime == "onnxruntime"} == {"fp32", "fp16", "int8"}


def test_what_needs_a_gpu_is_refused(tools: StandIns, bundle: Path) -> None:
    rewrite(bundle, lambda content: content["artifacts"][0].update(format="tensorrt"))
    rewrite(bundle, lambda content: content.update(artifacts=content["artifacts"][:1]))
    with pytest.raises(UnavailableError, match=r"nothing in the bundle can be asked elsewhere: tensorrt fp32: .*GPU"):
        dmformer.verify(bundle, cpus=["cortex-a72"])


@pytest.mark.slow
def test_pytorch_is_left_out_and_said(tools: StandIns, bundle: Path) -> None:
    report = dmformer.verify(bundle, cpus=["cortex-a72"], engines=["openvino==1.26.0"])
    assert any(
        reason.startswith("torch fp32: PyTorch is what the answers are compared with") for reason in report.skipped
    )
    assert [replayed.engine for replayed in report.replays] == ["onnxruntime 1.32.0", "openvino 1.26.0"]


def test_the_report_fits_its_schema(tools: StandIns, bundle: Path, inline: Callable[..., Run]) -> None:
    import jsonschema

    run = inline("verify", bundle, "--runtime", "ort", "--cpu", "cortex-a72", "--json", "-")
    assert run.code == 0, run.err
    schema = json.loads((Path(dmformer.__file__).parent / "schemas/verify.json").read_text())
    report = json.loads(run.out)
    jsonschema.validate(report, schema)
    assert {check["processor"] for check in report["checks"]} == {"cortex-a72"}
    assert "cortex-a72" in run.err  # the table
    assert f"not checked: {NOT_SHOWN}" in run.err


def test_a_crash_ends_with_one_line(tools: StandIns, bundle: Path, inline: Callable[..., Run]) -> None:
    tools.crash("SIGILL")
    run = inline("verify", bundle, "--runtime", "ort", "--cpu", "cortex-a72")
    assert run.code == 1
    assert "first: runtime in onnxruntime 1.32.0 fp32 on cortex-a72" in run.error_line
    assert "SIGILL" in run.error_line


def test_without_qemu_exit_code_3(
    tools: StandIns, bundle: Path, inline: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    run = inline("verify", bundle, "--cpu", "cortex-a72")
    assert run.code == 3
    assert "apt-get install qemu-user-static" in run.error_line


def test_without_a_network_and_a_cache_exit_code_3(tools: StandIns, bundle: Path, inline: Callable[..., Run]) -> None:
    tools.take_network_away()
    run = inline("verify", bundle, "--runtime", "ort", "--cpu", "cortex-a72")
    assert run.code == 3
    assert "the index cannot be reached; expected a network once" in run.error_line


def test_a_cache_that_cannot_be_written_is_said(
    tools: StandIns, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DMFORMER_CACHE", str(tmp_path / "file/cache"))
    notes: list[str] = []
    dmformer.verify(bundle, runtimes=["ort"], engines=["onnxruntime==1.26.0"], note=notes.append)
    (said,) = notes
    assert said.startswith("the cache could not be written: ")
    assert "file/cache" in said


@pytest.mark.slow
def test_from_the_cache_no_network_is_asked(
    tools: StandIns, bundle: Path, inline: Callable[..., Run], tmp_path: Path
) -> None:
    for _ in range(2):
        run = inline(
            "verify", bundle, "--runtime", "ort", "--cpu", "cortex-a72", DMFORMER_CACHE=str(tmp_path / "cache")
        )
        assert run.code == 0, run.err
    programs = [line.split()[0] for line in tools.asked]
    assert programs.count("apt-get") == 2  # update and download, of the first run
    assert programs.count("pip") == 1


def test_the_list_needs_no_bundle(inline: Callable[..., Run]) -> None:
    run = inline("verify", "--cpu", "list")
    assert run.code == 0
    assert "cortex-a72" in run.out
    assert "Raspberry Pi 4" in run.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpu", "max"], "processor 'max' is all that QEMU computes"),
        (["--cpu", "pentium"], "unknown processor 'pentium'"),
        (["--root", "."], "--root without --cpu"),
        (["--cpu", "cortex-a72", "--root", "nowhere"], "--root 'nowhere' is no folder"),
        (["--engine", "onnxruntime"], "--engine 'onnxruntime'; expected PACKAGE==VERSION"),
        (["--engine", "onnxruntime==1.."], "--engine 'onnxruntime==1..'; expected PACKAGE==VERSION"),
        (["--engine", "onnxruntime==1.32..1.26"], "--engine 'onnxruntime==1.32..1.26'; expected PACKAGE==VERSION"),
        (["--engine", "numpy==2.0"], "--engine has numpy, which runs nothing of this bundle; expected onnxruntime"),
        (["--engine", "onnxruntime==1.26.0", "--bisect"], "expected them without --weights"),
        (["--cpu", "cortex-a72", "--precision", "fp32"], "--model, --precision or --time-limit without --server"),
        (["--cpu", "cortex-a72", "--cpu", "haswell", "--root", "."], "--root with --cpu of two architectures"),
    ],
)
def test_bad_input_is_one_line(
    tools: StandIns, bundle: Path, inline: Callable[..., Run], arguments: list[str], message: str
) -> None:
    run = inline("verify", bundle, *arguments)
    assert run.code == 2
    assert message in run.error_line


def test_bench_refuses_a_processor(bundle: Path, inline: Callable[..., Run]) -> None:
    run = inline("bench", bundle, "--cpu", "cortex-a72")
    assert run.code == 2
    assert "emulation has a processor's answers, not its speed" in run.error_line


# --- another release --------------------------------------------------------------------------------------------------


def test_another_release_runs_in_an_environment_of_its_own(
    tools: StandIns, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the stand-in's packages, which have no msgspec: nothing of this installation is found there."""
    (check,) = dmformer.verify(bundle, engines=["onnxruntime==1.26.0"]).checks
    assert check.engine == "onnxruntime 1.26.0"
    assert check.processor is None
    assert "No module named 'msgspec'" in (check.reason or "")
    assert open_bundle(bundle).manifest.evidence.processors == ()


@pytest.mark.parametrize("bad_from", range(6))
def test_the_first_bad_release_is_found_by_halving(bad_from: int) -> None:
    releases, runs = ["1.23.0", "1.23.2", "1.24.1", "1.26.0", "1.31.1", "1.32.0"], []

    def holds(version: str) -> bool:
        runs.append(version)
        return releases.index(version) < bad_from

    good, bad = find_first_bad(releases, holds)
    assert bad == releases[bad_from]
    assert good == (releases[bad_from - 1] if bad_from else None)
    assert len(runs) == len(set(runs)) <= 5


def test_where_the_ends_hold_all_are_asked() -> None:
    releases, runs = [str(number) for number in range(6)], []

    def holds(version: str) -> bool:
        runs.append(version)
        return version != "3"

    assert find_first_bad(releases, holds) == ("2", "3")
    assert sorted(runs) == releases
    assert find_first_bad(releases, lambda _: True) == ("5", None)
    assert find_first_bad(["7"], lambda _: False) == (None, "7")


def test_a_range_tells_the_first_bad_one(
    tools: StandIns, bundle: Path, inline: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(
        _: Machine, __: str, order: replay.ReplayOrder, ___: object, ____: float, packages: Path
    ) -> ParityReport:
        if (packages / "onnxruntime.marker").read_text() >= "1.31":
            raise StageFailed("the process was ended by signal 11 (SIGSEGV)")
        return replay.replay_artifact(order)

    monkeypatch.setattr(Machine, "call", answer)
    run = inline("verify", bundle, "--engine", "onnxruntime==1.23.2..1.32", "--json", "-")
    assert run.code == 1
    report = json.loads(run.out)
    assert report["release_ranges"] == [
        {
            "processor": None,
            "package": "onnxruntime",
            "releases": ["1.23.2", "1.24.1", "1.26.0", "1.31.1", "1.32.0"],
            "last_good": "1.26.0",
            "first_bad": "1.31.1",
        }
    ]
    tried = [one["engine"].split()[1] for one in report["replays"]]
    assert tried == ["1.32.0", "1.23.2", "1.26.0", "1.31.1"]
    assert (
        "onnxruntime 1.23.2 to 1.32.0: the first bad release is 1.31.1; 1.26.0, the release before it, holds" in run.err
    )


def test_a_range_without_releases_fails(tools: StandIns, bundle: Path) -> None:
    (check,) = dmformer.verify(bundle, engines=["onnxruntime==2.0..3.0"]).checks
    assert (check.reason or "").startswith("no release of onnxruntime from 2.0 to 3.0 for ")


# --- the real ones ----------------------------------------------------------------------------------------------------


@contextmanager
def unless_unavailable() -> Iterator[None]:
    try:
        yield
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cortex-a72", "nehalem"])
def test_an_emulated_processor_answers(name: str, reduced_bundle: Path) -> None:
    with unless_unavailable():
        report = dmformer.verify(reduced_bundle, runtimes=["ort"], cpus=[name])
    assert report.passed, [check.reason for check in report.checks if not check.passed]
    (replayed,) = report.replays
    assert replayed.engine == f"onnxruntime {metadata.version('onnxruntime')}"
    assert replayed.described is not None
    assert replayed.described.cpu == f"{name}, emulated"
    assert "avx" not in replayed.described.instructions


@pytest.mark.slow
def test_another_release_answers_here(exported: ExportResult) -> None:
    stages: list[str] = []

    @contextmanager
    def stage(name: str, parts: int | None = None) -> Iterator[Advance]:
        stages.append(name)
        yield lambda: None

    with unless_unavailable():
        report = dmformer.verify(exported.output, engines=["onnxruntime==1.26.0"], stage=stage)
    assert report.passed, [check.reason for check in report.checks if not check.passed]
    assert stages == ["here: install onnxruntime 1.26.0", "here: onnxruntime 1.26.0 fp32"]
    with unless_unavailable(), pytest.raises(UsageError, match="expected onnxruntime, openvino"):
        dmformer.verify(exported.output, engines=["tensorrt-rtx==1.5"])
