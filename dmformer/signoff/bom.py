"""A machine-learning bill of materials: CycloneDX 1.6, as JSON.

The library ``cyclonedx-python-lib`` writes components, hashes, licences and dependencies. It has no model cards (11.12
has a comment in their place), so that part is added to the JSON that it wrote. The same bundle gives the same bill, but
for its time; the serial number comes from the manifests' hashes and from what was added.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING, Any

from dmformer import __version__
from dmformer._optional import require
from dmformer.bench.sentences import digits
from dmformer.files import indented_json
from dmformer.signoff.accuracy import measured_accuracies, shares
from dmformer.text import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cyclonedx.model import HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License
    from packageurl import PackageURL

    from dmformer.bundle.manifest import Artifact, FileEntry, Manifest, Tensor
    from dmformer.signoff.api import SignOff

_DEMONSTRATION_LICENCE = "Apache-2.0"  # the LICENSE of this distribution, of which its demonstration weights are part
_LICENCE_KEYS = ("license", "licence")  # of what a checkpoint says of its training
_MOST_LETTERS = 1000  # of a text
_MOST_POINTS = 200
_TOOL = "dmformer"
_PACKAGE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,98}[a-z0-9])?", re.IGNORECASE)  # PEP 508
_PACKAGE_VERSION = re.compile(  # PEP 440
    r"v?(?:\d+!)?\d+(?:\.\d+)*(?:[-_.]?(?:alpha|beta|preview|pre|rc|a|b|c)[-_.]?\d*)?"
    r"(?:-\d+|[-_.]?(?:post|rev|r)[-_.]?\d*)?(?:[-_.]?dev[-_.]?\d*)?(?:\+[a-z0-9]+(?:[-_.][a-z0-9]+)*)?",
    re.IGNORECASE | re.ASCII,
)
_MODEL, _TRAINING_DATA, _CALIBRATION_DATA = "model", "data:training", "data:calibration"


def check_library() -> None:
    """Make sure that a bill can be made, before the work.

    Raises:
        UnavailableError: the package is missing.
    """
    require("cyclonedx.model.bom", extra="report", purpose="--bom")


def bill_of_materials(known: SignOff) -> bytes:
    """Return the bill of a bundle, as JSON.

    Raises:
        UnavailableError: the package is missing.
    """
    check_library()
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    written = make_outputter(_bom(known), OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    content = json.loads(written)
    content["metadata"]["component"]["modelCard"] = _model_card(known)
    return indented_json(content)


def _fit(text: object) -> str:
    shown = plain(str(text))
    return shown if len(shown) <= _MOST_LETTERS else f"{shown[:_MOST_LETTERS]}…"


# --- what the library writes ------------------------------------------------------------------------------------------


def _bom(known: SignOff) -> Bom:
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType

    manifest, opened = known.manifest, known.sources[0].bundle
    assert opened is not None
    model = manifest.model
    component = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=_fit(model.arch),
        version=opened.manifest_sha256[:16],
        bom_ref=_MODEL,
        description=f"{model.task}; weights: {model.weights_origin}",
        licenses=_licences(manifest),
        hashes=[_sha256(opened.manifest_sha256)],
        properties=_properties(_facts(known)),
    )
    tool = Component(type=ComponentType.APPLICATION, name=_TOOL, version=__version__, bom_ref="tool:dmformer")
    bom = Bom(serial_number=_serial_number(known), metadata=BomMetaData(component=component))
    bom.metadata.tools.components.add(tool)
    libraries = _libraries(known)
    for one in libraries.values():
        bom.components.add(one)
    others = [_file(entry) for entry in manifest.files] + list(_data_sets(manifest))
    artifacts = [(artifact, _artifact(artifact)) for artifact in manifest.artifacts]
    for part in [*others, *(described for _, described in artifacts)]:
        bom.components.add(part)
    bom.register_dependency(component, [*others, *(described for _, described in artifacts)])
    for artifact, described in artifacts:
        built_with = artifact.built_with.items()
        bom.register_dependency(described, [libraries[item] for item in built_with if item in libraries])
    return bom


def _serial_number(known: SignOff) -> uuid.UUID:
    """Return the same number for the same manifests and reports."""
    content = []
    for source in known.sources:
        if source.bundle is not None:
            content.append(source.bundle.manifest_sha256)
        else:
            content.append(indented_json([source.parity, source.bench, source.accuracy]).decode())
    return uuid.uuid5(uuid.NAMESPACE_OID, "\n".join(content))


def _facts(known: SignOff) -> Iterator[tuple[str, object]]:
    manifest = known.manifest
    model = manifest.model
    yield "manifest_sha256", known.sources[0].bundle.manifest_sha256 if known.sources[0].bundle else ""
    yield "tool_version", manifest.tool_version
    yield "parameters", model.parameters
    yield "macs", model.macs
    yield "weights", model.weights
    yield "deploy_form", model.deploy_form
    if model.checkpoint_sha256 is not None:
        yield "checkpoint_sha256", model.checkpoint_sha256
    if model.module is not None:
        yield "module", model.module.reference
        yield "module_source_sha256", model.module.source_sha256
    yield "verdict", known.verdict
    integrity = known.sources[0].integrity
    if integrity is not None:
        yield "signature", integrity.signature.status
        if integrity.signature.fingerprint is not None:
            yield "signature_key", integrity.signature.fingerprint
    for name, value in model.training.items():
        if not isinstance(value, dict):
            yield f"training:{name}", value


def _properties(facts: Iterable[tuple[str, object]]) -> list[Property]:
    from cyclonedx.model import Property

    return [Property(name=f"dmformer:{_fit(name)}", value=_fit(value)) for name, value in facts]


def _sha256(digest: str) -> HashType:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _licences(manifest: Manifest) -> list[License]:
    """Return the licence of the weights: that of the demonstration, or what the checkpoint says; none is invented."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    said = [value for name, value in manifest.model.training.items() if name.lower() in _LICENCE_KEYS]
    if manifest.model.weights == "demonstration":
        said = [_DEMONSTRATION_LICENCE]
    return [LicenseFactory().make_from_string(_fit(text)) for text in said if isinstance(text, str) and text.strip()][
        :1
    ]


def _file(entry: FileEntry) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        type=ComponentType.FILE,
        name=entry.path,
        bom_ref=f"file:{entry.path}",
        hashes=[_sha256(entry.sha256)],
        properties=_properties([("bytes", entry.bytes)]),
    )


def _artifact(artifact: Artifact) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    facts: list[tuple[str, object]] = [
        ("format", artifact.format),
        ("precision", artifact.precision),
        ("bytes", artifact.bytes),
        ("promised_share", artifact.promised_share),
        *((f"layers:{kind}", count) for kind, count in artifact.layers.items()),
    ]
    if artifact.weight_bits is not None:
        facts.append(("weight_bits", artifact.weight_bits))
    if artifact.target is not None:
        facts.append(("target", f"{artifact.target.flavour} {artifact.target.version}, {artifact.target.platform}"))
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=f"{artifact.format} {artifact.precision}",
        bom_ref=f"artifact:{artifact.format}/{artifact.precision}",
        hashes=[_sha256(artifact.sha256)],
        properties=_properties(facts),
        components=[_file(entry) for entry in artifact.files],
    )


def _libraries(known: SignOff) -> dict[tuple[str, str], Component]:
    """Return every package that built or measured something, by name and version; not this tool, which is named so."""
    from cyclonedx.model.component import Component, ComponentType

    roles: dict[tuple[str, str], list[str]] = {}

    def note(packages: Mapping[str, Any], role: str) -> None:
        for name, version in packages.items():
            if not plain(name).strip() or name == _TOOL:
                continue
            found = roles.setdefault((name, str(version)), [])
            found += [] if role in found else [role]

    for artifact in known.manifest.artifacts:
        note(artifact.built_with, "built an artifact")
    for one in known.manifest.evidence.processors:
        package, _, version = one.engine.partition(" ")
        note({package: version}, f"answered on {one.processor}")
    for source in known.sources:
        versions = source.bench.environment.get("versions") if source.bench is not None else None
        note(versions if isinstance(versions, dict) else {}, "was in the environment of a timing")
        for replay in source.parity.replays if source.parity is not None else ():
            note(replay.packages, f"answered on {replay.processor or 'a machine'}")
    return {
        (name, version): Component(
            type=ComponentType.LIBRARY,
            name=_fit(name),
            version=_fit(version),
            bom_ref=f"library:{_fit(name)}@{_fit(version)}",
            purl=_package_url(name, version),
            properties=_properties(("role", role) for role in found),
        )
        for (name, version), found in roles.items()
    }


def _package_url(name: str, version: str) -> PackageURL | None:
    """Return where a package comes from; ``None`` where its name or its version is none that PyPI has."""
    from packageurl import PackageURL

    if not _PACKAGE_NAME.fullmatch(name) or not _PACKAGE_VERSION.fullmatch(version):
        return None
    return PackageURL("generic" if name == "python" else "pypi", name=name, version=version)


def _data_sets(manifest: Manifest) -> Iterator[Component]:
    from cyclonedx.model.component import Component, ComponentType

    data, evidence = manifest.model.training.get("data"), manifest.evidence.accuracy
    if isinstance(data, str) and data.strip():
        yield Component(type=ComponentType.DATA, name=_fit(data), bom_ref=_TRAINING_DATA, description="training data")
    if evidence is not None:
        labelled = "labelled" if evidence.labelled else "without labels"
        yield Component(
            type=ComponentType.DATA,
            name=f"{evidence.images} calibration images",
            bom_ref=_CALIBRATION_DATA,
            description=f"{labelled}; for the ranges of int8, and for accuracy",
        )


# --- the model card ---------------------------------------------------------------------------------------------------


def _model_card(known: SignOff) -> dict[str, Any]:
    manifest = known.manifest
    model = manifest.model
    ours = model.module is None or model.key_map is not None
    parameters: dict[str, Any] = {
        **({"approach": {"type": "supervised"}} if model.training else {}),
        "task": model.task,
        **({"architectureFamily": "DMFormer"} if ours else {}),
        "modelArchitecture": _fit(model.arch),
        "datasets": [{"ref": data.bom_ref.value} for data in _data_sets(manifest)],
        "inputs": [{"format": _tensor(tensor)} for tensor in manifest.inputs],
        "outputs": [{"format": _tensor(tensor)} for tensor in manifest.outputs],
    }
    speeds = [
        f"{one.format} {one.precision} takes {one.speed.ratio:.2f} times as long as fp32 on {one.speed.cpu}"
        for one in manifest.artifacts
        if one.speed is not None and one.precision != "fp32"
    ]
    points = [*(f"FAILED: {failed}" for failed in known.failures), *known.open_points]
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(known))},
        "considerations": {
            "technicalLimitations": [_fit(point) for point in points[:_MOST_POINTS]],
            "performanceTradeoffs": [_fit(speed) for speed in speeds],
        },
    }


def _tensor(tensor: Tensor) -> str:
    return _fit(f"{tensor.name}: {tensor.dtype} {' x '.join(map(str, tensor.shape))}")


def _metrics(known: SignOff) -> Iterator[dict[str, Any]]:
    for name, images, accuracy in measured_accuracies(known):
        for share in shares(accuracy, name):
            metric: dict[str, Any] = {
                "type": share.kind,
                "value": f"{share.value:.6f}",
                "slice": _fit(f"{name}, {images}"),
            }
            if share.interval is not None:
                low, high = share.interval
                metric["confidenceInterval"] = {"lowerBound": f"{low:.6f}", "upperBound": f"{high:.6f}"}
            yield metric
    for artifact in known.manifest.artifacts:
        if artifact.points_lost is not None:
            value = f"{artifact.points_lost:.4f}"
            yield {"type": "percentage points lost", "value": value, "slice": f"{artifact.format} {artifact.precision}"}
    for source in known.sources:
        if source.parity is not None:
            held = sum(check.passed for check in source.parity.checks)
            yield {
                "type": "parity checks held",
                "value": f"{held} of {len(source.parity.checks)}",
                "slice": source.title,
            }
        for row in source.bench.results if source.bench is not None else ():
            if row.timed:
                yield {
                    "type": "latency, ms",
                    "value": digits(row.call_ms),
                    "slice": _fit(f"{row.title}, {source.title}"),
                }
