"""int8 weights of 7 bits beside 8: what each costs in accuracy, in every runtime, with and without VNNI.

Each network is exported with weights of 7 and of 8 bits. Every int8 artifact answers the golden images: in onnxruntime,
and in OpenVINO with the instruction sets of this processor and with AVX2 alone (``ONEDNN_MAX_CPU_ISA``). A row
has the error of the answers over the spread of PyTorch's, and the largest difference from a literal execution of the
file over the error which that makes: what an engine adds to int8, 2 at most in parity. On this processor there are the
points of accuracy that are lost on the calibration images, too.

Usage: python -m benchmarks.weight_bits [NETWORK...]    digits, scenes, dmformer_s; otherwise all
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import dmformer
from benchmarks.precisions import photographs
from dmformer.bundle.manifest import WEIGHT_BITS
from dmformer.machine import describe_processor

SIZE = 224
NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {},
    "scenes": {"task": "segmentation"},
    "dmformer_s": {"arch": "dmformer_s", "image_size": SIZE},
}
INSTRUCTION_SETS = ("DEFAULT", "AVX2")
GOLDEN_ERROR = """
import json, sys
import numpy as np
from pathlib import Path
from dmformer.bundle.reader import own_bundle
from dmformer.bundle.select import select
bundle = own_bundle(Path(sys.argv[1]))
golden = bundle.golden()
rows = {}
for choice in select(bundle, [], ["int8"])[0]:
    with choice.runtime() as runtime:
        (name,) = (spec.name for spec in runtime.inputs)
        answers = runtime.run_rows({name: golden.inputs}, keep=golden.thinned)["logits"]
    truth, literal = golden.outputs_float64["logits"], golden.files["int8"]["logits"]
    rows[choice.entry.name] = {
        "error": float(np.sqrt(np.mean((answers - truth) ** 2)) / (truth - truth.mean(0)).std()),
        "beyond": float(np.abs(answers - literal).max() / np.abs(literal - truth).max()),
    }
print(json.dumps(rows))
"""


def main() -> None:
    """Export, ask, print."""
    print(describe_processor())
    print(
        f"{'network':12}{'bits':>5}{'runtime':>14}{'held to':>9}{'error':>9}{'engine over file':>18}{'points lost':>13}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for network in sys.argv[1:] or NETWORKS:
            for bits in WEIGHT_BITS:
                measure(network, bits, Path(folder) / f"{network}-{bits}")


def measure(network: str, bits: int, bundle: Path) -> None:
    """Rows of one network with weights of so many bits."""
    calibration = photographs(bundle.with_name("photographs"), SIZE) if network == "dmformer_s" else None
    result = dmformer.export(
        **NETWORKS[network],
        formats=["onnx", "openvino"],
        precisions=["int8"],
        weight_bits=bits,
        calibration=calibration,
        max_accuracy_drop=100,
        force=True,  # saturated answers are what is to be seen
        output=bundle,
    )
    lost = {artifact.format: artifact.points_lost for artifact in result.manifest.artifacts}
    for held in INSTRUCTION_SETS:
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": held}
        done = subprocess.run(
            [sys.executable, "-c", GOLDEN_ERROR, str(bundle)], env=environment, stdout=subprocess.PIPE, check=True
        )
        for runtime, row in json.loads(done.stdout).items():
            if runtime == "onnxruntime" and held != "DEFAULT":
                continue  # it does not read the variable
            points = lost[{"onnxruntime": "onnx"}.get(runtime, runtime)] if held == "DEFAULT" else None
            told = "-" if points is None else f"{np.round(points, 2) + 0.0:.2f}"
            print(
                f"{network:12}{bits:5}{runtime:>14}{held.lower():>9}{row['error']:9.1%}{row['beyond']:18.2f}{told:>13}",
                flush=True,
            )


if __name__ == "__main__":
    main()
