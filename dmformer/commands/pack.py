"""``dmformer pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present


def pack(
    bundle: options.BundleArgument = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Otherwise beside the bundle, with .dmf after its name."),
    ] = None,
    require_signature: options.RequireSignatureOption = False,
    trusted_keys: options.TrustedKeysOption = None,
    debug: options.DebugOption = False,
) -> None:
    """Write a bundle as one file, the same bytes for the same bundle; a zip archive that any tool can read."""
    from dmformer.bundle.writer import pack as run_pack
    from dmformer.files import hash_file

    written = run_pack(options.find_bundle(bundle), output)
    sha256, size = hash_file(written)
    present.show(f"{written}: {present.megabytes(size)}, SHA-256 {sha256}")
