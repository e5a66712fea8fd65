"""Ask a running server for the golden answers: what is behind it is held to what a runtime on a device is held to.

A model is known by its name, as ``serve-layout`` gives it, or by what Triton's configuration of it says; its answers
have to be those of its artifact at each batch size, alone and among others. Where they are not, what was served instead
is looked for: another precision, exchanged classes. A model that prepares images gets files of images, and the tensor
that its network saw is compared with this machine's to one millionth.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dmformer.bench.load import LoadTarget, put_load
from dmformer.data.images import decode_image, encode_png
from dmformer.errors import DMFormerError, StageFailed
from dmformer.progress import silent
from dmformer.serve.client import LIMIT_S, ServerClient
from dmformer.serve.predictor import read_tensor, softmax
from dmformer.serve.remote import SERVER, ServedModel
from dmformer.serve.served import CLASS_INDEX, CLASS_MAP, CLASS_NAME, PROBABILITIES, SHA256
from dmformer.serve.targets import ServedTarget, find_models, request_rows
from dmformer.task import OUTPUT_NAME, class_logits
from dmformer.text import shorten
from dmformer.verify.answers import Answers, ask, batch_sizes
from dmformer.verify.compare import Comparison, compare, float32_limit, largest_difference, reduced_limit
from dmformer.verify.parity import check_golden_answers, check_preprocessing, tensor_limit
from dmformer.verify.report import Check, ParityReport, Server, add_cause, parity_report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dmformer.bundle.golden import Golden
    from dmformer.bundle.manifest import Manifest
    from dmformer.bundle.reader import Bundle
    from dmformer.progress import Progress

_CLIENTS, _TURNS = 8, 4  # that ask at once, and how often each row is asked
_PROBABILITY_LIMIT = 1e-5
_MOST_VALUES = 64  # of each class that tell it from the others


def verify_server(
    bundle: Bundle,
    url: str,
    *,
    model: str | None = None,
    runtimes: Sequence[str] = (),
    precision: str | None = None,
    limit_s: float = LIMIT_S,
    stage: Progress = silent,
) -> ParityReport:
    """Compare what a server answers with a bundle's golden answers.

    Args:
        bundle: what should be served.
        url: of the server; see :class:`dmformer.serve.client.ServerClient`.
        model: name of the model that is asked; otherwise all that are named as ``serve-layout`` names those of the
            bundle.
        runtimes: names of runtimes whose artifacts are asked; otherwise all.
        precision: of the artifact that should be behind a model of another name; otherwise what its configuration says.
        limit_s: seconds that one answer may take.
        stage: told about each step.

    Raises:
        CheckFailed: a file of the bundle is not what the manifest says.
        UnavailableError: the server cannot be reached, does not speak the protocol, or the model is not ready.
        UsageError: an argument cannot be used, or the server has no such model.
    """
    with stage("integrity"):
        bundle.check_all()
    golden = bundle.golden()
    with stage("preprocessing"):
        checks = check_preprocessing(bundle.manifest.preprocessing, golden)
    with stage(f"connect to {url}"), ServerClient(url, limit_s) as client:
        server = client.metadata
        targets, skipped = find_models(bundle.manifest, client, model, runtimes, precision)
    for target in targets:
        with stage(target.title):
            found = _check_model(target, golden, url, limit_s)
            checks += [msgspec.structs.replace(check, engine=target.title) for check in found]
    said = Server(
        url=url,
        name=shorten(server.name),
        version=shorten(server.version),
        models=tuple(target.title for target in targets),
    )
    asked = {target.spec.artifact.sha256: target.spec.artifact for target in targets}
    return msgspec.structs.replace(parity_report(checks, skipped, list(asked.values())), server=said)


def _check(target: ServedTarget, stage: str, batch: int, comparison: Comparison, *more: Any) -> Check:
    return Check.of(stage, SERVER, target.spec.artifact.precision, batch, comparison, *more)


def _check_model(target: ServedTarget, golden: Golden, url: str, limit_s: float) -> list[Check]:
    """Make every check of one version of a model."""
    identity, fits = _check_identity(target)
    if not fits:
        return [identity]
    spec, manifest = target.spec, target.spec.manifest
    rows = request_rows(spec, golden)
    outputs = [output.name for output in manifest.outputs]
    most = target.max_batch
    sizes = sorted({min(size, most or size) for size in batch_sizes(golden.inputs)})
    first = next((one.shape[0] for one in target.metadata.inputs if one.shape), -1)
    runtime = ServedModel(
        url, target.model, target.version, precision=spec.artifact.precision, outputs=outputs, limit_s=limit_s
    )
    answers = ask(
        runtime,
        rows,
        golden.thinned,
        sizes=sizes if first < 0 else [first],
        layers=False,
        other_size=None if spec.images else golden.other_size,
    )
    checks = [identity]
    if spec.images:
        checks += _check_images(target, golden, rows, url, limit_s)
    if first in (-1, 1):
        answers = _ask_concurrently(target, answers, rows, golden, url, limit_s)
    checks += check_golden_answers(answers, golden)
    checks += _check_precision(target, answers, golden)
    if all(check.passed for check in checks):
        return checks
    return add_cause(checks, _diagnosis(target, answers.at_largest_batch, golden))


def _check_identity(target: ServedTarget) -> tuple[Check, bool]:
    """Compare what the server says of a model with the manifest; whether it takes and gives what is expected."""
    spec, found = target.spec, target.mismatches
    fits = not found
    declared = target.configuration.parameter(SHA256) if target.configuration is not None else None
    if declared is not None and declared != spec.artifact.sha256:
        artifact = next((one for one in spec.manifest.artifacts if one.sha256 == declared), None)
        other = f"{artifact.format} {artifact.precision} of this bundle" if artifact else "of another bundle"
        expected = f"{spec.artifact.sha256[:12]}…, {spec.artifact.format} {spec.artifact.precision}"
        found.append(f"it says that it serves artifact {shorten(declared[:12])}…, {other}; expected {expected}")
    reason = "; ".join(found) or None
    return _check(target, "model", 1, Comparison(reason is None, reason=reason), None, "manifest"), fits


def _ask_concurrently(
    target: ServedTarget,
    answers: Answers,
    rows: NDArray[Any],
    golden: Golden,
    url: str,
    limit_s: float,
) -> Answers:
    """Ask each row by several clients at once too, and add how far that is from what it was answered before."""
    alone = answers.by_batch[min(answers.by_batch)]
    if isinstance(alone, DMFormerError):
        return answers
    largest = [0.0]

    def compare_row(row: int, answer: Mapping[str, NDArray[Any]]) -> None:
        kept = golden.thinned(answer)
        largest.append(max(largest_difference(kept[name], alone[name][row : row + 1]) for name in kept))

    load = LoadTarget.of(target, url, rows, limit_s)
    samples = put_load(load, _CLIENTS, requests=_TURNS * len(rows), seen=compare_row)
    if samples.errors:
        largest.append(float("inf"))
    difference = float(np.max(largest))  # NaN, where there is one
    return replace(answers, self_differences={**answers.self_differences, "concurrent": difference})


def _check_precision(target: ServedTarget, answers: Answers, golden: Golden) -> list[Check]:
    """Check that answers at a reduced precision are not float32's: by values alone the better one would pass."""
    outputs, precision = answers.at_largest_batch, target.spec.artifact.precision
    if precision == "fp32" or "fp32" not in golden.files or isinstance(outputs, DMFormerError):
        return []
    limits = float32_limit(golden.outputs, golden.outputs_float64)
    same = all(
        largest_difference(outputs[name], array) <= limits[name].max_abs
        for name, array in golden.files["fp32"].items()
        if name in outputs
    )
    reason = f"the answers are those of float32 to its noise; expected {precision}" if same else None
    return [_check(target, "precision", max(answers.by_batch), Comparison(not same, reason=reason), None, "onnx fp32")]


def _diagnosis(target: ServedTarget, outputs: Any, golden: Golden) -> str | None:
    """Say what was served instead, where the answers tell."""
    if isinstance(outputs, DMFormerError) or set(outputs) != set(golden.outputs):
        return None
    precision = target.spec.artifact.precision
    apart = {
        other: max(largest_difference(outputs[name], array) for name, array in arrays.items())
        for other, arrays in golden.files.items()
    }
    nearest = min(apart, key=apart.__getitem__, default=precision)
    if nearest != precision:
        limits = (
            float32_limit(golden.outputs, golden.outputs_float64)
            if nearest == "fp32"
            else reduced_limit(nearest, golden.files[nearest], golden.outputs_float64)
        )
        if apart[nearest] <= max(limit.max_abs for limit in limits.values()):
            return f"these are the answers of {nearest}"
    return _exchanged_classes(target, outputs, golden)


def _exchanged_classes(target: ServedTarget, outputs: Mapping[str, NDArray[Any]], golden: Golden) -> str | None:
    """Say which classes are exchanged, where the answers are right but for that."""
    expected = golden.files.get(target.spec.artifact.precision, golden.outputs).get(OUTPUT_NAME)
    if expected is None or outputs[OUTPUT_NAME].shape != expected.shape:
        return None
    values = int(np.prod(expected.shape)) // expected.shape[1]
    sample = np.random.default_rng(0).permutation(values)[:_MOST_VALUES]

    def by_channel(array: NDArray[Any]) -> NDArray[Any]:
        return np.moveaxis(array, 1, 0).reshape(expected.shape[1], -1)[:, sample].astype(np.float64)

    right = by_channel(expected)
    apart = (np.nan_to_num(np.abs(right - channel).max(1), nan=np.inf) for channel in by_channel(outputs[OUTPUT_NAME]))
    order = [int(np.argmin(distances)) for distances in apart]
    moved = [channel for channel, other in enumerate(order) if other != channel]
    if not moved or sorted(order) != list(range(len(order))):
        return None
    names = target.spec.manifest.model.classes

    def title(channel: int) -> str:
        return f"{channel} ({names[channel]})" if names else str(channel)

    shown = ", ".join(f"{title(order[channel])} in the place of {title(channel)}" for channel in moved[:4])
    return f"classes are exchanged: {shown}{', …' if len(moved) > 4 else ''}"


# --- models that prepare images ---------------------------------------------------------------------------------------


def _check_images(target: ServedTarget, golden: Golden, rows: NDArray[Any], url: str, limit_s: float) -> list[Check]:
    """Compare the tensors that a network saw with this machine's, and the classes with the logits beside them."""
    manifest = target.spec.manifest
    (tensor,) = manifest.inputs
    checks = []
    with ServerClient(url, limit_s) as client:

        def outputs(files: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
            return client.infer(target.model, target.metadata.inputs[0], files, names, target.version)

        for number, source in enumerate(golden.sources):
            file = encode_png(source)
            expected = read_tensor(manifest, decode_image(file))
            limit = tensor_limit(expected)
            try:
                seen = outputs(np.array([[file]], np.object_), [tensor.name])[tensor.name]
                comparison = compare(seen, expected, limit)
            except StageFailed as error:
                comparison = Comparison(False, reason=f"source image {number}: {error}")
            checks.append(_check(target, "preprocessing", 1, comparison, limit, "this machine"))
        if manifest.model.task == "features":
            return checks
        names = [output.name for output in target.spec.outputs]
        wrong: list[str] = []
        for row in range(len(rows)):
            try:
                wrong += _wrong_classes(outputs(rows[row : row + 1], names), manifest)
            except StageFailed as error:
                wrong.append(str(error))
    comparison = Comparison(not wrong, reason=wrong[0] if wrong else None)
    return [*checks, _check(target, "classes", len(rows), comparison, None, "its logits")]


def _wrong_classes(outputs: Mapping[str, NDArray[Any]], manifest: Manifest) -> list[str]:
    """Say where the classes of one image are not those of the logits beside them."""
    logits = class_logits(outputs[OUTPUT_NAME])
    expected = logits.argmax(1)
    pixels = CLASS_MAP in outputs
    shapes = {CLASS_MAP: expected.shape, CLASS_INDEX: (1, 1), CLASS_NAME: (1, 1), PROBABILITIES: logits.shape}
    wrong = [
        f"{name} of shape {outputs[name].shape}; expected {shape}"
        for name, shape in shapes.items()
        if name in outputs and outputs[name].shape != shape
    ]
    if wrong:
        return wrong
    if pixels:
        count = int((outputs[CLASS_MAP] != expected).sum())
        return [f"{count} of {expected.size} pixels have another class than their logits"] if count else []
    chosen = outputs[CLASS_INDEX][0, 0]
    if chosen != expected[0]:
        wrong.append(f"class {chosen}; the logits say {expected[0]}")
    if CLASS_NAME in outputs:
        name, right = outputs[CLASS_NAME][0, 0], manifest.model.classes[expected[0]].encode()
        wrong += [] if name == right else [f"class named {shorten(repr(name))}; the bundle says {right!r}"]
    apart = largest_difference(outputs[PROBABILITIES], softmax(logits))
    if not apart <= _PROBABILITY_LIMIT:
        wrong.append(
            f"probabilities differ from the softmax of the logits by {apart:.2g}, limit {_PROBABILITY_LIMIT:g}"
        )
    return wrong
