"""The page of a report: complete in itself, readable on a phone and in the dark, in a real browser."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import msgspec
import pytest

from dmformer.bench.limits import Limits
from dmformer.bench.page import render
from dmformer.bench.profile import summarise_kernels
from dmformer.bundle.manifest import Accuracy
from dmformer.bundle.reader import open_bundle
from dmformer.machine import describe_machine
from dmformer.runtimes.inspector import Kernel
from tests.test_bench_compare import report_of
from tests.test_bench_figures import row

if TYPE_CHECKING:
    from pathlib import Path

    from dmformer.bench.report import BenchReport, Result
    from dmformer.bundle.manifest import Manifest
    from dmformer.export.cached import ExportResult
    from tests.conftest import Cli, Made
    from tests.workers import Worker


KERNELS = [
    ("ReorderInput_1", "ReorderInput"),
    *(
        (f"stages.{stage}.{part}", operator)
        for stage in range(4)
        for part, operator in (
            ("downsample.conv/Conv", "Conv"),
            ("blocks.0.dma.expand/Conv", "Conv"),
            ("blocks.0.ffn.act/Gelu", "Gelu"),
            ("blocks.0/Add", "Add"),
        )
    ),
    ("/GlobalAveragePool", "GlobalAveragePool"),
    ("head/Gemm", "Gemm"),
]


@pytest.fixture(scope="module")
def manifest(exported: ExportResult) -> Manifest:
    """With accuracies, as a bundle of several precisions has them."""
    found = open_bundle(exported.output).manifest
    judged = [
        msgspec.structs.replace(artifact, accuracy=Accuracy(images=100, top1=1 - 0.01 * number))
        for number, artifact in enumerate(found.artifacts)
    ]
    return msgspec.structs.replace(found, artifacts=tuple(judged))


@pytest.fixture(scope="module")
def report(manifest: Manifest) -> BenchReport:
    """Two rows alone and two with streams, as a run with ``--profile`` gives them."""
    machine = Limits(threads=2, gflops=200, gbytes_per_s=12)
    kernels = [Kernel(name, operator, (10_000 * cost,)) for cost, (name, operator) in enumerate(KERNELS, 1)]
    rows = [
        msgspec.structs.replace(
            row(milliseconds, mode=mode, streams=streams, runtime=runtime, artifact_sha256=artifact.sha256),
            operations=2e8, least_bytes=3e6, attainable_ms=1.0, share_of_limit=1 / milliseconds,
            profile=summarise_kernels(kernels, 1) if mode == "compute" else None,
        )
        for mode, streams, milliseconds in (("compute", 1, 3), ("throughput", 2, 2))
        for runtime, artifact in zip(("onnxruntime", "openvino"), manifest.artifacts, strict=False)
    ]  # fmt: skip
    command = "dmformer bench <script>alert(1)</script>"
    environment = describe_machine()
    return report_of(*rows, arch="dmformer_nano", limits=machine, command=command, rounds=3, environment=environment)


@pytest.fixture(scope="module")
def page(report: BenchReport, manifest: Manifest) -> str:
    return render(report, manifest)


TITLES = ["Latency", "What speed costs", "Roofline", *["Where the time goes"] * 2]


def test_the_page_needs_nothing_else(page: str) -> None:
    fetched = re.findall(r"""(?:src|href)=["'](?!#)([^"']*)|@import|url\((?!#)""", page)
    assert fetched == []
    assert "<script" not in page
    assert len(page) < 1_000_000


def test_each_picture_is_there_for_wide_and_for_narrow_pages(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 2 * len(TITLES)
    for picture in pictures:
        ET.fromstring(picture)
        assert "<text" in picture  # text stays text
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", page)  # every colour is the page's


def test_figures_and_environment_are_there(page: str, report: BenchReport) -> None:
    for expected in (*(each.title for each in report.results), "GFLOP/s", "noise floor", "of limit", "operators: Conv"):
        assert expected in page
    assert report.environment["cpu"] in page
    assert "wrong answers on the calibration images" in page
    assert "&lt;script&gt;alert(1)" in page


def untimed(**fields: Any) -> Result:
    return msgspec.structs.replace(row(3), latency_ms=None, **fields)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([row(3)], id="one row"),
        pytest.param([row(3), untimed(status="failed", reason="<b>")], id="failed"),
        pytest.param([untimed(status="not run")], id="nothing timed"),
    ],
)  # fmt: skip
def test_a_page_of_little(rows: list[Any], manifest: Manifest) -> None:
    artifacts = [msgspec.structs.replace(each, artifact_sha256=manifest.artifacts[0].sha256) for each in rows]
    page = render(report_of(*artifacts, arch="x", partial=True), manifest)
    assert "stopped before the end" in page
    assert "<b>" not in page
    assert page.count("<svg") == 2 * any(each.timed for each in rows)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser: Any, page: str, tmp_path: Path) -> Any:
    """The page in the browser: for a colour scheme and a width in pixels."""
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")

    def open_page(scheme: str, width: int) -> Any:
        shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        shown.requested = []
        shown.on("request", lambda request: shown.requested.append(request.url))
        shown.goto(path.as_uri())
        return shown

    return open_page


LUMINANCE = """selector => {
  const linear = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const of = colour => { const [r, g, b] = colour.match(/\\d+/g).map(Number).map(linear);
                         return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const page = of(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll(selector)].filter(e => e.getBoundingClientRect().width).map(e => {
    const style = getComputedStyle(e), own = of(e.closest("svg") ? style.fill : style.color);
    return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05); });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(opened: Any, scheme: str, width: int) -> None:
    shown = opened(scheme, width)
    assert len(shown.requested) == 1  # the file alone
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 20, 25)"
    )
    boxes = shown.evaluate(
        "[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width).filter(width => width)"
    )
    assert len(boxes) == len(TITLES)
    assert all(0.8 * min(width, 960) - 40 <= box <= width for box in boxes)
    # WCAG's least contrast of text, in pictures and outside.
    contrasts = shown.evaluate(LUMINANCE, "h1, h2, p, td, th, svg text")
    assert len(contrasts) > 100
    assert min(contrasts) >= 4.5
    # Letters of pictures that can be read: at least 8 pixels high where the page is narrow.
    heights = shown.evaluate(
        "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height).filter(h => h > 0)"
    )
    assert min(heights) >= 8


def test_no_text_of_a_picture_is_cut_off(opened: Any) -> None:
    for width in (360, 1280):
        outside = opened("light", width).evaluate(
            """[...document.querySelectorAll('svg text')].filter(e => {
              const text = e.getBoundingClientRect(), box = e.closest('svg').getBoundingClientRect();
              return text.width && (text.left < box.left - 1 || text.right > box.right + 1
                                    || text.top < box.top - 1 || text.bottom > box.bottom + 1);
            }).map(e => e.textContent)"""
        )
        assert outside == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page(inline: Cli, made: Made, tmp_path: Path, worker: Worker) -> None:
    worker()
    target = tmp_path / "report.html"
    run = inline("bench", str(made.bundle), "--runtime", "ort", "--html", str(target))
    assert run.code == 0, run.err
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("target", ["no-such-folder/report.html", "."])
def test_a_page_that_cannot_be_written_is_found_before_the_work(inline: Cli, made: Made, target: str) -> None:
    run = inline("bench", str(made.bundle), "--html", target)
    assert run.code == 2
    assert "expected a file in a folder that exists" in run.err


def test_without_matplotlib_the_extra_is_named(inline: Cli, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    run = inline("bench", str(made.bundle), "--html", "report.html")
    assert run.code == 3
    assert "pip install 'dmformer[report]'" in run.err
