"""Whether a package is whole, by its files: importing an engine takes longer than everything else that is asked of it.

What pip wrote down when it installed the package (``RECORD``: every file with its size) is compared with what is there:
missing and cut libraries show, and those for another processor or Python, as in a copied environment. Whether an engine
loads is known only once it was loaded.
"""

from __future__ import annotations

import csv
import re
import sys
from contextlib import suppress
from fnmatch import fnmatch
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

_LIBRARY = re.compile(r"\.(so|pyd|dylib|dll)(\.[\w.]+)?$")


def whole(package: str, extension: str, *needed: str) -> str | None:
    """The version of an installed package whose libraries are all there; ``None`` where the files do not tell.

    That is also where it is imported already, which knows better, and where it was not installed by pip.

    Args:
        package: import name, and name of the distribution.
        extension: path of its extension module below the folder of all packages, without suffix.
        needed: patterns of libraries that must be among its files, below the same folder.
    """
    if package in sys.modules:
        return None
    with suppress(ImportError, ValueError, OSError, metadata.PackageNotFoundError):
        spec, distribution = find_spec(package), metadata.distribution(package)
        main = Path(str(distribution.locate_file(f"{package}/__init__.py")))
        record = distribution.read_text("RECORD")
        if spec is None or spec.origin is None or record is None or not main.samefile(spec.origin):
            return None  # not installed, or another package of the same name comes first
        libraries = _libraries(record)
        wanted = [[extension + suffix for suffix in EXTENSION_SUFFIXES], *([pattern] for pattern in needed)]
        if not all(any(fnmatch(name, one) for name in libraries for one in patterns) for patterns in wanted):
            return None
        if all(_is_as_recorded(Path(str(distribution.locate_file(name))), size) for name, size in libraries.items()):
            return distribution.version
    return None


def _libraries(record: str) -> dict[str, int | None]:
    """Shared libraries of a distribution: path below the folder of packages, and size in bytes."""
    lines = [line for line in record.splitlines() if _LIBRARY.search(line.partition(",")[0])]
    return {name: int(size) if size else None for name, _, size in csv.reader(lines)}


def _is_as_recorded(path: Path, size: int | None) -> bool:
    return path.stat().st_size == size and _processor(path) == _processor(Path(sys.executable))


def _processor(path: Path) -> bytes | None:
    """For which a file is: word size, byte order and machine of an ELF header; ``None`` on systems without ELF."""
    with path.open("rb") as file:
        header = file.read(20)
    return header[4:6] + header[18:20] if header.startswith(b"\x7fELF") else None
