"""Write a bundle, as a folder or as one file, so that a reader sees the whole old one or the whole new one.

:mod:`dmformer.bundle.archive` says what kind of file a packed bundle is.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from dmformer.bundle.archive import SUFFIX, extract
from dmformer.bundle.manifest import GOLDEN, MANIFEST, SIGNATURE
from dmformer.bundle.reader import own_bundle, read_manifest, read_signature_file
from dmformer.errors import CheckFailed, StageFailed, UsageError
from dmformer.files import hash_pieces, open_regular, read_pieces, utf8_path, whole_file
from dmformer.ownership import is_own, resolve
from dmformer.process import announce
from dmformer.procfs import is_mount_point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dmformer.bundle.manifest import FileEntry, ProcessorEvidence
    from dmformer.bundle.reader import Bundle

_TOKEN_BYTES = 8
_PATIENCE_S = 2.0  # for a process that was killed a moment ago and is on its way out
_RETIRED = "old"
_LITTLE_BYTES = 1_000_000
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_MODE = stat.S_IFREG | 0o644
_UNIX = 3


def _check_replaceable(folder: Path) -> None:
    """A folder that is replaced goes away with all that is in it, so it must hold a bundle and nothing else."""
    try:
        foreign = own_bundle(folder).unlisted()
    except UsageError as error:
        raise UsageError(
            f"output {str(folder)!r} is a folder with other things in it than a bundle; "
            "expected a new one, an empty one or a bundle"
        ) from error
    if foreign:
        raise UsageError(
            f"output {str(folder)!r} is a bundle with another file in it, {foreign[0]!r}, which would be lost; "
            "move it away or choose another `output`"
        )


def check_outside(target: Path) -> None:
    """Refuse to write into a bundle: its manifest lists every file that may be in it.

    Args:
        target: a file or folder, there or not.

    Raises:
        UsageError: it would lie in a bundle, or another user's link leads there.
    """
    named = resolve(target.parent)
    for folder in (named, *named.parents, *resolve(target).parents):
        if (folder / MANIFEST).is_file() and (folder / GOLDEN).is_file():
            raise UsageError(
                f"output {str(target)!r} is inside the bundle {str(folder)!r}, which would not hold any more; expected "
                "a place outside it"
            )


def check_destination(destination: Path, replaceable: Callable[[Path], None] = _check_replaceable) -> None:
    """Refuse to replace what may not be replaced.

    Args:
        destination: a folder, there or not.
        replaceable: raises where a folder that is not empty may not be replaced; otherwise only bundles may.

    Raises:
        UsageError: something else is there, the folder cannot be written, or it would lie in another bundle.
    """
    check_outside(destination)
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"output {str(destination)!r} is a file; expected a folder")
    if is_mount_point(destination):
        raise UsageError(
            f"output {str(destination)!r} is a mount point, which no folder can replace; expected a folder in it, like "
            f"{str(destination / 'bundle')!r}"
        )
    if destination.is_dir() and any(destination.iterdir()):
        replaceable(destination)
    if destination.is_dir() and Path.cwd().is_relative_to(destination.resolve()):
        raise UsageError(f"output {str(destination)!r} is the working folder or above it; expected a folder in it")
    parent = destination.resolve().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"output {str(destination)!r}: {str(existing)!r} cannot be written; choose another `output`")


@contextmanager
def staged(destination: Path, replaceable: Callable[[Path], None] = _check_replaceable) -> Iterator[Path]:
    """A new folder that takes the place of ``destination`` when the block ends without an error.

    An error in the block, or the process's end at any moment, leaves the destination as it was. The folder lies in a
    hidden one beside the destination, which is for all that the work writes on its way: what a killed process leaves
    there, the next one removes.

    Args:
        destination: a folder, there or not.
        replaceable: as :func:`check_destination` has it.

    Raises:
        StageFailed: writing failed, for instance because the disk is full.
        UsageError: the destination cannot be used, another user's link leads there, or another process is writing it.
    """
    check_destination(destination, replaceable)
    destination = resolve(destination)  # through a link, so that the link stays
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination):
            _clear_leftovers(destination)
            staging = announce(_hidden(destination, secrets.token_hex(_TOKEN_BYTES)))
            try:
                folder = staging / "bundle"
                folder.mkdir(parents=True)
                with _full_disks_named(staging):
                    yield utf8_path(folder)
                _flush(folder)
                _put_in_place(folder, destination)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise StageFailed(f"{str(destination)!r} could not be written: {error.strerror or error}") from error


@contextmanager
def _full_disks_named(folder: Path) -> Iterator[None]:
    """Engines have words of their own for a disk that is full."""
    try:
        yield
    except StageFailed as error:
        free = shutil.disk_usage(folder).free
        if free >= _LITTLE_BYTES:
            raise
        raise StageFailed(
            f"{error}; the disk is full: {free / 1e6:.1f} MB are left at {str(folder.parent)!r}"
        ) from error


def _hidden(destination: Path, name: str) -> Path:
    return destination.with_name(f".{destination.name}-{name}")


@contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """One writer at a time; the system gives the lock back however the process that holds it ends."""
    from filelock import FileLock, Timeout

    path = _hidden(destination, "lock")
    # Made here, because a link that somebody put there beforehand would be followed, and its target emptied.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
    lock = FileLock(path, timeout=_PATIENCE_S)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"output {str(destination)!r} is being written by another process; wait for it to end, or write to "
            "another folder"
        ) from error
    try:
        yield
    finally:
        if os.name == "posix":  # with the lock held: who opened the file meanwhile sees that it has no name any more
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _clear_leftovers(destination: Path) -> None:
    """Remove what killed processes left, and put a bundle back that one of them had moved out of the way."""
    leftover = re.compile(re.escape(_hidden(destination, "").name) + rf"[0-9a-f]{{{2 * _TOKEN_BYTES}}}")
    for folder in destination.parent.iterdir():
        if leftover.fullmatch(folder.name) and _is_own_folder(folder):  # in a shared folder, others may have made some
            if not destination.exists() and _is_own_folder(folder / _RETIRED):
                (folder / _RETIRED).rename(destination)
            shutil.rmtree(folder)


def _is_own_folder(path: Path) -> bool:
    return is_own(path) and path.is_dir() and not path.is_symlink()


def _flush(folder: Path) -> None:
    """To the disk, before any name leads there: a device that loses power has the old bundle or the new one too."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() and os.name == "nt":  # folders cannot be opened there
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(folder: Path, destination: Path) -> None:
    """Rename; where a bundle is in the way, exchange the two in one system call: the old one is then ``folder``."""
    if not destination.exists():
        try:
            folder.rename(destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return  # otherwise another export has put its bundle there in the meantime
    if not _exchange(folder, destination):
        # No atomic exchange on this system: for a moment there is no bundle, but never a mixture.
        # Where the process ends in it, the next one puts the old bundle back.
        destination.rename(folder.with_name(_RETIRED))
        folder.rename(destination)


def _exchange(first: Path, second: Path) -> bool:
    """Linux's renameat2(2) with RENAME_EXCHANGE; False where the system or the file system has none."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(second))


def note_processors(bundle: Bundle, noted: Sequence[ProcessorEvidence]) -> str | None:
    """Add to a bundle's evidence how emulated processors answered; only the manifest is replaced, as a whole.

    Args:
        bundle: a folder that is not signed.
        noted: what takes the place of earlier evidence of the same subject; that of other artifacts' files goes.

    Returns:
        Why nothing was noted, where the bundle takes nothing in; nothing was changed then.

    Raises:
        StageFailed: the manifest could not be written.
        UsageError: another process is writing the bundle.
    """
    if bundle.origin is not None:
        return f"{bundle.origin} is packed, or a folder of links"
    if read_signature_file(bundle.root) is not None:
        return f"{bundle.root} is signed, and a signature is of the manifest as it is"
    folder = bundle.root.resolve()
    if not os.access(folder, os.W_OK) or not os.access(folder.parent, os.W_OK):
        return f"{bundle.root} cannot be written"
    with _locked(folder):
        manifest = own_bundle(folder).manifest  # as it is now
        files = {(artifact.format, artifact.precision, artifact.sha256) for artifact in manifest.artifacts}
        subjects = {one.subject for one in noted}
        earlier = (one for one in manifest.evidence.processors if one.subject not in subjects)
        processors = (*earlier, *noted)
        kept = tuple(one for one in processors if (one.format, one.precision, one.artifact_sha256) in files)
        evidence = replace(manifest.evidence, processors=kept)
        with whole_file(folder / MANIFEST) as staging:
            staging.write_bytes(replace(manifest, evidence=evidence).encode())
    return None


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
    if bundle.source.is_file():
        raise UsageError(f"{bundle.source} is packed already; expected the folder of a bundle")
    bundle.check_all()
    folder = bundle.source.resolve()
    target = destination or folder.with_name(folder.name + SUFFIX)
    target = resolve(target.parent) / target.name
    _check_replaceable_file(target)
    check_outside(target)
    with whole_file(target) as staging, staging.open("xb") as file:
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            for name, data in _unlisted_contents(bundle):
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
        raise UsageError(f"{str(source)!r} does not end in {SUFFIX}; expected `output`, the folder to write")
    target = destination or source.with_suffix("")
    with staged(target) as folder:
        extract(source, folder)
    return own_bundle(target)


def _check_replaceable_file(target: Path) -> None:
    """A file that is replaced is lost, so it must be a packed bundle."""
    if target.is_symlink() or (target.exists() and not (target.is_file() and _is_packed(target))):
        raise UsageError(f"output {str(target)!r} is there and no packed bundle; choose another `output`")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"output {str(target)!r}: expected a file in a folder that exists")


def _is_packed(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[:1] == [MANIFEST]
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def _unlisted_contents(bundle: Bundle) -> Iterator[tuple[str, bytes]]:
    """Give the name and content of what the manifest does not list: itself and its signature."""
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
    member = _member(entry.path)
    member.file_size = entry.bytes
    with open_regular(path) as file, archive.open(member, "w") as target:
        sha256, _ = hash_pieces(read_pieces(file), target.write)
    if sha256 != entry.sha256:
        raise CheckFailed(f"{path} changed while it was packed; run it again")
