"""Where an emulated process crashed: QEMU's debugger stub tells the address, and the address the library.

The process is run once more under ``qemu -g SOCKET``, which speaks GDB's remote serial protocol (appendix E of GDB's
manual): ``c`` continues until a signal, ``g`` reads the registers, ``m`` memory. QEMU maps files where the process maps
them, so that QEMU's own ``/proc/PID/maps`` names the library.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dmformer.device.processors import EmulatedProcessor

_COUNTER = {"aarch64": 32, "x86_64": 16}  # place of the program counter among the registers, of 8 bytes each
_FATAL = frozenset((signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGTRAP, signal.SIGABRT))
_SOCKET = "gdb"
_LISTENING_S = 60.0
_MOST_BYTES = {"aarch64": 4, "x86_64": 15}  # of an instruction
_OBJDUMP = {"aarch64": "aarch64", "x86_64": "i386:x86-64"}
# Arm's Architecture Reference Manual, "A64 instruction set encoding": mask and value of a word, and Linux's name of the
# feature that its instructions need. The first that fits counts.
_ARM = (
    (0x1E000000, 0x04000000, "sve"),
    (0x9E000000, 0x80000000, "sme"),
    (0x9FE0FC00, 0x0E809400, "asimddp"),  # SDOT, UDOT
    (0x9FC0F400, 0x0F80E000, "asimddp"),
    (0xDFE0F400, 0x4E80A400, "i8mm"),  # SMMLA, UMMLA, USMMLA
    (0xBFE0FC00, 0x0E809C00, "i8mm"),  # USDOT
    (0xBF60FC00, 0x2E40FC00, "bf16"),  # BFDOT, BFMLAL
    (0xFFE0FC00, 0x6E40EC00, "bf16"),  # BFMMLA
    (0xBFFFFC00, 0x0EA16800, "bf16"),  # BFCVTN
    (0xFFFFFC00, 0x1E634000, "bf16"),  # BFCVT
    (0x9F60C400, 0x0E400400, "asimdhp"),  # arithmetic of vectors of float16
    (0x9F7E0C00, 0x0E780800, "asimdhp"),
    (0xBFC0B400, 0x0F001000, "asimdhp"),  # FMLA, FMLS by element
    (0xBFC0F400, 0x0F009000, "asimdhp"),  # FMUL by element
    (0x7FE00000, 0x1EE00000, "fphp"),
    (0x3FFFFC00, 0x38BFC000, "lrcpc"),  # LDAPR
    (0x3F200C00, 0x38200000, "atomics"),  # LDADD, SWP and the like
    (0x3FA07C00, 0x08A07C00, "atomics"),  # CAS
    (0xBF20F400, 0x2E008400, "asimdrdm"),  # SQRDMLAH, SQRDMLSH
)
_OTHER_VEX = {  # map and opcode of instructions with a VEX prefix that are of another set than AVX
    **{(2, base + low): "fma" for base in (0x90, 0xA0, 0xB0) for low in range(6, 16)},
    **{(2, opcode): "avx_vnni" for opcode in range(0x50, 0x54)},
    (2, 0x13): "f16c",
    (3, 0x1D): "f16c",
}
_AVX2_OPCODES = {
    2: frozenset((0x16, 0x36, 0x45, 0x46, 0x47, 0x58, 0x59, 0x5A, 0x78, 0x79, 0x8C, 0x8E, *range(0x90, 0x94))),
    3: frozenset((0x00, 0x01, 0x02, 0x38, 0x39, 0x46)),
}
_INTEGER_OPCODES = frozenset((*range(0x60, 0x6E), *range(0x70, 0x77), *range(0xD1, 0xE6), *range(0xE8, 0xFF)))


@dataclass(frozen=True)
class Fault:
    """Where a process was when a signal ended it.

    Attributes:
        library: name of the file whose code ran; ``None`` for code that is in no file.
        code: bytes from the instruction on; empty where they could not be read.
    """

    library: str | None
    code: bytes


def explain(ended_by: signal.Signals, fault: Fault | None, processor: EmulatedProcessor) -> str:
    """Return a sentence about a crash: the library, and for SIGILL the instruction and what the processor lacks."""
    said = f"the process was ended by signal {int(ended_by)} ({ended_by.name})"
    if fault is None:
        return f"{said}; where is not known: it did not happen again under QEMU's debugger stub"
    said = f"{said} in {fault.library or 'code that an engine made at run time'}"
    if ended_by is not signal.SIGILL or not fault.code:
        return said
    name = _disassemble(fault.code, processor.architecture)
    if processor.architecture == "aarch64":
        code, feature = fault.code[:4], _arm_feature(fault.code)
    else:
        code, feature = fault.code, _x86_feature(fault.code)
    said += f", at the instruction {code.hex(' ')}" + (f" ({name})" if name else "")
    if feature is not None and feature not in processor.features:
        return f"{said}: it needs {feature}, which {processor.name} lacks"
    return f"{said}, which {processor.name} lacks"


def locate_fault(
    command: Sequence[str], order: bytes, environment: Mapping[str, str], timeout_s: float, folder: Path
) -> Fault | None:
    """Run a command that crashed once more, under QEMU's debugger stub; ``None`` where it does not crash again.

    Args:
        command: QEMU, with its arguments.
        order: what it reads from standard input.
        environment: of the process.
        timeout_s: seconds that it may take.
        folder: for the order and the stub's socket.
    """
    given = folder / "order.json"
    given.write_bytes(order)
    counter = next(where for name, where in _COUNTER.items() if name in Path(command[0]).name)
    with given.open("rb") as stdin:
        process = subprocess.Popen(
            [command[0], "-g", _SOCKET, *command[1:]],
            cwd=folder,  # a socket's name has 107 bytes at most, the folder's may have more
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
        )
    try:
        with socket.socket(socket.AF_UNIX) as stub, suppress(OSError, ValueError):
            _connect(stub, folder, process)
            stub.settimeout(timeout_s)
            if not _run_to_the_crash(stub):
                return None
            registers = bytes.fromhex(_ask(stub, "g")[: 16 * (counter + 1)])
            address = int.from_bytes(registers[8 * counter : 8 * counter + 8], "little")
            code = b""
            with suppress(ValueError):
                code = bytes.fromhex(_ask(stub, f"m{address:x},{max(_MOST_BYTES.values()):x}"))
            return Fault(_library(process.pid, address), code)
    finally:
        process.kill()
        process.wait()
    return None


def _connect(stub: socket.socket, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Connect to the stub as soon as it listens.

    Raises:
        OSError: it did not begin to, or has ended.
    """
    begun, opened = time.monotonic(), os.open(folder, os.O_RDONLY)
    try:
        while True:
            try:
                return stub.connect(f"/proc/self/fd/{opened}/{_SOCKET}")
            except OSError:
                if process.poll() is not None or time.monotonic() - begun > _LISTENING_S:
                    raise
                time.sleep(0.05)
    finally:
        os.close(opened)


def _run_to_the_crash(stub: socket.socket) -> bool:
    """Let the process run until a signal that ends it; other signals are handed on."""
    reply = _ask(stub, "c")
    while reply.startswith("T"):
        number = int(reply[1:3], 16)  # GDB's own numbers, which are Linux's for these but for SIGBUS
        if number == 10 or number in _FATAL:
            return True
        reply = _ask(stub, f"C{reply[1:3]}")
    return False


def _ask(stub: socket.socket, request: str) -> str:
    """Send a packet, ``$content#checksum``, and return the content of the answer."""
    content = request.encode()
    stub.sendall(b"$%s#%02x" % (content, sum(content) & 0xFF))
    received = b""
    while (answer := re.search(rb"\$([^#]*)#..", received)) is None:
        piece = stub.recv(1 << 16)
        if not piece:
            raise OSError("the stub has gone")
        received += piece
    stub.sendall(b"+")
    return answer[1].decode()


def _library(process: int, address: int) -> str | None:
    """Return the name of the file that is mapped at an address."""
    for line in Path(f"/proc/{process}/maps").read_text(encoding="utf-8").splitlines():
        span, *_, name = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return Path(name).name if name.startswith("/") and not name.startswith("/dev/") else None
    return None


def _disassemble(code: bytes, architecture: str) -> str | None:
    """Return an instruction as an assembler writes it, where a program for it is at hand."""
    for name in (f"{architecture}-linux-gnu-objdump", "objdump"):
        if program := shutil.which(name):
            with tempfile.NamedTemporaryFile() as file:
                file.write(code[: _MOST_BYTES[architecture]])
                file.flush()
                arguments = ["-D", "-b", "binary", "-m", _OBJDUMP[architecture], file.name]
                done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
            found = re.search(r"(?m)^ *0:\t[0-9a-f ]+\t(.+)$", done.stdout)
            if found:
                return " ".join(found[1].split())
    return None


def _arm_feature(code: bytes) -> str | None:
    word = int.from_bytes(code[:4], "little")
    return next((feature for mask, value, feature in _ARM if word & mask == value), None)


def _x86_feature(code: bytes) -> str | None:
    """Return the instruction set of an instruction, from its prefix, map and opcode (Intel's manual, volume 2)."""
    if code[:1] == b"\x62":
        return "avx512f"
    if code[:1] == b"\xc5":
        return _vex_feature(1, code[1], code[2])
    if code[:1] == b"\xc4":
        return _vex_feature(code[1] & 0x1F, code[2], code[3])
    legacy = code.lstrip(bytes((0x66, 0xF2, 0xF3, *range(0x40, 0x50))))
    return {b"\x0f\xb8": "popcnt", b"\x0f\x38": "sse4_1", b"\x0f\x3a": "sse4_1"}.get(legacy[:2])


def _vex_feature(table: int, fields: int, opcode: int) -> str:
    """Return the instruction set of an instruction with a VEX prefix; bits of ``fields`` are its width and its type."""
    wide, integer = bool(fields & 4), fields & 3 == 1
    if opcode in _AVX2_OPCODES.get(table, ()) or (wide and integer and table == 1 and opcode in _INTEGER_OPCODES):
        return "avx2"
    if table > 1 and opcode >= 0xF0:
        return "bmi2"
    return _OTHER_VEX.get((table, opcode), "avx")
