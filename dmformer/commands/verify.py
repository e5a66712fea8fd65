"""``dmformer verify``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.text import Text

    from dmformer.verify.report import Check, Finding, ParityReport, ReleaseRange

CASES = "dmformer-bisect"
_ELSEWHERE = "Another processor, another release of an engine"


def verify(
    bundle: options.BundleArgument = None,
    runtimes: options.RuntimeOption = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Compare with this checkpoint; needs PyTorch."),
    ] = None,
    weights_key: options.WeightsKeyOption = None,
    module: options.ModuleOption = None,
    module_options: options.ModuleArgumentsOption = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Compare on these images too; needs PyTorch."),
    ] = None,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", help=f"Find the node where a failure begins, and save it below {CASES}; needs PyTorch and ONNX."
        ),
    ] = False,
    case: Annotated[
        Path | None,
        typer.Option("--case", metavar="DIR", help="Run a failure that --bisect saved, instead of a bundle."),
    ] = None,
    cpus: Annotated[
        list[str] | None,
        typer.Option(
            "--cpu",
            metavar="NAME",
            help="Ask on this processor, emulated by QEMU, as cortex-a72; list shows all. Repeatable.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="PACKAGE==VERSION",
            help="Ask with this release of an engine; FIRST..LAST finds the first bad one. Repeatable.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="With --cpu: a root file system of the device, with Python; otherwise a small Debian.",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="Ask this server, by the Open Inference Protocol: http://HOST:PORT, or grpc://HOST:PORT.",
            rich_help_panel=options.SERVED,
        ),
    ] = None,
    model: options.ServedModelOption = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="P",
            help="Of the artifact behind --model, where the server does not say.",
            rich_help_panel=options.SERVED,
        ),
    ] = None,
    limit_s: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            metavar="S",
            help="Seconds that one answer may take, otherwise 60.",
            rich_help_panel=options.SERVED,
        ),
    ] = None,
    json_file: options.JsonOption = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Check that a bundle's runtimes answer as PyTorch does.

    Without --weights and --images the reference is in the bundle, and PyTorch is not needed.
    """
    from dmformer.verify.api import verify as run_verify
    from dmformer.verify.localize.case import run_case
    from dmformer.verify.report import failure

    if "list" in map(str.lower, cpus or []):
        _list_processors()
        return
    if case is not None:
        others = (
            *(bundle, runtimes, weights, weights_key, module, module_options, images, bisect, cpus, engines, root),
            *(server, model, precision),
        )
        if any(others) or limit_s is not None:
            raise UsageError("--case with other arguments; expected it alone, or with --json")
        report = run_case(case)
    else:
        opened = options.find_bundle(bundle)
        with present.stages() as shown:
            report = run_verify(
                opened,
                runtimes=runtimes or [],
                weights=weights,
                weights_key=weights_key,
                module=module,
                module_options=options.parse_pairs(module_options or [], "--module-option", "num_classes=10"),
                images=images,
                bisect=Path(CASES) if bisect else None,
                cpus=cpus or [],
                engines=engines or [],
                root=root,
                server=server,
                model=model,
                precision=precision,
                limit_s=limit_s,
                stage=shown.stage,
                note=lambda note: shown.say(f"note: {note}"),
            )
    _show(report, json_file)
    present.write_json(report, json_file)
    if not report.passed:
        raise CheckFailed(failure(report))


def _list_processors() -> None:
    """Show the processors that can be emulated."""
    from dmformer.device.processors import PROCESSORS

    listing = present.table("Processors for --cpu", ["name", "architecture", "found in"])
    for row in PROCESSORS:
        present.add_row(listing, [row.name, row.architecture, row.found_in])
    present.show(listing)


def _show(report: ParityReport, json_file: str | None) -> None:
    """Show the checks: those that failed first, stage by stage; those that held in one line for each reference."""
    elsewhere = ["processor"] if report.replays else []
    figures = ["max abs", "of limit", "cosine", "class"]
    columns = ["", *elsewhere, "stage", "runtime", "precision", "batch", "against", *figures]
    listing = present.table("Parity with PyTorch", columns, numeric=figures)
    groups: dict[tuple[object, ...], list[Check]] = {}
    for check in sorted(report.checks, key=lambda check: check.passed):
        stage = None if check.passed else check.where
        engine = (check.processor, check.engine or check.runtime)
        groups.setdefault((stage, *engine, check.precision, check.against, check.limit), []).append(check)
    for group in groups.values():
        verdict, *cells = _cells(group)
        place = [group[0].processor or "here"] if elsewhere else []
        present.add_row(listing, [verdict, *place, *cells])
    present.show(listing, json_file)
    if report.server is not None:
        present.show(f"asked {report.server.name} {report.server.version} at {report.server.url}", json_file)
    for line in _remarks(report):
        present.show(line, json_file)
    for reason in report.skipped:
        present.say(f"not checked: {reason}")


def _remarks(report: ParityReport) -> Iterator[str]:
    """Say what the table of figures leaves open: reasons, findings, and where the limits come from."""
    batches: dict[tuple[object, ...], list[str]] = {}
    for check in report.checks:
        if check.reason is not None:
            mark = "" if check.passed else "FAILED "
            remark = (f"{mark}{check.asked}", check.against, check.reason)
            batches.setdefault(remark, []).append(str(check.batch))
    for (what, against, reason), numbers in batches.items():
        yield f"{what}, batch {', '.join(numbers)}, against {against}: {reason}"
    for span in report.release_ranges:
        yield _range_line(span)
    for finding in report.findings:
        yield from _finding_lines(finding)
    for limit, source in dict.fromkeys((check.limit, check.limit_source) for check in report.checks):
        if limit:
            yield f"limit {limit:.2g}: {source}"


def _range_line(span: ReleaseRange) -> str:
    """Say where the releases of a range begin to fail."""
    where = f" on {span.processor}" if span.processor else ""
    title = f"{span.package} {span.releases[0]} to {span.releases[-1]}{where}"
    if span.first_bad is None:
        return f"{title}: all {len(span.releases)} releases hold"
    before = f"; {span.last_good}, the release before it, holds" if span.last_good else ""
    return f"{title}: the first bad release is {span.first_bad}{before}"


def _finding_lines(finding: Finding) -> Iterator[str]:
    """Say line by line where a failure begins, whose fault it is, and how to see it alone."""
    distance = "NaN or infinite" if finding.max_abs is None else f"{finding.max_abs:.3g}"
    where = f" at {finding.size}" if finding.size else ""
    yield (
        f"FOUND {finding.runtime} {finding.precision}{where} parts at {', '.join(finding.nodes)} "
        f"(module {finding.module}): {distance}, limit {finding.limit:.3g}"
    )
    yield f"  {finding.explanation}"
    for difference in finding.differences:
        yield f"  {difference}"
    if finding.island is not None and finding.island.nodes:
        island = finding.island
        verdict = "holds" if island.passed else "still fails"
        yield (
            f"  with {len(island.nodes)} more nodes in float32 the file {verdict}, {island.file} in the case's folder: "
            f"{', '.join(island.nodes)}"
        )
    yield f"  found in {finding.runs} runs with at most {finding.most_shown} inner tensors shown, and one with all"
    yield f"  to see it alone: dmformer verify --case {shlex.quote(str(finding.case))}"


def _cells(group: Sequence[Check]) -> list[str | Text]:
    """One line for checks in one runtime against one reference: the figures are those of the worst."""
    first = group[0]
    distances = [check.max_abs for check in group if check.max_abs is not None]
    cosines = [check.cosine for check in group if check.cosine is not None]
    agreements = [check.top1_agreement for check in group if check.top1_agreement is not None]
    return [
        present.mark(first.passed, "FAILED"),
        ", ".join(dict.fromkeys(check.where for check in group)),
        first.engine or first.runtime,
        first.precision,
        ", ".join(map(str, sorted({check.batch for check in group}))),
        first.against,
        f"{max(distances):.2g}" if distances else "-",
        _share(max(distances) / first.limit) if distances and first.limit else "-",
        f"{min(cosines):.6f}" if cosines else "-",
        f"{min(agreements):.0%}" if agreements else "-",
    ]


def _share(of_limit: float) -> str:
    return f"{of_limit:.0%}" if of_limit < 10 else f"{of_limit:,.0f} x"
