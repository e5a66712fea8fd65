"""The Kubernetes manifests of the documentation: by Kubernetes' own schemas, and by what serve-layout writes."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dmformer.bundle.reader import open_bundle
from dmformer.layouts.api import serve_layout
from tests.conftest import ROOT
from tests.protocol_double import Double, serving

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dmformer.export.cached import ExportResult

kubernetes_validate = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")
FOLDER = ROOT / "docs/kubernetes"
VERSIONS = ("1.33", "1.37")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def containers() -> list[dict[str, Any]]:
    deployment, service = documents("triton.yaml")[0], documents("kserve.yaml")[0]
    return [*deployment["spec"]["template"]["spec"]["containers"], *service["spec"]["predictor"]["containers"]]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_of_their_schemas(version: str) -> None:
    found = documents("triton.yaml")
    assert [one["kind"] for one in found] == [
        "Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler",
    ]  # fmt: skip
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_manifest_is_refused() -> None:
    deployment = documents("triton.yaml")[0]
    deployment["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["timeout"] = 5
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_the_labels_go_together() -> None:
    deployment, service, budget, scaler = documents("triton.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    named = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= named


def test_the_model_is_one_that_is_laid_out(exported: ExportResult, tmp_path: Path) -> None:
    layout = serve_layout("triton", open_bundle(exported.output), tmp_path / "out", backend="python")
    for container in containers():
        (loaded,) = (one.partition("=")[2] for one in container["args"] if one.startswith("--load-model="))
        assert loaded in layout.models
        assert container["readinessProbe"]["httpGet"]["path"] == f"/v2/models/{loaded}/ready"
        command = container["startupProbe"]["exec"]["command"]
        assert command[:3] == ["dmformer", "verify", "/bundle"]
        assert command[-2:] == ["--model", loaded]


def test_the_liveness_probe_asks_for_one_row_and_fails_where_it_is_refused(exported: ExportResult) -> None:
    asked = []

    def answer(rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        asked.append(rows.shape)
        return {"logits": np.zeros((len(rows), 10), np.float32)}

    (given,), name = exported.manifest.inputs, "dmformer_nano_onnx_fp32"
    with serving(Double(answer, name, {}, [{"name": "logits"}])) as double:
        for container in containers():
            python, *arguments = container["livenessProbe"]["exec"]["command"]
            assert python == "python3"
            assert f"http://127.0.0.1:8000/v2/models/{name}/infer" in arguments[-1]
            arguments[-1] = arguments[-1].replace("http://127.0.0.1:8000", double.url)
            for double.broken, held in (("", True), ("infer refuses", False), ("infer cut", False)):
                done = subprocess.run([sys.executable, *arguments], capture_output=True, timeout=60, check=False)
                assert (done.returncode == 0) is held, done.stderr
    assert asked == [(1, *given.shape[1:])] * 2
    assert given.name in arguments[-1]


def test_tritons_processes_have_shared_memory_of_the_pods_own() -> None:
    pods = (documents("triton.yaml")[0]["spec"]["template"]["spec"], documents("kserve.yaml")[0]["spec"]["predictor"])
    for pod in pods:
        (volume,), (container,) = pod["volumes"], pod["containers"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]


def test_the_probe_is_a_command_that_there_is() -> None:
    import typer.main

    from dmformer.cli import app

    known = {flag for one in typer.main.get_command(app).commands["verify"].params for flag in one.opts}  # type: ignore[attr-defined]
    for container in containers():
        command = container["startupProbe"]["exec"]["command"]
        assert {one for one in command if one.startswith("--")} <= known
