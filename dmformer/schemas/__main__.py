"""Write the schemas from the types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from dmformer.bench.report import BenchReport
from dmformer.bench.server import LoadReport
from dmformer.bundle.integrity import IntegrityReport
from dmformer.bundle.manifest import Manifest
from dmformer.cache import CacheReport
from dmformer.device.doctor import MachineReport
from dmformer.export.build import BuildReport
from dmformer.files import indented_json
from dmformer.serve.predictor import PredictReport, SegmentReport
from dmformer.tuning.report import TuneReport
from dmformer.verify.evaluate import EvalReport
from dmformer.verify.report import ParityReport

TYPES: dict[str, type[msgspec.Struct]] = {
    "manifest": Manifest,
    "verify": ParityReport,
    "bench": BenchReport,
    "load": LoadReport,
    "eval": EvalReport,
    "predict": PredictReport,
    "segment": SegmentReport,
    "doctor": MachineReport,
    "build": BuildReport,
    "cache": CacheReport,
    "check": IntegrityReport,
    "tune": TuneReport,
}


def schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a type."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(kind)}


def encode(kind: type[msgspec.Struct]) -> bytes:
    """The schema as it is written to its file."""
    return indented_json(schema(kind))


if __name__ == "__main__":
    for name, kind in TYPES.items():
        Path(__file__).with_name(f"{name}.json").write_bytes(encode(kind))
