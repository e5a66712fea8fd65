"""The page to sign a bundle off: every section says what is known, what failed stands out, texts stay text."""

from __future__ import annotations

import base64
import html as html_module
import json
import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

import dmformer
from dmformer.bundle.integrity import sign_bundle
from dmformer.bundle.manifest import GOLDEN, PARITY_REPORT, Accuracy
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.trust import TRUSTED_KEYS, generate_keys, load_private_key
from dmformer.bundle.writer import pack
from dmformer.errors import CheckFailed, UsageError
from dmformer.verify.report import Replay, Server
from tests.bundles import rewrite
from tests.paper_bundle import (
    CPU,
    DEVICE,
    FLIP,
    check,
    decided,
    device_accuracy,
    device_parity,
    parity,
    pixels_decided,
    timings,
    write_bundle,
)
from tests.test_bench_page import LUMINANCE
from tests.tiers import first

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dmformer.bundle.manifest import Artifact
    from dmformer.export.cached import ExportResult
    from tests.conftest import Run

FAILED = check("runtime", "int8", 3.0, passed=False, reason="difference 0.006; limit 0.002", batch=5)


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of which everything held; not to be written into."""
    return write_bundle(tmp_path_factory.mktemp("paper") / "bundle")


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """The same, to be written into."""
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def reports(paper: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What verify, bench and eval said of it on a device."""
    artifacts = open_bundle(paper).manifest.artifacts
    folder = tmp_path_factory.mktemp("device")
    return written(folder, artifacts)


def written(folder: Path, artifacts: tuple[Artifact, ...]) -> list[Path]:
    found = {
        "verify": device_parity(artifacts),
        "bench": timings(artifacts, DEVICE.cpu),
        "eval": device_accuracy(artifacts),
    }
    for name, report in found.items():
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(report))
    return [folder / f"{name}.json" for name in found]


@pytest.fixture(scope="module")
def page(paper: Path, reports: list[Path]) -> str:
    return dmformer.report(paper, add=reports).html()


def section(page: str, title: str) -> str:
    """The text of a section, without tags."""
    (found,) = re.findall(rf"<section[^>]*><h2>{re.escape(title)}</h2>(.*?)</section>", page, flags=re.DOTALL)
    return html_module.unescape(re.sub(r"<[^>]+>", "|", found))


# --- what is on the page ----------------------------------------------------------------------------------------------

SECTIONS = {
    "What was shipped": (
        "paper_net", "1.23 M parameters", f"checkpoint, SHA-256 {'c' * 64}", "letters, 77 images",
        "held_out_top1 0.875", "torch 9.8.7, onnx 6.5.4", "onnx/int8/model.onnx", "golden.npz", "signature|",
    ),
    "Checks": ("deploy form in torch fp32", "runtime in onnxruntime int8", "limit", "verify.json (Device 7)"),
    "Decisions": ("51.0% to 93.0%", "image 2: class 1 for 2, margin 0.0123, within the noise", "onnxruntime int8: one"),
    "Layers by precision": ("40 int8, 17 fp32", "no int8 arithmetic on paper", "it would lose 3 points", "promised"),
    "Accuracy": (
        "94.50% (89.5% to 95.5%)", "86.00% (73.8% to 93.1%)", "200 calibration images", "50 images of field photos",
        "98.50%", "0.25", "the accuracy budget is 0.5",
    ),
    "Latency": ("fake int8 batch 1", "Device 7", "38%", "111 GFLOP/s", "bench.json"),
    "Where it was checked and timed": (
        "Maker's own 1000 (avx2)", "Device 7 (neon)", "cortex-z9, emulated by QEMU 1.2",
        "onnx fp32 by onnxruntime 3.2.1",
    ),
    "Sensitivity": ("stages.1.blocks.0", "int8"),
    "What was assumed": ("the mean was assumed", "std", "12 nodes became 9", "2026-01-02T03:04:05Z: the trace"),
    "What remains open": ("tensorrt: no GPU on paper", "not signed", "was not faster than fp32"),
    "What this page does not prove": ("runs nothing", "reports are not signed"),
    "Every check": ("1, 2|", "75.00%", "0.0015", "16 x the noise of a test", "itself"),
}  # fmt: skip


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_says_what_is_known(page: str, title: str) -> None:
    text = section(page, title)
    for expected in SECTIONS[title]:
        assert expected in text, text


def test_every_section_is_looked_at(page: str) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", page) == list(SECTIONS)


@pytest.mark.parametrize("title", ["Checks", "Layers by precision", "Accuracy", "Latency", "Sensitivity"])
def test_a_section_has_a_picture(page: str, title: str) -> None:
    (found,) = re.findall(rf"<section[^>]*><h2>{title}</h2>(.*?)</section>", page, flags=re.DOTALL)
    assert found.count("<svg") == 2


def test_every_file_is_there_with_its_hash(page: str, paper: Path) -> None:
    text = section(page, "What was shipped")
    for entry in open_bundle(paper).manifest.entries:
        assert entry.path in text
        assert entry.sha256 in text


def test_the_verdict_comes_first(page: str) -> None:
    body = page.partition("<body>")[2]
    assert body.index("Every check held: 18 of 18. Every file is what the manifest lists.") < body.index("open points")
    assert body.index("open points") < body.index("<section")
    assert 'class="verdict held"' in body


def test_the_page_needs_nothing_else(page: str) -> None:
    assert [link for link in re.findall(r"""(?:src|href)=["'](?!#)([^"']*)""", page) if link[:5] != "data:"] == []
    assert not re.search(r"""@import|url\((?!#)|<script|<link""", page)


def test_golden_images_are_there_and_a_flip_stands_out(page: str) -> None:
    images = re.findall(r"<figure( class=\"bad\")?><img src=\"data:image/png;base64,[^\"]+\" alt=\"([^\"]*)\"", page)
    assert [(bool(bad), caption.split("\n")[0]) for bad, caption in images] == [
        (False, "image 0: nought"), (False, "image 1: one"), (True, "image 2: two"), (False, "image 3: nought"),
    ]  # fmt: skip


def test_a_flip_of_an_image_of_ones_own_is_of_no_golden_one(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parity(decided("fp32", msgspec.structs.replace(FLIP, image=0))))
    assert "image 0: nought</figcaption>" in dmformer.report(bundle).html()


def test_pixels_are_decided(tmp_path: Path) -> None:
    report = parity(pixels_decided())
    report = msgspec.structs.replace(report, checks=tuple(one for one in report.checks if one.decisions is None))
    known = dmformer.report(write_bundle(tmp_path / "b", report, task="segmentation"))
    text = section(known.html(), "Decisions")
    assert "3 of 4096 pixels, 3 within the noise" in text
    assert "image 3" in text


def test_what_is_not_there_is_open(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")

    def strip(content: dict[str, Any]) -> None:
        content["evidence"].update(accuracy=None, processors=[], cached=[])
        content["files"] = [file for file in content["files"] if "bench" not in file["path"]]
        content["artifacts"][1]["format"] = "tensorrt"
        content["model"].update(weights="random", seed=7)

    rewrite(bundle, strip)
    (bundle / "reports" / "bench.json").unlink()
    points = "\n".join(dmformer.report(bundle).open_points)
    for expected in (
        "latency: not measured", "accuracy: not measured", "no other machine", "RANDOM weights, seed 7",
        "tensorrt int8: no check of its answers",
    ):  # fmt: skip
        assert expected in points


# --- what failed ------------------------------------------------------------------------------------------------------


def test_a_failed_check_stands_out(tmp_path: Path) -> None:
    known = dmformer.report(write_bundle(tmp_path / "b", parity(FAILED)))
    assert not known.passed
    page = known.html()
    assert "NOT everything held: 1 failure; of the 10 checks listed here, 9 held." in page
    assert 'class="verdict failed"' in page
    assert "FAILED" in section(page, "Checks")
    (bad,) = re.findall(r'<tr class="bad">(.*?)</tr>', section_html(page, "Every check"), flags=re.DOTALL)
    assert "300.00%" in bad
    assert "difference 0.006; limit 0.002" in bad
    with pytest.raises(CheckFailed, match="NOT everything held"):
        known.judge()


def section_html(page: str, title: str) -> str:
    return page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]


def test_a_check_that_failed_without_a_figure_is_in_the_picture(tmp_path: Path) -> None:
    broken = check("runtime", "int8", None, passed=False, reason="the engine ended")
    page = dmformer.report(write_bundle(tmp_path / "b", parity(broken))).html()
    assert "FAILED" in section(page, "Checks")


@pytest.mark.parametrize("share", first(2, [float("nan"), float("inf"), 1e30, 0.0, 1e-30]))
def test_any_figure_can_be_drawn(tmp_path: Path, share: float) -> None:
    strange = check("runtime", "fp32", share, passed=False, reason="strange")
    assert "FAILED" in dmformer.report(write_bundle(tmp_path / "b", parity(strange))).html()


def damage(bundle: Path) -> None:
    (bundle / "onnx" / "int8" / "model.onnx").write_bytes(b"other")


def fail_processor(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["evidence"]["processors"][0].update(passed=False))


def contradict(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["evidence"]["parity"].update(passed=False, failed=4))


def forge(bundle: Path) -> None:
    """Put a signature there that is of this manifest and was made by nobody."""
    generate_keys(bundle.parent / "signer.pem")
    found = sign_bundle(bundle, load_private_key(bundle.parent / "signer.pem", lambda: ""))
    zeros = base64.b64encode(bytes(64)).decode()
    (bundle / "manifest.sig").write_bytes(msgspec.structs.replace(found, signature=zeros).encode())


@pytest.mark.parametrize(
    ("spoil", "expected"),
    first(
        3,
        [
            (damage, "onnx/int8/model.onnx"),
            (lambda bundle: (bundle / "more").write_text("x"), "not listed in the manifest"),
            (
                lambda bundle: (bundle / PARITY_REPORT).write_text("{}"),
                "no parity report that is what the manifest lists",
            ),
            (lambda bundle: (bundle / GOLDEN).write_text("x"), GOLDEN),
            (forge, "signature: "),
            (fail_processor, "onnx fp32 on cortex-z9, by onnxruntime 3.2.1: checks failed"),
            (contradict, "the manifest says that 4 checks failed"),
        ],
    ),
)
def test_whatever_did_not_hold_is_told(spoilt: Path, spoil: Callable[[Path], object], expected: str) -> None:
    spoil(spoilt)
    known = dmformer.report(spoilt)
    assert not known.passed
    assert any(expected in failure for failure in known.failures), known.failures
    assert expected in html_module.unescape(known.html())


def test_signatures_are_told(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    public = generate_keys(tmp_path / "signer.pem")
    sign_bundle(spoilt, load_private_key(tmp_path / "signer.pem", lambda: ""))
    monkeypatch.setenv(TRUSTED_KEYS, str(keys))
    assert "holds, by an unknown key" in section(dmformer.report(spoilt).html(), "What was shipped")
    (keys / "signer.pem").write_bytes(public.read_bytes())
    known = dmformer.report(spoilt)
    assert "signature|holds; key " in re.sub(r"\|+", "|", section(known.html(), "What was shipped").replace("\n", ""))
    assert not any("sign" in point for point in known.open_points)
    rewrite(spoilt, lambda content: content.update(tool_version="0.0.8"))
    with pytest.raises(CheckFailed, match="the signature is of another"):
        dmformer.report(spoilt)


# --- what is added ----------------------------------------------------------------------------------------------------


def test_a_report_that_failed_elsewhere_is_a_failure(paper: Path, tmp_path: Path) -> None:
    artifacts = open_bundle(paper).manifest.artifacts
    path = tmp_path / "device.json"
    path.write_bytes(msgspec.json.encode(device_parity(artifacts, FAILED)))
    known = dmformer.report(paper, add=[path])
    assert not known.passed
    assert known.failures[0].startswith("device.json (Device 7): 1 of 10 checks failed")


def test_a_replay_is_told_with_its_processor(paper: Path, tmp_path: Path) -> None:
    replay = Replay(
        processor="nehalem-x", runtime="onnxruntime", engine="onnxruntime 7.7", platform="linux", emulator="QEMU 9",
        packages={}, described=None, passed=True,
    )  # fmt: skip
    report = msgspec.structs.replace(device_parity(open_bundle(paper).manifest.artifacts), replays=(replay,))
    path = tmp_path / "device.json"
    path.write_bytes(msgspec.json.encode(report))
    text = section(dmformer.report(paper, add=[path]).html(), "Where it was checked and timed")
    assert "nehalem-x, emulated by QEMU 9" in text


def test_a_server_is_told_with_its_models(paper: Path, tmp_path: Path) -> None:
    server = Server(url="http://shelf:8000", name="quadruple", version="4.4", models=("paper_net_onnx_fp32 version 1",))
    report = msgspec.structs.replace(device_parity(open_bundle(paper).manifest.artifacts, FAILED), server=server)
    path = tmp_path / "served.json"
    path.write_bytes(msgspec.json.encode(report))
    known = dmformer.report(paper, add=[path])
    text = re.sub(r"[|\n]+", "|", section(known.html(), "Where it was checked and timed"))
    source = "served.json (a server, asked from Device 7)"
    assert f"server quadruple 4.4 at http://shelf:8000|paper_net_onnx_fp32 version 1|FAILED|{source}" in text
    assert known.failures[0].startswith(f"{source}: 1 of 10 checks failed")
    assert '<td class="text">server quadruple' in known.html()  # it wraps: addresses are long


@pytest.mark.parametrize("packed", [False, True])
def test_another_bundle_is_shown_beside(paper: Path, tmp_path: Path, packed: bool) -> None:
    other = write_bundle(tmp_path / "other", arch="second_net")
    if packed:
        other = pack(open_bundle(other), tmp_path / "other.dmf")
    page = dmformer.report(paper, add=[other]).html()
    assert "second_net" in section(page, "What was shipped")
    assert "onnx int8, bundle other" in section(page, "Layers by precision")
    assert "Sign-off of paper_net" in page


def test_what_another_bundle_answers_is_not_held_for_this_one(tmp_path: Path) -> None:
    quiet = parity()
    report = msgspec.structs.replace(quiet, checks=tuple(one for one in quiet.checks if one.precision == "fp32"))
    this = write_bundle(tmp_path / "this", report)
    rewrite(this, lambda content: content["evidence"].update(processors=[]))
    other = write_bundle(tmp_path / "other")
    known = dmformer.report(this, add=[other])
    assert "onnx int8: no check of its answers" in known.open_points
    assert any("no other machine" in point for point in known.open_points)
    assert '<figure class="bad">' not in known.html()


@pytest.mark.parametrize("place", range(3), ids=["verify", "bench", "eval"])
def test_a_report_on_another_bundle_is_refused(paper: Path, tmp_path: Path, place: int) -> None:
    foreign = tuple(
        msgspec.structs.replace(one, files=(msgspec.structs.replace(one.files[0], sha256="f" * 64),))
        for one in open_bundle(paper).manifest.artifacts
    )
    path = written(tmp_path, foreign)[place]
    with pytest.raises(UsageError, match="which the bundle does not have; expected a report on this bundle"):
        dmformer.report(paper, add=[path])


def test_a_report_that_names_no_artifacts_is_refused(inline: Callable[..., Run], paper: Path, tmp_path: Path) -> None:
    """Such is the report in another bundle: its checks would pass for those of this one."""
    other = write_bundle(tmp_path / "other", parity(decided("int8")))
    run = inline("report", paper, "--html", "page.html", "--add", other / PARITY_REPORT)
    assert run.code == 2
    assert "says not which artifacts it asked; expected a report of verify --json by this version" in run.error_line
    assert not (tmp_path / "page.html").exists()


def test_a_report_on_nothing_is_not_the_bundles_own(paper: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_bytes(msgspec.json.encode(timings((), DEVICE.cpu)))
    without = msgspec.structs.replace(parity(), checks=())
    bundle = write_bundle(tmp_path / "b", without)
    rewrite(
        bundle, lambda content: content.update(files=[one for one in content["files"] if "bench" not in one["path"]])
    )
    (bundle / "reports" / "bench.json").unlink()
    assert "latency: not measured" in dmformer.report(bundle, add=[path]).open_points


@pytest.mark.parametrize("again", ["the bundle", "its own timing", "a report", "a copy of a report", "another bundle"])
def test_nothing_counts_twice(paper: Path, reports: list[Path], tmp_path: Path, again: str) -> None:
    copied = tmp_path / "copied.json"
    copied.write_text(json.dumps(json.loads(reports[0].read_text()), indent=3))
    other = write_bundle(tmp_path / "other", arch="second_net")
    add = {
        "the bundle": [paper], "its own timing": [paper / "reports" / "bench.json"],
        "a report": [reports[0], reports[0]], "a copy of a report": [reports[0], copied],
        "another bundle": [other, pack(open_bundle(other), tmp_path / "other.dmf")],
    }  # fmt: skip
    with pytest.raises(UsageError, match="is on the page already; expected each bundle and each report once"):
        dmformer.report(paper, add=add[again])


def test_sources_of_the_same_name_are_told_apart(paper: Path, tmp_path: Path) -> None:
    artifacts = open_bundle(paper).manifest.artifacts
    add = []
    for lab, more in (("a", ()), ("b", (FAILED,))):
        (tmp_path / lab).mkdir()
        add.append(tmp_path / lab / "verify.json")
        add[-1].write_bytes(msgspec.json.encode(device_parity(artifacts, *more)))
    known = dmformer.report(paper, add=add)
    first, second = (source.title for source in known.sources[1:])
    assert (first, second) == ("verify.json (Device 7)", f"2. verify.json (Device 7), {add[1]}")
    assert known.failures[0].startswith("2. verify.json (Device 7), ")
    assert "2. verify.json" in section_html(known.html(), "Checks")


def evaluated(paper: Path, path: Path, top1: float, torch: float | None, **changed: Any) -> Path:
    """What eval says of a bundle whose int8 has a top-1, and PyTorch another."""
    report = device_accuracy(open_bundle(paper).manifest.artifacts)
    fp32, int8 = (msgspec.structs.replace(one, agreement_with_torch=0.9) for one in report.results)
    of_torch = None if torch is None else Accuracy(images=50, top1=torch, top1_interval=(0.7, 0.99))
    report = msgspec.structs.replace(
        report, results=(fp32, msgspec.structs.replace(int8, top1=top1)), torch=of_torch, **changed
    )
    path.write_bytes(msgspec.json.encode(report))
    return path


@pytest.mark.parametrize(("top1", "failed"), [(0.86, False), (0.9, False), (0.84, True)])
def test_an_added_accuracy_is_held_to_the_budget(paper: Path, tmp_path: Path, top1: float, failed: bool) -> None:
    known = dmformer.report(paper, add=[evaluated(paper, tmp_path / "eval.json", top1, 0.86)])
    expected = "eval.json: onnxruntime int8 loses 2.00 points on 50 images; the accuracy budget is 0.5"
    assert list(known.failures) == ([expected] if failed else [])
    assert not any("not held to the accuracy budget" in point for point in known.open_points)


def test_an_accuracy_that_nothing_is_compared_with_is_open(paper: Path, tmp_path: Path) -> None:
    known = dmformer.report(paper, add=[evaluated(paper, tmp_path / "eval.json", 0.5, None)])
    (point,) = [point for point in known.open_points if "int8: not held to the accuracy budget of 0.5" in point]
    assert "PyTorch's on the calibration images is +45.00 points from it" in point
    bundle = write_bundle(tmp_path / "b")
    rewrite(bundle, lambda content: content["evidence"].update(accuracy=None))
    known = dmformer.report(bundle, add=[evaluated(bundle, tmp_path / "eval.json", 0.5, 0.9)])
    assert any("int8: not held to the accuracy budget: the bundle has none" in point for point in known.open_points)


def test_images_that_were_left_out_and_notes_are_open(paper: Path, tmp_path: Path) -> None:
    accuracy = evaluated(paper, tmp_path / "eval.json", 0.86, 0.86, unreadable=("a.png: cut off", "b.png: empty"))
    timing = tmp_path / "bench.json"
    report = timings(open_bundle(paper).manifest.artifacts, DEVICE.cpu)
    timing.write_bytes(msgspec.json.encode(msgspec.structs.replace(report, notes=("int8 sums overflow here",))))
    points = dmformer.report(paper, add=[accuracy, timing]).open_points
    for expected in (
        "eval.json: left out: a.png: cut off", "eval.json: left out: b.png: empty",
        "bench.json (Device 7): int8 sums overflow here",
    ):  # fmt: skip
        assert expected in points


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no report that this version reads"),
        (b"[]", "no report that this version reads"),
        (b"{}", "is no report"),
        (b'{"url": "http://shelf:8000", "rows": []}', "neither a server's load"),
        (b'{"results": 1, "environment": {}}', "no report that this version reads"),
        (b'{"passed": true, "checks": [], "checks": []}', "twice"),
        (b"[" * 100_000, "no report that this version reads"),
        (b"\xff\xfe", "no report that this version reads"),
        (b'{"passed": true, "checks": [{}]}', "no report that this version reads"),
    ],
    ids=range(9),
)
def test_what_is_no_report_is_refused_in_one_line(paper: Path, tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=expected) as refused:
        dmformer.report(paper, add=[path])
    assert "\n" not in str(refused.value)
    assert "expected what verify, bench or eval wrote with --json, or a bundle" in str(refused.value)


def test_what_is_not_there_is_refused(paper: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        dmformer.report(paper, add=[tmp_path / "nothing.json"])


def test_a_report_names_the_artifacts_that_it_asked(exported: ExportResult, tmp_path: Path) -> None:
    report = dmformer.verify(exported.output, runtimes=["onnxruntime"])
    path = tmp_path / "verify.json"
    path.write_bytes(msgspec.json.encode(report))
    known = dmformer.report(exported.output, add=[path])
    assert report.artifacts == tuple(one.sha256 for one in known.manifest.artifacts if one.format == "onnx")
    assert known.passed, known.failures
    with pytest.raises(UsageError, match="which the bundle does not have"):
        dmformer.report(write_bundle(tmp_path / "b"), add=[path])


# --- strangers --------------------------------------------------------------------------------------------------------

STRANGE = "<script>alert(1)</script>\x1b[2J $x$ \u202e\u4e2d\"' onload=x"


def test_texts_of_strangers_stay_text(tmp_path: Path) -> None:
    report = parity(check(STRANGE, "fp32", 0.5), check("precision", "fp32", None, reason=STRANGE))
    report = msgspec.structs.replace(report, skipped=(STRANGE,), processor=msgspec.structs.replace(CPU, cpu=STRANGE))
    bundle = write_bundle(tmp_path / "b", report, arch=STRANGE, classes=(STRANGE, "<b>", "c"), notes=(STRANGE,))
    rewrite(bundle, lambda content: content["artifacts"][1].update(sensitivity={STRANGE: 1.0}, layers={STRANGE: 2}))
    page = dmformer.report(bundle).html()
    assert "<script" not in page
    assert "<b>" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J" in page


def test_a_page_of_far_too_much_is_bounded(tmp_path: Path) -> None:
    many = [check(f"stage {number}", "fp32", 0.5) for number in range(3000)]
    last = check("the last", "fp32", 2.0, passed=False, reason="x" * 100_000)
    bundle = write_bundle(tmp_path / "b", parity(*many, last))
    page = dmformer.report(bundle).html()
    assert len(page) < 4_000_000
    assert "the last in onnxruntime fp32" in section(page, "Checks")
    assert "more rows" in section(page, "Every check")
    assert "Drawn: 180 rows, and 2829 more are in the table." in section(page, "Checks")[:400]


def test_what_pictures_leave_out_is_told(paper: Path, tmp_path: Path) -> None:
    artifacts = open_bundle(paper).manifest.artifacts
    assert "more are in the table" not in dmformer.report(paper).html()
    timing = timings(artifacts, DEVICE.cpu)
    (tmp_path / "bench.json").write_bytes(
        msgspec.json.encode(msgspec.structs.replace(timing, results=timing.results * 12))
    )
    accuracy = device_accuracy(artifacts)
    (tmp_path / "eval.json").write_bytes(
        msgspec.json.encode(msgspec.structs.replace(accuracy, results=accuracy.results * 20))
    )
    page = dmformer.report(paper, add=[tmp_path / "bench.json", tmp_path / "eval.json"]).html()
    assert "Drawn: 20 rows, and 6 more are in the table." in section(page, "Latency")
    assert "Drawn: 30 rows, and 13 more are in the table." in section(page, "Accuracy")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"mode": "throughput", "samples": 0}, "has a latency and no calls that were timed"),
        ({"samples_ns": ()}, "has a latency and no calls that were timed"),
        ({"samples_ns": ((),)}, "has a latency and no calls that were timed"),
        ({"attainable_ms": 1e308}, "has times that no clock gives"),
        ({"samples_ns": ((10**400,),)}, "has times that no clock gives"),
    ],
)
def test_a_timing_that_nothing_measured_is_refused(
    paper: Path, tmp_path: Path, changed: dict[str, Any], expected: str
) -> None:
    report = msgspec.to_builtins(timings(open_bundle(paper).manifest.artifacts, DEVICE.cpu))
    report["results"][0].update(changed)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    with pytest.raises(UsageError, match=expected):
        dmformer.report(paper, add=[path])


@pytest.mark.parametrize("changed", [{"images": 0}, {"top1": 1e300}, {"agreement_with_torch": -1}])
def test_an_accuracy_that_is_no_share_is_refused(paper: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    report = msgspec.to_builtins(device_accuracy(open_bundle(paper).manifest.artifacts))
    report["results"][0].update(changed)
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(report))
    with pytest.raises(UsageError, match="an accuracy that is no share of its images"):
        dmformer.report(paper, add=[path])


def test_a_strange_runtime_is_no_formula(paper: Path, tmp_path: Path) -> None:
    report = timings(open_bundle(paper).manifest.artifacts, DEVICE.cpu)
    strange = tuple(msgspec.structs.replace(row, runtime="$\\frac{$" + "x" * 500) for row in report.results)
    path = tmp_path / "bench.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(report, results=strange)))
    (svg, *_) = re.findall(
        r"<svg.*?</svg>", section_html(dmformer.report(paper, add=[path]).html(), "Latency"), re.DOTALL
    )
    assert "frac{$" in svg
    assert "x" * 100 not in svg


# --- in a browser -----------------------------------------------------------------------------------------------------

OUTSIDE = """[...document.querySelectorAll('svg text')].filter(e => {
  const text = e.getBoundingClientRect(), box = e.closest('svg').getBoundingClientRect();
  return text.width && (text.left < box.left - 1 || text.right > box.right + 1
                        || text.top < box.top - 1 || text.bottom > box.bottom + 1);
}).map(e => e.textContent)"""


@pytest.fixture
def opened(browser: Any, page: str, tmp_path: Path) -> Callable[[str, int], Any]:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")

    def open_page(scheme: str, width: int) -> Any:
        shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        shown.goto(path.as_uri())
        return shown

    return open_page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(opened: Callable[[str, int], Any], scheme: str, width: int) -> None:
    shown = opened(scheme, width)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate(OUTSIDE) == []
    assert min(shown.evaluate(LUMINANCE, "h1, h2, p, li, td, th, figcaption, svg text")) >= 4.5


def test_on_paper(opened: Callable[[str, int], Any]) -> None:
    shown = opened("dark", 680)  # A4 within its margins
    shown.emulate_media(media="print", color_scheme="dark")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.evaluate("document.documentElement.scrollWidth") <= 680
    assert shown.evaluate(OUTSIDE) == []
    too_wide = """[...document.querySelectorAll('table, pre, figure')].filter(
      e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.textContent)"""
    assert shown.evaluate(too_wide) == []
    assert shown.pdf(prefer_css_page_size=True).startswith(b"%PDF")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_both(inline: Callable[..., Run], paper: Path, reports: list[Path], tmp_path: Path) -> None:
    added = [part for path in reports for part in ("--add", path)]
    run = inline("report", paper, "--html", "page.html", "--bom", "bom.json", *added)
    assert run.code == 0, run.err
    assert run.out == ""
    assert "Every check held: 18 of 18" in run.err
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((tmp_path / "bom.json").read_bytes())["bomFormat"] == "CycloneDX"


def test_a_failed_check_is_1_and_the_page_is_written(inline: Callable[..., Run], tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parity(FAILED))
    run = inline("report", bundle, "--html", "page.html")
    assert run.code == 1
    assert "NOT everything held: 1 failure" in run.error_line
    assert "NOT everything held" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_either_goes_to_standard_output(inline: Callable[..., Run], paper: Path) -> None:
    run = inline("report", paper, "--html", "-")
    assert run.out.startswith("<!doctype html>")
    assert json.loads(inline("report", paper, "--bom", "-").out)["bomFormat"] == "CycloneDX"
    assert inline("report", paper, "--html", "-", "--bom", "-").code == 2


def test_no_file_is_written_over_another(
    inline: Callable[..., Run], paper: Path, reports: list[Path], tmp_path: Path
) -> None:
    added = tmp_path / "ev.json"
    added.write_bytes(reports[0].read_bytes())
    (tmp_path / "link.json").symlink_to("ev.json")
    for arguments, named in (
        (("--html", "c.out", "--bom", "./c.out"), "--html and --bom both name './c.out'; expected two files"),
        (("--html", "ev.json", "--add", added), "--add and --html both name 'ev.json'"),
        (("--bom", "link.json", "--add", added), "--add and --bom both name 'link.json'"),
    ):
        run = inline("report", paper, *arguments)
        assert run.code == 2
        assert named in run.error_line
    assert added.read_bytes() == reports[0].read_bytes()
    assert not (tmp_path / "c.out").exists()


def test_nothing_is_written_where_what_is_added_is_bad(inline: Callable[..., Run], paper: Path, tmp_path: Path) -> None:
    run = inline("report", paper, "--html", "page.html", "--add", tmp_path / "nothing.json")
    assert run.code == 2
    assert run.error_line.startswith("error: --add ")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("option", "package"), [("--html", "matplotlib"), ("--bom", "cyclonedx.model.bom")])
def test_a_missing_package_is_named(
    inline: Callable[..., Run], paper: Path, monkeypatch: pytest.MonkeyPatch, option: str, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    run = inline("report", paper, option, "file")
    assert run.code == 3
    assert "dmformer[report]" in run.error_line
