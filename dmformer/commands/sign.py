"""``dmformer sign``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dmformer.commands import _options as options
from dmformer.commands import _present as present
from dmformer.errors import UsageError


def sign(
    bundle: options.BundleArgument = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="Private Ed25519 key in PEM form to sign with.")
    ] = None,
    generate_key: Annotated[
        Path | None,
        typer.Option(
            "--generate-key", metavar="FILE", help="Make a key instead: the private one here, the public one beside it."
        ),
    ] = None,
    debug: options.DebugOption = False,
) -> None:
    """Sign a bundle, once all of it was found to be what its manifest lists; or make a key to sign with."""
    from dmformer.bundle.integrity import sign_bundle
    from dmformer.bundle.trust import generate_keys, load_private_key

    if (key is None) == (generate_key is None) or (generate_key is not None and bundle is not None):
        raise UsageError("expected a bundle and --key FILE; or --generate-key FILE alone")
    if generate_key is not None:
        public = generate_keys(generate_key)
        present.show(f"{generate_key}: the private key; keep it to yourself, and off the devices")
        present.show(f"{public}: the public key; put it into the trusted keys of each device")
        return
    assert key is not None
    private = load_private_key(key, _password)
    folder = options.bundle_path(bundle)
    signature = sign_bundle(folder, private)
    present.show(f"{folder} is signed with key {signature.fingerprint}")


def _password() -> str:
    """Asked for on the terminal, where an encrypted key needs it."""
    if not sys.stdin.isatty():
        raise UsageError("the key is encrypted, and there is no terminal to ask for its password; run it on one")
    answer: str = typer.prompt("password of the key", hide_input=True, err=True)
    return answer
