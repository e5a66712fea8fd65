"""``dmformer unpack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present


def unpack(
    packed: Annotated[Path, typer.Argument(metavar="FILE", help="A packed bundle.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Folder to write; otherwise beside the file, without its .dmf."),
    ] = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Write a packed bundle as a folder, every file checked; nothing is left behind if that fails."""
    from dmformer.bundle.writer import unpack as run_unpack

    bundle = run_unpack(packed, output)
    listed = bundle.manifest.entries
    size = present.megabytes(sum(entry.bytes for entry in listed))
    present.show(f"{bundle.root}: {len(listed)} files, {size}; manifest SHA-256 {bundle.manifest_sha256}")
