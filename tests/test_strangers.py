"""A bundle or a case from a stranger: what is checked is what is opened, and its text stays text."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dmformer import text
from dmformer.bundle.integrity import check_integrity
from dmformer.bundle.manifest import Tensor, file_entry
from dmformer.bundle.reader import open_bundle
from dmformer.bundle.select import choose
from dmformer.bundle.trust import _DER_PREFIX, _ORDER_8, _PRIME, Policy, policy_in_force, weakness
from dmformer.errors import CheckFailed, DMFormerError, UsageError
from dmformer.files import OpenFile, open_regular
from dmformer.layouts.api import serve_layout
from dmformer.names import check_name
from dmformer.runtimes.registry import inspect_artifact
from dmformer.runtimes.target import Target
from dmformer.verify.localize.case import Case, read_case, run_case, save_case
from tests.bundles import adopt, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run

ONNX, IR = "onnx/fp32/model.onnx", "openvino/fp32/model.xml"


def outside(path: Path, location: str) -> None:
    """Say that the first weight of an ONNX file is in another one."""
    import onnx

    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())


def renamed(bundle: Path, old: str, new: str) -> None:
    (bundle / old).rename(bundle / new)

    def change(content: dict[str, Any]) -> None:
        for artifact in content["artifacts"]:
            for file in artifact["files"]:
                file["path"] = new if file["path"] == old else file["path"]

    rewrite(bundle, change)


@pytest.mark.parametrize("name", ["model.onnx", "model.dat", "model.xml", "model"])
def test_outside_weights_are_refused_whatever_the_file_is_called(bundle: Path, tmp_path: Path, name: str) -> None:
    outside(bundle / ONNX, "../../../secret")
    adopt(bundle, ONNX)
    renamed(bundle, ONNX, f"onnx/fp32/{name}")
    opened = open_bundle(bundle)
    assert not check_integrity(bundle).passed
    with pytest.raises(CheckFailed, match="keeps weights in"):
        choose(opened, "ort", None).runtime()
    with pytest.raises(CheckFailed, match="keeps weights in"):
        serve_layout("triton", opened, tmp_path / "served")
    assert not list((tmp_path / "served").rglob("*.onnx")) if (tmp_path / "served").exists() else True


def test_an_onnx_file_that_is_declared_as_openvino(bundle: Path) -> None:
    shutil.copy(bundle / ONNX, bundle / IR)
    adopt(bundle, IR)
    with pytest.raises(UsageError, match="no OpenVINO IR"):
        choose(open_bundle(bundle), "ov", None).runtime()


def test_a_torch_artifact_that_names_other_files(bundle: Path) -> None:
    name = "torch/fp32/model.safetensors"
    (bundle / name).write_text('{"weight_map": {"w": "elsewhere.safetensors"}}')
    adopt(bundle, name)
    renamed(bundle, name, "torch/fp32/model.json")
    with pytest.raises(UsageError, match=r"no \.safetensors file"):
        open_bundle(bundle).load_path(open_bundle(bundle).artifacts("torch")[0])


def test_a_file_that_is_exchanged_after_its_check_is_not_loaded(bundle: Path) -> None:
    """OpenVINO answers from what was hashed; onnxruntime, which maps by name, says that the file changed."""
    rows = open_bundle(bundle).golden().inputs[:1]
    for name, files in (("ov", (IR, IR[:-3] + "bin")), ("ort", (ONNX,))):
        opened = open_bundle(bundle)
        with choose(opened, name, None).runtime() as runtime:
            expected = runtime.run({"image": rows})["logits"]
        runtime = choose(opened, name, None).runtime()
        for file in files:
            (bundle / file).rename(bundle / f"{file}.gone")
            (bundle / file).write_bytes((bundle / f"{file}.gone").read_bytes().replace(b"\x3e", b"\x3d"))
        if name == "ort":
            with pytest.raises(CheckFailed, match="changed while it was loaded"), runtime:
                pass
        else:
            with runtime:
                assert (runtime.run({"image": rows})["logits"] == expected).all()


def test_names_that_collide_on_a_server_are_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "onnx/fp32/model.onnx").rename(bundle / "onnx/fp32/net.onnx")
    (bundle / "onnx/fp32/model.onnx").write_bytes(b"x")

    def change(content: dict[str, Any]) -> None:
        (artifact,) = (one for one in content["artifacts"] if one["format"] == "onnx")
        artifact["files"][0]["path"] = "onnx/fp32/net.onnx"
        artifact["files"].append({"path": "onnx/fp32/model.onnx", "bytes": 1, "sha256": "0" * 64})

    rewrite(bundle, change)
    adopt(bundle, "onnx/fp32/model.onnx")
    with pytest.raises(UsageError, match="same file"):
        serve_layout("triton", open_bundle(bundle), tmp_path / "served")


@pytest.mark.parametrize("data", [b"\0\0\0\0ORTM", b"\x3a\x0d\x0a\x0b\x22\x09EPContext"])
def test_what_onnxruntime_takes_for_something_else(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(DMFormerError):
        inspect_artifact("onnx", [OpenFile(tmp_path / "m.onnx")])


def test_pipes_and_links_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "f").write_bytes(b"")
    (tmp_path / "link").symlink_to("f")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=name):
            open_regular(tmp_path / name)


# --- text -------------------------------------------------------------------------------------------------------------

NASTY = "a\x1b]0;T\x07\x1b[2J\x9b31m\r\nb\u202ec\u2028\U000e0041`<b>[x](y)\ud800\udce9"


def test_text_stays_text() -> None:
    for made in (text.plain(NASTY), text.markdown(NASTY), text.markdown_code(NASTY), text.pbtxt_string(NASTY)):
        assert made.isprintable()
    assert text.plain("größe 图 क्\u200dष") == "größe 图 क्\u200dष"
    assert text.plain("\udce9") == "\\xe9"
    assert "<b>" not in text.markdown(NASTY)
    assert text.markdown_code("a`b") == "``a`b``"
    assert text.pbtxt_string('é"\n') == '"\\303\\251\\042\\012"'
    data = json.dumps({"a": "\x9b\x7f\u202e\U000e0041"}, ensure_ascii=False, indent=1).encode()
    assert json.loads(text.plain_json(data)) == json.loads(data)
    assert text.plain_json(data).decode().replace("\n", "").isprintable()


@pytest.mark.parametrize("command", ["inspect", "predict", "check", "serve-layout", "verify"])
def test_a_manifests_text_reaches_no_terminal(inline: Callable[..., Run], bundle: Path, command: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["classes"] = [f"\x1b[2J\x9b{i}" for i in range(10)]
        content["model"]["arch"] = content["tool_version"] = "x\x1b]0;T\x07\u202e"

    rewrite(bundle, change)
    image = Path(text.__file__).parent / "assets/digits/7.png"
    more = {"predict": [bundle, image], "serve-layout": ["triton", bundle]}.get(command, [bundle])
    for debug in ([], ["--debug"]):
        ran = inline(command, *more, *debug)
        assert not {"\x1b", "\x9b", "\u202e", "\x07"} & set(ran.out + ran.err)
    assert "\x9b" not in inline("inspect", bundle, "--json").out


@pytest.mark.parametrize("value", ["10\nx: y", "linux\n", "a b", ""])
@pytest.mark.parametrize("field", ["version", "platform"])
def test_fields_of_a_target_have_patterns(field: str, value: str) -> None:
    import msgspec

    target = {
        "flavour": "tensorrt", "version": "10.3", "compute_capabilities": ["8.9"], "platform": "linux-x86_64",
        "gpu": None, "min_batch": 1, "opt_batch": 1, "max_batch": 1, "workspace_mb": None, "build_s": 1.0,
        "onnx_sha256": "0" * 64,
    }  # fmt: skip
    msgspec.convert(target, Target)
    for wrong in ({field: value}, {"compute_capabilities": ["8.9\n"]}, {"onnx_sha256": "0" * 64 + "\n"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({**target, **wrong}, Target)


@pytest.mark.parametrize("name", ["x\n", "x\x1b", "\u2028", ""])
def test_names_of_tensors_have_a_pattern(name: str) -> None:
    import msgspec

    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": name, "dtype": "float32", "shape": [1]}, Tensor)


@pytest.mark.parametrize("change", [("dtype", "int4"), ("precision", "int4")])
@pytest.mark.parametrize(
    "command",
    ["inspect", "predict", "verify", pytest.param("bench", marks=pytest.mark.slow), "serve-layout", "doctor", "build"],
)
def test_types_that_are_not_there_are_no_defect(
    inline: Callable[..., Run], bundle: Path, command: str, change: tuple[str, str]
) -> None:
    field, value = change
    if field == "dtype":
        rewrite(bundle, lambda content: content["outputs"][0].update(dtype=value))
    else:
        rewrite(bundle, lambda content: [one.update(precision=value) for one in content["artifacts"]])
    image = Path(text.__file__).parent / "assets/digits/7.png"
    more = {
        "predict": [bundle, image], "serve-layout": ["triton", bundle], "doctor": ["--bundle", bundle],
        "bench": [bundle, "--duration", "0.01", "--rounds", "1"], "build": [bundle, "--format", "ov"],
    }.get(command, [bundle])  # fmt: skip
    ran = inline(command, *more)
    assert "defect" not in ran.err, ran.err


# --- cases and keys ---------------------------------------------------------------------------------------------------


@pytest.fixture
def case(bundle: Path, tmp_path: Path) -> Path:
    golden, folder = open_bundle(bundle).golden(), tmp_path / "case"
    folder.mkdir()
    shutil.copy(bundle / ONNX, folder / "m.onnx")
    entry = file_entry(folder, folder / "m.onnx")
    made = Case(runtime="onnxruntime", precision="fp32", files=(entry,), node="n", limits={"logits": 1.0})
    save_case(folder, made, {"image": golden.inputs}, {"logits": golden.outputs["logits"]})
    return folder


def test_a_case_falls_under_the_policy(case: Path) -> None:
    assert run_case(case).passed
    with policy_in_force(Policy(required=True)), pytest.raises(CheckFailed, match="signature is required"):
        run_case(case)


def test_a_case_with_outside_weights_is_refused(case: Path) -> None:
    outside(case / "m.onnx", "/etc/passwd")
    entry = file_entry(case, case / "m.onnx")
    content = json.loads((case / "case.json").read_bytes())
    content["files"] = [{"path": "m.onnx", "bytes": entry.bytes, "sha256": entry.sha256}]
    (case / "case.json").write_text(json.dumps(content))
    with pytest.raises(CheckFailed, match="keeps weights in"):
        run_case(case)


def test_what_a_case_may_not_be(case: Path, tmp_path: Path) -> None:
    description = (case / "case.json").read_bytes()
    np.savez_compressed(case / "case.npz", **{"expected/logits": np.zeros(100 << 20, np.uint8)})
    with pytest.raises(UsageError, match="expand"):
        read_case(case)
    (case / "case.json").write_bytes(description + b" " * (1 << 20))
    with pytest.raises(UsageError, match="more than"):
        read_case(case)
    (case / "case.json").unlink()
    (tmp_path / "elsewhere").write_bytes(description)
    (case / "case.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="a link"):
        read_case(case)
    (case / "case.json").unlink()
    os.mkfifo(case / "case.json")
    with pytest.raises(UsageError, match="no case"):
        read_case(case)


def times(count: int, point: tuple[int, int]) -> tuple[int, int]:
    """A multiple of a point of the curve, by the addition law of RFC 8032."""
    d, total = -121665 * pow(121666, -1, _PRIME) % _PRIME, (0, 1)
    for _ in range(count):
        (x1, y1), (x2, y2) = total, point
        k = d * x1 * x2 * y1 * y2 % _PRIME
        total = (
            (x1 * y2 + x2 * y1) * pow(1 + k, -1, _PRIME) % _PRIME,
            (y1 * y2 + x1 * x2) * pow(1 - k, -1, _PRIME) % _PRIME,
        )
    return total


def test_the_points_of_small_order_are_those() -> None:
    d = -121665 * pow(121666, -1, _PRIME) % _PRIME
    square = (_ORDER_8**2 - 1) * pow(d * _ORDER_8**2 + 1, -1, _PRIME) % _PRIME
    x = pow(square, (_PRIME + 3) // 8, _PRIME)
    x = x if x * x % _PRIME == square else x * pow(2, (_PRIME - 1) // 4, _PRIME) % _PRIME
    orders = [times(count, (x, _ORDER_8)) for count in range(1, 9)]
    assert orders[-1] == (0, 1)
    for _, y in orders:
        for sign in (0, 1 << 255):
            assert weakness(_DER_PREFIX + (y | sign).to_bytes(32, "little")) == "of small order"


def test_keys_in_another_form() -> None:
    assert weakness(_DER_PREFIX + (_PRIME + 1).to_bytes(32, "little")) == "not in its canonical form"
    assert weakness(b"\0" * 44) is not None
    assert weakness(_DER_PREFIX + (9).to_bytes(32, "little")) is None


@pytest.mark.parametrize("name", ["com¹.txt", "LPT³", "CONIN$", "conout$.log", "a/COM².x"])
def test_more_names_that_windows_reserves(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


# --- the working folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["[" * 3000, "a = " + "[" * 3000, "a = " + "9" * 6000, "a = " + "{b = " * 3000])
def test_nested_toml_is_one_line(tmp_path: Path, value: str) -> None:
    from dmformer.train.recipe import read_recipe

    (tmp_path / "r.toml").write_text(value)
    with pytest.raises(UsageError):
        read_recipe(str(tmp_path / "r.toml"))


def test_a_matplotlibrc_in_the_working_folder_has_no_say(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 77\n")
    code = (
        "from dmformer.page.svg import _matplotlib, _svg; import os; m = _matplotlib(); "
        "print(m.rcParams['lines.linewidth'], os.getcwd())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(text.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1.5", str(tmp_path)]
