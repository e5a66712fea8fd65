"""NVIDIA's tritonserver with its Python backend, started on loopback ports from an environment of its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# The stub of this release is built for NumPy 1.
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy<2", "onnxruntime>=1.21", "openvino>=2025.0")
_READY_S = 120.0


def environment() -> Path:
    """The folder of an environment with the server, and with what a bundle's predictor needs; made once, by pip."""
    named = os.environ.get("DMFORMER_SERVING_ENVIRONMENT")
    folder = Path(named) if named else platformdirs.user_cache_path("dmformer-tests") / f"serving-{PYTHON}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "installed"
        if not done.is_file() or done.read_text() != "\n".join(PACKAGES):
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            # The engines come by name: this tool itself lies in the tree that is tested.
            base = [one for one in _base_requirements() if not one.startswith("numpy")]
            subprocess.run([folder / "bin/pip", "install", "--quiet", *PACKAGES, *base], check=True)
            done.write_text("\n".join(PACKAGES))
    return folder


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
                    "--exit-on-error=false",
                    "--cache-directory=" + str(folder / "no-caches"),
                    *arguments,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
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
