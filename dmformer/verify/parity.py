"""Parity checks: a runtime against golden outputs at several batch sizes, preprocessing against golden pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from dmformer.errors import DMFormerError, UnavailableError, UsageError
from dmformer.runtimes.layers import describe, shortfall
from dmformer.verify.accuracy import BATCH
from dmformer.verify.compare import Comparison, Limit, compare, float32_limit, reduced_limit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.manifest import Accuracy
    from dmformer.data.preprocessing import Preprocessing
    from dmformer.runtimes.base import Runtime

# One row alone, an even batch, and one that no power of two divides.
BATCH_SIZES = (1, 2, 5)


class Check(Struct, frozen=True, kw_only=True):
    """One row of the parity report; see :class:`dmformer.verify.compare.Comparison` for the figures."""

    stage: str
    runtime: str
    precision: str
    batch: int
    passed: bool
    max_abs: float | None
    max_rel: float | None
    cosine: float | None
    top1_agreement: float | None
    limit: float | None
    limit_source: str | None
    reason: str | None


class ParityReport(Struct, frozen=True, kw_only=True):
    """What ``verify`` or an export found. ``skipped`` has a sentence for whatever was not checked or was left out."""

    passed: bool
    checks: tuple[Check, ...]
    skipped: tuple[str, ...] = ()


def report(checks: Sequence[Check], skipped: Sequence[str] = ()) -> ParityReport:
    """Sum up; no check at all is no pass."""
    return ParityReport(
        passed=bool(checks) and all(check.passed for check in checks), checks=tuple(checks), skipped=tuple(skipped)
    )


def failure(found: ParityReport) -> str:
    """How many checks of a report failed, and the first of them."""
    failed = [check for check in found.checks if not check.passed]
    first = failed[0]
    return (
        f"{len(failed)} of {len(found.checks)} checks failed; first: {first.stage} in {first.runtime} "
        f"{first.precision} at batch {first.batch}: {first.reason}"
    )


def check_preprocessing(preprocessing: Preprocessing, golden: Golden) -> Check:
    """This machine's normalisation of the golden images against the tensors that the reference was computed on."""
    peak = float(np.abs(golden.inputs).max())
    limit = Limit(4 * float(np.finfo(np.float32).eps) * peak, "4 x the last place of the largest input value")
    try:
        comparison = compare(preprocessing.normalize(golden.images), golden.inputs, limit)
    except (ValueError, IndexError) as error:
        comparison = Comparison(False, reason=f"the golden images cannot be normalised: {error}")
    return as_check("preprocessing", "numpy", "fp32", len(golden.images), comparison, limit)


@dataclass(frozen=True)
class Answers:
    """What a runtime answered to the golden inputs.

    Attributes:
        runtime: its name.
        precision: of the artifact.
        by_batch: for each batch size an array for each output, or why there is none.
        layers: in which precision each compute layer ran, counted; empty where they were not read.
        unread: why they could not be read.
        apart: how far identical rows of one batch were from each other; ``None`` where that was not asked.
    """

    runtime: str
    precision: str
    by_batch: dict[int, dict[str, NDArray[Any]] | DMFormerError]
    layers: dict[str, int] = field(default_factory=dict)
    unread: DMFormerError | None = None
    apart: float | None = None


def ask(runtime: Runtime, golden: Golden, batch_sizes: Sequence[int] = BATCH_SIZES, *, layers: bool = True) -> Answers:
    """Load the runtime and run every golden row at each batch size.

    A failure of the runtime is an answer too; that it cannot run on this machine at all is raised.

    Args:
        runtime: not open yet.
        golden: what to ask.
        batch_sizes: rows in each call; those that the artifact does not take are brought within its bounds.
        layers: read back in which precision each layer ran.

    Raises:
        UnavailableError: the runtime cannot run on this machine.
    """
    least, most = runtime.batches
    batch_sizes = sorted({min(max(batch, least), most or batch) for batch in batch_sizes})
    by_batch: dict[int, dict[str, NDArray[Any]] | DMFormerError] = {}
    found: dict[str, int] = {}
    unread, apart = None, None
    try:
        with runtime:
            for batch in batch_sizes:
                by_batch[batch] = runtime.run_rows({runtime.inputs[0].name: golden.inputs}, batch)
            apart = _rows_apart(runtime, golden.inputs[:1], batch_sizes[-1])
            if layers:
                found = runtime.layers()
    except UnavailableError:
        raise
    except DMFormerError as error:
        unread = error
        by_batch.update({batch: error for batch in batch_sizes if batch not in by_batch})
    return Answers(runtime.name, runtime.precision, by_batch, found, unread, apart)


def check_answers(stage: str, answers: Answers, golden: Golden, expected: Answers | None = None) -> list[Check]:
    """Compare answers with the golden outputs of their precision, one check a batch size.

    Args:
        stage: name of the step that is checked.
        answers: of a runtime.
        golden: the expected outputs, and the measure of noise that the limits come from.
        expected: what to compare with, batch by batch, instead of the golden outputs.

    Raises:
        DMFormerError: what to compare with is an error itself.
        StageFailed: the golden outputs themselves are not finite, or differ too little to tell anything.
    """
    try:
        outputs = golden.expected(answers.precision)
    except UsageError as error:
        nothing = Comparison(False, reason=str(error))
        return [as_check(stage, answers.runtime, answers.precision, batch, nothing, None) for batch in answers.by_batch]
    limits = _limits(answers.precision, golden)
    loosest = max(limits.values(), key=lambda limit: limit.max_abs)
    checks = []
    for batch, answer in answers.by_batch.items():
        wanted = outputs if expected is None else expected.by_batch[batch]
        if isinstance(wanted, DMFormerError):
            raise wanted
        if isinstance(answer, DMFormerError):
            comparison, limit = Comparison(False, reason=str(answer)), loosest
        else:
            comparison, limit = _compare_outputs(answer, wanted, limits)
        checks.append(as_check(stage, answers.runtime, answers.precision, batch, comparison, limit))
    return checks


def _rows_apart(runtime: Runtime, row: NDArray[np.float32], batch: int) -> float:
    """The largest difference between the answers to one row that stands ``batch`` times in a batch."""
    repeated = {runtime.inputs[0].name: np.repeat(row, batch, axis=0)}
    return max(float(np.abs(answer - answer[:1]).max()) for answer in runtime.run(repeated).values())


def check_rows(answers: Answers, golden: Golden) -> list[Check]:
    """Identical rows of a batch must get the same answers, but for rounding: an engine may split a batch unevenly.

    Empty where the runtime failed before, or where there are no golden outputs at the precision.
    """
    apart = answers.apart
    if apart is None or (answers.precision != "fp32" and answers.precision not in golden.reduced):
        return []
    limit = max(_limits(answers.precision, golden).values(), key=lambda limit: limit.max_abs)
    passed = apart <= limit.max_abs  # not so where it is NaN
    reason = None if passed else f"identical rows of a batch get answers that are {apart:.3g} apart"
    comparison = Comparison(passed, max_abs=apart if np.isfinite(apart) else None, reason=reason)
    return [as_check("rows", answers.runtime, answers.precision, max(answers.by_batch), comparison, limit)]


def _limits(precision: str, golden: Golden) -> dict[str, Limit]:
    outputs = golden.expected(precision)
    if precision == "fp32":
        return float32_limit(outputs, golden.outputs_float64)
    return reduced_limit(precision, outputs, golden.outputs_float64)


def check_layers(answers: Answers, promised: float, cannot_compute: str | None) -> Check:
    """Whether the compute layers ran in the precision that was promised.

    Args:
        answers: of a runtime.
        promised: least share of the layers, 0..1.
        cannot_compute: why the runtime has no arithmetic of the precision here; the check holds then, and says so.
    """
    missing = shortfall(answers.layers, answers.precision, promised)
    if answers.unread is not None:
        comparison = Comparison(False, reason=str(answers.unread))
    elif cannot_compute is not None and missing is not None:
        comparison = Comparison(bool(answers.layers), reason=f"{cannot_compute} ({describe(answers.layers)})")
    else:
        comparison = Comparison(missing is None, reason=missing)
    return as_check("precision", answers.runtime, answers.precision, 1, comparison, None)


def check_accuracy(runtime: str, precision: str, accuracy: Accuracy, lost: float, most: float) -> Check:
    """Whether the accuracy budget holds: ``lost`` and ``most`` in percentage points."""
    reason = None
    if lost > most:
        reason = f"loses {lost:.2f} points on {accuracy.images} images; the budget (--max-accuracy-drop) is {most:g}"
    check = as_check("accuracy", runtime, precision, BATCH, Comparison(reason is None, reason=reason), None)
    return msgspec.structs.replace(check, top1_agreement=accuracy.agreement_with_torch)


def _compare_outputs(
    candidate: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], limits: Mapping[str, Limit]
) -> tuple[Comparison, Limit]:
    """The first comparison that failed, or the one nearest to its limit."""
    if set(candidate) != set(expected):
        reason = f"outputs {sorted(candidate)}; expected {sorted(expected)}"
        return Comparison(False, reason=reason), next(iter(limits.values()))
    found = [(compare(candidate[name], array, limits[name]), limits[name]) for name, array in expected.items()]
    return min(found, key=lambda pair: (pair[0].passed, -(pair[0].max_abs or 0.0) / pair[1].max_abs))


def as_check(
    stage: str, runtime: str, precision: str, batch: int, comparison: Comparison, limit: Limit | None
) -> Check:
    """A row of the report from a comparison."""
    return Check(
        stage=stage,
        runtime=runtime,
        precision=precision,
        batch=batch,
        passed=comparison.passed,
        max_abs=comparison.max_abs,
        max_rel=comparison.max_rel,
        cosine=comparison.cosine,
        top1_agreement=comparison.top1_agreement,
        limit=limit.max_abs if limit else None,
        limit_source=limit.source if limit else None,
        reason=comparison.reason,
    )
