"""``dmformer cache``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.errors import UsageError


def cache(
    action: Annotated[
        Literal["list", "clear"],
        typer.Argument(metavar="[list|clear]", help="list: what, how large, when. clear: remove all of it."),
    ] = "list",
    json_file: options.JsonOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Show or clear what exports keep, so that the same work is not done twice.

    DMFORMER_CACHE names its folder, or no cache where it is empty; DMFORMER_CACHE_LIMIT_MB how large it may grow.
    """
    from dmformer.cache import FOLDER, open_cache

    opened = open_cache()
    if opened.folder is None and opened.trouble:
        raise UsageError(f"the cache is not used: {opened.trouble}")
    if opened.folder is None:
        raise UsageError(f"{FOLDER} is empty, so nothing is kept; expected a folder, or no such variable")
    if action == "clear":
        opened.clear()
    found = opened.report()
    present.write_json(found, json_file)
    if json_file == "-":
        return
    listing = present.table(f"Cache {found.folder}", ["what", "size", "made", "last used"], numeric=["size"])
    for entry in found.entries:
        present.add_row(listing, [entry.what, present.megabytes(entry.bytes), entry.made, entry.used])
    present.show(listing)
    limit = present.megabytes(found.limit_bytes)
    present.show(f"{present.megabytes(found.bytes)} of at most {limit}; entries share what they have in common")
