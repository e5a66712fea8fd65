"""Open a bundle: nothing in it is parsed before its hash was checked, the manifest excepted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmformer.bundle.golden import Golden, load_golden
from dmformer.bundle.manifest import GOLDEN, MANIFEST, Artifact, FileEntry, Manifest, decode_manifest, hash_file
from dmformer.errors import CheckFailed, UsageError

MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and its manifest."""

    root: Path
    manifest: Manifest

    def check(self, entry: FileEntry) -> Path:
        """The file, once its size and SHA-256 were found to be the manifest's.

        Raises:
            CheckFailed: it is missing, leads out of the bundle, or is of another content.
        """
        path = self.root / entry.path
        if not path.is_file() or not path.resolve().is_relative_to(self.root.resolve()):
            raise CheckFailed(f"{path}: missing or outside the bundle; expected the file that the manifest lists")
        sha256, size = hash_file(path)
        if (sha256, size) != (entry.sha256, entry.bytes):
            raise CheckFailed(
                f"{path}: SHA-256 {sha256[:12]}… of {size} bytes; the manifest says {entry.sha256[:12]}… of "
                f"{entry.bytes}: the file was changed or damaged: copy or export the bundle again"
            )
        return path

    def load_path(self, artifact: Artifact) -> Path:
        """The file of an artifact that its runtime loads, after checking all its files.

        Raises:
            CheckFailed: a file is not what the manifest says.
        """
        paths = [self.check(entry) for entry in artifact.files]
        return paths[0]

    def entries(self) -> list[FileEntry]:
        """Every file that the manifest lists."""
        return [*self.manifest.files, *(file for artifact in self.manifest.artifacts for file in artifact.files)]

    def unlisted(self) -> list[str]:
        """Files below the bundle's folder that the manifest does not list, the manifest itself excepted."""
        listed = {MANIFEST, *(entry.path for entry in self.entries())}
        found = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir())
        return sorted(set(found) - listed)

    def check_all(self) -> None:
        """Every listed file by its hash, and no file that is not listed.

        This finds damage and mistakes. Somebody who can write the bundle can write its manifest too.

        Raises:
            CheckFailed: a file is missing, of another content, or not listed.
        """
        for entry in self.entries():
            self.check(entry)
        if unlisted := self.unlisted():
            raise CheckFailed(f"{self.root}: {unlisted[0]!r} is not listed in the manifest; expected no other files")

    def golden(self) -> Golden:
        """Golden inputs and outputs, after checking their hash.

        Raises:
            CheckFailed: the file is not what the manifest says.
            UsageError: the bundle has none.
        """
        for entry in self.manifest.files:
            if entry.path == GOLDEN:
                return load_golden(self.check(entry))
        raise UsageError(f"{self.root}: the manifest lists no {GOLDEN}; export the bundle again")

    def artifacts(self, format_name: str, precision: str | None = None) -> list[Artifact]:
        """Artifacts of a format, at one precision or at all."""
        return [
            artifact
            for artifact in self.manifest.artifacts
            if artifact.format == format_name and precision in (None, artifact.precision)
        ]


def open_bundle(root: Path) -> Bundle:
    """Read a bundle's manifest.

    Raises:
        UsageError: there is no bundle, or its manifest cannot be read.
    """
    path = root / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"no bundle at {str(root)!r} ({MANIFEST}: {error.strerror}); run: dmformer export") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise UsageError(f"{path}: more than {MAX_MANIFEST_BYTES >> 20} MiB; expected the manifest of a bundle")
    return Bundle(root, decode_manifest(data, str(path)))
