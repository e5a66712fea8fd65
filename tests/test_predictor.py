"""Choosing from a bundle, and predicting with one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

import dmformer
from dmformer.assets import SAMPLE_IMAGES
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.bundle.select import choose, select
from dmformer.errors import CheckFailed, DMFormerError, StageFailed, UnavailableError, UsageError
from dmformer.runtimes import registry
from dmformer.runtimes.support import Availability
from dmformer.serve.predictor import Predictor
from tests.bundles import lengthen, one_line, rewrite

if TYPE_CHECKING:
    from dmformer.export.cached import ExportResult

DIGITS = sorted(SAMPLE_IMAGES.glob("*.png"))

# --- choosing ---------------------------------------------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make runtimes unavailable."""
    for name in names:
        support, hidden = registry.support(registry.entry(name)), Availability(False, reason=f"no {name} here")
        monkeypatch.setattr(support, "probe", lambda hidden=hidden: hidden)


def names(bundle: Bundle, *runtimes: str) -> list[str]:
    return [choice.entry.name for choice in select(bundle, runtimes)[0]]


@pytest.fixture
def opened(exported: ExportResult) -> Bundle:
    return open_bundle(exported.output)


EVERY = [row.name for row in registry.ENTRIES if row.format in ("torch", "onnx", "openvino")]  # in the bundle


def test_without_names_or_with_all_everything_that_runs_is_taken(opened: Bundle) -> None:
    assert names(opened) == names(opened, "all") == names(opened, "ALL") == EVERY


def test_named_runtimes_come_in_their_order_and_once(opened: Bundle) -> None:
    assert names(opened, "ov", "ort") == ["openvino", "onnxruntime"]
    assert names(opened, "ort", "onnxruntime", "ORT") == ["onnxruntime"]
    assert names(opened, "all", "ov") == ["openvino", *(name for name in EVERY if name != "openvino")]


def test_what_cannot_run_is_left_out_and_said(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openvino")
    chosen, skipped = select(opened, [])
    assert "openvino" not in [choice.entry.name for choice in chosen]
    assert skipped == ["openvino fp32: no openvino here"]


def test_a_named_runtime_that_cannot_run_is_refused(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openvino")
    for wanted in (["ov"], ["all", "ov"], ["ort", "ov"]):
        with pytest.raises(UnavailableError, match="no openvino here"):
            select(opened, wanted)


def test_nothing_can_run(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *EVERY)
    with pytest.raises(UnavailableError, match="nothing in the bundle can run") as caught:
        select(opened, [])
    assert all(f"no {name} here" in str(caught.value) for name in EVERY)


def test_nothing_in_the_bundle_for_a_runtime(bundle: Path) -> None:
    rewrite(bundle, lambda content: content.update(artifacts=[content["artifacts"][1]]))
    opened = open_bundle(bundle)
    assert names(opened) == ["onnxruntime"]
    with pytest.raises(UsageError, match=r"nothing for runtime openvino; it has onnx fp32.*--format openvino"):
        select(opened, ["ov"])


def test_precisions(opened: Bundle) -> None:
    assert len(select(opened, [], ["fp32"])[0]) == len(EVERY)
    for runtimes in ([], ["ort"]):
        for precisions in (["int8", "fp16"], ["fp32", "INT8"]):
            with pytest.raises(UsageError, match=r"nothing at int8; it has .*onnx fp32.*--precision int8"):
                select(opened, runtimes, precisions)


def test_a_precision_that_only_another_runtime_has(reduced_bundle: Path) -> None:
    rewrite(
        reduced_bundle,
        lambda c: c.update(artifacts=[a for a in c["artifacts"] if a["files"][0]["path"][:6] != "onnx/i"]),
    )
    opened = open_bundle(reduced_bundle)
    assert len(select(opened, [], ["int8"])[0]) == 1
    with pytest.raises(UsageError, match=r"runtime onnxruntime at int8; .*--format onnx --precision int8"):
        select(opened, ["ort"], ["int8"])


def test_unknown_runtimes_are_wrong_usage(opened: Bundle) -> None:
    with pytest.raises(UsageError, match="unknown runtime 'coreml'"):
        select(opened, ["ort", "coreml"])


def test_choose_takes_the_first_that_runs_in_the_manifests_order(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = ["openvino", "onnx", "torch"]
    rewrite(bundle, lambda content: content["artifacts"].sort(key=lambda artifact: order.index(artifact["format"])))
    opened = open_bundle(bundle)
    assert choose(opened, None, None).entry.name == choose(opened, "auto", None).entry.name == "openvino"
    assert choose(opened, None, "fp32").entry.name == "openvino"
    assert choose(opened, "ort", None).entry.name == "onnxruntime"
    hide(monkeypatch, "openvino")
    assert choose(opened, None, None).entry.name == "onnxruntime"
    with pytest.raises(UnavailableError):
        choose(opened, "ov", None)
    with pytest.raises(UsageError):
        choose(opened, None, "int8")
    hide(monkeypatch, "onnxruntime", "torch")
    with pytest.raises(UnavailableError):
        choose(opened, None, None)


def test_artifacts_of_no_known_format_are_passed_over(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["artifacts"][0].update(format="coreml"))
    opened = open_bundle(bundle)
    assert choose(opened, None, None).entry.name == "onnxruntime"
    assert "torch" not in names(opened)


# --- predicting -------------------------------------------------------------------------------------------------------


def test_the_digits_are_read(exported: ExportResult) -> None:
    with dmformer.load(exported.output, runtime="ort") as predictor:
        predictions = predictor.predict(DIGITS, top_k=10)  # more than one batch of images
    assert len(DIGITS) == 10
    assert [Path(prediction.image) for prediction in predictions] == DIGITS
    for path, prediction in zip(DIGITS, predictions, strict=True):
        likely = prediction.classes
        assert likely[0].name == path.stem
        assert sorted(entry.index for entry in likely) == list(range(10))
        assert all(entry.name == str(entry.index) for entry in likely)
        probabilities = [entry.probability for entry in likely]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)
        assert all(0 <= probability <= 1 for probability in probabilities)


def test_several_images_as_one_by_one(exported: ExportResult) -> None:
    with dmformer.load(exported.output, runtime="ort", threads=1) as predictor:
        together = predictor.predict([str(path) for path in DIGITS])
        alone = [predictor.predict([path])[0] for path in DIGITS]
    for one, other in zip(together, alone, strict=True):
        assert one.image == other.image
        assert one.classes[0].index == other.classes[0].index
        assert one.classes[0].probability == pytest.approx(other.classes[0].probability, abs=1e-5)


@pytest.mark.parametrize(("top_k", "shown"), [(1, 1), (3, 3), (10, 10), (1000, 10)])
def test_top_k(exported: ExportResult, top_k: int, shown: int) -> None:
    with dmformer.load(exported.output, runtime="ort") as predictor:
        assert len(predictor.predict(DIGITS[:1], top_k)[0].classes) == shown
        assert predictor.predict([], top_k) == []


def test_no_class_names(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["model"].update(classes=[]))
    with dmformer.load(bundle, runtime="ort") as predictor:
        (likely,) = predictor.predict(DIGITS[:1], top_k=1)[0].classes
    assert (likely.index, likely.name) == (0, None)


class Loud:
    """A runtime whose logits are far beyond what exp() takes."""

    in_turn = nullcontext

    def check_open(self) -> None:
        pass

    def run_rows(self, inputs: Any) -> Any:
        (array,) = inputs.values()
        return {"logits": np.tile(np.float32([1e4, -1e4, 9e3]), (len(array), 1))}


def test_large_logits_do_not_overflow(opened: Bundle) -> None:
    predictor = Predictor(choose(opened, "ort", None))
    predictor.runtime = Loud()  # type: ignore[assignment]
    predictor.manifest = msgspec.structs.replace(
        opened.manifest, outputs=(msgspec.structs.replace(opened.manifest.outputs[0], name="logits"),)
    )
    assert [likely.probability for likely in predictor.predict(DIGITS[:1])[0].classes] == [1, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_no_number_is_a_failure(exported: ExportResult, bad: float) -> None:
    with dmformer.load(exported.output, runtime="ort") as predictor:
        really = predictor.runtime.run
        predictor.runtime.run = lambda inputs: {"logits": really(inputs)["logits"] * np.float32(bad)}
        with pytest.raises(StageFailed, match="NaN or infinity"):
            predictor.predict(DIGITS[:1])


def test_an_image_that_cannot_be_read_is_named(exported: ExportResult, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with dmformer.load(exported.output, runtime="ort") as predictor:
        for bad in ("text.png", "missing.png"):
            with pytest.raises(UsageError, match=bad):
                predictor.predict([DIGITS[0], tmp_path / bad])


def test_load_refuses_what_it_cannot_use(exported: ExportResult, tmp_path: Path) -> None:
    for arguments in (
        {"bundle": tmp_path},
        {"bundle": exported.output, "runtime": "coreml"},
        {"bundle": exported.output, "precision": "int8"},
        {"bundle": exported.output, "threads": 0},
    ):
        with pytest.raises(UsageError):
            dmformer.load(**arguments)  # type: ignore[arg-type]


def test_load_of_a_spoilt_bundle(bundle: Path) -> None:
    lengthen(bundle / "onnx/fp32/model.onnx")
    with pytest.raises(CheckFailed):
        dmformer.load(bundle, runtime="ort")
    with dmformer.load(bundle, runtime="ov") as predictor:
        assert predictor.predict(DIGITS[:1], 1)[0].classes[0].name == "0"


def test_a_manifest_that_does_not_fit_the_artifact(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["inputs"][0].update(name="pixels"))
    with pytest.raises(DMFormerError) as caught, dmformer.load(bundle, runtime="ort") as predictor:
        predictor.predict(DIGITS[:1])
    one_line(caught.value)


def test_many_threads_may_predict(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are those of one thread, and no two threads are in the engine at once."""
    inside, most = 0, 0
    with dmformer.load(bundle, runtime="openvino") as predictor:
        alone = predictor.predict(DIGITS)
        infer = predictor.runtime.infer

        def watched(inputs: Any) -> Any:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.002)
            found = infer(inputs)
            inside -= 1
            return found

        monkeypatch.setattr(predictor.runtime, "infer", watched)
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda image: predictor.predict(image)[0], DIGITS * 3))
    assert most == 1
    for one, expected in zip(together, alone * 3, strict=True):
        assert one.image == expected.image
        assert [likely.index for likely in one.classes] == [likely.index for likely in expected.classes]
        assert one.classes[0].probability == pytest.approx(expected.classes[0].probability, abs=1e-5)


def test_a_predictor_is_not_closed_under_an_inference(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = dmformer.load(bundle, runtime="onnxruntime")
    began, order = threading.Event(), []
    with predictor, ThreadPoolExecutor(1) as pool:
        infer, close = predictor.runtime.infer, predictor.runtime.close

        def slow(inputs: Any) -> Any:
            began.set()
            time.sleep(0.1)
            found = infer(inputs)
            order.append("answered")
            return found

        monkeypatch.setattr(predictor.runtime, "infer", slow)
        monkeypatch.setattr(predictor.runtime, "close", lambda: (order.append("closed"), close()))
        answer = pool.submit(predictor.predict, SAMPLE_IMAGES / "7.png", 1)
        began.wait(10)
        predictor.__exit__(None, None, None)
        assert order == ["answered", "closed"]
        assert answer.result()[0].classes[0].name == "7"
