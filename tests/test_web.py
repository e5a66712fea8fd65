"""The page for browsers: in headless Chromium, its pixels, answers and checks beside those of Python."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import dmformer
from dmformer.assets import SAMPLE_IMAGES, SCENES
from dmformer.bundle.reader import open_bundle
from dmformer.cache import Cache
from dmformer.device import installation
from dmformer.device.installation import NpmPackage
from dmformer.errors import CheckFailed, StageFailed, UnavailableError, UsageError
from dmformer.layouts import web
from dmformer.layouts.api import serve_layout
from dmformer.layouts.web import ENGINE
from tests.bundles import one_line, rewrite
from tests.png import png
from tests.web import Opened, served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dmformer.export.cached import ExportResult
    from tests.conftest import Run


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serve a folder for as long as the test runs; gives the address."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(served(*arguments))


@pytest.fixture(scope="module")
def labelling(segmentation_open: ExportResult, web_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "scenes"
    serve_layout("web", open_bundle(segmentation_open.output), folder, onnxruntime_web=web_engine)
    return folder


# --- answers ---------------------------------------------------------------------------------------------------------


def same_rows(shown: list[list[str]], bundle: Path, precision: str = "fp32") -> None:
    """Compare the page's rows with those that Python makes in onnxruntime: the same but for what only one can see."""
    expected = [
        ["ok" if check.passed else "FAILED", check.where, str(check.batch), check.against, f"{check.limit:.3g}"]
        for check in dmformer.verify(bundle, runtimes=["onnxruntime"]).checks
        if check.stage != "precision" and (check.precision == precision or check.runtime == "numpy")
    ]
    assert [[*row[:4], row[5]] for row in shown if row[1] != "integrity"] == expected


def test_classes_of_the_demonstration(
    browser: Any, serve: Callable[..., str], web_page: Path, exported: ExportResult
) -> None:
    address = serve(web_page)
    opened = Opened(browser, address).ready()
    rows = opened.verify()
    assert all(row[0] == "ok" for row in rows), rows
    assert opened.verdict == f"all {len(rows)} checks held"
    assert [row[1] for row in rows].count("integrity") == 2
    same_rows(rows, exported.output)
    with dmformer.load(exported.output, runtime="onnxruntime") as predictor:
        for number, path in enumerate(sorted(SAMPLE_IMAGES.glob("*.png"))):
            shown = (opened.drop if number % 2 else opened.look)(path)
            (prediction,) = predictor.predict(path, top_k=3)
            expected = [[one.name, f"{100 * one.probability:.2f} %"] for one in prediction.classes]
            assert [row[:2] for row in shown[:3]] == expected
    assert not opened.errors
    assert all(url.startswith(address) for url in opened.requested)


def test_pixels_of_the_demonstration(
    browser: Any, serve: Callable[..., str], labelling: Path, segmentation_open: ExportResult
) -> None:
    opened = Opened(browser, serve(labelling)).ready()
    rows = opened.verify()
    assert all(row[0] == "ok" for row in rows), rows
    same_rows(rows, segmentation_open.output)
    with dmformer.load(segmentation_open.output, runtime="onnxruntime") as predictor:
        for path in sorted((SCENES / "images/validation").iterdir())[:2]:
            shown = opened.look(path)
            (segments,) = predictor.segment(path)
            assert shown == [[one.name, f"{100 * one.share:.1f} %"] for one in segments.classes]
            canvas = opened.page.evaluate(
                "() => { const one = document.getElementById('picture'); return [one.width, one.height]; }"
            )
            assert min(canvas) == 480
    assert not opened.errors


@pytest.mark.slow
def test_every_precision_answers_in_the_browser(
    browser: Any, serve: Callable[..., str], reduced: ExportResult, web_engine: Path, tmp_path: Path
) -> None:
    serve_layout("web", open_bundle(reduced.output), tmp_path / "web", onnxruntime_web=web_engine)
    opened = Opened(browser, serve(tmp_path / "web")).ready()
    titles = opened.page.eval_on_selector_all("#model option", "options => options.map(one => one.textContent)")
    assert titles == ["onnx fp32", "onnx fp16", "onnx int8"]
    for title in titles:
        opened.page.select_option("#model", title)
        rows = opened.verify()
        assert all(row[0] == "ok" for row in rows), (title, [row for row in rows if row[0] != "ok"])
        same_rows(rows, reduced.output, title.removeprefix("onnx "))


@pytest.mark.slow
def test_threads_where_the_server_admits_them(browser: Any, serve: Callable[..., str], web_page: Path) -> None:
    headers = (("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Embedder-Policy", "require-corp"))
    opened = Opened(browser, serve(web_page, *headers)).ready()
    assert opened.page.evaluate("crossOriginIsolated")
    assert all(row[0] == "ok" for row in opened.verify())
    assert not opened.errors


# --- what fails ------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(web_page: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(web_page, tmp_path / "spoilt"))


def mend_hash(folder: Path, path: Path) -> None:
    """Write the hash of a changed file into the layout, as somebody who means harm does."""
    listing = folder / "layout.json"
    page = json.loads(listing.read_bytes())
    for file in (page["golden"]["file"], *(model["file"] for model in page["models"])):
        if file["path"] == path.relative_to(folder).as_posix():
            file["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    listing.write_text(json.dumps(page))


@pytest.mark.parametrize("mended", [pytest.param(False, marks=pytest.mark.slow), True])
def test_damaged_golden_answers_fail(browser: Any, serve: Callable[..., str], spoilt: Path, mended: bool) -> None:
    page = json.loads((spoilt / "layout.json").read_bytes())
    path, place = spoilt / "golden.bin", page["models"][0]["references"][0]["outputs"]["logits"]["offset"]
    data = bytearray(path.read_bytes())
    data[place + 2] ^= 0x10
    path.write_bytes(data)
    if mended:
        mend_hash(spoilt, path)
    opened = Opened(browser, serve(spoilt)).ready()
    failed = [row for row in opened.verify() if row[0] != "ok"]
    assert failed[0][1] == ("runtime" if mended else "integrity")
    assert "failed" in opened.verdict
    assert ("differs by" if mended else "SHA-256") in failed[0][6]
    assert failed[0][6] in opened.verdict


@pytest.mark.parametrize("mended", [False, True])
def test_a_swapped_class_fails(browser: Any, serve: Callable[..., str], spoilt: Path, mended: bool) -> None:
    onnx = pytest.importorskip("onnx")
    (path,) = spoilt.glob("models/*/1/model.onnx")
    model = onnx.load(path)
    (head,) = (node for node in model.graph.node if "logits" in node.output)
    for tensor in model.graph.initializer:
        if tensor.name in head.input:
            values = onnx.numpy_helper.to_array(tensor).copy()
            axis = values.shape.index(10)
            values = np.take(values, [1, 0, *range(2, 10)], axis)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    if mended:
        mend_hash(spoilt, path)
    opened = Opened(browser, serve(spoilt)).ready()
    failed = [row for row in opened.verify() if row[0] != "ok"]
    stages = {row[1] for row in failed}
    assert stages == ({"runtime", "decisions"} if mended else {"integrity"})


ENGINE_THAT = """async () => {
  const { check } = await import(new URL('checks.js', location.href).href);
  const inputs = {shape: [3, 1, 1, 1], data: Float32Array.of(1, 2, 3)};
  const logits = {shape: [3, 2], data: Float32Array.of(1, -1, 2, -2, 3, -3)};
  const limit = {max_abs: 0.01, source: ''}, pixels = {see: null, normalise: values => Float32Array.from(values)};
  const golden = {batches: [1, 2], images: inputs, inputs, limit, strides: {}, sources: [], other: null,
                  arrays: array => array.data};
  let calls = 0;
  const run = async (_, given, [batch]) => {
    calls++;
    const data = Float32Array.from([...given].flatMap(value => [value, -value]));
    const answers = {logits: {shape: [batch, 2], type: 'float32', data}};
    FAULT;
    return answers;
  };
  const rows = [];
  const references = [{name: 'PyTorch', outputs: {logits}, limits: {logits: limit}}];
  await check({page: {task: 'classification'}, model: {references}, golden, session: null, run, pixels,
               show: row => rows.push(row)});
  return rows.filter(row => !row.passed).map(row => row.stage);
}"""


@pytest.mark.parametrize(("fault", "expected"), [
    ("", []),
    ("if (calls === 6) data[2] += 0.02", ["rows"]),
    ("if (calls === 7) data[2] += 0.02", ["shuffled"]),
    ("if (calls === 10) data[2] += 0.02", ["repeated"]),
    ("if (calls === 5) data[0] += 0.02", ["runtime", "batches"]),
    ("if (calls === 2) data[0] = NaN", ["runtime", "batches", "decisions", "rows", "shuffled", "repeated"]),
    ("if (batch === 2) answers.logits.type = 'float16'", ["runtime"]),
    ("answers.more = answers.logits", ["runtime"]),
    ("answers.logits.shape = [batch, 2, 1]", ["runtime", "decisions"]),
    ("throw new Error('broken')", ["runtime", "decisions"]),
])  # fmt: skip
def test_each_check_can_fail(
    browser: Any, serve: Callable[..., str], web_page: Path, fault: str, expected: list[str], tmp_path: Path
) -> None:
    """The scripts' checks on an engine that is called for two rows, one, equal ones, shuffled ones, and again."""
    opened = Opened(browser, serve(web_page)).ready()
    failed = opened.page.evaluate(ENGINE_THAT.replace("FAULT", fault))
    assert failed[0] == "pixels"  # there are no source images
    assert set(failed[1:]) <= {*expected}
    assert expected[:1] == failed[1:2]


def test_a_file_that_is_no_network_is_told(browser: Any, serve: Callable[..., str], spoilt: Path) -> None:
    (path,) = spoilt.glob("models/*/1/model.onnx")
    path.write_bytes(b"no network")
    mend_hash(spoilt, path)
    opened = Opened(browser, serve(spoilt)).ready()
    rows = opened.verify()
    assert [row[0] for row in rows] == ["ok", "FAILED"]
    opened.page.set_input_files("#file", SAMPLE_IMAGES / "3.png")
    opened.page.wait_for_selector("#said.bad")


@pytest.mark.slow
def test_what_is_no_image_is_told(browser: Any, serve: Callable[..., str], web_page: Path, tmp_path: Path) -> None:
    opened = Opened(browser, serve(web_page)).ready()
    whole = (SAMPLE_IMAGES / "3.png").read_bytes()
    buffer = io.BytesIO()
    Image.new("CMYK", (40, 40)).save(buffer, "JPEG")
    see_through = io.BytesIO()
    Image.new("RGBA", (40, 40), (200, 10, 10, 100)).save(see_through, "WEBP")
    cases = (
        (b"%PDF-1.7", "no image that is read here"),
        (b"", "no image that is read here"),
        (whole[:-30], "pixels"),
        (whole[:40] + b"\0" + whole[41:], "checksum"),
        (b"\xff\xd8\xff\xe0damaged", "cannot read the image"),
        (buffer.getvalue(), "CMYK"),
        (see_through.getvalue(), "transparency"),
        (png(np.zeros((40, 40, 1), np.uint16), 16, 0), "8 bits a channel"),
        (png(np.zeros((3000, 1, 1), np.uint8), 8, 0), "no more than 1:64"),
    )
    for number, (content, expected) in enumerate(cases):
        (tmp_path / f"image{number}").write_bytes(content)
        opened.page.set_input_files("#file", tmp_path / f"image{number}")
        opened.page.wait_for_selector("#said.bad")
        assert expected in opened.page.text_content("#said")
        opened.page.evaluate("document.getElementById('said').className = ''")
    assert opened.look(SAMPLE_IMAGES / "3.png")[0][0] == "3"  # after all that


def test_one_line_where_it_cannot_start(browser: Any, serve: Callable[..., str], web_page: Path) -> None:
    shown = Opened(browser, (web_page / "index.html").as_uri()).page
    assert "Opened as a file" in shown.text_content("#status")
    assert "http.server 8000 --bind 127.0.0.1" in shown.text_content("#status")
    assert not shown.is_visible("#main")
    without = Opened(browser, serve(web_page), script="delete globalThis.WebAssembly").page
    without.wait_for_selector("#status.bad")
    assert "no WebAssembly" in without.text_content("#status")
    assert not without.is_visible("#main")


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("images.js", None, "page.js, or a script that it needs, does not come; expected every file of the folder"),
        ("layout.json", None, "layout.json: the server answers 404; expected the file"),
        (
            "layout.json",
            "<!doctype html>",
            "layout.json: the server does not answer, or sends something else; expected",
        ),
    ],
)
def test_a_file_that_does_not_come_is_named(
    browser: Any, serve: Callable[..., str], spoilt: Path, path: str, content: str | None, says: str
) -> None:
    (spoilt / path).unlink()
    if content is not None:
        (spoilt / path).write_text(content)
    page = Opened(browser, serve(spoilt)).page
    page.wait_for_selector("#status.bad")
    assert says in page.text_content("#status")


def test_a_server_that_is_gone_is_said(browser: Any, web_page: Path) -> None:
    with served(web_page) as address:
        opened = Opened(browser, address).ready()
    opened.page.set_input_files("#file", SAMPLE_IMAGES / "3.png")
    opened.page.wait_for_selector("#said.bad")
    assert "model.onnx: the server does not answer" in opened.page.text_content("#said")


@pytest.mark.slow
def test_where_browsers_compare_no_hashes_it_says_so(browser: Any, serve: Callable[..., str], web_page: Path) -> None:
    """As on a page that comes by http from another machine."""
    script = "Object.defineProperty(Crypto.prototype, 'subtle', {value: undefined})"
    opened = Opened(browser, serve(web_page), script=script).ready()
    rows = opened.verify()
    assert {row[0] for row in rows} == {"ok"}
    assert "integrity" not in {row[1] for row in rows}
    assert "hashes: this browser compares them" in opened.page.text_content("#skipped")


def test_the_page_reaches_no_other_origin(browser: Any, serve: Callable[..., str], web_page: Path) -> None:
    other = serve(web_page)
    opened = Opened(browser, serve(web_page)).ready()
    reached = opened.page.evaluate(
        """async other => {
          const outcome = async promise => { try { await promise; return 'reached'; } catch { return 'refused'; } };
          const loaded = (kind, fields) => new Promise((resolve, reject) => {
            const added = Object.assign(document.createElement(kind), fields);
            document.head.append(Object.assign(added, {onload: resolve, onerror: reject}));
          });
          return [await outcome(fetch(other + 'layout.json', {mode: 'no-cors'})),
                  await outcome(loaded('script', {src: other + 'images.js', type: 'module'})),
                  await outcome(loaded('link', {rel: 'stylesheet', href: other + 'style.css'})),
                  await outcome(loaded('script', {src: 'data:text/javascript,1'}))];
        }""",
        other,
    )
    assert reached == ["refused"] * 4


def test_names_of_classes_stay_text(
    browser: Any, serve: Callable[..., str], bundle: Path, web_engine: Path, tmp_path: Path
) -> None:
    name = "<img src=x onerror=alert(1)>\u202e"

    def strange(content: dict[str, Any]) -> None:
        content["model"]["classes"][3] = name
        content["model"]["arch"] = "<b>net</b>"

    rewrite(bundle, strange)
    serve_layout("web", open_bundle(bundle), tmp_path / "web", onnxruntime_web=web_engine)
    opened = Opened(browser, serve(tmp_path / "web")).ready()
    assert opened.look(SAMPLE_IMAGES / "3.png")[0][0] == "<img src=x onerror=alert(1)>\\u202e"
    assert opened.page.text_content("h1").startswith("<b>net</b>")
    assert opened.page.locator("img, b").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_narrow_screen(browser: Any, serve: Callable[..., str], labelling: Path, width: int) -> None:
    opened = Opened(browser, serve(labelling), width).ready()
    opened.verify()
    opened.look(next((SCENES / "images/validation").iterdir()))
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(exported: ExportResult, web_engine: Path, tmp_path: Path, inline: Callable[..., Run]) -> None:
    run = inline("serve-layout", "web", exported.output, "--output", "out", "--onnxruntime-web", web_engine)
    assert run.code == 0, run.err
    assert "out/models/dmformer_nano_onnx_fp32" in run.out
    assert "how to serve the page, and what it does: " in run.err
    said = (tmp_path / "out/README.md").read_text()
    for fact in ("python3 -m http.server", "Cross-Origin-Embedder-Policy", "Pillow", ENGINE.version, "not here: torch"):
        assert fact in said
    again = inline("serve-layout", "web", exported.output, "--output", "out", "--onnxruntime-web", web_engine)
    assert (again.code, "--force" in again.error_line) == (2, True)


def test_another_file_in_the_place_of_the_engine(
    exported: ExportResult, tmp_path: Path, inline: Callable[..., Run]
) -> None:
    (tmp_path / "engine.tgz").write_bytes(b"other")
    run = inline("serve-layout", "web", exported.output, "--output", "out", "--onnxruntime-web", "engine.tgz")
    assert run.code == 1
    assert "SHA-512" in run.error_line
    assert f"npm pack onnxruntime-web@{ENGINE.version}" in run.error_line
    assert not (tmp_path / "out").exists()
    missing = inline("serve-layout", "web", exported.output, "--output", "out", "--onnxruntime-web", "none.tgz")
    assert missing.code == 2
    other = inline("serve-layout", "ovms", exported.output, "--output", "out", "--onnxruntime-web", "engine.tgz")
    assert (other.code, "--onnxruntime-web" in other.error_line) == (2, True)


def npm_that(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of npm's name that does something else."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_without_a_network_what_is_in_the_cache_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"an archive"
    package = NpmPackage("a-package", "1.0.0", hashlib.sha512(content).hexdigest())
    cache = Cache(tmp_path / "cache")
    npm_that(tmp_path / "bin", f"printf '{content.decode()}' > a-package-1.0.0.tgz", monkeypatch)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert package.download(tmp_path / name, cache).read_bytes() == content
        (tmp_path / "bin/npm").write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    (tmp_path / "third").mkdir()
    with pytest.raises(UnavailableError, match=r"not in the cache, and npm could not get it .*ENOTFOUND") as caught:
        package.download(tmp_path / "third", Cache())
    assert "npm pack a-package@1.0.0" in one_line(caught.value)


def test_the_command_without_npm(
    exported: ExportResult, tmp_path: Path, inline: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    npm_that(tmp_path / "bin", "exit 0", monkeypatch)
    run = inline("serve-layout", "web", exported.output, "--output", "out")
    assert run.code == 3
    assert "no message" in run.error_line
    assert run.error_line.endswith(f"npm pack onnxruntime-web@{ENGINE.version}, given as --onnxruntime-web")
    assert not (tmp_path / "out").exists()


def test_npm_that_finds_no_room_or_hangs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = NpmPackage("a-package", "1.0.0", "0" * 128)
    full = "npm error code ENOSPC\\nnpm error nospc ENOSPC: no space left on device, write"
    npm_that(tmp_path / "bin", f"printf '{full}' >&2\nexit 1", monkeypatch)
    said = "No space left on device; expected room there"
    with pytest.raises(StageFailed, match=said) as caught, installation.temporary_folder() as folder:
        package.download(folder, Cache())
    one_line(caught.value)
    monkeypatch.setattr(installation, "_LIMIT_S", 0.2)
    (tmp_path / "bin/npm").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(UnavailableError, match=r"npm did not end within 0\.2 s; expected a network") as late:
        package.download(tmp_path, Cache())
    one_line(late.value)
    monkeypatch.setattr(installation, "_PIP", (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(UnavailableError, match=r"pip did not end within 0\.2 s"):
        installation.list_releases(installation.Platform.here(), "a-package", Cache())


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_full_output_is_not_the_temporary_folder(
    exported: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    packed = tmp_path / "engine.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        for name in web._ENGINE_FILES:
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = 1 << 20
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    sha512 = hashlib.sha512(packed.read_bytes()).hexdigest()
    monkeypatch.setattr(web, "ENGINE", NpmPackage("an-engine", "1.0.0", sha512))
    bundle = open_bundle(exported.output)
    (tmp_path / "full").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            web.write_page(tmp_path / "full", bundle.manifest, bundle.golden(), {}, engine=packed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / "page").mkdir()
    web.write_page(tmp_path / "page", bundle.manifest, bundle.golden(), {}, engine=packed)
    assert "Copyright (c) Microsoft Corporation" in (tmp_path / "page/onnxruntime-web/LICENSE").read_text()


def test_another_file_from_npm_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = NpmPackage("a-package", "1.0.0", hashlib.sha512(b"an archive").hexdigest())
    cache = Cache(tmp_path / "cache")
    npm_that(tmp_path / "bin", "printf 'another' > a-package-1.0.0.tgz", monkeypatch)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckFailed, match="SHA-512"):
        package.download(tmp_path / "folder", cache)
    assert not cache.report().entries
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UnavailableError, match="npm is not here"):
        package.download(tmp_path / "folder", cache)


def test_what_a_page_cannot_show_is_left_out(bundle: Path, features_open: ExportResult, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing that web serves: .*features are no classes"):
        serve_layout("web", open_bundle(features_open.output), tmp_path / "out")

    def outside(content: dict[str, Any]) -> None:
        (onnx,) = (one for one in content["artifacts"] if one["format"] == "onnx")
        data = bundle / "onnx/fp32/weights.bin"
        data.write_bytes(b"weights")
        sha256 = hashlib.sha256(b"weights").hexdigest()
        onnx["files"].append({"path": "onnx/fp32/weights.bin", "bytes": 7, "sha256": sha256})

    rewrite(bundle, outside)
    with pytest.raises(UsageError, match="onnx fp32: weights in a file beside"):
        serve_layout("web", open_bundle(bundle), tmp_path / "out")
    rewrite(bundle, lambda content: content.update(artifacts=content["artifacts"][:1]))
    with pytest.raises(UsageError, match="nothing that web serves: torch fp32"):
        serve_layout("web", open_bundle(bundle), tmp_path / "out")
