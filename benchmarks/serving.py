"""What serving costs beside the network: CPU time of server, model and client for a request, in NVIDIA's tritonserver.

CPU time, for it holds on a busy machine too; and latency, which does not. Usage: python -m benchmarks.serving BUNDLE
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from dmformer.bench.load import LoadTarget, ask_alone, put_load
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.layouts.api import serve_layout
from dmformer.serve.client import ServerClient
from dmformer.serve.targets import find_models, request_rows
from tests.tritonserver import Triton, triton

REQUESTS = 2000
CONCURRENCY = (1, 4, 16)


def cpu_s(process: int) -> float:
    """CPU time that a process has used, its own threads only, in seconds."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(bundle: Bundle, server: Triton, url: str) -> None:
    """Print a line for each model and number of clients."""
    with ServerClient(url) as client:
        targets, _ = find_models(bundle.manifest, client)
    for target in targets:
        load = LoadTarget.of(target, url, request_rows(target.spec, bundle.golden()))
        alone, stub = ask_alone(load), server.stub_of(target.model)
        for clients in CONCURRENCY:
            before = cpu_s(server.process.pid), cpu_s(stub)
            samples = put_load(load, clients, requests=REQUESTS, alone=alone)
            after = cpu_s(server.process.pid), cpu_s(stub)
            triton_ms, model_ms = (1e3 * (now - then) / REQUESTS for then, now in zip(before, after, strict=True))
            latencies = sorted(samples.latencies_ns)
            p50_ms, rate = latencies[len(latencies) // 2] / 1e6, len(latencies) / samples.wall_s
            print(
                f"{url.partition(':')[0]:5} {target.model:40} {clients:3} clients: {triton_ms:6.3f} ms server, "
                f"{model_ms:6.3f} ms model, {1e3 * samples.cpu_s / REQUESTS:6.3f} ms client; p50 {p50_ms:6.2f} ms, "
                f"{rate:6.0f} requests/s, {sum(samples.errors.values())} failed, {samples.mixed_up} mixed up",
                flush=True,
            )


def main() -> None:
    """Lay the bundle out, start the server, measure over both protocols."""
    bundle = open_bundle(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        serve_layout("triton", bundle, folder / "served", backend="python", images=True, runtimes=["onnxruntime"])
        with triton(folder / "served/models", folder / "run") as server:
            for url in (server.http, server.grpc):
                measure(bundle, server, url)


if __name__ == "__main__":
    main()
