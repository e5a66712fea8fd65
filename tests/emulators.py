"""Stand-ins for QEMU, apt-get, dpkg-deb and pip: scripts that take the arguments and give the answers of the real ones.

What they play is marked in each. ``tests/test_emulation.py`` has the tests with the real ones, which are slow.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmformer.device import installation

if TYPE_CHECKING:
    import pytest

# qemu-aarch64-static: "--version", "-cpu help", and "-cpu MODEL -L ROOT PYTHON -S ARGUMENTS…", which it runs with this
# interpreter and its packages in the place of PYTHON. FAIL names what breaks instead.
_QEMU = """
import os, signal, sys, time
arguments = sys.argv[1:]
if "--version" in arguments:
    print("qemu-aarch64 version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)")
elif arguments == ["-cpu", "help"]:
    print("Available CPUs:\\n  cortex-a53\\n  cortex-a72\\n  cortex-a76\\n  max\\n  neoverse-n1")
else:
    cpu, model, prefix, root, python, isolated, *rest = arguments
    assert (cpu, prefix, isolated) == ("-cpu", "-L", "-S"), arguments
    assert python.startswith(root) and os.path.isfile(python), python
    with open(root + "/proc/cpuinfo") as file, open(LOG, "a") as log:
        log.write("qemu " + model + "\\n")
        assert model in file.read()
    failing = open(FAIL).read() if os.path.exists(FAIL) else ""
    if failing and "verify.replay" in " ".join(rest):
        os.kill(os.getpid(), getattr(signal, failing))
    os.execv(sys.executable, [sys.executable, *rest])
"""
# apt-get: "update", and "download PACKAGES…", which writes a file for each into the working folder.
_APT = """
import pathlib, sys
with open(LOG, "a") as log:
    log.write("apt-get " + " ".join(word for word in sys.argv[1:] if not word.startswith("-")) + "\\n")
if "download" in sys.argv:
    for name in sys.argv[sys.argv.index("download") + 1:]:
        pathlib.Path(name + "_1_arm64.deb").write_bytes(name.encode())
"""
# dpkg-deb: "--extract FILE FOLDER".
_DPKG = """
import pathlib, sys
_, extract, package, folder = sys.argv
assert extract == "--extract" and pathlib.Path(package).read_bytes()
python = pathlib.Path(folder) / "usr/bin/python3.11"
python.parent.mkdir(parents=True, exist_ok=True)
python.write_bytes(b"")
"""
# pip: "download --dest=FOLDER WHEEL[EXTRA] PACKAGE==VERSION…" and "index versions PACKAGE".
_PIP = """
import os, sys, zipfile
RELEASES = ["1.23.0", "1.23.2", "1.24.1", "1.26.0", "1.31.1", "1.32.0"]
with open(LOG, "a") as log:
    log.write("pip " + " ".join(os.path.basename(w) for w in sys.argv[1:] if not w.startswith("-")) + "\\n")
if os.path.exists(OFFLINE):
    sys.exit("WARNING: Retrying (Retry(total=0)) after connection broken by NewConnectionError\\n"
             "ERROR: No matching distribution found for " + sys.argv[-1])
if "index" in sys.argv:
    print("onnxruntime (1.32.0)\\nAvailable versions: " + ", ".join(reversed(RELEASES)))
else:
    (folder,) = [word.removeprefix("--dest=") for word in sys.argv if word.startswith("--dest=")]
    package, _, version = sys.argv[-1].partition("==")
    assert zipfile.ZipFile(sys.argv[-2].partition("[")[0]).testzip() is None
    if version not in RELEASES:
        sys.exit("ERROR: Could not find a version that satisfies the requirement (from versions: 1.32.0)\\n"
                 f"ERROR: No matching distribution found for {sys.argv[-1]}")
    for name in (f"{package}-{version}-cp311-cp311-manylinux_2_28_aarch64.whl", "numpy-2.0.0-py3-none-any.whl"):
        with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
            wheel.writestr(name.partition("-")[0] + ".marker", version)
"""


@dataclass(frozen=True)
class StandIns:
    """What the scripts were asked, and what breaks them."""

    folder: Path

    @property
    def asked(self) -> list[str]:
        """One line for each call of a program."""
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def forget(self) -> None:
        (self.folder / "log").unlink(missing_ok=True)

    def take_network_away(self) -> None:
        (self.folder / "offline").touch()

    def crash(self, signal_name: str) -> None:
        """End the emulated process that asks an artifact by a signal."""
        (self.folder / "fail").write_text(signal_name)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """Put the scripts before everything else on PATH, and in the place of pip."""
    folder.mkdir()
    names = {"LOG": folder / "log", "FAIL": folder / "fail", "OFFLINE": folder / "offline"}
    head = f"#!{sys.executable}\n" + "".join(f"{name} = {str(path)!r}\n" for name, path in names.items())
    scripts = {"qemu-aarch64-static": _QEMU, "apt-get": _APT, "dpkg-deb": _DPKG, "pip": _PIP}
    for name, script in scripts.items():
        (folder / name).write_text(head + script)
        (folder / name).chmod(0o755)
    keyring = folder / "keyring.gpg"
    keyring.touch()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(installation, "_PIP", (sys.executable, str(folder / "pip")))
    monkeypatch.setattr(installation, "_KEYRING", keyring)
    return StandIns(folder)
