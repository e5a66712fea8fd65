"""The bill of materials: valid by CycloneDX's schema, the same for the same bundle, and nothing in it is invented."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import dmformer
from dmformer.bundle.reader import open_bundle
from dmformer.models.specification import ModuleOrigin
from tests.bundles import rewrite
from tests.paper_bundle import check, device_accuracy, parity, timings, write_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bom") / "bundle")


@pytest.fixture(scope="module")
def bill(paper: Path) -> dict[str, Any]:
    return json.loads(dmformer.report(paper).bom())


def errors(data: bytes) -> list[str]:
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(data.decode(), all_errors=True)
    return [] if found is None else list(map(str, found))


def components(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for component in content.get("components", ()):
        yield component
        yield from components(component)


def test_it_is_valid(paper: Path) -> None:
    assert errors(dmformer.report(paper).bom()) == []


def test_the_validator_sees_what_is_wrong_in_the_model_card(bill: dict[str, Any]) -> None:
    spoilt = json.loads(json.dumps(bill))
    spoilt["metadata"]["component"]["modelCard"]["modelParameters"]["approach"] = {"type": "magic"}
    assert errors(json.dumps(spoilt).encode())


def test_the_model_is_described(bill: dict[str, Any]) -> None:
    model = bill["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "paper_net")
    properties = {one["name"]: one["value"] for one in model["properties"]}
    assert properties["dmformer:parameters"] == "1230000"
    assert properties["dmformer:checkpoint_sha256"] == "c" * 64
    card = model["modelCard"]["modelParameters"]
    assert (card["task"], card["architectureFamily"]) == ("classification", "DMFormer")
    assert card["inputs"] == [{"format": "image: float32 batch x 3 x 32 x 32"}]
    assert "version" in model


def test_every_file_is_there_with_its_hash(bill: dict[str, Any], paper: Path) -> None:
    files = {one["name"]: one["hashes"][0]["content"] for one in components(bill) if one["type"] == "file"}
    assert files == {entry.path: entry.sha256 for entry in open_bundle(paper).manifest.entries}


def test_data_sets_are_named(bill: dict[str, Any]) -> None:
    data = {one["bom-ref"]: one["name"] for one in bill["components"] if one["type"] == "data"}
    assert set(data.values()) == {"letters, 77 images", "200 calibration images"}
    card = bill["metadata"]["component"]["modelCard"]["modelParameters"]
    assert {one["ref"] for one in card["datasets"]} == set(data)


def test_versions_of_what_touched_it_are_there(bill: dict[str, Any]) -> None:
    libraries = {one["purl"]: one for one in bill["components"] if one["type"] == "library"}
    assert set(libraries) == {"pkg:pypi/torch@9.8.7", "pkg:pypi/onnx@6.5.4", "pkg:pypi/onnxruntime@3.2.1"}
    built = {one["ref"]: one.get("dependsOn", []) for one in bill["dependencies"]}
    assert built["artifact:onnx/int8"] == ["library:onnx@6.5.4", "library:torch@9.8.7"]
    assert {"artifact:onnx/fp32", "artifact:onnx/int8"} <= set(built["model"])
    assert bill["metadata"]["tools"]["components"][0]["name"] == "dmformer"


def test_packages_have_addresses_where_an_index_has_such(tmp_path: Path) -> None:
    versions = {
        "python": "3.11.2", "dmformer": "0.0.7", "openvino": "2026.4.0-1-releases/2026/4", "my engine": "1.0",
        "Foo_Bar": "1!2.0rc1.post2.dev3+cpu.1", "../x": "1", "empty": "", "jaX": "1.0\n",
    }  # fmt: skip
    bundle = write_bundle(tmp_path / "b")
    report = timings(open_bundle(bundle).manifest.artifacts, "x")
    report = msgspec.structs.replace(report, environment=report.environment | {"versions": versions})
    path = tmp_path / "bench.json"
    path.write_bytes(msgspec.json.encode(report))
    rewrite(bundle, lambda content: content["artifacts"][0].update(built_with={"dmformer": "0.0.7", "": "1"}))
    data = dmformer.report(bundle, add=[path]).bom()
    assert errors(data) == []
    content = json.loads(data)
    found = {one["name"]: one.get("purl") for one in content["components"] if one["type"] == "library"}
    del found["torch"], found["onnx"], found["onnxruntime"]
    assert found == {
        "python": "pkg:generic/python@3.11.2", "openvino": None, "my engine": None, "../x": None, "jaX": None,
        "Foo_Bar": "pkg:pypi/foo-bar@1%212.0rc1.post2.dev3%2Bcpu.1", "empty": None,
    }  # fmt: skip
    assert content["metadata"]["tools"]["components"][0]["name"] == "dmformer"


def test_metrics_have_their_intervals(bill: dict[str, Any]) -> None:
    metrics = bill["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    (int8,) = [one for one in metrics if one["type"] == "top-1" and one["slice"].startswith("onnx int8")]
    assert int8["value"] == "0.935000"
    assert int8["confidenceInterval"] == {"lowerBound": "0.885000", "upperBound": "0.945000"}
    assert {"type": "parity checks held", "value": "9 of 9", "slice": "this bundle"} in metrics


def test_what_failed_is_told(tmp_path: Path) -> None:
    failed = parity(check("runtime", "int8", 3.0, passed=False, reason="off"))
    bill = json.loads(dmformer.report(write_bundle(tmp_path / "b", failed)).bom())
    limitations = bill["metadata"]["component"]["modelCard"]["considerations"]["technicalLimitations"]
    assert limitations[0].startswith("FAILED: 1 of 10 checks failed")
    assert "not signed: nothing says who wrote it" in limitations


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"weights": "demonstration"}, [{"license": {"id": "Apache-2.0"}}]),
        ({"training": {"license": "MIT"}}, [{"license": {"id": "MIT"}}]),
        ({"training": {"licence": "MIT OR Apache-2.0"}}, [{"expression": "MIT OR Apache-2.0"}]),
        ({"training": {"license": "ask <me>"}}, [{"license": {"name": "ask <me>"}}]),
        ({"training": {"license": 7}}, None),
    ],
    ids=range(6),
)
def test_no_licence_is_invented(tmp_path: Path, changed: dict[str, Any], expected: list[dict[str, Any]] | None) -> None:
    data = dmformer.report(write_bundle(tmp_path / "b", **changed)).bom()
    assert errors(data) == []
    found = json.loads(data)["metadata"]["component"].get("licenses")
    assert found == expected


def test_the_same_bundle_gives_the_same_bill(paper: Path, bill: dict[str, Any], tmp_path: Path) -> None:
    again = json.loads(dmformer.report(paper).bom())
    for one in (again, first := json.loads(json.dumps(bill))):
        del one["metadata"]["timestamp"]
    assert again == first
    report = tmp_path / "eval.json"
    report.write_bytes(msgspec.json.encode(device_accuracy(open_bundle(paper).manifest.artifacts)))
    with_more = json.loads(dmformer.report(paper, add=[report]).bom())
    assert with_more["serialNumber"] != bill["serialNumber"]


def test_an_own_network_is_no_dmformer(tmp_path: Path) -> None:
    module = ModuleOrigin(reference="net.py:build", source_sha256="d" * 64)
    bundle = write_bundle(tmp_path / "b", module=module, weights="module", checkpoint_sha256=None)
    data = dmformer.report(bundle).bom()
    assert errors(data) == []
    model = json.loads(data)["metadata"]["component"]
    assert "architectureFamily" not in model["modelCard"]["modelParameters"]
    assert {"name": "dmformer:module", "value": "net.py:build"} in model["properties"]


def test_texts_of_strangers_are_valid_and_bounded(tmp_path: Path) -> None:
    strange = "\x1b[2J" + "x" * 100_000
    bundle = write_bundle(
        tmp_path / "b", arch=strange, notes=(strange,) * 20, training={"data": strange, strange: strange}
    )
    data = dmformer.report(bundle).bom()
    assert errors(data) == []
    assert len(data) < 1_000_000
    assert b"\\u001b" not in data
