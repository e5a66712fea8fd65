"""Which processor answers right with which engine at which precision: the table of docs/processors.md.

Exports the demonstrations at every precision and replays them on each emulated processor, minutes each. Bundles and
reports that are in out/processors already are taken as they are, so that it can be stopped and go on. The page is
written anew after each report.

Usage: python -m benchmarks.processors [PROCESSOR...]    otherwise those of the page
"""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import dmformer
from dmformer.assets import CALIBRATION_IMAGES, SCENES
from dmformer.device.emulation import NOT_SHOWN
from dmformer.device.processors import PROCESSORS, processor
from dmformer.files import indented_json
from dmformer.machine import cpu_model
from dmformer.verify.report import ParityReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmformer.verify.report import Check

PAGE = Path(__file__).parents[1] / "docs/processors.md"
WORK = Path("out/processors")
NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {"calibration": CALIBRATION_IMAGES},
    "scenes": {"task": "segmentation", "calibration": SCENES},
}
NAMES = ("cortex-a53", "cortex-a72", "cortex-a76", "cortex-a78ae", "neoverse-n1", "nehalem", "ivybridge", "haswell")
HEAD = """# Processors that were asked, by emulation

Made by `python -m benchmarks.processors`: the golden answers of the demonstrations, asked for by `dmformer verify
--cpu` under QEMU's user mode. **No device was touched.** A cell has the largest difference from what it was compared
with, as a share of its limit; *in float32* marks where the engine computes that precision in float32 there and says so.

{not_shown}.

"""


def main(names: Sequence[str]) -> None:
    """Export, ask, write the page."""
    WORK.mkdir(parents=True, exist_ok=True)
    rows = [processor(name) for name in names or NAMES]
    for network, options in NETWORKS.items():
        bundle = WORK / network
        if not bundle.exists():
            dmformer.export(
                formats=["onnx", "openvino"], precisions=["fp32", "fp16", "int8"], output=bundle, force=True, **options
            )
        for row in rows:
            kept = WORK / f"{network}-{row.name}.json"
            if not kept.exists():
                report = dmformer.verify(bundle, cpus=[row.name])
                kept.write_bytes(indented_json(report))
                print(f"{network} on {row.name}: {'held' if report.passed else 'FAILED'}", flush=True)
            PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page, of the reports that are there."""
    parts = [HEAD.format(not_shown=NOT_SHOWN[0].upper() + NOT_SHOWN[1:])]
    for network in NETWORKS:
        found = [(row, path) for row in PROCESSORS if (path := WORK / f"{network}-{row.name}.json").exists()]
        reports = [(row, path, msgspec.json.decode(path.read_bytes(), type=ParityReport)) for row, path in found]
        if reports:
            parts.append(_section(network, reports))
    return "\n".join(parts)


def _section(network: str, reports: Sequence[tuple[Any, Path, ParityReport]]) -> str:
    columns = list(
        dict.fromkeys(
            (check.runtime, check.precision)
            for *_, report in reports
            for check in report.checks
            if check.runtime != "numpy"
        )
    )
    titles = [f"{runtime} {precision}" for runtime, precision in columns]
    lines = [
        f"## {network}",
        "",
        f"| processor | found in | {' | '.join(titles)} |",
        f"|---|---|{'---|' * len(titles)}",
    ]
    for row, _, report in reports:
        cells = [_cell([one for one in report.checks if (one.runtime, one.precision) == column]) for column in columns]
        lines.append(f"| {row.name} | {row.found_in} | {' | '.join(cells)} |")
    lines += ["", *_reasons(reports), "", "When, and with what:", ""]
    for row, path, report in reports:
        day = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).date()
        engines = ", ".join(one.engine for one in report.replays)
        emulator = next(one.emulator for one in report.replays)
        lines.append(f"- {row.name}: {day}, {emulator}, {report.replays[0].platform}, {engines}")
    lines += ["", f"The emulating processor: {cpu_model()}.", ""]
    return "\n".join(lines)


def _cell(checks: Sequence[Check]) -> str:
    if not checks:
        return "-"
    shares = [one.max_abs / one.limit for one in checks if one.max_abs is not None and one.limit]
    text = f"{max(shares):.0%}" if shares else "no answer"
    if any("computes in float32" in (one.reason or "") for one in checks):
        text += ", in float32"
    failed = [one for one in checks if not one.passed]
    return f"**FAILED** ({', '.join(dict.fromkeys(one.stage for one in failed))}) {text}" if failed else text


def _reasons(reports: Sequence[tuple[Any, Path, ParityReport]]) -> list[str]:
    checks = (check for *_, report in reports for check in report.checks if not check.passed)
    return list(dict.fromkeys(f"- FAILED {one.asked}, against {one.against}: {one.reason}" for one in checks))


if __name__ == "__main__":
    main(sys.argv[1:])
