"""A bundle as one file, and back; :mod:`dmformer.bundle.archive` says what kind of file."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from typing import TYPE_CHECKING

from dmformer.bundle.archive import extract
from dmformer.bundle.manifest import MANIFEST, SIGNATURE
from dmformer.bundle.reader import own_bundle, read_manifest, read_signature_file
from dmformer.bundle.writer import staged
from dmformer.errors import CheckFailed, UsageError
from dmformer.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dmformer.bundle.manifest import FileEntry
    from dmformer.bundle.reader import Bundle

SUFFIX = ".dmf"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_MODE = stat.S_IFREG | 0o644
_UNIX = 3
_PIECE = 1 << 20


def pack(bundle: Bundle, destination: Path | None = None) -> Path:
    """Write a bundle as one file: the same bytes for the same bundle, on every machine.

    Args:
        bundle: a folder.
        destination: otherwise beside the bundle, with ``.dmf`` after its name; an older packed bundle is replaced.

    Returns:
        Path of the file.

    Raises:
        CheckFailed: a file of the bundle is not what the manifest says, or not listed in it.
        StageFailed: the file could not be written.
        UsageError: the bundle is packed already, or something else than a packed bundle is at the destination.
    """
    if bundle.packed is not None:
        raise UsageError(f"{bundle.packed} is packed already; expected the folder of a bundle")
    bundle.check_all()
    folder = bundle.root.resolve()
    target = destination or folder.with_name(folder.name + SUFFIX)
    _check_replaceable(target)
    if target.resolve().is_relative_to(folder):
        raise UsageError(f"output {str(target)!r} is inside the bundle; expected a file outside it")
    with whole_file(target) as staging, staging.open("xb") as file:
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            for name, data in _contents(bundle):
                archive.writestr(_member(name), data)
            for entry in sorted(bundle.manifest.entries, key=lambda entry: entry.path):
                _add(archive, entry, bundle.root / entry.path)
        file.flush()
        os.fsync(file.fileno())
    return target


def unpack(source: Path, destination: Path | None = None) -> Bundle:
    """Write a packed bundle as a folder; a reader sees all of it, or what was there before.

    Args:
        source: the file.
        destination: otherwise beside the file, without its ``.dmf``; an older bundle is replaced.

    Raises:
        CheckFailed: a file is not what the manifest says, or the policy asks for a signature that is not there.
        StageFailed: the folder could not be written.
        UsageError: the file is no packed bundle, or something else than a bundle is at the destination.
    """
    if source.is_dir():
        raise UsageError(f"{str(source)!r} is a folder; expected a packed bundle")
    if destination is None and source.suffix != SUFFIX:
        raise UsageError(f"{str(source)!r} does not end in {SUFFIX}; expected --output, the folder to write")
    target = destination or source.with_suffix("")
    with staged(target) as folder:
        extract(source, folder)
    return own_bundle(target)


def _check_replaceable(target: Path) -> None:
    """A file that is replaced is lost, so it must be a packed bundle."""
    if target.is_symlink() or (target.exists() and not (target.is_file() and _is_packed(target))):
        raise UsageError(f"output {str(target)!r} is there and no packed bundle; choose another --output")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"output {str(target)!r}: expected a file in a folder that exists")


def _is_packed(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[:1] == [MANIFEST]
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def _contents(bundle: Bundle) -> Iterator[tuple[str, bytes]]:
    """What the manifest does not list: itself and its signature."""
    manifest = read_manifest(bundle.root)
    if hashlib.sha256(manifest).hexdigest() != bundle.manifest_sha256:
        raise CheckFailed(f"{bundle.root} changed while it was packed; run it again")
    yield MANIFEST, manifest
    signature = read_signature_file(bundle.root)
    if signature is not None:
        yield SIGNATURE, signature


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, _EPOCH)
    member.create_system = _UNIX
    member.external_attr = _MODE << 16
    return member


def _add(archive: zipfile.ZipFile, entry: FileEntry, path: Path) -> None:
    member, digest = _member(entry.path), hashlib.sha256()
    member.file_size = entry.bytes
    with path.open("rb") as file, archive.open(member, "w") as target:
        while piece := file.read(_PIECE):
            digest.update(piece)
            target.write(piece)
    if digest.hexdigest() != entry.sha256:
        raise CheckFailed(f"{path} changed while it was packed; run it again")
