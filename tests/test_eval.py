"""Accuracy on labelled images: the figures themselves, the whole on held-out digits, and the command."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image

import dmformer
from dmformer.assets import CALIBRATION_IMAGES, DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from dmformer.bundle.manifest import Accuracy
from dmformer.bundle.reader import open_bundle
from dmformer.data.labelled import ImageSet, image_set
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import CheckFailed, StageFailed, UsageError
from dmformer.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dmformer.models.dmformer import create_model
from dmformer.models.lively import lively_
from dmformer.progress import silent
from dmformer.runtimes import base, registry
from dmformer.runtimes.base import TensorSpec
from dmformer.train.digits import CLASSES, PREPROCESSING, load_digits, write_images
from dmformer.verify.accuracy import BATCH, logits_of, parts, points_lost, score, wilson_interval
from dmformer.verify.evaluate import EvalReport, EvalResult, evaluate
from dmformer.verify.reference import torch_logits
from tests.bundles import lengthen, one_line, rewrite
from tests.fakes import FakeRuntime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from dmformer.export.pipeline import ExportResult
    from dmformer.progress import Advance
    from tests.conftest import Run

    Cli = Callable[..., Run]

SCHEMA = Path(dmformer.__file__).parent / "schemas" / "eval.json"

# --- the interval -----------------------------------------------------------------------------------------------------


def roots(hits: int, count: int) -> list[float]:
    """Wilson's interval by its definition: the shares p at which (hits/count - p)^2 = z^2 p (1 - p) / count."""
    share, z2 = hits / count, 1.9599639845400545**2
    return sorted(np.roots([1 + z2 / count, -(2 * share + z2 / count), share**2]).real.tolist())


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine, 1998, table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(hits: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(hits, count) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (1, 2), (0, 359), (358, 359), (359, 359), (49998, 50000)])
def test_the_interval_solves_wilsons_equation(hits: int, count: int) -> None:
    assert wilson_interval(hits, count) == pytest.approx(roots(hits, count), abs=1e-7)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 359, 50_000])
def test_the_interval_stays_within_0_and_1_and_mirrors(count: int) -> None:
    for hits in {0, 1, count // 3, count // 2, count - 1, count}:
        low, high = wilson_interval(hits, count)
        assert 0 <= low < high <= 1
        assert low <= hits / count + 1e-12
        assert hits / count - 1e-12 <= high
        assert wilson_interval(count - hits, count) == pytest.approx((1 - high, 1 - low))


def test_more_images_make_it_narrower() -> None:
    widths = [np.ptp(wilson_interval(count * 9 // 10, count)) for count in (10, 100, 1000, 10_000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.02


@pytest.mark.parametrize(("count", "share"), [(20, 0.5), (20, 0.9), (100, 0.8), (359, 0.95), (359, 0.5)])
def test_the_interval_covers_the_true_share_as_often_as_it_says(count: int, share: float) -> None:
    covered = 0.0
    for hits in range(count + 1):
        low, high = wilson_interval(hits, count)
        if low <= share <= high:
            log = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
            covered += math.exp(log + hits * math.log(share) + (count - hits) * math.log1p(-share))
    assert 0.92 < covered < 0.98


def test_the_interval_holds_the_share_itself() -> None:
    for count in range(1, 400):
        assert wilson_interval(0, count)[0] == 0
        assert wilson_interval(count, count)[1] == 1


# --- the score --------------------------------------------------------------------------------------------------------


def array(*rows: list[float]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


def labels(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def test_top_1_and_top_5_are_counted() -> None:
    logits = array([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [0, 9, 1, 8, 2, 7, 3], [1, 0, 0, 0, 0, 0, 2])
    found = score(logits, labels(6, 4, 0, 0), None)  # first, fifth, last, second
    assert (found.images, found.top1, found.top5, found.agreement_with_torch) == (4, 0.25, 0.75, None)
    assert found.top1_interval == wilson_interval(1, 4)
    assert found.top5_interval == wilson_interval(3, 4)


def test_the_sixth_is_not_among_the_top_5() -> None:
    logits = array([6, 5, 4, 3, 2, 1, 0])
    assert [score(logits, labels(index), None).top5 for index in range(7)] == [1, 1, 1, 1, 1, 0, 0]


def test_ties_go_to_the_lower_index() -> None:
    logits = array([0, 7, 7, 7, 7, 7, 7])
    assert [score(logits, labels(index), None).top1 for index in range(7)] == [0, 1, 0, 0, 0, 0, 0]
    assert [score(logits, labels(index), None).top5 for index in range(7)] == [0, 1, 1, 1, 1, 1, 0]
    assert score(logits, None, array([0, 7, 0, 0, 0, 0, 0])).agreement_with_torch == 1


def test_a_network_that_answers_the_same_for_every_class_is_no_good() -> None:
    assert score(np.zeros((10, 10), np.float32), np.arange(10), None).top1 == 0.1


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_with_5_classes_or_fewer_the_top_5_is_every_class(classes: int) -> None:
    logits = np.eye(classes, dtype=np.float32)
    found = score(logits, np.roll(np.arange(classes), 1), None)
    assert found.top5 == 1
    assert found.top1 == (1 if classes == 1 else 0)


def test_without_labels_there_is_agreement_alone() -> None:
    logits = array([1, 2, 3], [3, 2, 1], [1, 3, 2], [9, 1, 1])
    found = score(logits, None, array([0, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 0]))
    assert found == Accuracy(images=4, agreement_with_torch=0.75)
    assert score(logits, None, None) == Accuracy(images=4)


def test_agreement_is_with_pytorch_and_not_with_the_labels() -> None:
    found = score(array([1, 2], [1, 2]), labels(0, 0), array([0, 1], [0, 1]))
    assert (found.top1, found.agreement_with_torch) == (0, 1)


def test_points_lost() -> None:
    def accuracy(top1: float | None, agreement: float | None = None) -> Accuracy:
        interval = None if top1 is None else wilson_interval(round(200 * top1), 200)
        return Accuracy(images=200, top1=top1, top1_interval=interval, agreement_with_torch=agreement)

    assert points_lost(accuracy(0.90, 0.5), accuracy(0.95), 10) == 5
    assert points_lost(accuracy(0.95, 0.5), accuracy(0.90), 10) == -5  # a gain
    assert points_lost(accuracy(0.995), accuracy(1.0), 10) == 0.5  # one image of 200, and not a hair more
    assert points_lost(accuracy(None, 0.98), accuracy(None, 1.0), 10) == 2
    assert points_lost(accuracy(None, 1.0), accuracy(None, 1.0), 10) == 0


def test_where_pytorch_may_be_guessing_agreement_counts() -> None:
    guessing = score(array(*[[1, 0]] * 20), labels(*[0, 1] * 10), None)
    other = score(array(*[[0, 1]] * 20), labels(*[0, 1] * 10), array(*[[1, 0]] * 20))
    assert (guessing.top1, other.top1) == (0.5, 0.5)
    assert points_lost(other, guessing, 2) == 100


# --- a runtime's answers ----------------------------------------------------------------------------------------------


class Fake(FakeRuntime):
    """Answers with each image's first value and its negative; notes the sizes of its batches."""

    input_spec = TensorSpec("picture", "float32", ("batch", 3, 32, 32))
    output_spec = TensorSpec("any", "float32", ("batch", 2))

    def __init__(self, spoil: Callable[[NDArray[np.float32]], object] = lambda _: None) -> None:
        super().__init__()
        self.spoil = spoil
        self.sizes: list[int] = []

    def infer(self, inputs: Any) -> Any:
        first = inputs["picture"][:, 0, 0, 0]
        self.sizes.append(len(first))
        answer = np.stack([first, -first], 1)
        self.spoil(answer)
        return {"any": answer}


@pytest.fixture
def grey(tmp_path: Path) -> ImageSet:
    """19 images, each brighter than the one before."""
    (tmp_path / "grey").mkdir()
    for level in range(19):
        Image.new("L", (32, 32), 10 * level).save(tmp_path / "grey" / f"{level:02}.png")
    plain = Preprocessing(image_size=32, crop_fraction=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    return image_set(tmp_path / "grey", plain, (), 2)


def test_answers_are_in_the_order_of_the_images(grey: ImageSet) -> None:
    runtime, advanced = Fake(), []
    found = logits_of(runtime, grey, lambda: advanced.append(1))
    np.testing.assert_allclose(found[:, 0] * 255, np.arange(0, 190, 10), atol=1e-3)
    np.testing.assert_array_equal(found[:, 1], -found[:, 0])
    assert runtime.sizes == [BATCH, BATCH, 19 - 2 * BATCH]
    assert len(advanced) == parts(grey) == 3
    assert runtime.closed == 1


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (BATCH, 1), (BATCH + 1, 2), (2 * BATCH, 2)])
def test_parts_are_batches(grey: ImageSet, count: int, expected: int) -> None:
    assert parts(replace(grey, paths=grey.paths[:count])) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_answer_that_is_no_number_is_refused(grey: ImageSet, value: float) -> None:
    def spoil(answer: NDArray[np.float32]) -> None:
        if len(answer) < BATCH:  # the last batch alone
            answer[-1, 1] = value

    runtime = Fake(spoil)
    with pytest.raises(StageFailed, match="fake answers with NaN or infinity"):
        logits_of(runtime, grey, lambda: None)
    assert runtime.closed == 1


def test_a_runtime_is_closed_where_an_image_cannot_be_read(grey: ImageSet) -> None:
    grey.paths[12].write_bytes(b"no image")
    runtime = Fake()
    with pytest.raises(UsageError, match=r"12\.png"):
        logits_of(runtime, grey, lambda: None)
    assert runtime.closed == 1


def test_pytorchs_own_answers_that_are_no_numbers_are_refused(grey: ImageSet) -> None:
    model = create_model("dmformer_nano", num_classes=2).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    with pytest.raises(StageFailed, match="NaN"):
        torch_logits(model, grey, lambda: None)


# --- the whole, on held-out digits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 359 held-out digits, in folders named after their classes."""
    folder = tmp_path_factory.mktemp("digits") / "held-out"
    digits = load_digits()
    write_images(folder, digits, digits.held_out)
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's threads that wait for a busy core cost more than they save on images this small."""
    monkeypatch.setattr(base, "usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def report(exported: ExportResult, held_out: Path) -> EvalReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "usable_cores", lambda: 1)
        return evaluate(exported.output, held_out)


def only(found: EvalReport) -> EvalResult:
    (result,) = found.results
    return result


def test_int8_and_fp16_lose_at_most_half_a_point_in_every_runtime(reduced: ExportResult, held_out: Path) -> None:
    found = evaluate(reduced.output, held_out)
    assert [(row.runtime, row.precision) for row in found.results] == [
        (name, precision) for name in ("onnxruntime", "openvino") for precision in ("fp32", "fp16", "int8")
    ]
    exact = found.results[0].top1
    assert exact is not None
    assert all(row.top1 is not None and row.top1 >= exact - 0.005 for row in found.results)


def test_float32_is_as_accurate_as_the_checkpoint_says(report: EvalReport, held_out: Path) -> None:
    told = load_checkpoint(DEMONSTRATION_CHECKPOINT).training
    assert (report.data, report.images, report.labelled, report.skipped) == (str(held_out), 359, True, ())
    assert told["held_out_images"] == 359
    assert [row.runtime for row in report.results] == ["torch", "onnxruntime", "openvino"]
    assert report.torch is not None
    for row in (report.torch, *report.results):
        assert row.images == 359
        assert row.top1 is not None
        assert round(row.top1, 6) == told["held_out_top1"]
        assert row.agreement_with_torch == 1
        assert row.top1_interval == wilson_interval(round(359 * row.top1), 359)
        assert row.top5 is not None
        assert row.top1 <= row.top5 <= 1


def test_each_row_names_its_artifact(report: EvalReport, exported: ExportResult) -> None:
    expected = {(artifact.precision, artifact.sha256) for artifact in exported.manifest.artifacts}
    assert {(row.precision, row.artifact_sha256) for row in report.results} == expected


def test_the_report_is_valid_against_its_schema(report: EvalReport) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    document = json.loads(msgspec.json.encode(report))
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(document)
    assert msgspec.json.decode(msgspec.json.encode(report), type=EvalReport) == report
    del document["results"][0]["runtime"]
    assert not Draft202012Validator(schema).is_valid(document)


def test_shuffled_labels_bring_it_down_to_chance(exported: ExportResult, held_out: Path, tmp_path: Path) -> None:
    paths = sorted(held_out.rglob("*.png"))
    drawn = np.random.default_rng(0).permutation([path.parent.name for path in paths])
    for path, name in zip(paths, drawn, strict=True):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / name / path.name)
    found = only(evaluate(exported.output, tmp_path, runtimes=["ort"]))
    assert found.top1 is not None
    assert 0.05 < found.top1 < 0.16
    assert found.agreement_with_torch == 1


@pytest.mark.parametrize("wrong", [{"mean": [0.0] * 3, "std": [1.0] * 3}, {"mean": [0.9] * 3}, {"std": [0.05] * 3}])
def test_wrong_preprocessing_shows(bundle: Path, wrong: dict[str, Any], report: EvalReport) -> None:
    rewrite(bundle, lambda content: content["preprocessing"].update(wrong))
    found = evaluate(bundle, CALIBRATION_IMAGES, runtimes=["ort"])
    (good,) = (row.top1 for row in report.results if row.runtime == "onnxruntime")
    assert good is not None
    top1 = only(found).top1
    assert top1 is not None
    assert top1 < 0.6 < good
    assert found.torch is not None
    assert found.torch.top1 == top1  # PyTorch sees the same images


def test_the_order_of_channels_shows(bundle: Path, tmp_path: Path) -> None:
    """Digits in red alone, which a network for BGR would see in blue."""
    for path in sorted(CALIBRATION_IMAGES.rglob("*.png"))[::4]:
        red = np.zeros((32, 32, 3), np.uint8)
        red[..., 0] = np.asarray(Image.open(path))
        (tmp_path / "red" / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(red).save(tmp_path / "red" / path.parent.name / path.name)

    def answers() -> NDArray[np.float32]:
        opened = open_bundle(bundle)
        (artifact,) = opened.artifacts("onnx")
        images = image_set(tmp_path / "red", opened.manifest.preprocessing, CLASSES, 10)
        kind = registry.adapter(registry.entry("ort"))
        return logits_of(kind(opened.load_path(artifact), threads=1), images, lambda: None)

    as_rgb, before = answers(), only(evaluate(bundle, tmp_path / "red", runtimes=["ort"]))
    rewrite(bundle, lambda content: content["preprocessing"].update(channels="BGR"))
    as_bgr, after = answers(), only(evaluate(bundle, tmp_path / "red", runtimes=["ort"]))
    assert np.abs(as_rgb - as_bgr).max() > 0.1
    assert (before.top1, before.top1_interval) != (after.top1, after.top1_interval)


def test_loose_images_have_agreement_alone(exported: ExportResult) -> None:
    found = evaluate(exported.output, SAMPLE_IMAGES)
    assert (found.images, found.labelled, len(found.results)) == (10, False, 3)
    assert found.torch == Accuracy(images=10, agreement_with_torch=1.0)
    for row in found.results:
        assert (row.top1, row.top1_interval, row.top5, row.top5_interval) == (None, None, None, None)
        assert (row.images, row.agreement_with_torch) == (10, 1)


# --- PyTorch's answers ------------------------------------------------------------------------------------------------


def drop_torch(content: dict[str, Any]) -> None:
    content["artifacts"] = [artifact for artifact in content["artifacts"] if artifact["format"] != "torch"]


def weights_of(path: Path, *, classes: tuple[str, ...] = CLASSES, seed: int = 1) -> Path:
    """A checkpoint of other weights than the demonstration's."""
    model = lively_(create_model("dmformer_nano", num_classes=len(classes)), seed)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_checkpoint(path, Checkpoint("dmformer_nano", model.config, state, PREPROCESSING, classes))
    return path


def test_without_the_torch_format_agreement_is_left_out_and_why_is_said(bundle: Path) -> None:
    rewrite(bundle, drop_torch)
    found = evaluate(bundle, CALIBRATION_IMAGES, runtimes=["ort"])
    assert found.torch is None
    assert only(found).agreement_with_torch is None
    assert only(found).top1 is not None
    (reason,) = found.skipped
    assert "agreement with PyTorch: the bundle has no torch format; give --weights FILE" in reason


def test_without_labels_and_without_the_torch_format_there_is_nothing_to_measure(bundle: Path) -> None:
    rewrite(bundle, drop_torch)
    with pytest.raises(UsageError) as caught:
        evaluate(bundle, SAMPLE_IMAGES, runtimes=["ort"])
    assert "agreement with PyTorch cannot be measured" in one_line(caught.value)
    assert "--weights FILE" in str(caught.value)


def test_weights_that_are_given_take_the_place_of_the_torch_format(bundle: Path) -> None:
    rewrite(bundle, drop_torch)
    found = evaluate(bundle, SAMPLE_IMAGES, runtimes=["ort"], weights=DEMONSTRATION_CHECKPOINT)
    assert (only(found).agreement_with_torch, found.skipped) == (1, ())


def test_weights_that_are_given_come_before_the_torch_format(exported: ExportResult, tmp_path: Path) -> None:
    found = evaluate(
        exported.output, CALIBRATION_IMAGES, runtimes=["ort"], weights=weights_of(tmp_path / "w.safetensors")
    )
    row = only(found)
    assert found.torch is not None
    assert found.torch.top1 is not None
    assert row.agreement_with_torch is not None
    assert found.torch.top1 < 0.4
    assert row.agreement_with_torch < 0.4
    assert row.top1 == 1  # the network was trained on these


def test_weights_of_other_classes_are_refused(exported: ExportResult, tmp_path: Path) -> None:
    weights = weights_of(tmp_path / "w.safetensors", classes=CLASSES[:7])
    with pytest.raises(UsageError):
        evaluate(exported.output, SAMPLE_IMAGES, runtimes=["ort"], weights=weights)


@pytest.mark.parametrize("name", ["missing.safetensors", "text.safetensors"])
def test_weights_that_cannot_be_read(exported: ExportResult, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UsageError) as caught:
        evaluate(exported.output, SAMPLE_IMAGES, runtimes=["ort"], weights=tmp_path / name)
    assert name in one_line(caught.value)


# --- what is measured -------------------------------------------------------------------------------------------------


def as_int8(content: dict[str, Any]) -> None:
    """List the onnx and openvino files once more, under another precision: eval believes the name."""
    content["artifacts"] += [
        {**artifact, "precision": "int8"} for artifact in content["artifacts"] if artifact["format"] != "torch"
    ]


@pytest.mark.parametrize(
    ("runtimes", "precisions", "expected"),
    [
        (["ort"], [], ["onnxruntime fp32", "onnxruntime int8"]),
        (["ov", "ort"], ["int8"], ["openvino int8", "onnxruntime int8"]),
        (["onnxruntime"], ["FP32"], ["onnxruntime fp32"]),
        ([], ["int8"], ["onnxruntime int8", "openvino int8"]),
        (["torch"], [], ["torch fp32"]),
    ],
)
def test_runtimes_and_precisions_are_chosen(
    bundle: Path, runtimes: list[str], precisions: list[str], expected: list[str]
) -> None:
    rewrite(bundle, as_int8)
    found = evaluate(bundle, SAMPLE_IMAGES, runtimes=runtimes, precisions=precisions)
    assert [f"{row.runtime} {row.precision}" for row in found.results] == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"runtimes": ["tflite"]}, "unknown runtime 'tflite'"),
        ({"precisions": ["int8"]}, "nothing at int8"),
        ({"runtimes": ["torch"], "precisions": ["fp16"]}, "nothing at fp16"),
    ],
)
def test_what_the_bundle_has_not_is_refused_before_an_image_is_read(
    exported: ExportResult, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        evaluate(exported.output, "nowhere", **arguments)


@pytest.mark.parametrize("name", ["model.onnx", "torch"])
def test_a_changed_file_is_not_measured(bundle: Path, name: str) -> None:
    (path,) = (path for path in bundle.rglob("*") if path.is_file() and name in path.as_posix()[len(str(bundle)) :])
    lengthen(path)
    with pytest.raises(CheckFailed, match="changed or damaged"):
        evaluate(bundle, SAMPLE_IMAGES, runtimes=["ort"])


def test_an_image_that_cannot_be_read_is_named(exported: ExportResult, tmp_path: Path) -> None:
    folder = shutil.copytree(SAMPLE_IMAGES, tmp_path / "images")
    (folder / "9.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"9\.png"):
        evaluate(exported.output, folder, runtimes=["ort"])


def test_progress_is_told_in_batches(exported: ExportResult) -> None:
    told: list[list[Any]] = []

    @contextmanager
    def stage(name: str, parts: int | None = None) -> Iterator[Advance]:
        told.append([name, parts, 0])

        def advance() -> None:
            told[-1][2] += 1

        with silent(name, parts):
            yield advance

    evaluate(exported.output, SAMPLE_IMAGES, stage=stage)
    names = ["PyTorch", "torch fp32", "onnxruntime fp32", "openvino fp32"]
    assert told == [[name, 2, 2] for name in names]


# --- the command ------------------------------------------------------------------------------------------------------

KEYS = {"runtime", "precision", "images", "top1", "top5", "agreement_with_torch"}


def hide_torch(folder: Path) -> str:
    """A PYTHONPATH on which PyTorch is not installed."""
    folder.mkdir()
    (folder / "torch.py").write_text("raise ModuleNotFoundError('none', name='torch')\n")
    return str(folder)


def test_json_is_piped_alone(cli: Cli, exported: ExportResult) -> None:
    run = cli("eval", exported.output, "--data", CALIBRATION_IMAGES, "--runtime", "ort", "--json", "-")
    assert run.code == 0, run.err
    document = json.loads(run.out)
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(document)
    (row,) = document["results"]
    assert set(row) >= KEYS
    assert (row["runtime"], row["precision"], row["images"]) == ("onnxruntime", "fp32", 200)
    assert (row["top1"], row["top5"], row["agreement_with_torch"]) == (1, 1, 1)
    assert "top-1" in run.err


def test_a_table_and_a_file(cli: Cli, exported: ExportResult, tmp_path: Path) -> None:
    run = cli("eval", exported.output, "--data", SAMPLE_IMAGES, "--precision", "fp32", "--json", "report.json")
    assert run.code == 0, run.err
    rows = [line.split() for line in run.out.splitlines() if line.strip().endswith("100.00%")]
    assert [row[0] for row in rows] == ["PyTorch", "torch", "onnxruntime", "openvino"]
    assert "no accuracy without labels" in run.err
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["labelled"], document["results"][0]["top1"], document["torch"]["top1"]) == (False, None, None)


def test_without_pytorch_accuracy_is_measured_and_agreement_is_not(
    cli: Cli, exported: ExportResult, tmp_path: Path
) -> None:
    path = hide_torch(tmp_path / "path")
    run = cli("eval", exported.output, "--data", CALIBRATION_IMAGES, "--json", "-", PYTHONPATH=path)
    assert run.code == 0, run.err
    document = json.loads(run.out)
    assert [row["runtime"] for row in document["results"]] == ["onnxruntime", "openvino"]
    assert [(row["top1"], row["agreement_with_torch"]) for row in document["results"]] == [(1, None)] * 2
    assert len(document["skipped"]) == 2  # the torch format, and agreement
    assert "not measured: agreement with PyTorch" in run.err


@pytest.mark.parametrize("arguments", [[], ["--weights", DEMONSTRATION_CHECKPOINT], ["--runtime", "torch"]])
def test_agreement_without_pytorch_is_3(
    cli: Cli, exported: ExportResult, tmp_path: Path, arguments: list[object]
) -> None:
    data = SAMPLE_IMAGES if not arguments else CALIBRATION_IMAGES
    run = cli("eval", exported.output, "--data", data, *arguments, PYTHONPATH=hide_torch(tmp_path / "path"))
    assert run.code == 3, run.err
    assert "pip install 'dmformer[export]'" in run.error_line
    assert run.out == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "BUNDLE"], "--data"),
        (["eval", "BUNDLE", "--data"], "--data"),
        (["eval", "BUNDLE", "--data", "nowhere"], "no folder 'nowhere'"),
        (["eval", "BUNDLE", "--data", "strange"], "strange/dog: no class of the network"),
        (["eval", "BUNDLE", "--data", "bare"], "no image in 'bare'"),
        (["eval", "nowhere", "--data", "strange"], "no bundle at 'nowhere'"),
        (["eval", "--data", "strange"], "no bundle named"),
        (["eval", "BUNDLE", "--data", "strange", "--json", "nowhere/report.json"], "nowhere/report.json"),
    ],
)
def test_wrong_usage_is_one_line_and_2(
    cli: Cli, exported: ExportResult, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    for name in ("strange/dog", "strange/3", "bare"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(SAMPLE_IMAGES / "3.png", tmp_path / "strange" / "dog")
    shutil.copy(SAMPLE_IMAGES / "3.png", tmp_path / "strange" / "3")
    run = cli(*(str(exported.output) if argument == "BUNDLE" else argument for argument in arguments))
    assert run.code == 2, run.err
    assert expected in run.error_line
    assert run.out == ""
