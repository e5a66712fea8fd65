"""A failure made small enough to send: a model file, the inputs that show it, and what should have come out.

``case.json`` describes it, ``case.npz`` has ``inputs/NAME`` and ``expected/NAME``.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from dmformer.bundle.golden import read_arrays
from dmformer.bundle.manifest import FileEntry
from dmformer.bundle.reader import locate
from dmformer.bundle.select import saturation_risk
from dmformer.bundle.trust import admit_unsigned
from dmformer.errors import CheckFailed, UsageError, first_line
from dmformer.files import OpenFile, decode_json, indented_json, read_bounded
from dmformer.ownership import resolve
from dmformer.runtimes import registry
from dmformer.verify.compare import Limit, compare
from dmformer.verify.report import Check, ParityReport, add_cause, parity_report

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

CASE = "case.json"
_ARRAYS = "case.npz"
_MOST_CASE_BYTES = 1 << 20
_MOST_ARRAYS_BYTES = 1 << 30


class Case(Struct, frozen=True, kw_only=True):
    """What ``case.json`` holds.

    Attributes:
        runtime: name of the runtime that answers wrongly.
        precision: of the model file.
        files: of the model, with the one to load first.
        node: the first whose results differ from the expected ones.
        limits: the largest difference allowed in each expected tensor.
        full_range: whether the model has int8 weights of 8 bits.
    """

    runtime: str
    precision: str
    files: tuple[FileEntry, ...]
    node: str
    limits: dict[str, float]
    full_range: bool = False


@contextmanager
def staged_case(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``folder``, and of an older case in it, unless writing fails."""
    folder = resolve(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    staging.chmod(0o755)  # it was made for this user alone
    try:
        yield staging
        if (folder / CASE).is_file():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_case(
    folder: Path, case: Case, inputs: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]
) -> None:
    """Write description and arrays beside the model files, which are there already."""
    arrays = {f"inputs/{name}": array for name, array in inputs.items()}
    arrays |= {f"expected/{name}": array for name, array in expected.items()}
    np.savez_compressed(folder / _ARRAYS, **arrays)  # type: ignore[arg-type]
    (folder / CASE).write_bytes(indented_json(case))


def read_case(folder: Path) -> tuple[Case, dict[str, NDArray[Any]]]:
    """Read the description and the arrays of a case, all of them numbers.

    Raises:
        UsageError: the folder has no case that this version reads.
    """
    try:
        case = decode_json(read_bounded(folder / CASE, _MOST_CASE_BYTES), Case)
        arrays = read_arrays(read_bounded(folder / _ARRAYS, _MOST_ARRAYS_BYTES))
    except Exception as error:  # zipfile, zlib, NumPy and msgspec each have their own kinds
        raise UsageError(f"{folder}: no case: {first_line(error)}; expected a folder of verify --bisect") from error
    expected = {name.removeprefix("expected/") for name in arrays if name.startswith("expected/")}
    if not expected or expected != set(case.limits) or not case.files:
        raise UsageError(
            f"{folder}: the case names {sorted(case.limits)} and has {sorted(expected)}; run verify --bisect again"
        )
    if wrong := [name for name, array in arrays.items() if array.ndim == 0 or array.dtype.kind not in "fiu"]:
        raise UsageError(f"{folder}: array {wrong[0]!r} is {arrays[wrong[0]].dtype}; expected numbers, rows first")
    return case, arrays


def run_case(folder: Path) -> ParityReport:
    """Run a case on this machine and compare its tensors with what was expected, one check for each.

    Raises:
        CheckFailed: a model file is not the one that was saved, or leads to another one; or signatures are required.
        StageFailed: the runtime failed.
        UnavailableError: the runtime cannot run on this machine.
        UsageError: the folder has no case that this version reads.
    """
    admit_unsigned(str(folder))
    case, arrays = read_case(folder)
    row = registry.entry(case.runtime)
    files = tuple(_open_saved(folder, entry) for entry in case.files)
    # A cut out of an ONNX file is one, whichever engine is to run it.
    registry.inspect_artifact("onnx" if files[0].path.suffix == ".onnx" else row.format, files)
    expected = {name.removeprefix("expected/"): array for name, array in arrays.items() if name.startswith("expected/")}
    answered = _answer(case, files, {name.removeprefix("inputs/"): array for name, array in arrays.items()}, expected)
    checks = []
    for name, array in expected.items():
        limit = Limit(case.limits[name], "saved with the case")
        comparison = compare(answered[name].astype(np.float64), array.astype(np.float64), limit)
        checks.append(Check.of(name, case.runtime, case.precision, len(array), comparison, limit, "expected"))
    return parity_report(add_cause(checks, saturation_risk(row, case.full_range)))


def _open_saved(folder: Path, entry: FileEntry) -> OpenFile:
    """Open a model file of a case, after checking that it is the one that was saved."""
    try:
        file = OpenFile(locate(folder, entry))
    except OSError as error:
        raise CheckFailed(f"{folder / entry.path}: {error.strerror}; expected the file saved with the case") from error
    if (file.sha256, file.bytes) != (entry.sha256, entry.bytes):
        raise CheckFailed(f"{file.path}: changed; expected the file that was saved with the case")
    return file


def _answer(
    case: Case, files: Sequence[OpenFile], given: Mapping[str, NDArray[Any]], names: Collection[str]
) -> dict[str, NDArray[Any]]:
    """Run the model for the tensors named; one that is no output of it has to be shown, which may need ONNX."""
    adapter = registry.available_adapter(registry.entry(case.runtime))
    path = files[0].path
    with adapter(path, files=files, precision=case.precision) as runtime:
        inner = [name for name in names if name not in {spec.name for spec in runtime.outputs}]
        inputs = {spec.name: given[spec.name] for spec in runtime.inputs if spec.name in given}
        if not inner:
            return runtime.run(inputs)
    with adapter(path, files=files, precision=case.precision, taps=inner) as runtime:
        return runtime.run(inputs)
