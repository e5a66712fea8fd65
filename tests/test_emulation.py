"""Emulated processors: what they are, what is laid out for them, and what is said when a process crashes there."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dmformer import machine
from dmformer.bench import plan
from dmformer.cache import Cache
from dmformer.device import installation
from dmformer.device.crash import Fault, explain
from dmformer.device.emulation import Machine, emulated_machine, this_machine
from dmformer.device.installation import NoRelease, Platform, lay_out_debian, lay_out_packages, list_releases
from dmformer.device.processors import PROCESSORS, processor
from dmformer.errors import StageFailed, UnavailableError, UsageError
from dmformer.process import TimedOut
from tests.emulators import StandIns, stand_in

if TYPE_CHECKING:
    from collections.abc import Iterator

ARM = Platform.linux("aarch64", "3.11", 36)
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-x86_64-static") is None or sys.platform != "linux" or machine.describe_processor().architecture
    != "x86_64",
    reason="no emulator of x86-64 on x86-64: apt-get install qemu-user-static",
)  # fmt: skip


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return stand_in(tmp_path / "tools", monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens, no temporary folder stays."""
    folder = tmp_path / f"temporary{80 * '-'}"  # longer than the name of a socket may be
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


# --- which processors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", ["Raspberry Pi 3", "Raspberry Pi 4", "Raspberry Pi 5", "Jetson", "without AVX,"])
def test_the_boards_are_there(board: str) -> None:
    assert any(board in row.found_in or board in f"{row.found_in}," for row in PROCESSORS)


def test_max_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match=r"'max' is all that QEMU computes, and no processor: .*int8.*cortex-a72"):
        processor("MAX")


def test_others_are_refused_with_a_list() -> None:
    with pytest.raises(UsageError, match=r"unknown processor 'm1'; expected one of cortex-a35, .*haswell"):
        processor("m1")


@pytest.mark.parametrize("row", PROCESSORS, ids=lambda row: row.name)
def test_the_description_is_read_as_that_of_the_processor(row: object, monkeypatch: pytest.MonkeyPatch) -> None:
    text = row.cpuinfo(2)  # type: ignore[attr-defined]
    monkeypatch.setattr(machine, "read_text", lambda path: text if str(path) == "/proc/cpuinfo" else None)
    monkeypatch.setattr("platform.machine", lambda: row.architecture)  # type: ignore[attr-defined]
    described = machine.describe_processor()
    assert described.cpu == f"{row.name}, emulated"  # type: ignore[attr-defined]
    assert set(described.instructions) == row.features & machine._DECISIVE  # type: ignore[attr-defined]
    assert text.count("processor\t") == 2
    assert machine.is_emulated()


def test_x86_without_vnni_is_known_to_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_text", lambda _: processor("haswell").cpuinfo(1))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert machine.without_vnni() == "this processor has no VNNI"


def test_this_machine_is_not_emulated() -> None:
    assert not machine.is_emulated()


def test_a_foreign_description_is_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container for Arm that QEMU runs on x86: the process sees the system's own processor."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(machine, "read_text", lambda _: "vendor_id\t: GenuineIntel\nmodel name\t: Xeon\n")
    assert machine.is_emulated()


def test_bench_is_refused_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan, "is_emulated", lambda: True)
    with pytest.raises(UnavailableError, match="emulation has a processor's answers, not its speed"):
        plan.plan_bench(tmp_path, plan.BenchRequest())


# --- what is laid out -------------------------------------------------------------------------------------------------


def test_a_small_debian_is_laid_out_once(tools: StandIns, cache: Cache, tmp_path: Path) -> None:
    for name in ("first", "second"):
        lay_out_debian("aarch64", tmp_path / name, cache)
        assert (tmp_path / name / installation.DEBIAN_PYTHON).is_file()
    assert [line.split()[1] for line in tools.asked] == ["update", "download"]


def test_packages_are_downloaded_once(tools: StandIns, cache: Cache, tmp_path: Path) -> None:
    for name in ("first", "second"):
        versions = lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0"], tmp_path / name, cache)
        assert versions == {"numpy": "2.0.0", "onnxruntime": "1.26.0"}
        assert (tmp_path / name / "onnxruntime.marker").read_text() == "1.26.0"
    assert len(tools.asked) == 1
    assert tools.asked[0].endswith("-py3-none-any.whl[onnxruntime] onnxruntime==1.26.0")
    lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.32.0"], tmp_path / "third", cache)
    assert len(tools.asked) == 2


def test_what_was_damaged_is_downloaded_again(tools: StandIns, cache: Cache, tmp_path: Path) -> None:
    lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0"], tmp_path / "first", cache)
    assert cache.folder is not None
    for path in (cache.folder / "objects").iterdir():
        path.write_bytes(path.read_bytes() + b"!")
    lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0"], tmp_path / "second", cache)
    assert len(tools.asked) == 2


def test_no_release_is_told_with_the_platform(tools: StandIns, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(NoRelease, match=r"^no release of onnxruntime==9.9 for aarch64, Python 3.11$"):
        lay_out_packages(ARM, "onnxruntime", ["onnxruntime==9.9"], tmp_path / "folder", cache)


def test_without_a_network_the_cache_serves(tools: StandIns, cache: Cache, tmp_path: Path) -> None:
    lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0"], tmp_path / "first", cache)
    releases = list_releases(ARM, "onnxruntime", cache)
    tools.take_network_away()
    lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0"], tmp_path / "second", cache)
    assert list_releases(ARM, "onnxruntime", cache) == releases
    with pytest.raises(UnavailableError, match="not in the cache, and the index cannot be reached"):
        lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.32.0"], tmp_path / "third", cache)
    with pytest.raises(UnavailableError, match="the index cannot be reached"):
        list_releases(ARM, "onnxruntime", Cache())


def test_releases_come_oldest_first(tools: StandIns, cache: Cache) -> None:
    listed = list_releases(ARM, "onnxruntime", cache)
    assert listed == ["1.23.0", "1.23.2", "1.24.1", "1.26.0", "1.31.1", "1.32.0"]


def test_a_full_disk_is_one_line_and_nothing_stays(
    tools: StandIns, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zipfile.ZipFile.extractall", full)
    with pytest.raises(StageFailed, match="No space left on device"):
        lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0"], tmp_path / "folder", cache)
    monkeypatch.undo()


def test_two_runs_at_once_do_not_meet(tools: StandIns, cache: Cache, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def lay_out(number: int) -> dict[str, str]:
        folder = tmp_path / str(number)
        return lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0"], folder, Cache(cache.folder))

    with ThreadPoolExecutor(4) as pool:
        assert all(versions["onnxruntime"] == "1.26.0" for versions in pool.map(lay_out, range(4)))
    assert all((tmp_path / str(number) / "onnxruntime.marker").is_file() for number in range(4))


def test_an_interrupt_leaves_nothing(
    tools: StandIns, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0"], tmp_path / "folder", cache)
    assert cache.folder is not None
    assert not (cache.folder / "entries").exists()


@pytest.mark.slow
def test_pip_itself_understands_what_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, on a folder of wheels that hold nothing but their names."""
    from importlib import metadata

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    arm = "cp311-cp311-manylinux_2_28_aarch64"
    needed = [text for text in metadata.requires("dmformer") or [] if "extra ==" not in text]
    names = [f"{''.join(c if c.isalnum() else '_' for c in text.split('>')[0])}-999.0-py3-none-any" for text in needed]
    for name in (*names, f"onnxruntime-1.26.0-{arm}", f"onnxruntime-1.32.0-{arm}", "onnxruntime-1.31.0-cp39-cp39-any"):
        write_wheel(wheels / f"{name}.whl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert list_releases(ARM, "onnxruntime", Cache()) == ["1.26.0", "1.32.0"]
    versions = lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0"], tmp_path / "folder", Cache())
    assert versions["onnxruntime"] == "1.26.0"
    assert len(versions) == 1 + len(needed)
    with pytest.raises(NoRelease, match=r"no release of onnxruntime==1.31.0 for aarch64, Python 3.11"):
        lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.31.0"], tmp_path / "folder", Cache())
    with pytest.raises(NoRelease, match=r"no installation for aarch64, Python 3.11: .+"):
        lay_out_packages(ARM, "onnxruntime", ["onnxruntime==1.26.0", "onnxruntime>1.30"], tmp_path / "folder", Cache())


def write_wheel(path: Path) -> None:
    import zipfile

    name, version, *_ = path.name.split("-")
    with zipfile.ZipFile(path, "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {path.stem.split('-', 2)[2]}\n")
        wheel.writestr(f"{info}/RECORD", "")


# --- where it runs ----------------------------------------------------------------------------------------------------


def test_without_qemu_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, cache: Cache) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with (
        pytest.raises(UnavailableError, match=r"needs qemu-aarch64-static, .*apt-get install qemu-user-static"),
        emulated_machine(processor("cortex-a72"), None, cache),
    ):
        pass


def test_an_older_qemu_plays_the_nearest(tools: StandIns, cache: Cache) -> None:
    """The stand-in, as Debian's QEMU 7.2, has no Cortex-A78AE; the description of the processor stays that one's."""
    tools.forget()
    with (
        pytest.raises(StageFailed),  # the stand-in looks for the model's name in the description
        emulated_machine(processor("cortex-a78ae"), None, cache),
    ):
        pass
    assert tools.asked[-1] == "qemu cortex-a76"
    with (
        pytest.raises(UnavailableError, match="has no cortex-a35; expected a newer QEMU"),
        emulated_machine(processor("cortex-a35"), None, cache),
    ):
        pass


def test_the_root_of_a_board_takes_debians_place(tools: StandIns, cache: Cache, tmp_path: Path) -> None:
    root = tmp_path / "board"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/python3.9").touch()
    (root / "usr/bin/python3.12").touch()
    for name in ("proc", "tmp", "home", "usr/lib", "etc"):
        (root / name).mkdir()
    (root / "lib").symlink_to("/usr/lib")  # its own, not this machine's
    with emulated_machine(processor("cortex-a72"), root, cache) as there:
        shown = Path(there.interpreter[there.interpreter.index("-L") + 1])
        # Debian 13's real root had a /tmp, in which QEMU looked for a bundle in this machine's.
        assert {entry.name for entry in shown.iterdir()} == {"proc", "usr", "lib", "etc"}
        python = Path(there.interpreter[5])
        assert python.resolve() == (root / "usr/bin/python3.12").resolve()
        assert (shown / "lib").resolve() == (root / "usr/lib").resolve()
        system = Path(there.interpreter[4])
        assert "cortex-a72, emulated" in (system / "proc/cpuinfo").read_text()
    assert list((root / "proc").iterdir()) == []  # the board's own stays as it is
    assert not any("apt-get" in line for line in tools.asked)


def test_a_root_without_python_is_refused(tools: StandIns, cache: Cache, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"`root` .* has no usr/bin/python3.N"),
        emulated_machine(processor("cortex-a72"), tmp_path, cache),
    ):
        pass


def test_a_time_out_ends_the_process(tmp_path: Path) -> None:
    with pytest.raises(TimedOut, match="did not end within"):
        Machine((sys.executable,), Platform.here()).call("time:sleep", 60, object, 0.5, tmp_path)


def test_here_nothing_of_this_installation_is_used(tmp_path: Path) -> None:
    """With an empty folder of packages not even msgspec is found."""
    with pytest.raises(StageFailed, match="No module named 'msgspec'"):
        this_machine().call("os:getcwd", None, str, 60, tmp_path)


def test_what_names_this_machine_does_not_reach_an_emulated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt")
    there = Machine((), ARM, processor("cortex-a72"))
    assert not {"ONEDNN_MAX_CPU_ISA", "LD_LIBRARY_PATH"} & set(there._environment(Path()))
    assert this_machine()._environment(Path())["ONEDNN_MAX_CPU_ISA"] == "AVX2"


# --- what is said of a crash ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "feature"),
    [
        ("cortex-a72", "0094824e", "asimddp"),  # sdot v0.4s, v0.16b, v2.16b
        ("cortex-a72", "0094826e", "asimddp"),  # udot
        ("cortex-a72", "0014424e", "asimdhp"),  # fadd v0.8h, v0.8h, v2.8h
        ("cortex-a72", "0028e21e", "fphp"),  # fadd h0, h0, h2
        ("cortex-a72", "200021b8", "atomics"),  # ldadd w1, w0, [x1]
        ("cortex-a76", "00a4824e", "i8mm"),  # smmla v0.4s, v0.16b, v2.16b
        ("cortex-a76", "00fc426e", "bf16"),  # bfdot v0.4s, v0.8h, v2.8h
        ("cortex-a76", "00006004", "sve"),  # add z0.h, z0.h, z0.h
        ("nehalem", "c5fc58c0", "avx"),  # vaddps ymm0, ymm0, ymm0
        ("ivybridge", "c5fdfec0", "avx2"),  # vpaddd ymm0, ymm0, ymm0
        ("ivybridge", "c4e27db8c0", "fma"),  # vfmadd231ps ymm0, ymm0, ymm0
        ("haswell", "c4e27d50c0", "avx_vnni"),  # vpdpbusd ymm0, ymm0, ymm0
        ("haswell", "62f17c4858c0", "avx512f"),  # vaddps zmm0, zmm0, zmm0
    ],
)
def test_sigill_names_the_feature(name: str, code: str, feature: str) -> None:
    said = explain(signal.SIGILL, Fault("libengine.so", bytes.fromhex(code).ljust(15, b"\0")), processor(name))
    assert said.startswith("the process was ended by signal 4 (SIGILL) in libengine.so, at the instruction ")
    assert said.endswith(f": it needs {feature}, which {name} lacks"), said
    assert bytes.fromhex(code)[:4].hex(" ") in said


def test_no_feature_is_named_that_the_processor_has() -> None:
    said = explain(signal.SIGILL, Fault(None, bytes.fromhex("0094824e")), processor("cortex-a76"))
    assert said.endswith(", which cortex-a76 lacks")
    assert "asimddp" not in said
    assert "code that an engine made at run time" in said


def test_sigsegv_names_the_library() -> None:
    said = explain(signal.SIGSEGV, Fault("libengine.so", b"\0\0\0\0"), processor("cortex-a72"))
    assert said == "the process was ended by signal 11 (SIGSEGV) in libengine.so"
    assert "where is not known" in explain(signal.SIGSEGV, None, processor("cortex-a72"))


FAULTY = """
import ctypes, mmap
def jump(code: str) -> None:
    memory = mmap.mmap(-1, 4096, prot=7)
    memory.write(bytes.fromhex(code))
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
def read_nothing(_: str) -> None:
    ctypes.string_at(8)
"""


@needs_qemu
@pytest.mark.parametrize(
    ("function", "code", "expected"),
    [
        ("jump", "c5fc58c0c3", r"SIGILL\) in code .* at the instruction c5 fc 58 c0 .*: it needs avx, which nehalem"),
        ("read_nothing", "", r"signal 11 \(SIGSEGV\) in libc"),
    ],
)
def test_a_real_crash_is_located(tmp_path: Path, function: str, code: str, expected: str) -> None:
    """QEMU's own Nehalem, with this machine's Python: the process is run again under the debugger's stub."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    packages = [str(tmp_path), *(path for path in sys.path if "site-packages" in path)]
    there = Machine(("qemu-x86_64-static", "-cpu", "Nehalem", sys.executable), Platform.here(), processor("nehalem"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "_environment", lambda *_: {"PYTHONPATH": ":".join(packages)})
        with pytest.raises(StageFailed, match=expected):
            there.call(f"faulty:{function}", code, object, 120, tmp_path)


# --- the real ones ----------------------------------------------------------------------------------------------------

HWCAP = """
from ctypes import CDLL, c_ulong
BITS = ("fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 "
        "sm3 sm4 asimddp").split()
getauxval = CDLL(None).getauxval
getauxval.restype, getauxval.argtypes = c_ulong, [c_ulong]
print(*(name for place, name in enumerate(BITS) if getauxval(16) >> place & 1))
print(open("/proc/cpuinfo").read().count("CPU part"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1"])
def test_an_emulated_arm_has_what_the_table_says(name: str, tmp_path: Path) -> None:
    import subprocess

    row = processor(name)
    try:
        with emulated_machine(row, None, Cache()) as there:
            assert there.fits.title == "aarch64, Python 3.11"
            done = subprocess.run(
                [*there.interpreter, "-c", HWCAP], env={}, capture_output=True, text=True, check=True, timeout=200
            )
    except UnavailableError as error:
        pytest.skip(str(error))
    features, parts = done.stdout.splitlines()
    assert set(features.split()) - {"evtstrm", "cpuid"} == row.features - {"evtstrm", "cpuid"}
    assert int(parts) == machine.usable_cores()
