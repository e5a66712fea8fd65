"""``dmformer eval``: the whole on held-out digits, PyTorch's answers, what is measured, and the command."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from msgspec.structs import replace
from PIL import Image

import dmformer
from dmformer.assets import CALIBRATION_IMAGES, DEMONSTRATION_CHECKPOINT, SAMPLE_IMAGES
from dmformer.bundle.manifest import Accuracy
from dmformer.bundle.reader import open_bundle
from dmformer.commands.eval import _show as show_eval
from dmformer.data.images import image_set
from dmformer.errors import CheckFailed, UsageError
from dmformer.export.networks import lively_
from dmformer.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dmformer.models.dmformer import create_model
from dmformer.progress import silent
from dmformer.runtimes import base, registry
from dmformer.train.datasets import DIGIT_CLASSES, DIGIT_PREPROCESSING, load_digits, write_digits
from dmformer.verify.evaluate import EvalReport, EvalResult, evaluate
from dmformer.verify.tasks.classification import Classification, Paired, wilson_interval
from tests.bundles import copied, lengthen, one_line, rewrite
from tests.tiers import first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from dmformer.export.cached import ExportResult
    from dmformer.progress import Advance
    from tests.conftest import Run

    Cli = Callable[..., Run]

SCHEMA = Path(dmformer.__file__).parent / "schemas" / "eval.json"

# --- the whole, on held-out digits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 359 held-out digits, in folders named after their classes."""
    folder = tmp_path_factory.mktemp("digits") / "held-out"
    digits = load_digits()
    write_digits(folder, digits, digits.held_out)
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


@pytest.mark.slow
def test_int8_and_fp16_lose_at_most_half_a_point_in_every_runtime(reduced: ExportResult, held_out: Path) -> None:
    found = evaluate(reduced.output, held_out)
    assert [(row.runtime, row.precision) for row in found.results] == [
        (name, precision) for name in ("onnxruntime", "openvino") for precision in ("fp32", "fp16", "int8")
    ]
    exact = found.results[0].top1
    assert exact is not None
    assert all(row.top1 is not None and row.top1 >= exact - 0.005 for row in found.results)


def test_each_runtime_is_paired_with_pytorch(report: EvalReport, capsys: pytest.CaptureFixture[str]) -> None:
    for row in report.results:
        assert row.paired == Paired(torch_only=0, runtime_only=0, p_value=1.0)
    show_eval(report, None)
    assert "McNemar" not in capsys.readouterr().out
    worse = replace(report.results[-1], paired=Paired(torch_only=10, runtime_only=0, p_value=0.002))
    show_eval(replace(report, results=(worse,)), None)
    assert "PyTorch alone is right on 10 images, the runtime alone on 0" in " ".join(capsys.readouterr().out.split())


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


@pytest.mark.parametrize(
    "wrong", first(1, [{"mean": [0.0] * 3, "std": [1.0] * 3}, {"mean": [0.9] * 3}, {"std": [0.05] * 3}])
)
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
        images = image_set(tmp_path / "red", opened.manifest.preprocessing, DIGIT_CLASSES, 10)
        kind = registry.adapter(registry.entry("ort"))
        runtime = kind(opened.load_path(artifact), threads=1)
        return Classification(10).answers(runtime, images, lambda: None)

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


def weights_of(path: Path, *, classes: tuple[str, ...] = DIGIT_CLASSES, seed: int = 1) -> Path:
    """A checkpoint of other weights than the demonstration's."""
    model = lively_(create_model("dmformer_nano", num_classes=len(classes)), seed)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_checkpoint(path, Checkpoint("dmformer_nano", model.config, state, DIGIT_PREPROCESSING, classes))
    return path


def test_without_the_torch_format_agreement_is_left_out_and_why_is_said(bundle: Path) -> None:
    rewrite(bundle, drop_torch)
    found = evaluate(bundle, CALIBRATION_IMAGES, runtimes=["ort"])
    assert found.torch is None
    assert only(found).agreement_with_torch is None
    assert only(found).top1 is not None
    (reason,) = found.skipped
    assert "agreement with PyTorch: the bundle has no torch format; give the checkpoint" in reason


def test_without_labels_and_without_the_torch_format_there_is_nothing_to_measure(bundle: Path) -> None:
    rewrite(bundle, drop_torch)
    with pytest.raises(UsageError) as caught:
        evaluate(bundle, SAMPLE_IMAGES, runtimes=["ort"])
    assert "agreement with PyTorch cannot be measured" in one_line(caught.value)
    assert "give the checkpoint, or export the format torch" in str(caught.value)


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
    weights = weights_of(tmp_path / "w.safetensors", classes=DIGIT_CLASSES[:7])
    with pytest.raises(UsageError):
        evaluate(exported.output, SAMPLE_IMAGES, runtimes=["ort"], weights=weights)


@pytest.mark.parametrize("name", ["missing.safetensors", "text.safetensors"])
def test_weights_that_cannot_be_read(exported: ExportResult, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UsageError) as caught:
        evaluate(exported.output, SAMPLE_IMAGES, runtimes=["ort"], weights=tmp_path / name)
    assert name in one_line(caught.value)


# --- what is measured -------------------------------------------------------------------------------------------------


def add_int8(bundle: Path) -> None:
    """Copies of the onnx and openvino files, under another precision: eval believes the name."""

    def add(content: dict[str, Any]) -> None:
        kept = [artifact for artifact in content["artifacts"] if artifact["format"] != "torch"]
        content["artifacts"] += [copied(bundle, artifact, precision="int8") for artifact in kept]

    rewrite(bundle, add)


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
    add_int8(bundle)
    found = evaluate(bundle, SAMPLE_IMAGES, runtimes=runtimes, precisions=precisions)
    assert [f"{row.runtime} {row.precision}" for row in found.results] == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"runtimes": ["coreml"]}, "unknown runtime 'coreml'"),
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
    assert told == [["PyTorch, torch fp32, onnxruntime fp32, openvino fp32", 2, 2]]


# --- the command ------------------------------------------------------------------------------------------------------

KEYS = {"runtime", "precision", "images", "top1", "top5", "agreement_with_torch"}


def hide_torch(folder: Path) -> str:
    """A PYTHONPATH on which PyTorch is not installed."""
    folder.mkdir()
    (folder / "torch.py").write_text("raise ModuleNotFoundError('none', name='torch')\n")
    return str(folder)


@pytest.mark.slow
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


@pytest.mark.slow
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
    inline: Cli, exported: ExportResult, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    for name in ("strange/dog", "strange/3", "bare"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(SAMPLE_IMAGES / "3.png", tmp_path / "strange" / "dog")
    shutil.copy(SAMPLE_IMAGES / "3.png", tmp_path / "strange" / "3")
    run = inline(*(str(exported.output) if argument == "BUNDLE" else argument for argument in arguments))
    assert run.code == 2, run.err
    assert expected in run.error_line
    assert run.out == ""
