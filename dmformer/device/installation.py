"""This tool and one engine, laid out to be run elsewhere: on an emulated processor, with another release, in a browser.

Python packages come as wheels by ``pip download``: pip resolves what this tool's own metadata asks for and compares
hashes with those of the index. The system of an emulated machine comes as Debian packages by ``apt-get``, which checks
signed lists; what runs in a browser comes by ``npm pack``, pinned to one version and its hash. What was downloaded is
kept in the cache by what was asked for, and hashed again when it is used. It is unpacked into a temporary folder for
each run, so that nothing half laid out is ever used and runs do not meet; where everything is in the cache no network
is asked.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dmformer import __version__
from dmformer.cache import digest
from dmformer.errors import CheckFailed, StageFailed, UnavailableError, UsageError
from dmformer.files import open_regular
from dmformer.process import announce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dmformer.cache import Cache

DEBIAN_PYTHON = "usr/bin/python3.11"
_DEBIAN = "bookworm"
_DEBIAN_NAMES = {"aarch64": "arm64", "x86_64": "amd64"}
# Python, what its standard library and the engines' wheels link to: wheels bring everything else.
_DEBIAN_PACKAGES = (
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libstdc++6", "libgcc-s1", "zlib1g",
    "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5", "libgomp1",
)  # fmt: skip
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_MIRROR = "http://deb.debian.org"
_SOURCES = f"""\
deb [signed-by={_KEYRING}] {_MIRROR}/debian {_DEBIAN} main
deb [signed-by={_KEYRING}] {_MIRROR}/debian {_DEBIAN}-updates main
deb [signed-by={_KEYRING}] {_MIRROR}/debian-security {_DEBIAN}-security main
"""
_LIMIT_S = 1800.0  # for one download; a server that sends nothing more is not waited for without an end
_PIP = (sys.executable, "-m", "pip")
_NPM_FLAGS = ("--ignore-scripts", "--fetch-retries=1", "--fetch-retry-mintimeout=2000")
_UNREACHED = re.compile(r"Retrying|ConnectionError|ConnectTimeout|Could not fetch URL|name resolution", re.IGNORECASE)


class NoRelease(UnavailableError):
    """A package has no release that fits a platform, or none that goes with what else is needed."""


@dataclass(frozen=True)
class Platform:
    """What wheels have to fit.

    Attributes:
        title: for people: processor's architecture and Python.
        tags: wheels' platform tags, the newest first; none for this interpreter on this machine.
        python: version, as in ``3.11``.
    """

    title: str
    tags: tuple[str, ...] = ()
    python: str = ""

    @classmethod
    def here(cls) -> Platform:
        """Return that of this interpreter."""
        python = ".".join(platform.python_version_tuple()[:2])
        return cls(f"{platform.machine()}, Python {python}", (), python)

    @classmethod
    def linux(cls, architecture: str, python: str, glibc: int) -> Platform:
        """Return that of CPython on Linux with the GNU C library 2.``glibc``."""
        tags = [f"manylinux_2_{minor}_{architecture}" for minor in range(glibc, 16, -1)]
        return cls(f"{architecture}, Python {python}", (*tags, f"manylinux2014_{architecture}"), python)

    @property
    def flags(self) -> list[str]:
        """Arguments of pip."""
        if not self.tags:
            return []
        named = [f"--platform={tag}" for tag in self.tags]
        abis = [f"--abi={abi}" for abi in (f"cp{self.python.replace('.', '')}", "abi3", "none")]
        return [*named, f"--python-version={self.python}", "--implementation=cp", *abis]


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a new folder that goes away with the block, and with the process where that crashes.

    Raises:
        StageFailed: what was written there did not fit on the disk.
    """
    # Named before it is made, so that an interrupt between the two leaves nothing.
    folder = announce(Path(tempfile.gettempdir()) / f"dmformer-{secrets.token_hex(8)}")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    except OSError as error:
        more = "; expected room there, or TMPDIR that names another folder" if error.errno == errno.ENOSPC else ""
        raise StageFailed(f"laying out in {str(folder)!r} failed: {error.strerror or error}{more}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lay_out_debian(architecture: str, folder: Path, cache: Cache) -> None:
    """Unpack a small Debian with Python into a folder.

    Args:
        architecture: as in ``aarch64``.
        folder: new or empty.
        cache: where the packages are kept.

    Raises:
        StageFailed: a package could not be unpacked.
        UnavailableError: the packages are not in the cache and cannot be downloaded here.
    """
    what = f"Debian {_DEBIAN} packages for {architecture}"
    with temporary_folder() as scratch:
        found = _kept(
            cache, what, [_DEBIAN_PACKAGES, _SOURCES], scratch, lambda: _debian_packages(architecture, scratch)
        )
        folder.mkdir(parents=True, exist_ok=True)
        for path in found:
            _run(["dpkg-deb", "--extract", str(path), str(folder)], what, "dpkg")


def _debian_packages(architecture: str, folder: Path) -> list[Path]:
    """Download Debian packages with lists and settings of our own: no rights of an administrator are needed."""
    if not _KEYRING.is_file():
        raise UnavailableError(f"{_KEYRING} is missing, which Debian's lists are signed for; run: "
                               "apt-get install debian-archive-keyring")  # fmt: skip
    state = folder / "apt"
    (state / "lists/partial").mkdir(parents=True)
    (state / "archives/partial").mkdir(parents=True)
    (state / "sources.list").write_text(_SOURCES, encoding="utf-8")
    name = _DEBIAN_NAMES[architecture]
    settings = {
        "APT::Architecture": name,
        "APT::Architectures": name,
        "APT::Sandbox::User": "",  # downloads are made as the user who asks
        "Dir::State": str(state),
        "Dir::State::status": os.devnull,
        "Dir::Cache": str(state),
        "Dir::Etc::sourcelist": str(state / "sources.list"),
        "Dir::Etc::sourceparts": os.devnull,
        "Acquire::Languages": "none",
        "APT::Update::Error-Mode": "any",
    }
    command = ["apt-get", "--quiet", *(f"--option={key}={value}" for key, value in settings.items())]
    what = f"Debian's packages for {name}"
    _run([*command, "update"], what, "apt")
    _run([*command, "download", *_DEBIAN_PACKAGES], what, "apt", folder)
    shutil.rmtree(state)
    return sorted(folder.glob("*.deb"))


def _run(command: list[str], what: str, package: str, folder: Path | None = None) -> None:
    """Run a program of Debian's.

    Raises:
        OSError: the disk is full.
        UnavailableError: it is not here, or failed.
    """
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = _call(command[0], command, folder, environment)
    except FileNotFoundError as error:
        raise UnavailableError(
            f"{command[0]} is not here, which gets {what}; expected Debian's {package}, or `root`, a root file system"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
        said = (lines or done.stderr.splitlines() or ["no message"])[0]
        raise UnavailableError(f"{what} could not be had ({said}); expected them in the cache, or a network")


def _call(
    name: str, command: Sequence[str], folder: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program that downloads or unpacks, and return how it ended.

    Args:
        name: of the program, for people.
        command: the program and its arguments.
        folder: that it works in.
        environment: of the program; otherwise this process's own.

    Raises:
        OSError: the program is not here, or says that the disk is full.
        UnavailableError: it did not end in time.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=folder,
            env=environment,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"{name} did not end within {_LIMIT_S:g} s; expected a network that answers: run it again"
        ) from error
    full = os.strerror(errno.ENOSPC)
    if done.returncode and full.lower() in done.stderr.lower():
        raise OSError(errno.ENOSPC, full)
    return done


def lay_out_packages(fits: Platform, extra: str, pins: Sequence[str], folder: Path, cache: Cache) -> dict[str, str]:
    """Unpack the Python packages that this tool needs with one engine, but not this tool itself, into a folder.

    Args:
        fits: what the wheels have to fit.
        extra: of this distribution, that installs the engine.
        pins: requirements beside it, as in ``onnxruntime==1.26.0``.
        folder: new or empty.
        cache: where the wheels are kept.

    Returns:
        The version of each package.

    Raises:
        NoRelease: a package has no release that fits.
        UnavailableError: the wheels are not in the cache and cannot be downloaded here.
    """
    try:
        own = metadata.distribution("dmformer").read_text("METADATA") or ""
    except metadata.PackageNotFoundError as error:
        raise UnavailableError(
            "dmformer is not installed, so that nothing tells what it needs; run: pip install ."
        ) from error
    named = ", ".join(pins) or extra
    inputs = [fits.title, fits.tags, sys.platform, extra, list(pins), own]
    with temporary_folder() as scratch:
        found = _kept(
            cache,
            f"wheels for {fits.title}: {named}",
            inputs,
            scratch,
            lambda: _wheels(fits, extra, pins, own, scratch),
        )
        for path in found:
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder)
        for data in (*folder.glob("*.data/purelib"), *folder.glob("*.data/platlib")):
            shutil.copytree(data, folder, dirs_exist_ok=True)
    return {name: version for name, version, *_ in sorted(path.name.split("-") for path in found)}


def _wheels(fits: Platform, extra: str, pins: Sequence[str], own: str, folder: Path) -> list[Path]:
    """Download wheels: pip reads what is needed from a wheel of this tool that holds its metadata only."""
    tool = folder / "own" / f"dmformer-{__version__}-py3-none-any.whl"
    tool.parent.mkdir()
    info = f"dmformer-{__version__}.dist-info"
    with zipfile.ZipFile(tool, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", re.sub(r"(?m)^Version: .*$", f"Version: {__version__}", own, count=1))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    _pip(fits, "download", "--quiet", *fits.flags, "--only-binary=:all:", f"--dest={folder}", f"{tool}[{extra}]", *pins)
    return sorted(path for path in folder.glob("*.whl") if path.name != tool.name)


def _pip(fits: Platform, *arguments: str) -> str:
    """Run pip, and return what it prints.

    Raises:
        NoRelease: no release fits.
        OSError: the disk is full.
        UnavailableError: pip is not here, or the index cannot be reached.
    """
    done = _call("pip", [*_PIP, "--disable-pip-version-check", "--no-input", *arguments])
    if not done.returncode:
        return done.stdout
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    said = (errors or done.stderr.splitlines() or ["no message"])[-1]
    if "No module named pip" in done.stderr:
        raise UnavailableError("pip is not here, which gets the packages; run: python -m ensurepip")
    missing = re.search(r"No matching distribution found for (.+)", done.stderr)
    if _UNREACHED.search(done.stderr):
        raise UnavailableError(
            f"packages for {fits.title} are not in the cache, and the index cannot be reached; expected a network once"
        )
    if missing is not None:
        raise NoRelease(f"no release of {missing[1].strip()} for {fits.title}")
    raise NoRelease(f"no installation for {fits.title}: {said}")


@dataclass(frozen=True)
class NpmPackage:
    """One version of a package of the npm registry.

    Attributes:
        name: of the package.
        version: of the package.
        sha512: of its archive, in hexadecimal digits.
    """

    name: str
    version: str
    sha512: str

    @property
    def title(self) -> str:
        """Name and version, for people."""
        return f"{self.name} {self.version}"

    def download(self, folder: Path, cache: Cache) -> Path:
        """Put the archive into a folder, from the cache or by ``npm``.

        Raises:
            CheckFailed: npm gave another file than expected.
            OSError: the disk is full.
            UnavailableError: it is not in the cache and cannot be downloaded here.
        """
        (path,) = _kept(cache, self.title, self.sha512, folder, lambda: [self.check(self._pack(folder))])
        return path

    def check(self, path: Path) -> Path:
        """Return the path of an archive, after comparing its hash.

        Raises:
            CheckFailed: it is another file than expected.
            UsageError: it cannot be read.
        """
        try:
            with open_regular(path, links=True) as file:
                found = hashlib.sha512(file.read()).hexdigest()
        except OSError as error:
            raise UsageError(
                f"{str(path)!r}: {error.strerror or error}; expected the file that is written by: {self._command}"
            ) from error
        if found != self.sha512:
            raise CheckFailed(
                f"{str(path)!r}: SHA-512 {found[:12]}…; expected {self.sha512[:12]}…, that of {self.title}: take the "
                f"file that is written by: {self._command}"
            )
        return path

    @property
    def _command(self) -> str:
        return f"npm pack {self.name}@{self.version}"

    def _pack(self, folder: Path) -> Path:
        """Run npm, which writes the archive of the registry that it is set up for."""
        npm = shutil.which("npm")
        elsewhere = f"or the file that is written elsewhere by: {self._command}"
        if npm is None:
            raise UnavailableError(f"npm is not here, which gets {self.title}; expected it, {elsewhere}")
        done = _call(
            "npm", [npm, "pack", f"{self.name}@{self.version}", "--pack-destination", str(folder), *_NPM_FLAGS], folder
        )
        written = sorted(folder.glob("*.tgz"))
        if done.returncode or not written:
            lines = [line for line in done.stderr.splitlines() if re.match(r"npm (error|ERR!) ", line)]
            said = (lines or done.stderr.splitlines() or ["no message"])[0]
            raise UnavailableError(
                f"{self.title} is not in the cache, and npm could not get it ({said}); expected a network once, "
                f"{elsewhere}"
            )
        return written[0]


def _kept(cache: Cache, what: str, inputs: object, folder: Path, make: Callable[[], list[Path]]) -> list[Path]:
    """Return files as they were downloaded earlier for the same request, or as they are now."""
    key = "" if cache.folder is None else digest([what, inputs])  # of what was asked alone: no version of this tool's
    found = cache.find(key, list[Path], folder)
    if found is None:
        found = make()
        cache.keep(key, what, found, folder)
    return found


def list_releases(fits: Platform, package: str, cache: Cache) -> list[str]:
    """Return the versions of a package that fit, the oldest first; those of last time where the index is out of reach.

    Raises:
        NoRelease: there are none.
        UnavailableError: the index cannot be reached, and never was.
    """
    what = f"releases of {package} for {fits.title}"
    key = "" if cache.folder is None else digest([what, fits.tags])
    with temporary_folder() as folder:
        try:
            said = _pip(fits, "index", "versions", package, "--only-binary=:all:", *fits.flags)
        except NoRelease:
            raise
        except UnavailableError:
            kept = cache.find(key, list[str], folder)
            if kept is None:
                raise
            return kept
        listed = re.search(r"Available versions: (.*)", said)
        found = [] if listed is None else [one.strip() for one in listed[1].split(",")]
        found.sort(key=lambda version: [int(part) for part in re.findall(r"\d+", version)])
        cache.keep(key, what, found, folder)
    return found
