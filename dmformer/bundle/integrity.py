"""Check and sign a whole bundle: every file by its hash, the manifest by its signature."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from dmformer.bundle.manifest import MANIFEST, SIGNATURE
from dmformer.bundle.reader import is_copied, open_bundle, own_bundle, read_manifest, read_signature_file
from dmformer.bundle.trust import (
    Signature,
    check_signature,
    policy,
    policy_in_force,
    read_signature,
    sign_manifest,
    trusted_keys,
)
from dmformer.errors import CheckFailed, DMFormerError, UsageError
from dmformer.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from dmformer.bundle.manifest import FileEntry
    from dmformer.bundle.reader import Bundle
    from dmformer.files import OpenFile


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
    signature = sign_manifest(read_manifest(folder), key)
    if signature.manifest_sha256 != bundle.manifest_sha256:
        raise CheckFailed(f"{folder} changed while it was checked, and was not signed; run it again")
    with whole_file(folder / SIGNATURE) as staging:
        staging.write_bytes(signature.encode())
    return signature


class FileCheck(Struct, frozen=True, kw_only=True):
    """The check of a file of the bundle, with what is wrong with it."""

    path: str
    passed: bool
    reason: str | None = None


class SignatureCheck(Struct, frozen=True, kw_only=True):
    """The check of the bundle's signature.

    Attributes:
        status: ``none`` where there is none; ``trusted`` where it holds and its key is among the trusted ones;
            ``unknown key`` where it holds and its key is not; ``bad`` where it does not hold.
        fingerprint: of the key.
        trusted_as: the trusted key's file.
        reason: why it does not hold.
    """

    status: Literal["none", "trusted", "unknown key", "bad"]
    fingerprint: str | None = None
    trusted_as: str | None = None
    reason: str | None = None


class IntegrityReport(Struct, frozen=True, kw_only=True):
    """What ``check`` found; ``proves`` says in words what that is worth."""

    passed: bool
    manifest_sha256: str
    files: tuple[FileCheck, ...]
    signature: SignatureCheck
    proves: str


def check_integrity(named: Path) -> IntegrityReport:
    """Check everything in a bundle, a folder or a packed file, and go on where something is wrong.

    Raises:
        CheckFailed: a file of a packed bundle is not what its manifest says.
        StageFailed: there is no room to unpack it.
        UnavailableError: the bundle is signed, and the package that checks signatures is not installed.
        UsageError: there is no bundle, or a trusted key cannot be used.
    """
    if is_copied(named):
        with policy_in_force(replace(policy(), required=False)):  # what it asks for is a finding here
            bundle = open_bundle(named)
    else:
        bundle = own_bundle(named)
    files = _check_files(bundle)
    signature = _check_signature(bundle)
    held = signature.status == "trusted" or (signature.status != "bad" and not policy().required)
    return IntegrityReport(
        passed=held and all(file.passed for file in files),
        manifest_sha256=bundle.manifest_sha256,
        files=tuple(files),
        signature=signature,
        proves=_proves(files, signature),
    )


def _check_files(bundle: Bundle) -> list[FileCheck]:
    held: dict[str, OpenFile] = {}

    def open_listed(entry: FileEntry) -> None:
        held[entry.path] = bundle.open(entry)

    found = [_checked(entry.path, partial(open_listed, entry)) for entry in bundle.manifest.entries]
    for artifact in bundle.manifest.artifacts:
        files = [held[file.path] for file in artifact.files if file.path in held]
        if len(files) == len(artifact.files):
            inspected = _checked(artifact.files[0].path, partial(bundle.inspect, artifact, files))
            found += [] if inspected.passed else [inspected]
    unlisted = bundle.unlisted()
    return [*found, *(FileCheck(path=name, passed=False, reason="not listed in the manifest") for name in unlisted)]


def _checked(path: str, check: Callable[[], object]) -> FileCheck:
    try:
        check()
    except DMFormerError as error:
        return FileCheck(path=path, passed=False, reason=str(error))
    return FileCheck(path=path, passed=True)


def _check_signature(bundle: Bundle) -> SignatureCheck:
    signature: Signature | None = None
    try:
        data = read_signature_file(bundle.root)
        if data is None:
            return SignatureCheck(status="none")
        manifest, where = read_manifest(bundle.root), str(bundle.root / SIGNATURE)
        signature = read_signature(data, manifest, where)
        check_signature(signature, manifest, where)
    except CheckFailed as error:
        return SignatureCheck(
            status="bad", fingerprint=None if signature is None else signature.fingerprint, reason=str(error)
        )
    trusted = trusted_keys(policy().folder).get(signature.fingerprint)
    return SignatureCheck(
        status="unknown key" if trusted is None else "trusted",
        fingerprint=signature.fingerprint,
        trusted_as=None if trusted is None else str(trusted),
    )


def _proves(files: list[FileCheck], signature: SignatureCheck) -> str:
    """Say what the checks prove, and what they do not."""
    if failed := sum(not file.passed for file in files):
        return f"nothing: {failed} of {len(files)} files are not what {MANIFEST} lists"
    if signature.status == "bad":
        return f"nothing: every file is what {MANIFEST} lists, and {MANIFEST} is not what was signed"
    if signature.status == "none":
        return (
            f"every file is what {MANIFEST} lists: nothing was damaged or mixed up on the way. Not who wrote "
            f"{MANIFEST}, nor that {MANIFEST} itself is unchanged: for that compare its SHA-256 with the sender's, or "
            "have the bundle signed"
        )
    if signature.status == "unknown key":
        return (
            "every file is as the holder of the key signed it. Not whose key that is: it is not among the trusted "
            f"keys in {str(policy().folder)!r}; compare the fingerprint with the signer's, and put the public key there"
        )
    return (
        "every file is as the holder of the trusted key signed it. Not that the model answers rightly on this machine: "
        "dmformer verify checks that"
    )
