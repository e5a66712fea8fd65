"""Folders of images as people have them: system files, other suffixes, accents, and an image that cannot be read."""

from __future__ import annotations

import shutil
import struct
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from PIL import Image

from dmformer.assets import DEMONSTRATIONS
from dmformer.data.annotated import annotated_set
from dmformer.data.images import FORMATS, SUFFIXES, find_images, image_set, is_hidden, load_pixels, unreadable
from dmformer.data.preprocessing import Preprocessing
from dmformer.errors import UsageError
from dmformer.train.images import find_data_set

if TYPE_CHECKING:
    from collections.abc import Callable

    from dmformer.export.cached import ExportResult
    from tests.conftest import Run

SMALL = Preprocessing(image_size=32, crop_fraction=1.0)
NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
NO_UTF8 = b"caf\xe9".decode("utf-8", "surrogateescape")


def picture(path: Path, colour: tuple[int, int, int] = (9, 99, 199)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), colour).save(path, "PNG")
    return path


def data_set(folder: Path) -> Path:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            for number in range(3):
                picture(folder / part / name / f"{number}.png")
    return folder


SYSTEM = (
    *(".DS_Store", "._1.png", ".hidden/1.png", "@eaDir/1.png", "__MACOSX/1.png", "Thumbs.db"),
    *("lost+found/1.png", "$RECYCLE.BIN/1.png", ".ipynb_checkpoints/1.png"),
)


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("below", ["", "cat"])
def test_what_systems_leave_is_neither_class_nor_image(name: str, below: str, tmp_path: Path) -> None:
    folder = data_set(tmp_path / ".hidden" / "data")  # above the folder that is named, nothing is hidden
    picture(folder / "train" / below / name)
    found = image_set(folder / "train", SMALL, (), 2)
    assert len(found) == 6
    assert found.notes == (f"{folder / 'train'}: passed over what is no image: 1 hidden",)
    trained = find_data_set(folder, "classification", SMALL)
    assert (trained.classes, len(trained.training), trained.notes) == (("cat", "dog"), 6, found.notes)


def test_every_suffix_that_is_decoded_is_listed(tmp_path: Path) -> None:
    Image.init()
    decoded = {suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS} - {".pfm"}  # floating point
    assert decoded <= set(SUFFIXES)
    for suffix in SUFFIXES:
        picture(tmp_path / f"a{suffix.upper()}")
    assert len(find_images(tmp_path).paths) == len(SUFFIXES)
    assert find_images(tmp_path).notes == ()


def test_other_files_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "a.heic", "b.HEIC", "notes"):
        picture(tmp_path / name)
    (note,) = find_images(tmp_path).notes
    assert note.endswith("2 .heic, 1 without a suffix")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder_name", [NFC, NFD], ids=["NFC", "NFD"])
@pytest.mark.parametrize("class_name", [NFC, NFD], ids=["NFC", "NFD"])
def test_forms_of_unicode_are_one_name(folder_name: str, class_name: str, tmp_path: Path) -> None:
    picture(tmp_path / folder_name / "1.png")
    found = image_set(tmp_path, SMALL, ("tea", class_name), 2)
    assert found.labels is not None
    assert found.labels.tolist() == [1]


def test_training_and_validation_in_other_forms(tmp_path: Path) -> None:
    folder = data_set(tmp_path)
    (folder / "train" / "cat").rename(folder / "train" / NFC)
    (folder / "val" / "cat").rename(folder / "val" / NFD)
    found = find_data_set(folder, "classification", SMALL)
    assert found.classes == (NFC, "dog")
    assert sorted(found.validation.labels) == [0, 0, 0, 1, 1, 1]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = data_set(tmp_path)
    for part in ("train", "val"):
        (folder / part / "cat").rename(folder / part / NO_UTF8)
    found = find_data_set(folder, "classification", SMALL)
    assert found.classes == ("caf\\udce9", "dog")
    assert msgspec.json.encode(found.classes)
    assert len(found.fingerprint) == 64


def test_an_annotation_in_another_form(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "training" / f"{NFC}.png")
    annotation = tmp_path / "annotations" / "training" / f"{NFD}.png"
    annotation.parent.mkdir(parents=True)
    Image.new("L", (40, 32)).save(annotation)
    (tmp_path / "classes.txt").write_text("\ufeffwall\nsky\n", encoding="utf-8")
    found = annotated_set(tmp_path, "training")
    assert found.annotations == (annotation,)
    assert found.classes == ("wall", "sky")


# --- one odd image ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II",
        b"Exif\0\0" + bytes(64),
        b"Exif\0\0Exif\0\0II*\0\x08\0\0\0" + bytes(6),
        b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHH", 1, 0x0112, 3, 2, 6, 6) + bytes(4),  # two orientations
        b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHH", 1, 0x0112, 3, 1, 99, 0) + bytes(4),
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='six'",
    ],
    ids=["empty", "short", "zeros", "doubled", "two", "99", "beyond", "XMP"],
)
def test_odd_metadata_turns_nothing(block: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    image.save(path, quality=95)
    plain = load_pixels([path], SMALL)
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:])
    np.testing.assert_array_equal(load_pixels([path], SMALL), plain)


def test_each_image_that_cannot_be_read_is_found(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{number:04}.png") for number in range(5)]
    paths[1].write_bytes(b"\0\5\26\7")
    paths[3].write_bytes(paths[3].read_bytes()[:60])  # truncated
    told: list[int] = []
    found = unreadable(range(5), lambda row: load_pixels([paths[row]], SMALL), lambda: told.append(1))
    assert sorted(found) == [1, 3]
    assert str(paths[1]) in str(found[1])
    assert len(told) == 5


def test_training_finds_it_before_the_first_step(tmp_path: Path, inline: Callable[..., Run]) -> None:
    folder = data_set(tmp_path / "data")
    truncated = folder / "val" / "dog" / "2.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    done = inline(
        *("train", "--data", folder, "--output", tmp_path / "run", "--arch", "dmformer_nano", "--batch-size", "2"),
        *("--set", "steps=1", "--workers", "0", "--device", "cpu"),
    )
    assert done.code == 2
    assert str(truncated) in done.error_line
    assert "steps 1" not in done.err
    assert not (tmp_path / "run").exists()


def test_one_image_does_not_end_an_evaluation(
    exported: ExportResult, tmp_path: Path, inline: Callable[..., Run]
) -> None:
    images = DEMONSTRATIONS["classification"].calibration
    assert images is not None
    for digit in ("3", "7"):
        shutil.copytree(images / digit, tmp_path / "data" / digit)
    count = len(find_images(tmp_path / "data").paths)
    broken = sorted((tmp_path / "data" / "7").iterdir())[2]
    broken.write_bytes(b"no image")
    arguments = ("eval", exported.output, "--data", tmp_path / "data", "--runtime", "ort")
    done = inline(*arguments, "--json", tmp_path / "r.json")
    assert done.code == 0
    assert f"note: 1 of {count} images cannot be read and were left out:" in done.err
    assert str(broken) in done.err
    report = msgspec.json.decode((tmp_path / "r.json").read_bytes())
    assert (report["images"], report["results"][0]["images"], report["results"][0]["top1"]) == (count - 1,) * 2 + (1.0,)
    assert [str(broken) in reason for reason in report["unreadable"]] == [True]
    refused = inline(*arguments, "--strict")
    assert (refused.code, str(broken) in refused.error_line) == (2, True)


def test_nothing_that_can_be_read_is_an_error(
    exported: ExportResult, tmp_path: Path, inline: Callable[..., Run]
) -> None:
    (tmp_path / "data" / "3").mkdir(parents=True)
    (tmp_path / "data" / "3" / "a.png").write_bytes(b"no image")
    done = inline("eval", exported.output, "--data", tmp_path / "data", "--runtime", "ort")
    assert (done.code, "none of 1 images can be read" in done.error_line) == (2, True)


def test_hidden_is_told_by_the_name_alone() -> None:
    assert all(map(is_hidden, (".x", "._a.png", "THUMBS.DB", "@eaDir")))
    assert not any(map(is_hidden, ("a.b", "eaDir", "@home", "found")))
    with pytest.raises(UsageError, match="no image in"):
        find_images(Path(__file__).parent)
