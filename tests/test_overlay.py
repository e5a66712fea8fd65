"""Pictures of labelled pixels, by the pixels themselves; and ``predict`` with a network for segmentation."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

import dmformer
from dmformer.assets import SAMPLE_IMAGES, SCENES
from dmformer.data.overlay import LegendEntry, class_colours, overlay
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import StageFailed, UsageError
from dmformer.files import whole_file
from dmformer.serve.predictor import Segments
from tests.bundles import one_line, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from tests.conftest import Run

SCHEMA = Path(dmformer.__file__).parent / "schemas" / "segment.json"
SCENE = SCENES / "images/validation/0000.png"

# PASCAL VOC's colours of aeroplane, bicycle, bird ... tv/monitor, as its development kit draws them.
VOC = (
    (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128), (64, 0, 0),
    (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128), (64, 128, 128), (192, 128, 128), (0, 64, 0),
    (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128),
)  # fmt: skip


def test_colours_are_those_of_pascal_voc() -> None:
    assert [tuple(colour) for colour in class_colours(20).tolist()] == list(VOC)
    assert class_colours(255)[254].tolist() == [224, 224, 192]  # its void
    assert len({tuple(colour) for colour in class_colours(255).tolist()}) == 255


WHITE, BLACK = Image.new("RGB", (960, 480), "white"), Image.new("RGB", (960, 480))
LEGEND = [LegendEntry(0, "one", 0.75), LegendEntry(2, "three", 0.25)]


def halves(height: int, width: int) -> np.ndarray:
    """Class 0 at the left, class 2 at the right."""
    labels = np.zeros((height, width), np.intp)
    labels[:, width // 2 :] = 2
    return labels


def test_classes_lie_where_the_network_saw_them() -> None:
    """The centre square of an image twice as wide as high."""
    picture = np.asarray(overlay(BLACK, halves(32, 32), (240, 0, 720, 480), LEGEND))
    assert picture.shape[0] == 480
    assert picture[:, :240].max() == 0
    assert picture[:, 720:960].max() == 0
    colours = class_colours(3)
    for column, number in ((241, 0), (478, 0), (481, 2), (718, 2)):
        np.testing.assert_allclose(picture[5, column], 0.55 * colours[number], atol=1)
    seen = np.asarray(overlay(WHITE, halves(32, 32), (240, 0, 720, 480), LEGEND))
    assert set(np.unique(seen[:, :240])) == {89}  # 0.35 of 255
    np.testing.assert_allclose(seen[200, 300], 0.45 * 255 + 0.55 * colours[0], atol=1)


def test_a_small_image_is_enlarged_and_its_labels_with_it() -> None:
    picture = np.asarray(overlay(BLACK.resize((60, 30)), halves(32, 32), (15, 0, 45, 30), LEGEND))
    assert picture.shape[0] == 480
    assert picture[:, :240].max() == 0
    assert picture[100, 241].tolist() == picture[400, 478].tolist() != picture[400, 481].tolist()
    assert picture[100, 721:960].max() == 0


@pytest.mark.parametrize("size", [(150, 50), (50, 150), (200, 100), (64, 64), (101, 67)])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
def test_what_was_seen_is_what_the_preprocessing_keeps(size: tuple[int, int], crop_fraction: float) -> None:
    """By a picture of its own coordinates."""
    across, down = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = Image.fromarray(np.stack([across, down, 0 * down], axis=2).astype(np.uint8))
    preprocessing = Preprocessing(image_size=48, crop_fraction=crop_fraction, interpolation="bilinear")
    left, top, right, bottom = preprocessing.visible_box(*size)
    kept = preprocessing.pixels(image).astype(float)
    pixel = max(1.0, min(size) / 48) + 1
    assert kept[24, 0, 0] == pytest.approx(left, abs=pixel)
    assert kept[24, -1, 0] == pytest.approx(right - 1, abs=pixel)
    assert kept[0, 24, 1] == pytest.approx(top, abs=pixel)
    assert kept[-1, 24, 1] == pytest.approx(bottom - 1, abs=pixel)


def segments(image: Path, *, whole: bool, classes: tuple[Any, ...] = ()) -> Segments:
    return Segments(image, halves(32, 64 if whole else 32), classes, Preprocessing(image_size=32), uncropped=whole)


def test_at_an_open_size_all_of_the_image_is_in_colour(tmp_path: Path) -> None:
    BLACK.save(tmp_path / "a.png")
    whole = np.asarray(segments(tmp_path / "a.png", whole=True, classes=shares(1)).overlay())
    assert whole[:, :960].max(2).min() > 0
    assert (whole[:, :480] == whole[0, 0]).all()
    assert (whole[:, 480:960] == whole[0, 480]).all()
    centre = np.asarray(segments(tmp_path / "a.png", whole=False, classes=shares(1)).overlay())
    assert centre[:, :200].max() == 0


def shares(count: int) -> tuple[Any, ...]:
    from dmformer.serve.predictor import ClassShare

    return tuple(ClassShare(index=index, name=None, share=1 / count) for index in range(count))


def swatches(legend: np.ndarray) -> list[tuple[int, ...]]:
    """The colours of the boxes in a legend, from top to bottom."""
    found: list[tuple[int, ...]] = []
    for colour in map(tuple, legend[:, 27].tolist()):
        if colour not in {(255, 255, 255), (0, 0, 0)} and (not found or found[-1] != colour):
            found.append(colour)
    return found


def test_the_legend_has_the_classes_colours_in_order() -> None:
    legend = np.asarray(overlay(BLACK, halves(4, 4), (0, 0, 960, 480), LEGEND))[:, 960:]
    assert swatches(legend) == [VOC[0], VOC[2]]


def test_a_legend_of_many_classes_is_cut_short_and_says_so() -> None:
    entries = [LegendEntry(number, f"class {number}", 1 / 150) for number in range(150)]
    picture = overlay(Image.new("RGB", (600, 480)), np.arange(150).reshape(10, 15), (0, 0, 600, 480), entries)
    legend = np.asarray(picture)[:, 600:]
    assert swatches(legend) == [tuple(colour) for colour in class_colours(24).tolist()]
    assert picture.height > 480  # 25 lines
    last = np.flatnonzero((legend < 128).any(axis=(1, 2)))[-1]
    assert picture.height - 40 < last < picture.height  # "and 126 more"


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("two\nlines\tand  more", "two lines and more"),
        ("漢字", "class 0"),
        ("x" * 300, "x" * 39 + "…"),
        ("[bold]", "[bold]"),
        ("grün", "grün"),
        ("\ud800", "class 0"),
    ],
)
def test_names_are_shown_in_one_line_that_can_be_read(name: str, like: str) -> None:
    made = [
        np.asarray(
            overlay(BLACK, halves(4, 4), (0, 0, 960, 480), [LegendEntry(0, shown, 0.5), LegendEntry(1, "no", 0.5)])
        )
        for shown in (name, like, "something else")
    ]
    np.testing.assert_array_equal(made[0], made[1])
    assert made[0].shape != made[2].shape or not np.array_equal(made[0], made[2])


# --- predict ----------------------------------------------------------------------------------------------------------


def write(path: Path, size: tuple[int, int], mode: str = "RGB") -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_the_command_writes_a_picture_and_a_report(
    segmentation: ExportResult, inline: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    arguments = ("--output", "out", "--json", "report.json", "--top-k", "2", "--runtime", "ort")
    run = inline("predict", segmentation.output, SCENE, *arguments)
    assert run.code == 0, run.err
    report = json.loads((tmp_path / "report.json").read_bytes())
    Draft202012Validator(json.loads(SCHEMA.read_bytes())).validate(report)
    (found,) = report["predictions"]
    assert found["overlay"] == "out/0000.overlay.png"
    assert sum(one["share"] for one in found["classes"]) == pytest.approx(1)
    assert found["classes"][0]["name"] == "background"
    annotated = np.asarray(Image.open(SCENES / "annotations/validation/0000.png"))
    counts = np.bincount(annotated.ravel())
    assert {int(number) - 1 for number in np.flatnonzero(counts > 200)} <= {one["index"] for one in found["classes"]}
    with Image.open(tmp_path / "out/0000.overlay.png") as picture:
        assert picture.height == 480
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000.overlay.png"]


def test_reports_go_through_links_and_into_pipes(
    segmentation: ExportResult, inline: Callable[..., Run], tmp_path: Path
) -> None:
    """What is no plain file, as /dev/null is, must not be replaced by one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "real.json").write_text("older", encoding="utf-8")
    (tmp_path / "link.json").symlink_to("real.json")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for target in ("pipe", "link.json"):
            run = inline("predict", segmentation.output, SCENE, "--runtime", "ort", "--json", target)
            assert run.code == 0, run.err
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
        assert json.loads(os.read(reader, 1 << 16)) == json.loads((tmp_path / "real.json").read_bytes())
    finally:
        os.close(reader)
    assert (tmp_path / "link.json").is_symlink()
    with pytest.raises(StageFailed, match="pipe' is no file") as caught, whole_file(tmp_path / "pipe"):
        pass
    one_line(caught.value)


def test_labels_are_those_of_the_picture(segmentation: ExportResult) -> None:
    with dmformer.load(segmentation.output, "ort") as predictor:
        (found,) = predictor.segment(SCENE)
        logits = predictor.outputs(SCENE)["logits"]
        with pytest.raises(UsageError, match=r"a bundle for segmentation, asked for classification; .*segment\(\)"):
            predictor.predict(SCENE)
    annotated = np.asarray(Image.open(SCENES / "annotations/validation/0000.png"))
    assert (found.labels == logits[0].argmax(0)).all()
    assert (found.labels == annotated.astype(int) - 1)[annotated > 0].mean() > 0.9
    assert not found.uncropped


def test_pictures_of_one_name_do_not_replace_one_another(
    segmentation: ExportResult, inline: Callable[..., Run], tmp_path: Path
) -> None:
    images = [write(tmp_path / name, (40, 40)) for name in ("a.png", "b/a.png", "a-2.png", "b/a.jpg")]
    run = inline("predict", segmentation.output, *images, "--runtime", "ort", "--json", "-")
    assert run.code == 0, run.err
    names = [one["overlay"] for one in json.loads(run.out)["predictions"]]
    assert names == ["a.overlay.png", "a-2.overlay.png", "a-2-2.overlay.png", "a-3.overlay.png"]
    assert all((tmp_path / name).is_file() for name in names)


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (97, 65), (33, 31), (640, 32), (2000, 1500)])
def test_images_of_any_size(
    segmentation: ExportResult, segmentation_open: ExportResult, tmp_path: Path, size: tuple[int, int]
) -> None:
    image = write(tmp_path / "a.png", size)
    for bundle, whole in ((segmentation.output, False), (segmentation_open.output, True)):
        with dmformer.load(bundle, "ort") as predictor:
            (found,) = predictor.segment(image)
        assert found.uncropped is whole
        assert all(side % 32 == 0 for side in found.labels.shape)
        if whole:
            assert min(found.labels.shape) == 32
            wanted = max(size) / min(size)
            assert max(found.labels.shape) / 32 == pytest.approx(wanted, abs=0.5)
        picture = found.overlay()
        assert picture.width > picture.height * size[0] / size[1] - 1


@pytest.mark.parametrize("mode", ["L", "CMYK", "1"])
def test_images_of_other_colours(segmentation: ExportResult, tmp_path: Path, mode: str) -> None:
    image = write(tmp_path / "a.tif", (50, 40), mode)
    with dmformer.load(segmentation.output, "ort") as predictor:
        (found,) = predictor.segment(image)
    assert found.overlay().mode == "RGB"


def test_what_cannot_be_labelled_is_refused(
    segmentation: ExportResult,
    features_open: ExportResult,
    exported: ExportResult,
    inline: Callable[..., Run],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_bytes(b"")
    write(tmp_path / "narrow.png", (1, 65))
    for arguments, words in (
        ((segmentation.output, SCENE, "--output", "file"), "no such folder; expected one for the pictures"),
        ((segmentation.output, SCENE, "--output", "none"), "no such folder"),
        ((segmentation.output, tmp_path / "narrow.png"), "expected sides no more than 1:64"),
        ((segmentation.output, tmp_path / "file"), "no image that is read here"),
        ((features_open.output, SCENE), "a bundle of features tells no classes"),
        ((exported.output, SAMPLE_IMAGES / "3.png", "--output", "file"), "--output is for the pictures"),
    ):
        run = inline("predict", *arguments)
        assert run.code == 2, (arguments, run.err)
        assert words in run.error_line
    assert not list(tmp_path.glob("*.overlay.png"))


def test_methods_for_another_task_are_refused(features_open: ExportResult, exported: ExportResult) -> None:
    with dmformer.load(features_open.output) as predictor:
        for ask in (predictor.predict, lambda image: list(predictor.segment(image))):
            with pytest.raises(UsageError, match=r"a bundle for features, .*expected Predictor\.outputs\(\)") as caught:
                ask(SCENE)
            one_line(caught.value)
        assert predictor.outputs([SCENE, SCENE])["features_s8"].shape == (2, 32, 4, 4)
    with dmformer.load(exported.output) as predictor, pytest.raises(UsageError, match=r"expected Predictor\.predict"):
        next(iter(predictor.segment(SCENE)))


def test_strange_names_of_classes_in_tables_and_pictures(
    segmentation_bundle: Path, inline: Callable[..., Run], few_scenes: Path, tmp_path: Path
) -> None:
    names = [
        "a\nb",
        "[red]x[/red]",
        "漢字",
        "[/]",
        "\x1b[31mred",
        *(f"digit {index}" for index in range(5, 10)),
        "y" * 400,
    ]
    rewrite(segmentation_bundle, lambda content: content["model"].update(classes=names))
    run = inline("predict", segmentation_bundle, SCENE, "--runtime", "ort")
    assert run.code == 0, run.err
    assert "\x1b" not in run.out
    assert (tmp_path / "0000.overlay.png").is_file()
    data = Path(shutil.copytree(few_scenes, tmp_path / "data"))
    (data / "classes.txt").unlink()
    run = inline("eval", segmentation_bundle, "--data", data / "images/validation", "--runtime", "ort")
    assert run.code == 0, run.err
    assert inline("inspect", segmentation_bundle).code == 0
