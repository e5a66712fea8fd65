"""Model repositories for servers, read as the servers read them."""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest

from dmformer.bundle.integrity import sign_bundle
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.trust import generate_keys, load_private_key
from dmformer.errors import CheckFailed, UsageError
from dmformer.files import hash_file
from dmformer.layouts.api import serve_layout
from tests.bundles import copied, lengthen, one_line, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from dmformer.export.cached import ExportResult
    from tests.conftest import Run

TARGET = {
    "flavour": "tensorrt",
    "version": "10.13.3",
    "compute_capabilities": ["8.7"],
    "platform": "linux-aarch64",
    "gpu": "Orin",
    "min_batch": 1,
    "opt_batch": 1,
    "max_batch": 4,
    "workspace_mb": None,
    "build_s": 1.0,
    "onnx_sha256": "0" * 64,
}


@pytest.fixture(scope="module")
def model_config() -> ModuleType:
    """Triton's own ``model_config_pb2``, out of its client; the package around it needs gRPC."""
    files = metadata.files("tritonclient") or []
    (path,) = (file.locate() for file in files if str(file).endswith("tritonclient/grpc/model_config_pb2.py"))
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parse(model_config: ModuleType) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        from google.protobuf import text_format

        return text_format.Parse(path.read_text(encoding="utf-8"), model_config.ModelConfig())

    return read


def add_engine(bundle: Path, **target: Any) -> None:
    """An artifact that says that it is an engine, of files that are none."""

    def change(content: dict[str, Any]) -> None:
        (onnx,) = (artifact for artifact in content["artifacts"] if artifact["format"] == "onnx")
        engine = copied(bundle, onnx, format="tensorrt", precision="fp16")
        content["artifacts"].append({**engine, "target": {**TARGET, **target}, "built_with": {}})

    rewrite(bundle, change)


def test_a_repository_for_triton(exported: ExportResult, tmp_path: Path, parse: Callable[[Path], Any]) -> None:
    layout = serve_layout("triton", open_bundle(exported.output), tmp_path / "out", max_batch=16)
    assert layout.models == ("dmformer_nano_onnx_fp32", "dmformer_nano_openvino_fp32")
    assert layout.left_out == ("torch fp32: triton has no backend for it",)
    assert sorted(path.name for path in (tmp_path / "out/models").iterdir()) == sorted(layout.models)
    for name, backend, files in (
        ("dmformer_nano_onnx_fp32", "onnxruntime", ["model.onnx"]),
        ("dmformer_nano_openvino_fp32", "openvino", ["model.bin", "model.xml"]),
    ):
        folder = tmp_path / "out/models" / name
        config = parse(folder / "config.pbtxt")
        assert (config.name, config.backend, config.max_batch_size) == (name, backend, 16)
        assert sorted(path.name for path in (folder / "1").iterdir()) == files
        assert (folder / "1" / config.default_model_filename).is_file()
        ((given,), (output,)) = config.input, config.output
        assert (given.name, given.data_type, list(given.dims)) == ("image", 11, [3, 32, 32])
        assert (output.name, output.data_type, list(output.dims)) == ("logits", 11, [10])
        assert (folder / output.label_filename).read_text().splitlines() == list("0123456789")
        assert config.HasField("dynamic_batching")
        assert [group.kind for group in config.instance_group] == [2]  # KIND_CPU
    made = next(artifact for artifact in exported.manifest.artifacts if artifact.format == "onnx")
    assert hash_file(tmp_path / "out/models/dmformer_nano_onnx_fp32/1/model.onnx")[0] == made.sha256
    said = (tmp_path / "out/README.md").read_text()
    for fact in (made.sha256, "bicubic", "[0.5, 0.5, 0.5]", "Resize the shorter side to 32", "not here: torch fp32"):
        assert fact in said


def test_an_engine_carries_what_it_is_tied_to(bundle: Path, tmp_path: Path, parse: Callable[[Path], Any]) -> None:
    add_engine(bundle)
    layout = serve_layout("triton", open_bundle(bundle), tmp_path / "out")
    folder = tmp_path / "out/models/dmformer_nano_tensorrt_fp16"
    assert folder.name in layout.models
    assert [path.name for path in (folder / "1").iterdir()] == ["model.plan"]
    config = parse(folder / "config.pbtxt")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    assert [group.kind for group in config.instance_group] == [1]  # KIND_GPU
    for path in (folder / "config.pbtxt", tmp_path / "out/README.md"):
        assert "TensorRT 10.13.3 on linux-aarch64, compute capability 8.7, batch 1 to 4" in path.read_text()


def test_what_triton_cannot_load_is_left_out(bundle: Path, tmp_path: Path) -> None:
    add_engine(bundle, flavour="rtx")
    layout = serve_layout("triton", open_bundle(bundle), tmp_path / "out")
    assert any(reason.startswith("tensorrt fp16: an engine of TensorRT-RTX") for reason in layout.left_out)
    rewrite(bundle, lambda content: content.update(artifacts=content["artifacts"][:1]))
    with pytest.raises(UsageError, match="nothing that ovms serves: torch fp32") as caught:
        serve_layout("ovms", open_bundle(bundle), tmp_path / "other")
    one_line(caught.value)


def test_a_repository_for_openvino_model_server(exported: ExportResult, tmp_path: Path) -> None:
    """As docs.openvino.ai describes the configuration: ``config.json`` below the folder that is mounted at /models."""
    from dmformer.runtimes.openvino import core

    layout = serve_layout("ovms", open_bundle(exported.output), tmp_path / "out")
    listed = json.loads((tmp_path / "out/models/config.json").read_text())
    assert set(listed) == {"model_config_list"}
    assert [entry["config"]["name"] for entry in listed["model_config_list"]] == list(layout.models)
    for entry in listed["model_config_list"]:
        assert set(entry) == {"config"}
        config = entry["config"]
        assert config["base_path"] == f"/models/{config['name']}"
        model = next((tmp_path / "out" / config["base_path"][1:] / "1").glob("model.[xo]*"))
        compiled = core().compile_model(str(model), config["target_device"], config["plugin_config"])
        assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert not list((tmp_path / "out").rglob("*.pbtxt"))


@pytest.mark.parametrize("server", ["triton", "ovms"])
def test_every_precision_has_a_name_of_its_own(reduced: ExportResult, tmp_path: Path, server: str) -> None:
    layout = serve_layout(server, open_bundle(reduced.output), tmp_path / "out")
    assert {name.rpartition("_")[2] for name in layout.models} == {"fp32", "fp16", "int8"}
    assert len(set(layout.models)) == len(reduced.manifest.artifacts)


def test_only_an_empty_folder_is_filled(exported: ExportResult, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    serve_layout("triton", open_bundle(exported.output), tmp_path / "out")
    with pytest.raises(UsageError, match="not empty; expected a new folder, or `force`") as caught:
        serve_layout("ovms", open_bundle(exported.output), tmp_path / "out")
    one_line(caught.value)
    serve_layout("ovms", open_bundle(exported.output), tmp_path / "out", force=True)
    assert not list((tmp_path / "out").rglob("*.pbtxt"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("output", ["..", ".", "onnx", "new"])
def test_the_bundle_itself_is_not_replaced(bundle: Path, output: str) -> None:
    """With `force` too; and nothing is written into it, for it would not list that."""
    before = sorted(bundle.rglob("*"))
    with pytest.raises(UsageError, match=r"has the bundle in it, which would be lost|is inside the bundle") as caught:
        serve_layout("ovms", open_bundle(bundle), bundle / output, force=True)
    one_line(caught.value)
    assert sorted(bundle.rglob("*")) == before


def test_a_damaged_file_is_not_served(bundle: Path, tmp_path: Path) -> None:
    lengthen(bundle / "openvino/fp32/model.bin")
    with pytest.raises(CheckFailed, match=r"model\.bin"):
        serve_layout("ovms", open_bundle(bundle), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_leads_nowhere_else(bundle: Path, tmp_path: Path, parse: Callable[[Path], Any]) -> None:
    def strange(content: dict[str, Any]) -> None:
        content["model"]["arch"] = '../../"net"\n'
        content["model"]["classes"][3] = "three\nfour"

    rewrite(bundle, strange)
    layout = serve_layout("triton", open_bundle(bundle), tmp_path / "out")
    for name in layout.models:
        config = parse(tmp_path / "out/models" / name / "config.pbtxt")
        assert config.name == name
        assert len((tmp_path / "out/models" / name / "labels.txt").read_text().splitlines()) == 10
    assert [path.name for path in tmp_path.iterdir() if path != bundle] == ["out"]


def test_the_command(exported: ExportResult, tmp_path: Path, inline: Callable[..., Run]) -> None:
    run = inline("serve-layout", "Triton", exported.output, "--output", "out")
    assert run.code == 0, run.err
    assert "out/models/dmformer_nano_onnx_fp32" in run.out
    assert "left out: torch fp32" in run.err
    again = inline("serve-layout", "ovms", exported.output, "--output", "out")
    assert again.code == 2
    assert "--force" in again.error_line
    assert inline("serve-layout", "ovms", exported.output, "--output", "out", "--force").code == 0
    assert (
        "'tfserving'; expected triton, ovms or web" in inline("serve-layout", "tfserving", exported.output).error_line
    )


def test_pixels_have_no_labels_in_triton(
    segmentation: ExportResult, tmp_path: Path, parse: Callable[[Path], Any]
) -> None:
    serve_layout("triton", open_bundle(segmentation.output), tmp_path / "out")
    folder = tmp_path / "out/models/dmformer_nano_fpn_onnx_fp32"
    config = parse(folder / "config.pbtxt")
    ((given,), (output,)) = config.input, config.output
    assert (list(given.dims), list(output.dims), output.label_filename) == ([3, 64, 64], [11, 64, 64], "")
    assert not (folder / "labels.txt").exists()
    said = (tmp_path / "out/README.md").read_text()
    for fact in (
        "the largest of a pixel's is its class",
        "- 1: digit 0",
        "Take the centre of 64x64",
        "dmformer predict",
    ):
        assert fact in said
    assert "softmax" not in said


def test_an_open_size_is_open_in_triton_and_told(
    segmentation_open: ExportResult, tmp_path: Path, parse: Callable[[Path], Any]
) -> None:
    serve_layout("triton", open_bundle(segmentation_open.output), tmp_path / "out")
    config = parse(tmp_path / "out/models/dmformer_nano_fpn_onnx_fp32/config.pbtxt")
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([3, -1, -1], [11, -1, -1])
    said = (tmp_path / "out/README.md").read_text()
    assert "the longer one in proportion, to the nearest multiple of 32" in said
    assert "Take the centre" not in said


@pytest.mark.parametrize("server", ["triton", "ovms"])
def test_every_map_of_features_is_served(
    features_open: ExportResult, tmp_path: Path, parse: Callable[[Path], Any], server: str
) -> None:
    serve_layout(server, open_bundle(features_open.output), tmp_path / "out")
    if server == "triton":
        config = parse(tmp_path / "out/models/dmformer_nano_onnx_fp32/config.pbtxt")
        found = {output.name: list(output.dims) for output in config.output}
        assert found == {f"features_s{4 << index}": [16 << index, -1, -1] for index in range(4)}
    said = (tmp_path / "out/README.md").read_text()
    for index in range(4):
        assert f"Back comes `features_s{4 << index}`, float32, ['batch', {16 << index}" in said
    assert "outputs(IMAGE)" in said
    assert "logits" not in said
    assert "## Classes" not in said


def test_a_repository_for_the_python_backend(
    exported: ExportResult, tmp_path: Path, parse: Callable[[Path], Any]
) -> None:
    bundle = open_bundle(exported.output)
    layout = serve_layout("triton", bundle, tmp_path / "out", backend="python", images=True, instances=2, max_batch=3)
    kinds = [f"dmformer_nano_{name}_fp32{suffix}" for name in ("onnx", "openvino") for suffix in ("", "_images")]
    assert list(layout.models) == kinds
    assert layout.left_out == ("torch fp32: the reference, which needs PyTorch; expected another runtime",)
    assert "`class_index`, `class_name`, `probabilities`" in (tmp_path / "out/README.md").read_text()
    for name in kinds:
        folder = tmp_path / "out/models" / name
        config = parse(folder / "config.pbtxt")
        assert (config.name, config.backend, config.max_batch_size) == (name, "python", 3)
        assert [(group.count, group.kind) for group in config.instance_group] == [(2, 2)]
        assert (folder / "1" / config.default_model_filename).is_file()
        (given,) = config.input
        outputs = [output.name for output in config.output]
        labelled = {output.name: output.label_filename for output in config.output if output.label_filename}
        if name.endswith("_images"):
            assert (given.name, given.data_type, list(given.dims)) == ("encoded_image", 13, [1])  # TYPE_STRING
            assert outputs == ["class_index", "class_name", "probabilities", "logits", "image"]
            assert labelled == {"probabilities": "labels.txt"}
        else:
            assert (given.name, given.data_type, list(given.dims)) == ("image", 11, [3, 32, 32])
            assert (outputs, labelled) == (["logits"], {"logits": "labels.txt"})
        assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, 2, 3]
        size = (folder / "warmup" / "golden").stat().st_size
        assert size > 100 if name.endswith("_images") else size == 3 * 32 * 32 * 4
        inside = open_bundle(folder / "1/bundle")
        assert inside.manifest_sha256 == bundle.manifest_sha256
        assert {path.name for path in (folder / "1/bundle").iterdir()} == {
            "manifest.json", "golden.npz", name.split("_")[2],
        }  # fmt: skip
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        (artifact,) = inside.artifacts(parameters["dmformer_format"], parameters["dmformer_precision"])
        assert parameters["dmformer_sha256"] == artifact.sha256
        inside.open_artifact(artifact)


@pytest.mark.parametrize(
    ("server", "options", "says"),
    [
        ("ovms", {"backend": "python"}, "expected engines, or for triton python"),
        ("triton", {"backend": "onnx"}, "`backend` 'onnx' for triton; expected engines, or for triton python"),
        ("triton", {"images": True}, "`images` or `instances` with `backend` engines; expected python"),
        ("triton", {"instances": 2}, "`images` or `instances` with `backend` engines; expected python"),
        ("triton", {"backend": "python", "instances": 0}, "`max_batch` 8, `instances` 0; expected at least 1"),
        ("triton", {"max_batch": 1 << 31}, "expected at least 1, and at most 2147483647"),
        ("web", {"max_batch": 8}, "`max_batch` for web; expected it with triton alone"),
        ("ovms", {"max_batch": 3}, "`max_batch` for ovms; expected it with triton alone"),
        ("triton", {"precisions": ["int8"]}, "nothing for int8; it has torch fp32, onnx fp32, openvino fp32"),
        ("triton", {"runtimes": ["ncnn"]}, "nothing for ncnn; it has"),
        (
            "triton",
            {"backend": "python", "runtimes": ["torch"]},
            "nothing that triton serves: torch fp32: the reference",
        ),
    ],
)
def test_what_does_not_go_together(
    exported: ExportResult, tmp_path: Path, server: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        serve_layout(server, open_bundle(exported.output), tmp_path / "out", **options)
    assert says in one_line(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_signature_goes_with_what_it_signs(bundle: Path, tmp_path: Path) -> None:
    generate_keys(tmp_path / "key.pem")
    sign_bundle(bundle, load_private_key(tmp_path / "key.pem", lambda: pytest.fail("asked for a password")))
    serve_layout("triton", open_bundle(bundle), tmp_path / "out", backend="python", runtimes=["ort"])
    (inside,) = (tmp_path / "out/models").glob("*/1/bundle/manifest.sig")
    assert inside.read_bytes() == (bundle / "manifest.sig").read_bytes()
    open_bundle(inside.parent)
