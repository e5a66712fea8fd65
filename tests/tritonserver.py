"""NVIDIA's tritonserver with its Python backend, started on loopback ports from an environment of its own."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import platformdirs
import pytest

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# The stub of this release is built for NumPy 1.
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy<2", "onnxruntime>=1.21", "openvino>=2025.0")
_READY_S = 120.0
_INSTALL_S = 1200.0  # each of the two programs that make the environment
_REQUIRE = "DMFORMER_REQUIRE_SERVING"  # 1: no index is an error; otherwise the tests are skipped
_PR_SET_PDEATHSIG = 1


def environment() -> Path:
    """The folder of an environment with the server, and with what a bundle's predictor needs; made once, by pip."""
    named = os.environ.get("DMFORMER_SERVING_ENVIRONMENT")
    folder = Path(named) if named else platformdirs.user_cache_path("dmformer-tests") / f"serving-{PYTHON}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The engines come by name: this tool itself lies in the tree that is tested.
    packages = [*PACKAGES, *(one for one in _base_requirements() if not one.startswith("numpy"))]
    with folder.with_suffix(".lock").open("w") as lock:
        _lock(lock)
        done = folder / "installed"
        if not done.is_file() or done.read_text() != "\n".join(packages):
            if named and not done.is_file() and folder.is_dir() and any(folder.iterdir()):
                raise RuntimeError(
                    f"DMFORMER_SERVING_ENVIRONMENT names {named!r}, which is neither empty nor such an environment; "
                    "expected a new folder"
                )
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=_INSTALL_S)
            install(folder, packages)
            done.write_text("\n".join(packages))
    return folder


def _lock(file: IO[str]) -> None:
    """Wait for another process that makes the environment, for as long as that can take."""
    deadline = time.monotonic() + 2 * _INSTALL_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file.name} is locked for {2 * _INSTALL_S:g} s; which process holds it?") from None
            time.sleep(0.5)


def install(folder: Path, packages: list[str]) -> None:
    """Install into an environment; without an index the test is skipped, or fails where the server is required."""
    command = [folder / "bin/pip", "install", "--quiet", *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    if not done.returncode:
        return
    unreached = "Retrying (" in done.stderr  # what pip says of an index that does not answer
    if unreached and os.environ.get(_REQUIRE) != "1":
        pytest.skip("the package index cannot be reached, which has NVIDIA's server")
    raise RuntimeError(f"pip could not install what the tests of the server need: {done.stderr[-3000:]}")


def end_with_the_tests() -> Callable[[], None]:
    """Return what a child calls before its program, so that it gets SIGTERM where the tests' process is killed."""
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask


def _base_requirements() -> list[str]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: list[str] = project["dependencies"]
    return found


class Triton:
    """A server under way.

    Attributes:
        http: its URL for HTTP.
        grpc: its URL for gRPC.
        log: file of what it says.
        repository: its folder of models.
    """

    def __init__(self, repository: Path, folder: Path, *arguments: str, packages: Path | None = None) -> None:
        self.log, self.repository = folder / "triton.log", repository
        environment_folder = environment()
        site = next(environment_folder.glob("lib/python*/site-packages"))
        program = site / "pytriton/tritonserver"
        backends = folder / "backends"
        shutil.copytree(program / "backends", backends)
        stub = backends / "python/triton_python_backend_stub"
        shutil.copy(program / f"python_backend_stubs/{PYTHON}/triton_python_backend_stub", stub)
        stub.chmod(0o755)
        ports = _free_ports(2)
        self.http, self.grpc = (
            f"{scheme}://127.0.0.1:{port}" for scheme, port in zip(("http", "grpc"), ports, strict=True)
        )
        self._shared_memory = f"dmformer_tests_{os.getpid()}_{ports[0]}_"
        libraries = [sysconfig.get_config_var("LIBDIR"), str(site / "nvidia_pytriton.libs")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    program / "bin/tritonserver",
                    f"--model-repository={repository}",
                    f"--backend-directory={backends}",
                    "--http-address=127.0.0.1",
                    f"--http-port={ports[0]}",
                    "--grpc-address=127.0.0.1",
                    f"--grpc-port={ports[1]}",
                    "--allow-metrics=false",
                    f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
                    "--exit-on-error=false",
                    "--cache-directory=" + str(folder / "no-caches"),
                    *arguments,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=end_with_the_tests(),  # noqa: PLW1509 - one system call
                env={
                    **{name: value for name, value in os.environ.items() if not name.startswith("OMP_")},
                    "LD_LIBRARY_PATH": ":".join(libraries),
                    "PYTHONPATH": ":".join([str(site) if packages is None else str(packages), str(ROOT)]),
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
            )

    def wait(self, *, ready: bool = True) -> None:
        """Wait until every model is ready; or until it is live, where some may have failed to load."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.log.read_text()[-3000:]}")
            with (
                suppress(urllib.error.URLError, ConnectionError, TimeoutError),
                urllib.request.urlopen(f"{self.http}/v2/health/{'ready' if ready else 'live'}", timeout=5),
            ):
                return
            time.sleep(0.2)
        raise AssertionError(f"not ready within {_READY_S} s: {self.log.read_text()[-3000:]}")

    def stubs(self) -> list[int]:
        """Process numbers of the stubs, one for each instance of a model."""
        return [number for number, _ in self._stubs()]

    def stub_of(self, model: str) -> int:
        """Process number of the stub of a model of one instance."""
        (found,) = (number for number, command in self._stubs() if f"/{model}/1/model.py" in command)
        return found

    def _stubs(self) -> list[tuple[int, str]]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                command = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if parent == self.process.pid and "triton_python_backend_stub" in command:
                    found.append((int(path.parent.name), command))
        return sorted(found)

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            for path in Path("/dev/shm").glob(f"{self._shared_memory}*"):  # left behind by a process that is killed
                path.unlink(missing_ok=True)


@contextmanager
def triton(
    repository: Path, folder: Path, *arguments: str, packages: Path | None = None, ready: bool = True
) -> Iterator[Triton]:
    """A server over a repository, ready."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Triton(repository, folder, *arguments, packages=packages)
    try:
        server.wait(ready=ready)
        yield server
    finally:
        server.end()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
