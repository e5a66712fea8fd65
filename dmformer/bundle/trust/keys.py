"""Ed25519 keys in PEM files: private ones sign (PKCS #8), public ones say whose bundles a machine takes (RFC 8410)."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from dmformer._optional import require
from dmformer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# What stands before the 32 bytes of a public key in its DER form (RFC 8410, section 4).
DER_PREFIX = bytes.fromhex("302a300506032b6570032100")
_MAX_BYTES = 1 << 16
_HOW = "expected a private Ed25519 key, as dmformer sign --generate-key FILE makes it"


def fingerprint(public: bytes) -> str:
    """SHA-256 of a public key in DER form, as ``openssl pkey -pubin -outform DER | sha256sum`` prints it."""
    return hashlib.sha256(public).hexdigest()


def need_cryptography(purpose: str) -> None:
    """Make sure that the package is there.

    Raises:
        UnavailableError: it is not installed.
    """
    require("cryptography.hazmat.primitives.serialization", extra="signing", purpose=purpose)


def public_der(key: Ed25519PublicKey) -> bytes:
    """A public key in DER form."""
    return DER_PREFIX + key.public_bytes_raw()


def load_private_key(path: Path, password: Callable[[], str]) -> Ed25519PrivateKey:
    """Read a PEM file (PKCS #8), as :func:`generate_keys` or ``openssl genpkey -algorithm ed25519`` writes it.

    Args:
        path: of the file.
        password: asked for where the key is encrypted.

    Raises:
        UnavailableError: the package that reads it is not installed.
        UsageError: it cannot be read, or is no private Ed25519 key.
    """
    need_cryptography("signing")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read_key(path)
    secret = password().encode() if b"ENCRYPTED" in data else None
    try:
        key = load_pem_private_key(data, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"key {str(path)!r}: no private key in PEM form, or a wrong password; {_HOW}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"key {str(path)!r} is no Ed25519 key; {_HOW}")
    return key


def load_public_key(path: Path) -> bytes:
    """Read a PEM file with a public key; returns its DER form.

    Raises:
        UnavailableError: the package that reads it is not installed.
        UsageError: it cannot be read, or is no public Ed25519 key.
    """
    need_cryptography("reading trusted keys")
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
    return public_der(key)


def generate_keys(path: Path) -> Path:
    """Write a new private key, readable by its owner alone, and its public key beside it; returns the latter's path.

    Raises:
        UnavailableError: the package that makes it is not installed.
        UsageError: one of the files exists, or cannot be written.
    """
    need_cryptography("making keys")
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
        if path.exists() and not path.is_file():
            raise UsageError(f"key {str(path)!r} is no file; expected a key in PEM form")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"key {str(path)!r} cannot be read: {error.strerror}; expected a key in PEM form") from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"key {str(path)!r}: more than {_MAX_BYTES >> 10} KiB; expected a key in PEM form")
    return data


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not be there yet: a key that is replaced is lost."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise UsageError(f"key {str(path)!r} cannot be written: {error.strerror}; choose another file") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
