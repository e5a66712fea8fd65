"""Files that are there whole or not at all."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dmformer.errors import StageFailed
from dmformer.supervise import announce

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` when the block ends, in the place of an older file; or nothing does.

    Raises:
        StageFailed: it could not be written, or is a pipe or a device, which a file must not replace.
    """
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise StageFailed(f"{str(target)!r} is no file; expected a new one, or one to be replaced")
    staging = announce(target.with_name(f".{target.name}-{secrets.token_hex(8)}"))
    try:
        try:
            yield staging
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise StageFailed(f"{str(target)!r} could not be written: {error.strerror or error}") from error
