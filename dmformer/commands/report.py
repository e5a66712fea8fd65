"""``dmformer report``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.errors import UsageError
from dmformer.text import plain_json

_MOST_SHOWN = 12  # points that are printed; the page has all


def report(
    bundle: options.BundleArgument = None,
    html: Annotated[
        str | None,
        typer.Option(
            "--html",
            metavar="FILE",
            callback=options.check_report_target,
            help="Write one page that needs no network; - is standard output.",
        ),
    ] = None,
    bom: Annotated[
        str | None,
        typer.Option(
            "--bom",
            metavar="FILE",
            callback=options.check_report_target,
            help="Write a CycloneDX machine-learning bill of materials, as JSON; - is standard output.",
        ),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(
            "--add",
            metavar="FILE",
            help="The JSON of verify, bench or eval on another machine, or another bundle, to show beside. Repeatable.",
        ),
    ] = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Write everything that is known about a bundle, to be signed off: a page for people, and a bill of materials.

    Nothing is run. Where a check failed, the files are written all the same, and the exit code is 1.
    """
    from dmformer.page.svg import check_installed
    from dmformer.signoff.api import report as gather
    from dmformer.signoff.bom import check_library

    if html is None and bom is None:
        raise UsageError("nothing to write; expected --html FILE, --bom FILE or both")
    _check_targets({"--html": html, "--bom": bom}, add or [])
    if html is not None:
        check_installed()
    if bom is not None:
        check_library()
    known = gather(options.find_bundle(bundle), add=add or [])
    if html is not None:
        present.write_data(known.html().encode(), html)
    if bom is not None:
        present.write_data(plain_json(known.bom()) if bom == "-" else known.bom(), bom)
    present.say(known.verdict)
    for point in known.open_points[:_MOST_SHOWN]:
        present.say(f"open: {point}")
    if len(known.open_points) > _MOST_SHOWN:
        present.say(f"open: and {len(known.open_points) - _MOST_SHOWN} more")
    known.judge()


def _check_targets(targets: dict[str, str | None], added: list[Path]) -> None:
    """Refuse to write two files into one, or over what is read.

    Raises:
        UsageError: two paths lead to the same file.
    """
    taken = {os.path.realpath(path): "--add" for path in added}
    for flag, target in targets.items():
        if target is None:
            continue
        place = target if target == "-" else os.path.realpath(target)
        if place in taken:
            raise UsageError(f"{taken[place]} and {flag} both name {target!r}; expected two files")
        taken[place] = flag
