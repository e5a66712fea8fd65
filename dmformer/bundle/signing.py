"""Put a signature into a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmformer.bundle.manifest import SIGNATURE
from dmformer.bundle.reader import own_bundle, read_manifest
from dmformer.bundle.signature import Signature, sign
from dmformer.errors import CheckFailed, UsageError
from dmformer.whole import whole_file

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def sign_bundle(folder: Path, key: Ed25519PrivateKey) -> Signature:
    """Sign a bundle's manifest, once every file was found to be what it lists; an older signature is replaced.

    No policy applies: it is for the signer to decide.

    Raises:
        CheckFailed: a file is not what the manifest says, or not listed in it.
        StageFailed: the signature could not be written.
        UsageError: there is no bundle, or it is packed.
    """
    if folder.is_file():
        raise UsageError(f"{str(folder)!r} is a file; expected the folder of a bundle: sign it, then pack it")
    bundle = own_bundle(folder)
    bundle.check_all()
    signature = sign(read_manifest(folder), key)
    if signature.manifest_sha256 != bundle.manifest_sha256:
        raise CheckFailed(f"{folder} changed while it was checked, and was not signed; run it again")
    with whole_file(folder / SIGNATURE) as staging:
        staging.write_bytes(signature.encode())
    return signature
