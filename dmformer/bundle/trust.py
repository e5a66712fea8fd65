"""Whose bundles are opened: Ed25519 keys, signatures of manifests, and the policy of this machine.

Keys are PEM files: private ones (PKCS #8) sign, public ones (RFC 8410) say whose bundles a machine takes.

A signature (RFC 8032) is of the exact bytes of a manifest, which in turn has the hash of every other file.
``manifest.sig`` is JSON in one canonical form, so that no byte of it can change unseen. The public key in it says which
key made the signature; it makes nobody trustworthy. That is decided by the policy.

There is one policy, which the one place that opens bundles asks. It comes from the environment, so that a device's
service file can set it once, and a block of code can set its own::

    DMFORMER_REQUIRE_SIGNATURE=1       only bundles that are signed by a trusted key
    DMFORMER_TRUSTED_KEYS=DIR          folder of public keys (*.pem); otherwise trusted-keys in the user's configuration
"""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from dmformer._optional import require
from dmformer.bundle.manifest import MANIFEST, SIGNATURE
from dmformer.errors import CheckFailed, UsageError, first_line
from dmformer.files import Sha256, indented_json, read_bounded
from dmformer.ownership import exposure, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

REQUIRE = "DMFORMER_REQUIRE_SIGNATURE"
TRUSTED_KEYS = "DMFORMER_TRUSTED_KEYS"
MAX_SIGNATURE_BYTES = 1 << 12
_MAX_KEY_BYTES = 1 << 16
_EXPECTED = "expected a private Ed25519 key, as dmformer sign --generate-key FILE makes it"


def fingerprint(public: bytes) -> str:
    """Return the SHA-256 of a public key in DER form, as ``openssl pkey -pubin -outform DER | sha256sum`` prints it."""
    return hashlib.sha256(public).hexdigest()


def _need_cryptography(purpose: str) -> None:
    """Make sure that the package ``cryptography`` is there.

    Raises:
        UnavailableError: it is not installed.
    """
    require("cryptography.hazmat.primitives.serialization", extra="signing", purpose=purpose)


def _public_der(key: Ed25519PublicKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def load_private_key(path: Path, password: Callable[[], str]) -> Ed25519PrivateKey:
    """Read a PEM file (PKCS #8), as :func:`generate_keys` or ``openssl genpkey -algorithm ed25519`` writes it.

    Args:
        path: of the file.
        password: asked for where the key is encrypted.

    Raises:
        UnavailableError: the package that reads it is not installed.
        UsageError: it cannot be read, or is no private Ed25519 key.
    """
    _need_cryptography("signing")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read_key(path)
    secret = password().encode() if b"ENCRYPTED" in data else None
    try:
        key = load_pem_private_key(data, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"key {str(path)!r}: no private key in PEM form, or a wrong password; {_EXPECTED}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"key {str(path)!r} is no Ed25519 key; {_EXPECTED}")
    return key


def load_public_key(path: Path) -> bytes:
    """Read a PEM file with a public key; returns its DER form.

    Raises:
        UnavailableError: the package that reads it is not installed.
        UsageError: it cannot be read, or is no public Ed25519 key.
    """
    _need_cryptography("reading trusted keys")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read_key(path)
    if b"PRIVATE KEY" in data:
        raise UsageError(f"key {str(path)!r} is a private key; expected the public one: it alone belongs on a device")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"key {str(path)!r}: no public key in PEM form; remove it, or put the right one there"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"key {str(path)!r} is no Ed25519 key; remove it, or put the right one there")
    public = _public_der(key)
    if weak := weakness(public):
        raise UsageError(f"key {str(path)!r} is {weak}; anybody can sign with it: remove it")
    return public


def generate_keys(path: Path) -> Path:
    """Write a new private key, readable by its owner alone, and its public key beside it; returns the latter's path.

    Raises:
        UnavailableError: the package that makes it is not installed.
        UsageError: one of the files exists, or cannot be written.
    """
    _need_cryptography("making keys")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    beside = path.with_suffix(".pub.pem")
    _write_new(path, private, mode=0o600)
    try:
        _write_new(beside, public, mode=0o644)
    except BaseException:
        path.unlink()
        raise
    return beside


def _read_key(path: Path) -> bytes:
    try:
        return read_bounded(path, _MAX_KEY_BYTES, links=True)
    except OSError as error:
        raise UsageError(f"key {str(path)!r} cannot be read: {error.strerror}; expected a key in PEM form") from error


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not be there yet: a key that is replaced is lost."""
    try:
        handle = os.open(resolve(path.parent) / path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise UsageError(f"key {str(path)!r} cannot be written: {error.strerror}; choose another file") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


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
    public_key: Annotated[str, Meta(pattern="^[A-Za-z0-9+/=]{60}$", max_length=60)]
    signature: Annotated[str, Meta(pattern="^[A-Za-z0-9+/=]{88}$", max_length=88)]

    def encode(self) -> bytes:
        """Return the content of ``manifest.sig``."""
        return indented_json(self)


def sign_manifest(manifest: bytes, key: Ed25519PrivateKey) -> Signature:
    """Sign the bytes of a manifest."""
    public = _public_der(key.public_key())
    return Signature(
        algorithm="ed25519",
        manifest_sha256=hashlib.sha256(manifest).hexdigest(),
        fingerprint=fingerprint(public),
        public_key=base64.b64encode(public).decode(),
        signature=base64.b64encode(key.sign(manifest)).decode(),
    )


def read_signature(data: bytes, manifest: bytes, where: str) -> Signature:
    """Parse ``manifest.sig`` and see that it names this manifest; :func:`check_signature` tells who made it.

    This needs no package, so that every machine finds a manifest that was changed after it was signed.

    Raises:
        CheckFailed: it is damaged, or of another manifest.
    """
    damaged = f"{where}: damaged, or no signature of this version; copy the bundle or sign it again"
    try:
        found = msgspec.json.decode(data, type=Signature)
        public, signed = _decode_base64(found.public_key), _decode_base64(found.signature)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise CheckFailed(f"{damaged} ({first_line(error)})") from error
    if data != found.encode() or found.fingerprint != fingerprint(public) or len(signed) != _SIGNATURE_BYTES:
        raise CheckFailed(damaged)
    if weak := weakness(public):
        raise CheckFailed(f"{where}: its key is {weak}, with which anybody can sign; expected a sound one")
    if found.manifest_sha256 != hashlib.sha256(manifest).hexdigest():
        raise CheckFailed(
            f"{where}: the signature is of another {MANIFEST}; expected one of this: the bundle was changed after it "
            "was signed: copy it again, or look at what is in it and sign it again"
        )
    return found


def _decode_base64(text: str) -> bytes:
    """Decode base64 in its one form: the bits that are left over are zero."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("base64 in another form")
    return data


# RFC 8032: a point is its y, little-endian, with the sign of x in the last bit. Those of small order, over which a
# signature says nothing, have the y of the points of order 1 (1), 2 (-1), 4 (0) and 8.
_PRIME = 2**255 - 19
_ORDER_8 = 2707385501144840649318225287225658788936804267575313519463743609750303402022
_SMALL_ORDER = frozenset((0, 1, _PRIME - 1, _ORDER_8, _PRIME - _ORDER_8))
_DER_PREFIX = bytes.fromhex("302a300506032b6570032100")  # RFC 8410, of every Ed25519 key
_SIGNATURE_BYTES = 64


def weakness(public: bytes) -> str | None:
    """Say what is wrong with an Ed25519 public key in DER form; ``None`` where it can be trusted."""
    if len(public) != len(_DER_PREFIX) + 32 or not public.startswith(_DER_PREFIX):
        return "no Ed25519 key in its one form"
    y = int.from_bytes(public[len(_DER_PREFIX) :], "little") & (1 << 255) - 1
    if y >= _PRIME:
        return "not in its canonical form"
    return "of small order" if y in _SMALL_ORDER else None


def check_signature(signature: Signature, manifest: bytes, where: str) -> None:
    """Check that the key in a signature made it, for these bytes.

    Raises:
        CheckFailed: it did not.
        UnavailableError: the package that checks it is not installed.
    """
    _need_cryptography("checking a signature")
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    with suppress(InvalidSignature, UnsupportedAlgorithm, ValueError):
        key = load_der_public_key(base64.b64decode(signature.public_key))
        if isinstance(key, Ed25519PublicKey):
            key.verify(base64.b64decode(signature.signature), manifest)
            return
    raise CheckFailed(
        f"{where}: the signature does not hold for {MANIFEST} and key {signature.fingerprint[:16]}…: one of them "
        "was changed: copy the bundle again"
    )


@dataclass(frozen=True)
class Policy:
    """Whether bundles must be signed, and by whom.

    Attributes:
        required: open no bundle without a signature of a trusted key.
        trusted_keys: folder of the public keys; ``None`` is the user's own.
    """

    required: bool = False
    trusted_keys: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of the trusted keys."""
        import platformdirs

        try:
            return self.trusted_keys or platformdirs.user_config_path("dmformer") / "trusted-keys"
        except RuntimeError as error:  # a user without a home
            raise UsageError(f"no home folder, and so no trusted keys; expected {TRUSTED_KEYS} to name them") from error


_chosen: ContextVar[Policy | None] = ContextVar("policy", default=None)


def policy() -> Policy:
    """Return the policy in force: that of the innermost block, or else of the environment."""
    folder = os.environ.get(TRUSTED_KEYS)
    # Whatever is not plainly "no" asks for signatures: a mistyped value must not open the door.
    wanted = os.environ.get(REQUIRE, "") not in ("", "0")
    return _chosen.get() or Policy(required=wanted, trusted_keys=Path(folder) if folder else None)


@contextmanager
def policy_in_force(chosen: Policy) -> Iterator[None]:
    """Put every bundle that is opened in the block under this policy."""
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


def admit(manifest: bytes, signature: bytes | None, where: str) -> None:
    """Apply the policy to a manifest that was not parsed yet.

    A signature that is there must be of this manifest, asked for or not.

    Args:
        manifest: content of ``manifest.json``.
        signature: content of ``manifest.sig``; ``None`` where there is none.
        where: the bundle, for messages.

    Raises:
        CheckFailed: the signature is of another manifest, or one of a trusted key is required and there is none.
        UnavailableError: one is required, and the package that checks it is not installed.
        UsageError: one is required, and there are no trusted keys.
    """
    found = None if signature is None else read_signature(signature, manifest, f"{where}/{SIGNATURE}")
    if not policy().required:
        return
    folder = policy().folder
    keys = trusted_keys(folder)
    if not keys:
        raise UsageError(
            f"a signature is required, and there is no trusted key in {str(folder)!r}; expected public keys, "
            f"*.pem: put the signer's there, or name their folder with `trusted_keys` or {TRUSTED_KEYS}"
        )
    if found is None:
        raise CheckFailed(
            f"{where}: not signed, and a signature is required; run where the key is: dmformer sign BUNDLE --key FILE"
        )
    if found.fingerprint not in keys:
        raise CheckFailed(
            f"{where}: signed by key {found.fingerprint[:16]}…, which is not among the {len(keys)} trusted in "
            f"{str(folder)!r}; expected one of those"
        )
    check_signature(found, manifest, f"{where}/{SIGNATURE}")


def admit_unsigned(where: str) -> None:
    """Apply the policy to what is run and cannot be signed, like a case.

    Raises:
        CheckFailed: signatures are required.
    """
    if policy().required:
        raise CheckFailed(
            f"{where}: not signed, and a signature is required here, which only a bundle can have; run it where none "
            f"is required (without {REQUIRE})"
        )


def trusted_keys(folder: Path) -> dict[str, Path]:
    """Return the files of the public keys in a folder, by fingerprint; none where there is no folder.

    Raises:
        UnavailableError: the package that reads them is not installed.
        UsageError: one of them is no public Ed25519 key, other users could have put it there, or the folder cannot be
            read.
    """
    if not folder.exists():
        return {}
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix == ".pem")
        for path in (folder, *files):
            if reason := exposure(path):
                raise UsageError(
                    f"trusted keys {str(path)!r}: {reason}; expected keys that only you or root can write (chmod go-w)"
                )
    except OSError as error:
        raise UsageError(f"trusted keys {str(folder)!r}: {error.strerror}; expected a folder of public keys") from error
    return {fingerprint(load_public_key(path)): path for path in files}
