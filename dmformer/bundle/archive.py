"""Read a bundle that is packed into one file.

A ``.dmf`` file is a plain zip archive. A zip has an index, which says what is inside before anything is unpacked, and
every system has a tool that reads it. Members are stored, not compressed: weights hardly compress, so that the file is
the same bytes whatever zlib wrote it, and a few bytes of it cannot expand to many.

A member is written to disk only if the manifest in the archive lists it, and no byte more of it than listed.
"""

from __future__ import annotations

import stat
import zipfile
from typing import TYPE_CHECKING

from dmformer.bundle.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    FileEntry,
    decode_manifest,
)
from dmformer.bundle.trust import MAX_SIGNATURE_BYTES, admit
from dmformer.errors import CheckFailed, UsageError, first_line
from dmformer.files import hash_pieces, read_pieces
from dmformer.names import check_distinct, check_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUFFIX = ".dmf"
_ENCRYPTED = 0x1


def extract(source: Path, folder: Path) -> None:
    """Unpack into an empty folder; the policy is applied before anything is written.

    Raises:
        CheckFailed: the policy refuses the bundle, or a file is not what the manifest says.
        OSError: the folder cannot be written.
        UsageError: this is no packed bundle, or one that no dmformer writes.
    """
    with _open_archive(source) as archive:
        members = _members(archive, source)
        manifest = _read(archive, members, MANIFEST, MAX_MANIFEST_BYTES, source)
        signature = _read(archive, members, SIGNATURE, MAX_SIGNATURE_BYTES, source) if SIGNATURE in members else None
        admit(manifest, signature, str(source))
        entries = decode_manifest(manifest, f"{source}/{MANIFEST}").entries
        _check_listing(members, entries, source)
        for entry in entries:
            target = folder / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(archive, members[entry.path], entry, target, source)
        if signature is not None:
            (folder / SIGNATURE).write_bytes(signature)
        (folder / MANIFEST).write_bytes(manifest)


def _open_archive(source: Path) -> zipfile.ZipFile:
    expected = "expected a packed bundle, as dmformer pack writes it"
    if not source.is_file():
        raise UsageError(f"no file {str(source)!r}; {expected}")
    try:
        return zipfile.ZipFile(source)
    except Exception as error:  # zipfile raises whatever the bytes lead it to
        raise UsageError(f"no bundle at {str(source)!r} ({first_line(error)}); {expected}") from error


def _members(archive: zipfile.ZipFile, source: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name, after checking that none of them can do harm."""
    room = source.stat().st_size
    for member in archive.infolist():
        name, mode = member.orig_filename, member.external_attr >> 16
        check = f"{source}: member {name!r}"
        try:
            check_name(name)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise UsageError(f"{check} is a link or no file; expected files only")
        if member.flag_bits & _ENCRYPTED or member.compress_type != zipfile.ZIP_STORED:
            raise UsageError(
                f"{check} is compressed or encrypted; expected it stored: pack the bundle with dmformer pack"
            )
        room -= member.file_size
        if member.file_size != member.compress_size or room < 0:
            raise UsageError(f"{check} claims {member.file_size} bytes, more than the archive has; expected no more")
    try:
        check_distinct(member.orig_filename for member in archive.infolist())
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error
    return {member.orig_filename: member for member in archive.infolist()}


def _check_listing(members: dict[str, zipfile.ZipInfo], entries: tuple[FileEntry, ...], source: Path) -> None:
    """Check that the archive holds what its manifest lists, in that size, and nothing else."""
    listed = {entry.path: entry for entry in entries}
    if missing := sorted(set(listed) - set(members)):
        raise CheckFailed(f"{source}: {missing[0]!r} is missing; expected every file that the manifest lists")
    if other := sorted(set(members) - set(listed) - {MANIFEST, SIGNATURE}):
        raise CheckFailed(f"{source}: {other[0]!r} is not listed in the manifest; expected no other files")
    for name, entry in listed.items():
        if members[name].file_size != entry.bytes:
            raise CheckFailed(
                f"{source}: {name!r} of {members[name].file_size} bytes; the manifest says {entry.bytes}: copy the "
                "file again"
            )


def _read(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str, most: int, source: Path) -> bytes:
    member = members.get(name)
    if member is None or member.file_size > most:
        problem = "missing" if member is None else f"more than {most} bytes"
        raise UsageError(f"no bundle at {str(source)!r} ({name}: {problem}); expected a packed bundle")
    return b"".join(_pieces(archive, member, source))


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, entry: FileEntry, target: Path, source: Path) -> None:
    with target.open("xb") as file:
        sha256, size = hash_pieces(_pieces(archive, member, source), file.write)
    if (sha256, size) != (entry.sha256, entry.bytes):
        raise CheckFailed(
            f"{source}: {entry.path!r} has the SHA-256 {sha256[:12]}…; the manifest says "
            f"{entry.sha256[:12]}…: it was changed or damaged: copy the file again"
        )


def _pieces(archive: zipfile.ZipFile, member: zipfile.ZipInfo, source: Path) -> Iterator[bytes]:
    """Give the bytes of a member in pieces: as many as the index says, or an error."""
    try:
        with archive.open(member) as file:
            yield from read_pieces(file)
    except Exception as error:  # zipfile raises whatever the bytes lead it to
        raise CheckFailed(
            f"{source}: {member.orig_filename!r} is damaged ({first_line(error)}): copy the file again"
        ) from error
