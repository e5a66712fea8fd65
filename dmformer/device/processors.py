"""The processors that QEMU can play: where each is found, what the system there says of it, and QEMU's name of it.

Engines choose their kernels by what ``/proc/cpuinfo`` says, and QEMU shows the host's. With the host's, onnxruntime
1.32.0 for Arm crashes while it is imported; so an emulated process gets a description like the one on the board.
Parts are those of Arm's reference manuals (MIDR_EL1), features those of Linux's ``/proc/cpuinfo`` on such boards, as
far as QEMU's user mode has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmformer.errors import UsageError
from dmformer.machine import EMULATED

_ARMV8_0 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_ARMV8_2 = f"{_ARMV8_0} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
_NEHALEM = "fpu cx8 cmov mmx fxsr sse sse2 syscall nx lm pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
_IVY_BRIDGE = f"{_NEHALEM} pclmulqdq aes xsave avx f16c rdrand"
_HASWELL = f"{_IVY_BRIDGE} fma movbe abm fsgsbase bmi1 avx2 bmi2"


@dataclass(frozen=True)
class EmulatedProcessor:
    """A processor that emulation plays.

    Attributes:
        name: as users type it.
        found_in: boards and machines that have it.
        architecture: as in ``x86_64`` or ``aarch64``.
        models: QEMU's names: its own, and after it the nearest of older versions of QEMU.
        features: instruction sets that it has, in Linux's names.
        identity: lines of ``/proc/cpuinfo`` that say which it is.
    """

    name: str
    found_in: str
    architecture: str
    models: tuple[str, ...]
    features: frozenset[str]
    identity: tuple[tuple[str, str], ...]

    def cpuinfo(self, cores: int) -> str:
        """Return ``/proc/cpuinfo`` as Linux has it on a machine with this processor."""
        key = "Features" if self.architecture == "aarch64" else "flags"
        lines = [*self.identity, (key, " ".join(sorted(self.features)))]
        core = "".join(f"{name}\t: {value}\n" for name, value in lines)
        model = f"Model\t\t: {self.name}{EMULATED}\n" if self.architecture == "aarch64" else ""
        return "".join(f"processor\t: {number}\n{core}\n" for number in range(cores)) + model


def _arm(name: str, found_in: str, part: int, features: str, *nearest: str) -> EmulatedProcessor:
    """Return a processor designed by Arm (implementer 0x41)."""
    identity = (
        ("BogoMIPS", "100.00"),
        ("CPU implementer", "0x41"),
        ("CPU architecture", "8"),
        ("CPU variant", "0x0"),
        ("CPU part", f"{part:#05x}"),
        ("CPU revision", "0"),
    )
    return EmulatedProcessor(name, found_in, "aarch64", (name, *nearest), frozenset(features.split()), identity)


def _intel(model_name: str, found_in: str, model: int, features: str) -> EmulatedProcessor:
    """Return a processor by Intel, of family 6."""
    name = model_name.lower()
    identity = (
        ("vendor_id", "GenuineIntel"),
        ("cpu family", "6"),
        ("model", str(model)),
        ("model name", f"{name}{EMULATED}"),
        ("stepping", "1"),
    )
    return EmulatedProcessor(name, found_in, "x86_64", (model_name,), frozenset(features.split()), identity)


PROCESSORS = (
    _arm("cortex-a35", "i.MX 8X, Rockchip RK3308", 0xD04, _ARMV8_0),
    _arm("cortex-a53", "Raspberry Pi 3 and Zero 2, i.MX 8M", 0xD03, _ARMV8_0),
    _arm("cortex-a57", "Jetson Nano and TX1", 0xD07, _ARMV8_0),
    _arm("cortex-a72", "Raspberry Pi 4, Rockchip RK3399", 0xD08, _ARMV8_0),
    _arm("cortex-a76", "Raspberry Pi 5, Rockchip RK3588", 0xD0B, _ARMV8_2),
    _arm("cortex-a78ae", "Jetson Orin", 0xD42, _ARMV8_2, "cortex-a76"),
    _arm("neoverse-n1", "Ampere Altra, AWS Graviton 2", 0xD0C, _ARMV8_2),
    _intel("Nehalem", "x86 without AVX, as many Atoms and Celerons", 26, _NEHALEM),
    _intel("IvyBridge", "x86 with AVX, without AVX2", 58, _IVY_BRIDGE),
    _intel("Haswell", "x86 with AVX2, without VNNI, as most up to 2019", 60, _HASWELL),
)


def processor(name: str) -> EmulatedProcessor:
    """Return a processor by its name.

    Raises:
        UsageError: no such processor, or ``max``, which is none.
    """
    for row in PROCESSORS:
        if row.name == name.lower():
            return row
    names = ", ".join(row.name for row in PROCESSORS)
    if name.lower() == "max":
        raise UsageError(
            "processor 'max' is all that QEMU computes, and no processor: with its unfinished SME OpenVINO answers "
            f"wrongly at int8; expected one of {names}"
        )
    raise UsageError(f"unknown processor {name!r}; expected one of {names}, or list")
