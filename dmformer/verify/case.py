"""A failure made small enough to send: a model file, the inputs that show it, and what should have come out.

``case.json`` describes it, ``case.npz`` has ``inputs/NAME`` and ``expected/NAME``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

from dmformer.bundle.manifest import FileEntry, hash_file, indented_json
from dmformer.errors import CheckFailed, UsageError, first_line
from dmformer.runtimes import registry
from dmformer.verify.compare import Limit, compare
from dmformer.verify.parity import Check, as_check

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

CASE = "case.json"
_ARRAYS = "case.npz"


class Case(Struct, frozen=True, kw_only=True):
    """What ``case.json`` holds.

    Attributes:
        runtime: that answers wrongly.
        precision: of the model file.
        files: the model's, the one to load first.
        node: where the two sides part.
        limits: the largest difference allowed in each expected tensor.
    """

    runtime: str
    precision: str
    files: tuple[FileEntry, ...]
    node: str
    limits: dict[str, float]


def save_case(
    folder: Path, case: Case, inputs: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]
) -> None:
    """Write description and arrays beside the model files, which are there already."""
    arrays = {f"inputs/{name}": array for name, array in inputs.items()}
    arrays |= {f"expected/{name}": array for name, array in expected.items()}
    np.savez_compressed(folder / _ARRAYS, **arrays)  # type: ignore[arg-type]
    (folder / CASE).write_bytes(indented_json(case))


def run_case(folder: Path) -> list[Check]:
    """Run a case on this machine: one check for each tensor.

    Raises:
        CheckFailed: a model file is not the one that was saved.
        StageFailed: the runtime failed.
        UnavailableError: the runtime cannot run on this machine.
        UsageError: the folder has no case that this version reads.
    """
    try:
        case = msgspec.json.decode((folder / CASE).read_bytes(), type=Case)
        with (folder / _ARRAYS).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib, NumPy and msgspec each have their own kinds
        raise UsageError(f"{folder}: no case: {first_line(error)}; expected a folder of verify --bisect") from error
    for entry in case.files:
        path = folder / entry.path
        if not path.is_file() or hash_file(path)[0] != entry.sha256:
            raise CheckFailed(f"{path}: missing or changed; expected the file that was saved with the case")
    expected = {name.removeprefix("expected/"): array for name, array in arrays.items() if name.startswith("expected/")}
    if not expected or set(expected) != set(case.limits) or not case.files:
        raise UsageError(
            f"{folder}: the case names {sorted(case.limits)} and has {sorted(expected)}; run --bisect again"
        )
    adapter = registry.available_adapter(registry.entry(case.runtime))
    checks = []
    with adapter(folder / case.files[0].path, precision=case.precision, taps=tuple(expected)) as runtime:
        given = {spec.name: arrays[f"inputs/{spec.name}"] for spec in runtime.inputs if f"inputs/{spec.name}" in arrays}
        shown = runtime.run(given)
    for name, array in expected.items():
        limit = Limit(case.limits[name], "saved with the case")
        comparison = compare(shown[name].astype(np.float64), array.astype(np.float64), limit)
        checks.append(as_check(name, case.runtime, case.precision, len(array), comparison, limit, "expected"))
    return checks
