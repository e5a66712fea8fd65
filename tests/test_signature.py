"""Signatures: who signed what, which keys a machine trusts, and that every command asks."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

import dmformer
from dmformer.assets import SAMPLE_IMAGES
from dmformer.bundle.integrity import check_integrity, sign_bundle
from dmformer.bundle.manifest import GOLDEN, MANIFEST, SIGNATURE
from dmformer.bundle.reader import open_bundle, own_bundle
from dmformer.bundle.trust import (
    REQUIRE,
    TRUSTED_KEYS,
    Policy,
    admit,
    check_signature,
    fingerprint,
    generate_keys,
    load_private_key,
    load_public_key,
    policy,
    policy_in_force,
    read_signature,
    trusted_keys,
)
from dmformer.bundle.writer import pack
from dmformer.errors import CheckFailed, UsageError
from dmformer.export.build import build
from tests.bundles import lengthen, one_line, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from tests.conftest import Run

DIGIT = SAMPLE_IMAGES / "7.png"


def no_password() -> str:
    pytest.fail("asked for a password")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with one public key; the private one is beside the folder, ``key.pem``."""
    folder = tmp_path / "trusted"
    folder.mkdir()
    shutil.move(generate_keys(tmp_path / "key.pem"), folder)
    return folder


@pytest.fixture
def key(keys: Path) -> Ed25519PrivateKey:
    return load_private_key(keys.parent / "key.pem", no_password)


@pytest.fixture
def signed(bundle: Path, key: Ed25519PrivateKey) -> Path:
    sign_bundle(bundle, key)
    return bundle


@pytest.fixture
def strict(keys: Path) -> Policy:
    return Policy(required=True, trusted_keys=keys)


def refused(bundle: Path, strict: Policy) -> str:
    with policy_in_force(strict), pytest.raises(CheckFailed) as caught:
        open_bundle(bundle)
    return one_line(caught.value)


# --- the policy -------------------------------------------------------------------------------------------------------


def test_a_signed_bundle_is_opened(signed: Path, strict: Policy) -> None:
    with policy_in_force(strict):
        open_bundle(signed).check_all()
        open_bundle(pack(own_bundle(signed))).check_all()
    assert policy() == Policy()


def test_an_unsigned_bundle_is_not(bundle: Path, strict: Policy) -> None:
    assert "not signed" in refused(bundle, strict)
    assert "not signed" in refused(pack(own_bundle(bundle)), strict)


def test_another_signer_is_not_trusted(bundle: Path, strict: Policy, tmp_path: Path) -> None:
    generate_keys(tmp_path / "other.pem")
    signature = sign_bundle(bundle, load_private_key(tmp_path / "other.pem", no_password))
    said = refused(bundle, strict)
    assert signature.fingerprint[:16] in said
    assert "not among the 1 trusted" in said


def test_the_policy_is_asked_before_the_manifest_is_parsed(
    bundle: Path, strict: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(own_bundle(bundle))
    monkeypatch.setattr("dmformer.bundle.reader.decode_manifest", lambda *_: pytest.fail("parsed"))
    monkeypatch.setattr("dmformer.bundle.archive.decode_manifest", lambda *_: pytest.fail("parsed"))
    refused(bundle, strict)
    refused(packed, strict)


def variants(data: bytes) -> Iterator[bytes]:
    """Each byte changed in one bit, and other lengths."""
    for position, byte in enumerate(data):
        yield data[:position] + bytes([byte ^ (1 << position % 8)]) + data[position + 1 :]
    yield from (data[:-1], data + b"\n", data + b"\0", b"", data + data)


def test_every_byte_of_the_manifest(signed: Path, strict: Policy) -> None:
    """Both by its hash in the signature file, and by the signature itself."""
    manifest, signature = (signed / MANIFEST).read_bytes(), (signed / SIGNATURE).read_bytes()
    parsed = read_signature(signature, manifest, "here")
    with policy_in_force(strict):
        admit(manifest, signature, "here")
        for changed in variants(manifest):
            with pytest.raises(CheckFailed, match="of another manifest"):
                admit(changed, signature, "here")
            with pytest.raises(CheckFailed, match="does not hold"):
                check_signature(parsed, changed, "here")


def test_every_byte_of_the_signature(signed: Path, strict: Policy) -> None:
    manifest, signature = (signed / MANIFEST).read_bytes(), (signed / SIGNATURE).read_bytes()
    with policy_in_force(strict):
        for changed in variants(signature):
            with pytest.raises(CheckFailed):
                admit(manifest, changed, "here")
    for name in (MANIFEST, SIGNATURE):  # from the files of the bundle
        lengthen(signed / name)
        refused(signed, strict)


def test_a_manifest_changed_after_signing_is_found_without_any_key(
    signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    open_bundle(signed)
    rewrite(signed, lambda content: content.update(tool_version="0"))
    with pytest.raises(CheckFailed, match="signature is of another manifest"):
        open_bundle(signed)


def test_a_signature_cannot_be_made_without_the_private_key(signed: Path, strict: Policy, tmp_path: Path) -> None:
    """Somebody who changes the manifest and writes hash and trusted key into a new signature file."""
    generate_keys(tmp_path / "other.pem")
    trusted = json.loads((signed / SIGNATURE).read_bytes())
    rewrite(signed, lambda content: content.update(tool_version="0"))
    forged = sign_bundle(signed, load_private_key(tmp_path / "other.pem", no_password))
    path = signed / SIGNATURE
    path.write_bytes(replace(forged, public_key=trusted["public_key"], fingerprint=trusted["fingerprint"]).encode())
    assert "does not hold" in refused(signed, strict)
    path.write_bytes(replace(forged, fingerprint=trusted["fingerprint"]).encode())
    assert "damaged" in refused(signed, strict)


# --- where the policy comes from --------------------------------------------------------------------------------------

COMMANDS = (
    ("predict", DIGIT), ("verify",), ("bench",), ("doctor",), ("build", "--format", "ov"), ("eval", "--data", "."),
    ("inspect",), ("pack",), ("check",), ("report", "--bom", "bom.json"), ("tune",),
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_asks(inline: Callable[..., Run], bundle: Path, keys: Path, command: tuple[str, ...]) -> None:
    name, *others = command
    for options, environment in (
        (["--trusted-keys", keys], {}),
        (["--require-signature"], {TRUSTED_KEYS: str(keys)}),
        ([], {REQUIRE: "1", TRUSTED_KEYS: str(keys)}),
        ([], {REQUIRE: "ture", TRUSTED_KEYS: str(keys)}),
    ):
        run = inline(name, bundle, *others, *options, **environment)
        assert run.code == 1, run.err
        assert "sign" in run.error_line
    assert policy() == Policy()


def test_unpack_asks(inline: Callable[..., Run], bundle: Path, keys: Path, tmp_path: Path) -> None:
    packed = pack(open_bundle(bundle), tmp_path / "x.dmf")
    run = inline("unpack", packed, "--trusted-keys", keys)
    assert run.code == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_commands_work_on_a_bundle_that_is_signed(
    inline: Callable[..., Run], signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("dmformer.bench.api"), "ROUNDS", 1)
    for arguments in (["predict", signed, DIGIT], ["bench", signed, "--runtime", "ort", "--duration", "0.03"]):
        run = inline(*arguments, "--trusted-keys", keys)
        assert run.code == 0, run.err


def test_the_python_functions_ask(bundle: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE, "1")
    monkeypatch.setenv(TRUSTED_KEYS, str(keys))
    for function in (dmformer.load, dmformer.verify, dmformer.bench):
        with pytest.raises(CheckFailed, match="not signed"):
            function(bundle)


@pytest.mark.parametrize("value", ["", "0"])
def test_what_asks_for_nothing(bundle: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRE, value)
    assert open_bundle(bundle).root == bundle


@pytest.mark.slow
def test_an_export_where_signatures_are_required(
    inline: Callable[..., Run], bundle: Path, keys: Path, quick: None
) -> None:
    """What this machine makes itself, and what it replaces, need no signature."""
    run = inline("export", "--output", bundle, **{REQUIRE: "1", TRUSTED_KEYS: str(keys)})
    assert run.code == 0, run.err


def test_trusted_keys_are_the_users_own_by_default(
    inline: Callable[..., Run], signed: Path, keys: Path, tmp_path: Path
) -> None:
    run = inline("inspect", signed, "--require-signature", XDG_CONFIG_HOME=str(tmp_path / "config"))
    assert run.code == 2
    assert "no trusted key" in run.error_line
    shutil.copytree(keys, tmp_path / "config" / "dmformer" / "trusted-keys")
    run = inline("inspect", signed, "--require-signature", XDG_CONFIG_HOME=str(tmp_path / "config"))
    assert run.code == 0, run.err


def test_without_the_package_it_is_3(
    inline: Callable[..., Run], signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    for arguments in (
        ["inspect", signed, "--trusted-keys", keys],
        ["check", signed],
        ["sign", signed, "--key", keys.parent / "key.pem"],
        ["sign", "--generate-key", "new.pem"],
    ):
        run = inline(*arguments)
        assert run.code == 3, run.err
        assert "dmformer[signing]" in run.error_line
    assert inline("inspect", signed).code == 0


# --- sign and check ---------------------------------------------------------------------------------------------------


def test_sign_and_check(inline: Callable[..., Run], bundle: Path, tmp_path: Path) -> None:
    run = inline("sign", "--generate-key", "my.pem")
    assert run.code == 0, run.err
    assert stat.S_IMODE((tmp_path / "my.pem").stat().st_mode) == 0o600
    run = inline("sign", bundle, "--key", "my.pem")
    assert run.code == 0, run.err
    made_by = fingerprint(load_public_key(tmp_path / "my.pub.pem"))
    assert made_by in run.out
    unknown = inline("check", bundle, "--json", "-", XDG_CONFIG_HOME=str(tmp_path / "none"))
    assert unknown.code == 0
    assert json.loads(unknown.out)["signature"]["status"] == "unknown key"
    assert "Not whose key that is" in json.loads(unknown.out)["proves"]
    (tmp_path / "keys").mkdir()
    shutil.copy(tmp_path / "my.pub.pem", tmp_path / "keys")
    for environment, options in (({TRUSTED_KEYS: "keys"}, []), ({}, ["--trusted-keys", "keys"])):
        trusted = inline("check", bundle, "--json", "-", *options, **environment)
        assert trusted.code == 0
        found = json.loads(trusted.out)["signature"]
        assert (found["status"], found["fingerprint"]) == ("trusted", made_by)
        assert found["trusted_as"] == "keys/my.pub.pem"


def test_check_of_a_bad_signature_is_1(inline: Callable[..., Run], signed: Path) -> None:
    rewrite(signed, lambda content: content.update(tool_version="0"))
    run = inline("check", signed, "--json", "-")
    assert run.code == 1
    assert "of another manifest" in run.error_line
    assert json.loads(run.out)["signature"]["status"] == "bad"
    assert json.loads(run.out)["proves"].startswith("nothing")
    assert inline("inspect", signed).code == 1


def test_signing_again_replaces_what_no_longer_holds(signed: Path, key: Ed25519PrivateKey, strict: Policy) -> None:
    rewrite(signed, lambda content: content.update(tool_version="0"))
    sign_bundle(signed, key)
    with policy_in_force(strict):
        open_bundle(signed)
    assert not list(signed.glob(".*"))


def test_what_is_spoilt_or_packed_is_not_signed(bundle: Path, key: Ed25519PrivateKey) -> None:
    with pytest.raises(UsageError, match="sign it, then pack it"):
        sign_bundle(pack(own_bundle(bundle)), key)
    lengthen(bundle / GOLDEN)
    with pytest.raises(CheckFailed, match=GOLDEN):
        sign_bundle(bundle, key)
    assert not (bundle / SIGNATURE).exists()


@pytest.mark.usefixtures("quick")
def test_what_is_built_on_a_device_is_not_signed(signed: Path, strict: Policy, key: Ed25519PrivateKey) -> None:
    with policy_in_force(strict):
        found = build(signed, "ov")
        assert "signer has not seen what was built here" in found.notes[0]
        assert check_integrity(signed).signature.status == "none"
        with pytest.raises(CheckFailed, match="not signed"):
            open_bundle(signed)
        sign_bundle(signed, key)
        open_bundle(signed).check_all()


# --- keys -------------------------------------------------------------------------------------------------------------

openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine")


@openssl
def test_keys_of_openssl(bundle: Path, tmp_path: Path) -> None:
    """The commands of docs/integrity.md; and openssl verifies what was signed."""

    def run(*arguments: str, **settings: bytes) -> bytes:
        return subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True, **settings).stdout

    run("genpkey", "-algorithm", "ed25519", "-out", "key.pem")
    run("pkey", "-in", "key.pem", "-pubout", "-out", "key.pub.pem")
    signature = sign_bundle(bundle, load_private_key(tmp_path / "key.pem", no_password))
    assert fingerprint(run("pkey", "-pubin", "-in", "key.pub.pem", "-outform", "DER")) == signature.fingerprint
    (tmp_path / "raw").write_bytes(base64.b64decode(signature.signature))
    run("pkeyutl", "-verify", "-pubin", "-inkey", "key.pub.pem", "-rawin", "-in", str(bundle / MANIFEST),
        "-sigfile", "raw")  # fmt: skip
    (tmp_path / "keys").mkdir()
    shutil.copy(tmp_path / "key.pub.pem", tmp_path / "keys")
    with policy_in_force(Policy(required=True, trusted_keys=tmp_path / "keys")):
        open_bundle(bundle)


@openssl
def test_an_encrypted_key(inline: Callable[..., Run], bundle: Path, keys: Path, tmp_path: Path) -> None:
    encrypted = tmp_path / "encrypted.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "key.pem", "-aes256", "-passout", "pass:open", "-out", encrypted],
        check=True,
    )
    load_private_key(encrypted, lambda: "open")
    with pytest.raises(UsageError, match="wrong password"):
        load_private_key(encrypted, lambda: "wrong")
    run = inline("sign", bundle, "--key", encrypted)
    assert run.code == 2
    assert "no terminal" in run.error_line


def test_keys_are_not_replaced(tmp_path: Path) -> None:
    generate_keys(tmp_path / "key.pem")
    before = (tmp_path / "key.pem").read_bytes()
    with pytest.raises(UsageError, match="File exists"):
        generate_keys(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_bytes() == before
    (tmp_path / "other.pub.pem").touch()
    with pytest.raises(UsageError, match="File exists"):
        generate_keys(tmp_path / "other.pem")
    assert not (tmp_path / "other.pem").exists()
    with pytest.raises(UsageError, match="cannot be written"):
        generate_keys(tmp_path / "nowhere" / "key.pem")


def elliptic_key(path: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.Encoding.PEM
    if "private" in path.name:
        return key.private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.public_key().public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("what", ["missing", "folder", "empty", "text", "large", "of another kind", "the public one"])
def test_what_is_no_private_key(tmp_path: Path, keys: Path, what: str) -> None:
    path = tmp_path / "private.pem"
    if what == "folder":
        path.mkdir()
    elif what == "the public one":
        shutil.copy(keys / "key.pub.pem", path)
    elif what != "missing":
        contents = {"empty": b"", "text": b"-----BEGIN PRIVATE KEY-----\nx", "large": bytes(1 << 17)}
        path.write_bytes(contents[what] if what in contents else elliptic_key(path))
    with pytest.raises(UsageError) as caught:
        load_private_key(path, no_password)
    assert str(path) in one_line(caught.value)


@pytest.mark.parametrize("what", ["empty", "text", "of another kind", "a private one", "a folder"])
def test_a_trusted_key_that_cannot_be_used_is_told(keys: Path, what: str) -> None:
    path = keys / "odd.pem"
    if what == "a private one":
        shutil.copy(keys.parent / "key.pem", path)
    elif what == "a folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "text": b"ssh-ed25519 AAAA"}.get(what) or elliptic_key(path))
    with pytest.raises(UsageError) as caught:
        trusted_keys(keys)
    assert str(path) in one_line(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [[], ["bundle"], ["--key", "a", "--generate-key", "b"], ["bundle", "--generate-key", "b"]],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_sign_wants_one_thing(inline: Callable[..., Run], arguments: list[str]) -> None:
    run = inline("sign", *arguments)
    assert run.code == 2
    assert "--generate-key FILE" in run.error_line
