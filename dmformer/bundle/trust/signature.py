"""Ed25519 signatures (RFC 8032) of the exact bytes of a manifest, which in turn has the hash of every other file.

``manifest.sig`` is JSON in one canonical form, so that no byte of it can change unseen. The public key in it says which
key made the signature; it makes nobody trustworthy. That is decided by :mod:`dmformer.bundle.trust.policy`.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from dmformer.bundle.manifest import MANIFEST
from dmformer.bundle.trust.keys import DER_PREFIX, fingerprint, need_cryptography, public_der
from dmformer.errors import CheckFailed, first_line
from dmformer.files import Sha256, indented_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_SIGNATURE_BYTES = 1 << 12


class Signature(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``manifest.sig``.

    Attributes:
        algorithm: of the signature.
        manifest_sha256: of the manifest that was signed: shows without any key that a signature is of another one.
        fingerprint: SHA-256 of the public key in DER form.
        public_key: in DER form (RFC 8410), base64.
        signature: 64 bytes, base64.
    """

    algorithm: Literal["ed25519"]
    manifest_sha256: Sha256
    fingerprint: Sha256
    public_key: Annotated[str, Meta(pattern="^[A-Za-z0-9+/=]{60}$")]
    signature: Annotated[str, Meta(pattern="^[A-Za-z0-9+/=]{88}$")]

    def encode(self) -> bytes:
        """As it is written to ``manifest.sig``."""
        return indented_json(self)


def sign(manifest: bytes, key: Ed25519PrivateKey) -> Signature:
    """Sign the bytes of a manifest."""
    public = public_der(key.public_key())
    return Signature(
        algorithm="ed25519",
        manifest_sha256=hashlib.sha256(manifest).hexdigest(),
        fingerprint=fingerprint(public),
        public_key=base64.b64encode(public).decode(),
        signature=base64.b64encode(key.sign(manifest)).decode(),
    )


def read_signature(data: bytes, manifest: bytes, where: str) -> Signature:
    """Parse ``manifest.sig`` and see that it is of this manifest, which needs no package; :func:`verify` does the rest.

    Raises:
        CheckFailed: it is damaged, or of another manifest.
    """
    damaged = f"{where}: damaged, or no signature of this version; copy the bundle or sign it again"
    try:
        found = msgspec.json.decode(data, type=Signature)
        public = base64.b64decode(found.public_key, validate=True)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise CheckFailed(f"{damaged} ({first_line(error)})") from error
    if data != found.encode() or not public.startswith(DER_PREFIX) or found.fingerprint != fingerprint(public):
        raise CheckFailed(damaged)
    if found.manifest_sha256 != hashlib.sha256(manifest).hexdigest():
        raise CheckFailed(
            f"{where}: the signature is of another {MANIFEST}; expected one of this: the bundle was changed after it "
            "was signed: copy it again, or look at what is in it and sign it again"
        )
    return found


def verify(signature: Signature, manifest: bytes, where: str) -> None:
    """See that the key in the signature made it for these bytes.

    Raises:
        CheckFailed: it did not.
        UnavailableError: the package that checks it is not installed.
    """
    need_cryptography("checking a signature")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public = base64.b64decode(signature.public_key)[len(DER_PREFIX) :]
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(base64.b64decode(signature.signature), manifest)
    except (InvalidSignature, ValueError) as error:
        raise CheckFailed(
            f"{where}: the signature does not hold for {MANIFEST} and key {signature.fingerprint[:16]}…: one of them "
            "was changed: copy the bundle again"
        ) from error
