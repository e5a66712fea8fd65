"""The machine, its load and the versions that a figure was measured with, and what its processor cannot do."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from dmformer import __version__
from dmformer.errors import UsageError
from dmformer.procfs import cpu_quota, read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Instruction sets that decide how fast an engine is, or whether it runs, in Linux's names.
_DECISIVE = frozenset(
    ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
     "amx_int8", "amx_bf16", "amx_fp16", "neon", "asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")
)  # fmt: skip
_PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "ncnn", "ai-edge-litert")
# What oneDNN, and so OpenVINO and PyTorch, reads: the newest instruction set that it may use.
_ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
# Its names of them, each with the forms of VNNI (in Linux's names) that it may still use.
_ISA_VNNI: dict[str, frozenset[str]] = {
    **dict.fromkeys(("SSE41", "AVX", "AVX2", "AVX512_CORE"), frozenset()),
    **dict.fromkeys(("AVX2_VNNI", "AVX2_VNNI_2"), frozenset(("avx_vnni",))),
    **dict.fromkeys(("AVX512_CORE_VNNI", "AVX512_CORE_BF16"), frozenset(("avx512_vnni",))),
    **dict.fromkeys(
        ("AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512", "AVX10_1_512_AMX",
         "AVX10_1_512_AMX_FP16"), frozenset(("avx_vnni", "avx512_vnni")),
    ),
}  # fmt: skip
_VNNI = frozenset(("avx512_vnni", "avx_vnni"))
_X86 = frozenset(("x86_64", "amd64", "i686", "x86"))
_ARM = frozenset(("aarch64", "arm64"))
_FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")
EMULATED = ", emulated"  # ends the name of a processor that dmformer emulates
_CONTROL_GROUP = Path("/sys/fs/cgroup")


class Processor(Struct, frozen=True, kw_only=True):
    """The processor that something was measured or computed on.

    Attributes:
        cpu: its name, as the system has it.
        architecture: as in ``x86_64`` or ``aarch64``.
        instructions: instruction sets that decide how an engine computes, in Linux's names; empty where the system does
            not tell.
        max_isa: the newest instruction set that oneDNN was allowed to use, where ``ONEDNN_MAX_CPU_ISA`` names one.
    """

    cpu: str
    architecture: str
    instructions: tuple[str, ...] = ()
    max_isa: str | None = None


def describe_processor() -> Processor:
    """Return the processor of this machine."""
    decisive = tuple(sorted(instructions() & _DECISIVE))
    return Processor(cpu=cpu_model(), architecture=platform.machine(), instructions=decisive, max_isa=max_isa())


def processor_title(found: Mapping[str, Any]) -> str:
    """Describe a processor (or a machine, which has its fields): its name, and the instruction sets that matter."""
    held = f", oneDNN held to {found['max_isa']}" if found["max_isa"] else ""
    return f"{found['cpu']} ({' '.join(found['instructions']) or found['architecture']}{held})"


def max_isa() -> str | None:
    """Return the newest instruction set that oneDNN may use, in its own words; ``None`` where nothing holds it back.

    A name that oneDNN does not know holds nothing back.
    """
    limit = _isa_limit()
    return None if limit is None else limit[1]


def _isa_limit() -> tuple[str, str] | None:
    """Return the variable and the instruction set that it names; the first variable with a value counts."""
    for variable in _ISA_VARIABLES:
        named = os.environ.get(variable, "").upper()
        if named:
            return (variable, named) if named in _ISA_VNNI else None
    return None


def without_vnni() -> str | None:
    """Return why oneDNN adds products of 8-bit numbers in 16 bits that saturate; ``None`` where it need not.

    x86 processors without VNNI have no other instruction for it; Arm has.
    """
    if platform.machine().lower() not in _X86:
        return None
    sets = instructions()
    if sets and not sets & _VNNI:
        return "this processor has no VNNI"
    limit = _isa_limit()
    if limit is not None and not _ISA_VNNI[limit[1]] & (sets or _VNNI):
        return f"{limit[0]} holds oneDNN to {limit[1]}, without this processor's VNNI"
    return None if sets else "this system does not tell whether its processor has VNNI"


def on_arm() -> bool:
    """Return whether this process runs on an Arm processor of 64 bits."""
    return platform.machine().lower() in _ARM


def usable_cores() -> int:
    """Return the number of cores that this process may run on, and has the time for in its control group's quota.

    Whole cores of a quota count, and one at least: a further thread would use the others' time up, and then all of them
    would wait for the next period.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that cannot be meant; engines start them all, however many.

    Raises:
        UsageError: fewer than one, or far more than there are cores.
    """
    most = 4 * usable_cores()
    if threads is not None and not 1 <= threads <= most:
        raise UsageError(f"threads is {threads}; expected 1 to {most}, four times the cores that may be used")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory, system, load and versions, as JSON types."""
    memory = available_memory()
    versions = {"dmformer": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        **msgspec.structs.asdict(describe_processor()),
        "cores": usable_cores(),
        "cpu_quota_cores": cpu_quota(),
        "governor": read_text(_FREQUENCY / "scaling_governor"),
        "frequency_mhz": _frequencies(),
        "available_memory_mb": None if memory is None else memory // 1_000_000,
        "os": f"{platform.system()} {platform.release()}",
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def _frequencies() -> dict[str, float] | None:
    """Return the first core's frequency in MHz, now and at most. Virtual machines tell at best the first."""
    told = {"now": read_text(_FREQUENCY / "scaling_cur_freq"), "most": read_text(_FREQUENCY / "cpuinfo_max_freq")}
    found = {name: int(khz) / 1000 for name, khz in told.items() if khz}
    if mhz := _cpuinfo("cpu MHz"):
        found.setdefault("now", float(mhz))
    return found or None


def instructions() -> frozenset[str]:
    """Return the instruction sets of the processor, in Linux's names; empty where the system does not tell."""
    return frozenset(_cpuinfo("flags", "Features").split())  # x86; Arm


def cpu_model() -> str:
    """Return the processor's name, as the system has it."""
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()  # x86, or a board of Arm


def is_emulated() -> bool:
    """Return whether this process runs on an emulated processor, as far as it shows.

    It does where dmformer emulates one, and where the system describes a processor of another architecture than the
    process is for, as in a container for Arm that QEMU runs.
    """
    foreign = "CPU implementer" if platform.machine().lower() in _X86 else "vendor_id"
    return cpu_model().endswith(EMULATED) or bool(_cpuinfo(foreign))


def available_memory() -> int | None:
    """Return the bytes that a new process may take without swapping, within a container's limit.

    ``None`` where the system does not tell.
    """
    told = re.search(r"^MemAvailable: *(\d+)", read_text(Path("/proc/meminfo")) or "", re.MULTILINE)
    if told is None:
        return None
    available = int(told[1]) * 1024
    limit, used = (read_text(_CONTROL_GROUP / name) or "" for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():  # else no container, no limit ("max"), or the older hierarchy
        return min(available, max(0, int(limit) - int(used)))
    return available


def _cpuinfo(*keys: str) -> str:
    """Return the first value in Linux's description of the processor whose name begins with a key; else nothing."""
    lines = (read_text(Path("/proc/cpuinfo")) or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")


def give_memory_back() -> None:
    """Make glibc return freed memory to the system: loading a model leaves much behind."""
    import ctypes

    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def gpu_state() -> dict[str, Any] | None:
    """Return the state of the first NVIDIA GPU, as JSON types: clocks, temperature, power, and what holds them back.

    With the memory in use, of all processes, in MiB. ``None`` where there is no GPU, or no ``nvidia-ml-py`` to ask it,
    and for each figure that the GPU does not give.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - no package, no driver, no GPU
        return None

    def held_back(gpu: Any) -> list[str]:
        held, prefix = pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu), "nvmlClocksEventReason"
        named = {name.removeprefix(prefix): getattr(pynvml, name) for name in dir(pynvml) if name.startswith(prefix)}
        # Each reason is one bit; "All" is no reason, and an older name of a bit comes second.
        bits = {bit: name for name, bit in sorted(named.items(), reverse=True) if bit and bit & (bit - 1) == 0}
        return sorted(name for bit, name in bits.items() if held & bit)

    questions: dict[str, Callable[[Any], Any]] = {
        "name": pynvml.nvmlDeviceGetName,
        "driver": lambda _: pynvml.nvmlSystemGetDriverVersion(),
        "sm_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
        "temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        "memory_used_mb": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / (1 << 20),
        "power_w": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "throttle": held_back,
    }
    state: dict[str, Any] = {}
    try:
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        for name, ask in questions.items():
            try:
                state[name] = ask(gpu)
            except pynvml.NVMLError:  # boards and laptops answer some of these only
                state[name] = None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return state
