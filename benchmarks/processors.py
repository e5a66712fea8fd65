"""Which processor answers right with which engine at which precision: the table of docs/processors.md.

Exports the demonstrations at every precision, in every format that CPUs run, and replays them on each emulated
processor, engine by engine, minutes each. Bundles and reports that are in out/processors already are taken as they are,
so that it can be stopped and go on. The page is written anew after each report. Converting needs the tools of every
format: README, "Install".

Usage: python -m benchmarks.processors [PROCESSOR...]    otherwise those of the page
"""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

import dmformer
from dmformer.assets import CALIBRATION_IMAGES, SCENES
from dmformer.device.emulation import NOT_SHOWN
from dmformer.device.processors import PROCESSORS, EmulatedProcessor, processor
from dmformer.files import indented_json
from dmformer.machine import cpu_model
from dmformer.runtimes import registry
from dmformer.verify.report import ParityReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.verify.report import Check

PAGE = Path(__file__).parents[1] / "docs/processors.md"
WORK = Path("out/processors")
ENGINES = tuple(registry.entry(name) for name in ("onnxruntime", "openvino", "ncnn", "litert"))
PRECISIONS = ("fp32", "fp16", "int8")
# What is exported, and the processors that are asked.
NETWORKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "digits": (
        {"calibration": CALIBRATION_IMAGES},
        ("cortex-a72", "cortex-a76", "haswell", "nehalem", "cortex-a53", "neoverse-n1", "cortex-a78ae"),
    ),
    "scenes": (
        {"task": "segmentation", "calibration": SCENES},
        ("cortex-a72", "cortex-a76", "nehalem"),
    ),
}
HEAD = """# Processors that were asked, by emulation

Made by `python -m benchmarks.processors`: the golden answers of the demonstrations, asked for by `dmformer verify
--cpu` under QEMU's user mode. **No device was touched.** A cell has the largest difference from what it was compared
with, as a share of its limit; *in float32* marks where the engine computes that precision in float32 there and says so,
*mostly in float32* where it does so for most layers; *no release* where there is no wheel for that processor.

{not_shown}.

"""


class Asked(NamedTuple):
    """The reports of one processor, one for each engine that was asked, and when the last was written."""

    processor: EmulatedProcessor
    reports: tuple[ParityReport, ...]
    day: str

    @property
    def checks(self) -> list[Check]:
        """All checks of all engines."""
        return [check for report in self.reports for check in report.checks]


def main(names: Sequence[str]) -> None:
    """Export, ask, write the page."""
    WORK.mkdir(parents=True, exist_ok=True)
    asked = [processor(name).name for name in names]
    for network, (options, listed) in NETWORKS.items():
        bundle = WORK / network
        if not bundle.exists():
            formats = [row.format for row in ENGINES]
            dmformer.export(formats=formats, precisions=PRECISIONS, output=bundle, force=True, **options)
        for name in asked or listed:
            for row in ENGINES:
                kept = _kept(network, name, row)
                if not kept.exists():
                    report = dmformer.verify(bundle, runtimes=[row.name], cpus=[name])
                    kept.write_bytes(indented_json(report))
                    print(f"{network} on {name} in {row.name}: {'held' if report.passed else 'FAILED'}", flush=True)
                    PAGE.write_text(page(), encoding="utf-8")


def _kept(network: str, name: str, row: registry.RuntimeEntry) -> Path:
    return WORK / f"{network}-{name}-{row.name}.json"


def page() -> str:
    """Return the page, of the reports that are there."""
    parts = [HEAD.format(not_shown=NOT_SHOWN[0].upper() + NOT_SHOWN[1:])]
    for network in NETWORKS:
        found = [asked for one in PROCESSORS if (asked := _read(network, one)) is not None]
        if found:
            parts.append(_section(network, found))
    refused = [
        f"- {row.name} {name}: {reason}" for row in ENGINES for name, reason in registry.support(row).refused.items()
    ]
    parts.append("\n".join(["## What is not offered", "", *refused, ""]))
    parts.append(f"The emulating processor: {cpu_model()}.\n")
    return "\n".join(parts)


def _read(network: str, one: EmulatedProcessor) -> Asked | None:
    paths = [path for row in ENGINES if (path := _kept(network, one.name, row)).exists()]
    if not paths:
        return None
    reports = tuple(msgspec.json.decode(path.read_bytes(), type=ParityReport) for path in paths)
    latest = max(path.stat().st_mtime for path in paths)
    return Asked(one, reports, datetime.fromtimestamp(latest, timezone.utc).date().isoformat())


def _section(network: str, found: Sequence[Asked]) -> str:
    columns = [(row.name, name) for row in ENGINES for name in PRECISIONS if name in registry.support(row).precisions]
    titles = [f"{runtime} {precision}" for runtime, precision in columns]
    lines = [
        f"## {network}",
        "",
        f"| processor | found in | {' | '.join(titles)} |",
        f"|---|---|{'---|' * len(titles)}",
    ]
    for asked in found:
        cells = [_cell([one for one in asked.checks if (one.runtime, one.precision) == column]) for column in columns]
        lines.append(f"| {asked.processor.name} | {asked.processor.found_in} | {' | '.join(cells)} |")
    lines += ["", *_reasons(found), "", "When, and with what:", ""]
    for asked in found:
        replays = [replay for report in asked.reports for replay in report.replays]
        engines = ", ".join(one.engine for one in replays)
        lines.append(f"- {asked.processor.name}: {asked.day}, {replays[0].emulator}, {replays[0].platform}, {engines}")
    return "\n".join([*lines, ""])


def _cell(checks: Sequence[Check]) -> str:
    if not checks:
        return "not run"
    reasons = [one.reason or "" for one in checks]
    if any(reason.startswith("no release of") for reason in reasons):
        return "no release"
    shares = [one.max_abs / one.limit for one in checks if one.max_abs is not None and one.limit]
    text = f"{max(shares):.0%}" if shares else "no answer"
    if any("computes in float32" in reason for reason in reasons):
        text += ", in float32"
    elif any("computes the others in float32" in reason for reason in reasons):
        text += ", mostly in float32"
    failed = [one for one in checks if not one.passed]
    return f"**FAILED** ({', '.join(dict.fromkeys(one.stage for one in failed))}) {text}" if failed else text


def _reasons(found: Sequence[Asked]) -> list[str]:
    checks = (check for asked in found for check in asked.checks if not check.passed)
    return list(dict.fromkeys(f"- FAILED {one.asked}, against {one.against}: {one.reason}" for one in checks))


if __name__ == "__main__":
    main(sys.argv[1:])
