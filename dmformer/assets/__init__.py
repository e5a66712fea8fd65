"""The demonstration checkpoint and sample images that ship with the package."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
DEMONSTRATION_CHECKPOINT = _HERE / "dmformer_nano_digits.safetensors"
SAMPLE_IMAGES = _HERE / "digits"
