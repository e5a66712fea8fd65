"""Whose bundles this machine takes: one policy, which the one place that opens bundles asks.

It comes from the environment, so that a device's service file can set it once, and a block of code can set its own::

    DMFORMER_REQUIRE_SIGNATURE=1       only bundles that are signed by a trusted key
    DMFORMER_TRUSTED_KEYS=DIR          folder of public keys (*.pem); otherwise trusted-keys in the user's configuration
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmformer.bundle.manifest import SIGNATURE
from dmformer.bundle.trust.keys import fingerprint, load_public_key
from dmformer.bundle.trust.signature import read_signature, verify
from dmformer.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIRE = "DMFORMER_REQUIRE_SIGNATURE"
TRUSTED_KEYS = "DMFORMER_TRUSTED_KEYS"


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
        """Where the trusted keys are."""
        import platformdirs

        return self.trusted_keys or platformdirs.user_config_path("dmformer") / "trusted-keys"


_chosen: ContextVar[Policy | None] = ContextVar("policy", default=None)


def policy() -> Policy:
    """The one in force: of the innermost block, or else of the environment."""
    folder = os.environ.get(TRUSTED_KEYS)
    # Whatever is not plainly "no" asks for signatures: a mistyped value must not open the door.
    wanted = os.environ.get(REQUIRE, "") not in ("", "0")
    return _chosen.get() or Policy(required=wanted, trusted_keys=Path(folder) if folder else None)


@contextmanager
def policy_in_force(chosen: Policy) -> Iterator[None]:
    """Every bundle that is opened in the block comes under this policy."""
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
    current = policy()
    if not current.required:
        return
    keys = trusted_keys(current.folder)
    if not keys:
        raise UsageError(
            f"a signature is required, and there is no trusted key in {str(current.folder)!r}; expected public keys, "
            f"*.pem: put the signer's there, or name their folder with --trusted-keys or {TRUSTED_KEYS}"
        )
    if found is None:
        raise CheckFailed(
            f"{where}: not signed, and a signature is required; run where the key is: dmformer sign BUNDLE --key FILE"
        )
    if found.fingerprint not in keys:
        raise CheckFailed(
            f"{where}: signed by key {found.fingerprint[:16]}…, which is not among the {len(keys)} trusted in "
            f"{str(current.folder)!r}; expected one of those"
        )
    verify(found, manifest, f"{where}/{SIGNATURE}")


def trusted_keys(folder: Path) -> dict[str, Path]:
    """Files of the public keys in a folder, by fingerprint; none where there is no folder.

    Raises:
        UnavailableError: the package that reads them is not installed.
        UsageError: one of them is no public Ed25519 key, or the folder cannot be read.
    """
    if not folder.exists():
        return {}
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix == ".pem")
    except OSError as error:
        raise UsageError(f"trusted keys {str(folder)!r}: {error.strerror}; expected a folder of public keys") from error
    return {fingerprint(load_public_key(path)): path for path in files}
