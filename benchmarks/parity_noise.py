"""What the parity limit stands between: how far a right runtime is from PyTorch, and how far a slightly wrong one.

Both in units of the float32 noise that the limit is a multiple of (PyTorch float32 against float64, same inputs):
clean exports over random configurations through each engine, and a change of 1 % in each tensor in turn.

Usage: python benchmarks/parity_noise.py [EXPORTS]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dmformer.assets import DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from dmformer.data.images import list_images
from dmformer.export.formats import ConversionSource, convert
from dmformer.export.networks import random_checkpoint
from dmformer.graph.trace import trace
from dmformer.models.checkpoint import Checkpoint, load_checkpoint
from dmformer.runtimes import registry
from dmformer.verify.answers import ask
from dmformer.verify.compare import NOISE_FACTOR, float32_limit
from dmformer.verify.parity import check_answers, references
from dmformer.verify.reference import golden_pixels, make_golden


def clean(count: int) -> dict[str, list[float]]:
    """Largest difference of each engine on each clean export, in units of noise."""
    found: dict[str, list[float]] = {"onnxruntime": [], "openvino": []}
    for seed in range(count):
        random = np.random.default_rng(seed)
        options = {
            "num_classes": int(random.integers(2, 1000)),
            "branch_merge": str(random.choice(["sum", "concat"])),
            "gate_input": str(random.choice(["x", "x_prime"])),
            "layer_scale": [None, 0.01][int(random.integers(2))],
        }
        arch = str(random.choice(["dmformer_nano", "dmformer_t"]))
        checkpoint = random_checkpoint(arch, options, int(random.choice([32, 64, 96])), seed)
        model = checkpoint.model()
        golden = make_golden(model, checkpoint.preprocessing, golden_pixels(checkpoint.preprocessing, []))
        for engine, ratios in found.items():
            with tempfile.TemporaryDirectory() as folder:
                traced = Path(folder) / "traced.onnx"
                trace(checkpoint, model, traced)
                row = registry.entry(engine)
                files = convert(row, ConversionSource(traced, "fp32", checkpoint), Path(folder)).files
                runtime = registry.available_adapter(row)(files[0])
                answers = ask(runtime, golden.inputs, golden.thinned, layers=False, consistency=False)
                for check in check_answers("runtime", answers, references(golden, "fp32")):
                    ratios.append(NOISE_FACTOR * (check.max_abs or np.inf) / (check.limit or 1.0))
    return found


def perturbed(checkpoint: Checkpoint, images: list[Path]) -> list[tuple[float, str]]:
    """What 1 % of each tensor does to the output, in units of noise, least first."""
    model = checkpoint.model()
    golden = make_golden(model, checkpoint.preprocessing, golden_pixels(checkpoint.preprocessing, images))
    (reference,) = golden.outputs.values()
    (limit,) = float32_limit(golden.outputs, golden.outputs_float64).values()
    found = []
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            before = tensor.clone()
            tensor.mul_(1.01)
            with torch.inference_mode():
                moved = float(np.abs(model(torch.from_numpy(golden.inputs)).numpy() - reference).max())
            tensor.copy_(before)
            found.append((NOISE_FACTOR * moved / limit.max_abs, name))
    return sorted(found)


def main() -> None:
    """Print both sides."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print(f"the limit is {NOISE_FACTOR:g} times the float32 noise")
    for engine, ratios in clean(count).items():
        figures = f"largest difference {max(ratios):.2f}, median {np.median(ratios):.2f} x noise"
        print(f"{engine}: {count} clean exports, {figures}")
    for name, checkpoint, images in (
        ("demonstration", load_checkpoint(DEMONSTRATION_CHECKPOINT), list_images(SAMPLE_IMAGES)),
        ("dmformer_s, lively weights", random_checkpoint("dmformer_s", {"num_classes": 10}, 96, 1), []),
    ):
        effects = perturbed(checkpoint, images)
        caught = sum(effect > NOISE_FACTOR for effect, _ in effects)
        print(f"{name}: 1 % of one tensor is caught in {caught} of {len(effects)}; least effects, x noise:")
        for effect, tensor in effects[:6]:
            print(f"  {effect:8.1f}  {tensor}")


if __name__ == "__main__":
    main()
