"""Decisions about pixels, annotated images, and how eval scores a network that labels pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

import dmformer
from dmformer.bundle.manifest import Accuracy
from dmformer.data.annotated import IGNORED, annotated_images, label_maps, load_labels
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import DMFormerError, StageFailed, UsageError
from dmformer.runtimes.onnxruntime import OnnxRuntime
from dmformer.verify.answers import Answers
from dmformer.verify.compare import Limit, Reference
from dmformer.verify.evaluate import evaluate
from dmformer.verify.parity import check_decisions, check_labelled_pixels
from dmformer.verify.tasks import measure_of
from dmformer.verify.tasks.segmentation import Segmentation, confusion_matrix, pixel_accuracy
from tests.bundles import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from dmformer.verify.report import Check
    from tests.conftest import Run

SCHEMAS = Path(dmformer.__file__).parent / "schemas"

# --- decisions --------------------------------------------------------------------------------------------------------

LIMIT = 0.1
EXPECTED = np.zeros((2, 3, 4, 4), np.float32)  # class 1 everywhere, by a margin of 1; of the first pixel by 0.15
EXPECTED[:, 1] = 1.0
EXPECTED[0, 2, 0, 0] = 0.85


def answered(outputs: np.ndarray | DMFormerError) -> list[Check]:
    given: Any = outputs if isinstance(outputs, DMFormerError) else {"logits": outputs}
    answers = Answers("engine", "fp32", {2: given})
    return check_decisions(answers, given, Reference("PyTorch", {"logits": EXPECTED}, {"logits": Limit(LIMIT, "t")}))


def test_pixels_that_are_labelled_alike() -> None:
    (check,) = answered(EXPECTED + np.float32(0.05))
    assert check.passed
    assert check.reason is None
    assert check.decisions is None
    assert check.pixels is not None
    assert (check.pixels.images, check.pixels.pixels, check.pixels.flips, check.pixels.miou) == (2, 32, 0, 1.0)
    assert check.top1_agreement == 1.0


def test_a_pixel_that_flips_below_the_noise_is_told_and_no_failure() -> None:
    moved = EXPECTED.copy()
    moved[0, 2, 0, 0] = 1.05
    (check,) = answered(moved)
    assert check.passed
    assert check.pixels is not None
    assert (check.pixels.flips, check.pixels.below_noise) == (1, 1)
    assert check.pixels.worst_margin == pytest.approx(0.15)
    assert check.pixels.lowest == 15 / 16
    assert check.pixels.miou == pytest.approx((31 / 32 + 0) / 2)  # class 1, and class 2, which PyTorch never answers
    assert "1 of 32 pixels get another class, mIoU 48.44%" in (check.reason or "")


def test_one_pixel_that_flips_beyond_the_noise_fails() -> None:
    moved = EXPECTED.copy()
    moved[0, 2, 0, 0] = 1.05
    moved[1, 0, 3, 2] = 1.5
    (check,) = answered(moved)
    assert not check.passed
    assert check.pixels is not None
    assert (check.pixels.flips, check.pixels.below_noise) == (2, 1)
    assert check.pixels.worst_margin == 1.0


@pytest.mark.parametrize(
    "outputs",
    [
        EXPECTED[:1],
        EXPECTED[:, :, :, :3],
        EXPECTED.argmax(1).astype(np.float32),
        np.where(EXPECTED > 0.9, np.nan, EXPECTED),
        StageFailed("the engine failed"),
    ],
)
def test_what_decides_nothing_fails(outputs: np.ndarray | DMFormerError) -> None:
    (check,) = answered(outputs)
    assert not check.passed
    assert check.pixels is None


def test_features_decide_nothing() -> None:
    reference = Reference("PyTorch", {"features_s4": EXPECTED}, {"features_s4": Limit(LIMIT, "t")})
    assert check_decisions(Answers("engine", "fp32", {}), {"features_s4": EXPECTED}, reference) == []


LABELS = np.array([0] * 50 + [1] * 50)


def labelled(wrong: int, torch_wrong: int, most: float, *, decided: bool) -> Check:
    """A runtime and PyTorch that answer class 1 for so many of the pixels of class 0."""
    found = []
    for count in (wrong, torch_wrong):
        answer = LABELS.copy()
        answer[:count] = 1
        found.append(pixel_accuracy(confusion_matrix(answer, LABELS, 2)))
    answers = Answers("engine", "fp32", {2: {}})
    (decision,) = answered(EXPECTED)
    return check_labelled_pixels(answers, *found, msgspec.structs.replace(decision, passed=decided), most)


@pytest.mark.parametrize(
    ("wrong", "torch_wrong", "most", "decided", "passes"),
    [
        (0, 0, 0.0, False, True),  # just as good
        (10, 0, 0.0, True, True),  # worse, by pixels below the noise
        (10, 0, 0.0, False, False),
        (1, 0, 2.1, False, True),  # within the budget
        (1, 0, 0.9, False, False),
        (0, 10, 0.0, False, True),  # better
    ],
)
def test_labelled_pixels(wrong: int, torch_wrong: int, most: float, decided: bool, passes: bool) -> None:
    check = labelled(wrong, torch_wrong, most, decided=decided)
    assert check.passed is passes
    assert (check.reason is None) is (wrong == torch_wrong)
    assert check.stage == "accuracy"


def test_the_points_that_were_lost_are_said() -> None:
    check = labelled(10, 0, 1.0, decided=False)
    assert check.reason == f"mIoU {(40 / 50 + 50 / 60) / 2:.2%}, PyTorch's 100.00%: +18.333 points lost"


def test_without_a_labelled_pixel_there_is_no_pass() -> None:
    nothing = pixel_accuracy(np.zeros((2, 2), np.int64))
    (decision,) = answered(EXPECTED)
    check = check_labelled_pixels(Answers("engine", "fp32", {2: {}}), nothing, nothing, decision, 100.0)
    assert not check.passed
    assert "no pixel of these images has a class" in (check.reason or "")


# --- annotated images -------------------------------------------------------------------------------------------------


def draw(size: tuple[int, int]) -> np.ndarray:
    """Numbers 0 to 3, as an annotation has them: 0 is ignored. (H, W) in patches of 16 pixels."""
    width, height = size
    patches = np.random.default_rng(5).integers(0, 4, (-(-height // 16), -(-width // 16)))
    return np.kron(patches, np.ones((16, 16)))[:height, :width].astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image of 256x128 pixels whose red channel is 40 times its annotation."""
    for kind in ("images", "annotations"):
        (tmp_path / "data" / kind / "validation").mkdir(parents=True)
    numbers = draw((256, 128))
    Image.fromarray(numbers).save(tmp_path / "data/annotations/validation/a.png")
    image = np.stack([40 * numbers, np.zeros_like(numbers), np.zeros_like(numbers)], axis=2)
    Image.fromarray(image).save(tmp_path / "data/images/validation/a.png")
    (tmp_path / "data/classes.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    return tmp_path / "data"


@pytest.mark.parametrize("crop_fraction", [1.0, 0.875, 0.5])
@pytest.mark.parametrize("size", [64, 96])
def test_labels_are_resized_and_cropped_like_their_image(folder: Path, size: int, crop_fraction: float) -> None:
    preprocessing = Preprocessing(image_size=size, crop_fraction=crop_fraction, interpolation="bilinear")
    images = annotated_images(folder, preprocessing, ("one", "two", "three"), 3)
    (labels,) = label_maps(images, 3)
    assert labels.shape == (size, size)
    red = preprocessing.pixels(Image.open(images.paths[0]))[..., 0]
    numbers = np.where(labels == IGNORED, 0, labels + 1)
    assert (np.abs(red.astype(int) - 40 * numbers) <= 20).mean() > 0.9  # all but the edges between patches
    for moved in (np.roll(numbers, size // 8, 1), numbers[::-1], numbers.T):
        assert (np.abs(red.astype(int) - 40 * moved) <= 20).mean() < 0.8


def test_numbers_start_at_one_and_zero_counts_for_nothing(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1], [3, 2]], np.uint8)).save(tmp_path / "a.png")
    assert load_labels(tmp_path / "a.png", 3).tolist() == [[IGNORED, 0], [2, 1]]
    with pytest.raises(UsageError, match=r"annotation has 3; expected 0 \(ignored\) to 2"):
        load_labels(tmp_path / "a.png", 2)


def test_palettes_are_numbers_and_colours_are_refused(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[2, 1]], np.uint8), "P")
    palette.putpalette([255] * 768)
    palette.save(tmp_path / "p.png")
    assert load_labels(tmp_path / "p.png", 3).tolist() == [[1, 0]]
    for mode in ("RGB", "LA", "I;16"):
        Image.new(mode, (4, 4)).save(tmp_path / "c.png")
        with pytest.raises(UsageError, match=r"c\.png: annotation of mode"):
            load_labels(tmp_path / "c.png", 3)


# --- measures ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_the_class_of_each_pixel() -> None:
    logits = np.zeros((2, 3, 4, 5), np.float32)
    logits[0, 2, 1, 3] = 1
    logits[1, 1] = 1
    kept = Segmentation(3).keep({"logits": logits})
    assert (kept.shape, kept.dtype) == ((2, 4, 5), np.uint8)
    assert kept[0, 1, 3] == 2
    assert kept[0].sum() == 2
    assert (kept[1] == 1).all()
    wide = np.zeros((1, 300, 1, 1), np.float32)
    wide[0, 299] = 1
    assert Segmentation(300).keep({"logits": wide}).item() == 299


def test_all_pixels_of_all_images_count_together(folder: Path) -> None:
    """By figures worked out from the annotations: one image right, one with class 0 answered everywhere."""
    shutil.copy(folder / "images/validation/a.png", folder / "images/validation/b.png")
    shutil.copy(folder / "annotations/validation/a.png", folder / "annotations/validation/b.png")
    measure = measure_of("segmentation", 3)
    images = measure.images(folder, Preprocessing(image_size=64, crop_fraction=1.0), ("one", "two", "three"))
    (labels, _) = label_maps(images, 3)
    right = np.where(labels == IGNORED, 1, labels)
    found = measure.score(np.stack([right, np.zeros_like(right)]), images, None).accuracy()
    counts = np.bincount(labels[labels != IGNORED], minlength=3)
    total = counts.sum()
    assert found.pixel_accuracy == pytest.approx((total + counts[0]) / (2 * total))
    iou = [2 * counts[0] / (counts[0] + total), *(0.5 for _ in counts[1:])]
    assert found.iou == pytest.approx(iou)
    assert found.miou == pytest.approx(float(np.mean(iou)))
    assert found.agreement_with_torch is None
    half = measure.score(np.stack([right, right]), images, np.stack([right, right + 1])).accuracy()
    assert half.agreement_with_torch == 0.5


@pytest.mark.parametrize(
    ("found", "torch", "lost"),
    [
        (Accuracy(images=1, miou=0.7, agreement_with_torch=0.9), Accuracy(images=1, miou=0.75), 5.0),
        (Accuracy(images=1, miou=0.8, agreement_with_torch=0.9), Accuracy(images=1, miou=0.75), -5.0),
        # An untrained network has nothing to lose: agreement counts then, as without labels.
        (Accuracy(images=1, miou=0.2, agreement_with_torch=0.9), Accuracy(images=1, miou=0.2), 10.0),
        (Accuracy(images=1, agreement_with_torch=0.9), Accuracy(images=1), 10.0),
    ],
)
def test_points_lost_are_of_the_mean_intersection_over_union(found: Accuracy, torch: Accuracy, lost: float) -> None:
    assert Segmentation(4).points_lost(found, torch) == pytest.approx(lost)


def test_features_have_no_measure() -> None:
    with pytest.raises(UsageError, match="task features: accuracy needs classes"):
        measure_of("features", 0)


# --- eval -------------------------------------------------------------------------------------------------------------


def test_eval_is_what_the_measures_say_by_hand(segmentation: ExportResult, few_scenes: Path) -> None:
    report = evaluate(segmentation.output, few_scenes, runtimes=["ort"])
    (row,) = report.results
    assert (report.images, report.labelled, report.task) == (3, True, "segmentation")
    preprocessing = segmentation.manifest.preprocessing
    images = sorted((few_scenes / "images/validation").iterdir())
    pixels = np.stack([preprocessing.pixels(Image.open(path)) for path in images])
    with OnnxRuntime(segmentation.output / "onnx/fp32/model.onnx") as runtime:
        classes = runtime.run_rows({"image": preprocessing.normalize(pixels)})["logits"].argmax(1)
    annotations = np.stack(
        [np.asarray(Image.open(few_scenes / "annotations/validation" / path.name)) for path in images]
    )
    counted = annotations > 0
    assert row.pixel_accuracy == pytest.approx((classes[counted] == annotations[counted] - 1).mean())
    assert row.miou is not None
    assert row.miou > 0.7
    assert row.agreement_with_torch is not None
    assert row.agreement_with_torch > 0.999
    assert report.torch is not None
    assert report.torch.miou == pytest.approx(row.miou, abs=1e-3)
    schema = json.loads((SCHEMAS / "eval.json").read_bytes())

    Draft202012Validator(schema).validate(json.loads(msgspec.json.encode(report)))


def test_images_and_annotations_are_read_once_for_all_runtimes(
    segmentation: ExportResult, few_scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmformer.data import annotated

    opened: list[str] = []

    def note(path: Path, *others: Any) -> Any:
        opened.append(path.name)
        return load_labels(path, *others)

    monkeypatch.setattr(annotated, "load_labels", note)
    report = evaluate(segmentation.output, few_scenes)
    assert len(report.results) == 3
    assert sorted(opened) == sorted(path.name for path in (few_scenes / "annotations/validation").iterdir())


def test_a_score_keeps_no_more_than_a_confusion_matrix() -> None:
    score = Segmentation(3).new_score()
    for value in range(3):
        kept = np.full((1, 50, 50), value, np.uint8)
        score.add(kept, kept, kept)
    arrays = [value for value in vars(score).values() if isinstance(value, np.ndarray)]
    assert [array.tolist() for array in arrays] == [(2500 * np.eye(3)).tolist()]
    assert all(isinstance(value, (int, np.ndarray)) for value in vars(score).values())
    assert score.accuracy().agreement_with_torch == 1


def test_loose_images_are_measured_by_agreement(
    segmentation: ExportResult, few_scenes: Path, inline: Callable[..., Run]
) -> None:
    loose = few_scenes / "images/validation"
    report = evaluate(segmentation.output, loose, runtimes=["ort"])
    assert (report.labelled, report.images) == (False, 3)
    assert report.results[0].miou is None
    assert report.results[0].agreement_with_torch is not None
    run = inline("eval", segmentation.output, "--data", loose, "--runtime", "ort")
    assert run.code == 0, run.err
    assert "no accuracy without labels; expected images/validation and annotations/validation" in run.err


def test_eval_at_an_open_size_takes_the_size_of_the_preprocessing(
    segmentation_open: ExportResult, few_scenes: Path, inline: Callable[..., Run]
) -> None:
    run = inline("eval", segmentation_open.output, "--data", few_scenes, "--runtime", "ort", "--json", "-")
    assert run.code == 0, run.err
    report = json.loads(run.out)
    assert report["results"][0]["images"] == 3
    assert report["classes"][0] == "background"


def spoil(folder: Path, few_scenes: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(few_scenes, folder / "scenes")
    change(folder / "scenes")
    return folder / "scenes"


def annotation(folder: Path) -> Path:
    return min((folder / "annotations/validation").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "classes.txt").write_text("a\nb\n"), r"2 classes, a, b, …; expected the network's 11"),
        (lambda f: (f / "classes.txt").write_text("\n".join(map(str, range(11)))), r"11 classes, 0, 1, 2"),
        (lambda f: (f / "classes.txt").unlink(), "no classes.txt and no objectInfo150.txt"),
        (lambda f: (f / "classes.txt").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda f: annotation(f).unlink(), "no annotation; expected one at"),
        (lambda f: annotation(f).write_bytes(b"none"), "no image that is read here"),
        (lambda f: Image.new("L", (64, 65)).save(annotation(f)), "annotation of 64x65 pixels for an image of 64x64"),
        (
            lambda f: Image.new("L", (64, 64), 12).save(annotation(f)),
            r"annotation has 12; expected 0 \(ignored\) to 11",
        ),
        (lambda f: shutil.rmtree(f / "images/validation"), "no folder"),
        (lambda f: (f / "images/validation/bad.png").write_bytes(b""), "no annotation; expected one at"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    segmentation: ExportResult, few_scenes: Path, tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    data = spoil(tmp_path, few_scenes, change)
    with pytest.raises(UsageError, match=words) as caught:
        evaluate(segmentation.output, data, runtimes=["ort"])
    one_line(caught.value)


@pytest.mark.parametrize(("shift", "start"), [(-1, "0"), (1, "2"), (0, None)])
def test_annotations_that_are_numbered_from_another_start_are_told(
    segmentation: ExportResult, few_scenes: Path, tmp_path: Path, shift: int, start: str | None
) -> None:
    def renumber(folder: Path) -> None:
        for path in (folder / "annotations/validation").iterdir():
            numbers = np.asarray(Image.open(path)).astype(int)
            moved = np.where(numbers > 0, np.clip(numbers + shift, 0, 11), 0)
            Image.fromarray(moved.astype(np.uint8)).save(path)

    report = evaluate(segmentation.output, spoil(tmp_path, few_scenes, renumber), runtimes=["ort"])
    told = [note for note in report.notes if "if the annotations number them from" in note]
    assert len(told) == (start is not None)
    assert all(f"from {start} on" in note for note in told)


def test_eval_needs_classes(features_open: ExportResult, few_scenes: Path) -> None:
    with pytest.raises(UsageError, match="task features: accuracy needs classes"):
        evaluate(features_open.output, few_scenes)


def test_annotations_without_any_class_leave_no_accuracy(
    segmentation: ExportResult, few_scenes: Path, tmp_path: Path, inline: Callable[..., Run]
) -> None:
    def nothing(folder: Path) -> None:
        for path in (folder / "annotations/validation").iterdir():
            Image.new("L", (64, 64)).save(path)

    data = spoil(tmp_path, few_scenes, nothing)
    report = evaluate(segmentation.output, data, runtimes=["ort"])
    assert (report.results[0].miou, report.results[0].pixel_accuracy) == (None, None)
    run = inline("eval", segmentation.output, "--data", data, "--runtime", "ort")
    assert run.code == 0, run.err
    assert not dmformer.verify(segmentation.output, runtimes=["ort"], images=data).passed
