"""Open bundles, folders and packed files alike: nothing in one is parsed before its hash was checked, but the manifest.

This is the one place that opens bundles, so it is here that the policy of :mod:`dmformer.bundle.trust` is asked, before
the manifest is parsed. Each runtime's ``Support`` looks into what a bundle holds for it, before its engine does.

A content store (huggingface_hub's cache, DVC, git-annex) keeps a folder of which every file is a link to a blob. Such a
folder is copied as a packed bundle is unpacked, each file checked on its way, so that no link is followed after that; a
single link among files is refused.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dmformer.bundle.archive import extract
from dmformer.bundle.golden import Golden, parse_golden
from dmformer.bundle.manifest import (
    GOLDEN,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Artifact,
    FileEntry,
    Manifest,
    decode_manifest,
)
from dmformer.bundle.trust import MAX_SIGNATURE_BYTES, admit
from dmformer.errors import CheckFailed, StageFailed, UsageError
from dmformer.files import OpenFile, hash_pieces, open_regular, read_pieces
from dmformer.process import announce
from dmformer.runtimes import registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


_OF_FILE_MANAGERS = frozenset((".DS_Store", "Thumbs.db", "desktop.ini"))  # they leave them wherever they look in
_MOST_TEXT_BYTES = 64 << 20  # of a file whose line endings are looked at
_COPY = "copy the bundle with the files themselves (cp -rL)"


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and its manifest.

    Attributes:
        root: the folder; a temporary one, which goes away with this object, where there is an ``origin``.
        manifest: as it was read.
        manifest_sha256: of the bytes that were read.
        origin: what was copied to a temporary folder: a packed bundle's file, or a folder of links.
    """

    root: Path
    manifest: Manifest
    manifest_sha256: str
    origin: Path | None = None

    @property
    def source(self) -> Path:
        """The path that a user opened: the packed file, or the folder."""
        return self.origin or self.root

    def check(self, entry: FileEntry) -> Path:
        """Return the path of a listed file, after checking its size and SHA-256.

        Raises:
            CheckFailed: it is missing, reached over a link, or of another content.
        """
        return self.open(entry).path

    def open(self, entry: FileEntry) -> OpenFile:
        """Return a listed file, open, after checking its size and SHA-256.

        Raises:
            CheckFailed: it is missing, reached over a link, or of another content.
        """
        path = self.locate(entry)
        try:
            file = OpenFile(path)
        except OSError as error:
            raise CheckFailed(f"{path}: cannot be read: {error.strerror}; expected a file of the bundle") from error
        self._compare(entry, path, file.sha256, file.bytes)
        return file

    def read(self, entry: FileEntry) -> bytes:
        """Return the content of a listed file, read once, so that what was checked is what is used.

        Raises:
            CheckFailed: it is missing, reached over a link, or of another content.
        """
        path = self.locate(entry)
        with path.open("rb") as file:
            data = file.read(min(entry.bytes, path.stat().st_size) + 1)  # a manifest may claim any size
        self._compare(entry, path, hashlib.sha256(data).hexdigest(), len(data))
        return data

    def locate(self, entry: FileEntry) -> Path:
        """Return the path of a listed file, whose content is not looked at.

        Raises:
            CheckFailed: it is missing, or reached over a link.
        """
        return locate(self.root, entry)

    def copy(self, entry: FileEntry, target: Path, *, links: bool = False) -> None:
        """Copy a listed file, which may be a link where ``links`` says so, to a new one; check what was copied.

        Raises:
            CheckFailed: the file is of another size or content, or a link.
        """
        path = self.root / entry.path if links else self.locate(entry)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_regular(path, links=links) as file, target.open("xb") as copy:
            fits = os.fstat(file.fileno()).st_size == entry.bytes  # else nothing is copied
            self._compare(entry, path, *hash_pieces(read_pieces(file), copy.write if fits else None))

    def _compare(self, entry: FileEntry, path: Path, sha256: str, size: int) -> None:
        if (sha256, size) != (entry.sha256, entry.bytes):
            raise CheckFailed(
                f"{path}: SHA-256 {sha256[:12]}… of {size} bytes; the manifest says {entry.sha256[:12]}… of "
                f"{entry.bytes}: the file was changed or damaged{_line_endings(path, entry.sha256)}: "
                "copy or export the bundle again"
            )

    def load_path(self, artifact: Artifact) -> Path:
        """Return the file of an artifact that its runtime loads, after checking everything that the runtime may read.

        Raises:
            CheckFailed: a file is not what the manifest says, or the runtime could reach one that was not checked.
            UsageError: a file is damaged, or of another format than the manifest says.
        """
        return self.open_artifact(artifact)[0].path

    def open_artifact(self, artifact: Artifact) -> tuple[OpenFile, ...]:
        """Return the files of an artifact, open, the one to load first, after checking all that an engine may read.

        Raises:
            CheckFailed: a file is not what the manifest says, or the runtime could reach one that was not checked.
            UsageError: a file is damaged, or of another format than the manifest says.
        """
        files = tuple(self.open(entry) for entry in artifact.files)
        self.inspect(artifact, files)
        return files

    def inspect(self, artifact: Artifact, files: Sequence[OpenFile]) -> None:
        """Check that an engine which is given an artifact's first file finds no other files than the artifact's.

        Raises:
            CheckFailed: it would.
            UsageError: a file is damaged, or of another format than the manifest says.
        """
        # Engines look for files of their own beside the one that they are given: a .bin beside an .xml.
        for name in self.unlisted(files[0].path.parent):
            raise CheckFailed(f"{self.root / name} is not listed in the manifest; expected no other files: remove it")
        registry.inspect_artifact(artifact.format, files, artifact.target)

    def unlisted(self, folder: Path | None = None) -> list[str]:
        """List files and links below a folder, or below the root, that the manifest does not list.

        What file managers leave wherever they look in (``.DS_Store``, ``Thumbs.db``) does not count.
        """
        known = {MANIFEST, SIGNATURE, *(entry.path for entry in self.manifest.entries)}
        found = (path.relative_to(self.root).as_posix() for path in _everything(folder or self.root))
        return sorted(name for name in set(found) - known if PurePosixPath(name).name not in _OF_FILE_MANAGERS)

    def check_all(self) -> None:
        """Check every listed file by its hash, and that no other file is there.

        This finds damage and mistakes. Somebody who can write the bundle can write its manifest too.

        Raises:
            CheckFailed: a file is missing, of another content, or not listed.
        """
        for entry in self.manifest.files:
            self.check(entry)
        for artifact in self.manifest.artifacts:
            self.load_path(artifact)
        if unlisted := self.unlisted():
            raise CheckFailed(f"{self.root}: {unlisted[0]!r} is not listed in the manifest; expected no other files")

    def golden(self) -> Golden:
        """Return the golden inputs and outputs, after checking their hash.

        Raises:
            CheckFailed: the file is not what the manifest says.
            UsageError: the bundle has none, or one that leaves out what the manifest leaves open.
        """
        path = self.root / GOLDEN
        for entry in self.manifest.files:
            if entry.path == GOLDEN:
                found = parse_golden(self.read(entry), path)
                if self.manifest.open_size and found.other_size is None:
                    raise UsageError(
                        f"{path}: height and width are open, and the golden file has one size; expected another one "
                        "as well: export the bundle again"
                    )
                return found
        raise UsageError(f"{self.root}: the manifest lists no {GOLDEN}; export the bundle again")

    def artifacts(self, format_name: str, precision: str | None = None) -> list[Artifact]:
        """Return the artifacts of a format, at one precision or at all."""
        return [
            artifact
            for artifact in self.manifest.artifacts
            if artifact.format == format_name and precision in (None, artifact.precision)
        ]


def locate(root: Path, entry: FileEntry) -> Path:
    """Return the path of a file below a folder, whose content is not looked at.

    Raises:
        CheckFailed: it is missing, or reached over a link.
    """
    path = root
    for part in PurePosixPath(entry.path).parts:
        path /= part
        if path.is_symlink():
            raise CheckFailed(f"{root / entry.path}: {path.name!r} is a link; expected the file itself: {_COPY}")
    if not path.is_file():
        raise CheckFailed(f"{path}: missing, or no file; expected the file that the manifest lists")
    return path


def open_bundle(named: Path) -> Bundle:
    """Open a bundle, a folder or a packed file, under the policy in force.

    A packed bundle is unpacked, and a folder of links copied, each file checked, to a temporary folder that lasts as
    long as what is returned.

    Raises:
        CheckFailed: a packed or linked file is not what its manifest says, or the policy asks for a signature that is
            not there.
        StageFailed: there is no room to unpack.
        UnavailableError: the policy asks for signatures, and the package that checks them is not installed.
        UsageError: there is no bundle, or its manifest cannot be read.
    """
    if not is_copied(named):
        manifest = read_manifest(named)
        admit(manifest, read_signature_file(named), str(named))
        return _bundle(named, manifest)
    # Named before it is made, so that an interrupt between the two leaves nothing.
    folder = announce(Path(tempfile.gettempdir()) / f"dmformer-{secrets.token_hex(8)}")
    try:
        folder.mkdir(mode=0o700)
        extract(named, folder) if named.is_file() else _copy_links(named, folder)
        bundle = _bundle(folder, read_manifest(folder), named)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise StageFailed(f"{named} could not be unpacked to {str(folder)!r}: {error.strerror or error}") from error
        raise
    weakref.finalize(bundle, shutil.rmtree, folder, ignore_errors=True)
    return bundle


def is_copied(named: Path) -> bool:
    """Return whether a bundle is opened as a copy: a packed file, or a folder of which the manifest is a link."""
    return named.is_file() or ((named / MANIFEST).is_symlink() and (named / MANIFEST).is_file())


def _copy_links(source: Path, folder: Path) -> None:
    """Copy a bundle of links to files into an empty folder; the policy is applied before anything is written."""
    manifest, signature = read_manifest(source, links=True), read_signature_file(source, links=True)
    admit(manifest, signature, str(source))
    linked = _bundle(source, manifest)
    entries = linked.manifest.entries
    for entry in entries:
        path = source / entry.path
        if not path.is_symlink():
            raise CheckFailed(
                f"{path}: missing, or no link, while {MANIFEST} is a link and no file; expected every file a link, or "
                f"none: {_COPY}"
            )
        if not path.is_file():
            raise CheckFailed(f"{path}: a link to no file ({str(path.readlink())!r}); {_COPY}")
    if foreign := linked.unlisted():
        raise CheckFailed(f"{source}: {foreign[0]!r} is not listed in the manifest; expected no other files")
    for entry in entries:
        linked.copy(entry, folder / entry.path, links=True)
    if signature is not None:
        (folder / SIGNATURE).write_bytes(signature)
    (folder / MANIFEST).write_bytes(manifest)


def own_bundle(folder: Path) -> Bundle:
    """Open a bundle without a policy: one that this program wrote or replaces, or that the caller admits itself.

    Raises:
        UsageError: there is no bundle, or its manifest cannot be read.
    """
    return _bundle(folder, read_manifest(folder))


def _bundle(folder: Path, manifest: bytes, origin: Path | None = None) -> Bundle:
    parsed = decode_manifest(manifest, str((origin or folder) / MANIFEST))
    return Bundle(folder, parsed, hashlib.sha256(manifest).hexdigest(), origin)


def read_manifest(root: Path, *, links: bool = False) -> bytes:
    """Return the bytes of a bundle's manifest, which may be a link where ``links`` says so.

    Raises:
        UsageError: there is none, or it is no file of a manifest's size.
    """
    path = root / MANIFEST
    try:
        if path.is_symlink() and not links:
            raise UsageError(f"no bundle at {str(root)!r} ({MANIFEST}: a link, no file); {_COPY}")
        if path.exists() and not path.is_file():
            raise UsageError(f"no bundle at {str(root)!r} ({MANIFEST}: no file); run: dmformer export")
        with open_regular(path, links=links) as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"no bundle at {str(root)!r} ({MANIFEST}: {error.strerror}); run: dmformer export") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise UsageError(f"{path}: more than {MAX_MANIFEST_BYTES >> 20} MiB; expected the manifest of a bundle")
    return data


def read_signature_file(root: Path, *, links: bool = False) -> bytes | None:
    """Return the bytes of a bundle's ``manifest.sig``, a link where ``links`` allows it; ``None`` where there is none.

    Raises:
        CheckFailed: it cannot be read, or is no file.
    """
    path = root / SIGNATURE
    if not os.path.lexists(path):
        return None
    if (path.is_symlink() and not links) or not path.is_file():
        raise CheckFailed(f"{path}: no file; expected a signature, or nothing")
    try:
        with open_regular(path, links=links) as file:
            data = file.read(MAX_SIGNATURE_BYTES + 1)
    except OSError as error:
        raise CheckFailed(f"{path}: cannot be read: {error.strerror}; expected a signature, or nothing") from error
    if len(data) > MAX_SIGNATURE_BYTES:
        raise CheckFailed(f"{path}: more than {MAX_SIGNATURE_BYTES} bytes; expected a signature")
    return data


def _line_endings(path: Path, sha256: str) -> str:
    """Say that line endings were rewritten, as git does with ``core.autocrlf``, where that makes a file's content."""
    if path.stat().st_size > _MOST_TEXT_BYTES:
        return ""
    data = path.read_bytes()
    plain = data.replace(b"\r\n", b"\n")
    for before in (plain, plain.removesuffix(b"\r"), plain.replace(b"\n", b"\r\n")):
        if hashlib.sha256(before).hexdigest() == sha256:
            return ' (its line endings were rewritten, as git\'s core.autocrlf does: put "* -text" into .gitattributes)'
    return ""


def _everything(folder: Path) -> Iterator[Path]:
    """Walk everything below a folder that is no folder itself; a link to one is not followed."""
    with os.scandir(folder) as found:
        for item in found:
            if item.is_dir(follow_symlinks=False):
                yield from _everything(Path(item.path))
            else:
                yield Path(item.path)
