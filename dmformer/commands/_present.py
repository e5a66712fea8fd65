"""Where the output of commands goes, and what it looks like: messages, progress, tables, reports."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dmformer.errors import StageFailed
from dmformer.ownership import is_own, is_shared, resolve
from dmformer.process import printing_to_stderr
from dmformer.text import plain, plain_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType
    from rich.progress import Task
    from rich.table import Table
    from rich.text import Text

    from dmformer.bundle.manifest import Artifact
    from dmformer.progress import Advance

_PIPED_WIDTH = 120
FLAGS: dict[str, str] = {}  # of the whole command line, which fills it, by the arguments that they stand for


def in_flags(text: str) -> str:
    """Write a sentence of Python's functions, which name arguments in backticks, in flags of the command line."""
    return re.sub(r"`(\w+)`", lambda named: FLAGS.get(named[1], named[0]), text)


def shown(text: str) -> str:
    """Return a text as it is printed on one line: in flags of the command line, and without control characters."""
    return plain(in_flags(text))


def _console(stderr: bool, **settings: Any) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, **settings)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def messages() -> Console:
    """Return the console of progress and messages: standard error, so that standard output can be piped."""
    return _console(stderr=True, soft_wrap=True)


def results(json_target: str | None = None) -> Console:
    """Return the console of results: standard output, unless JSON goes there."""
    return _console(stderr=json_target == "-")


def say(line: str) -> None:
    """Print one line to standard error."""
    messages().print(shown(line))


def table(title: str, columns: Sequence[str], numeric: Sequence[str] = ()) -> Table:
    """Make an empty table; the columns named in ``numeric`` are set flush right."""
    from rich import box
    from rich.table import Table

    empty = Table(
        title=plain(title) or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in columns:
        empty.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return empty


def add_row(listing: Table, cells: Sequence[str | Text]) -> None:
    """Add a row of literal texts: nothing in them is markup."""
    from rich.text import Text

    listing.add_row(*(Text(shown(cell)) if isinstance(cell, str) else cell for cell in cells))


def mark(good: bool, bad: str = "no") -> Text:
    """Return a green ok, or a word in red."""
    from rich.text import Text

    return Text("ok", style="green") if good else Text(bad, style="bold red")


def show(renderable: RenderableType, json_target: str | None = None) -> None:
    """Print a result."""
    results(json_target).print(shown(renderable) if isinstance(renderable, str) else renderable)


def write_json(report: Any, target: str | None) -> None:
    """Write a report as indented JSON to a file or to standard output; nothing where no target was given."""
    if target is None:
        return
    from dmformer.files import indented_json

    data = indented_json(report)
    write_data(plain_json(data) if target == "-" else data, target)


def write_data(data: bytes, target: str) -> None:
    """Write a report that is encoded to a file, as :func:`write_report` does, or to standard output, which ``-`` is."""
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    write_report(Path(target), data)


def write_report(path: Path, data: bytes) -> None:
    """Write the file of a report or a picture, all of it or nothing, through a link too; or into a pipe or a device.

    Raises:
        StageFailed: it could not be written, or is another user's pipe in a shared folder.
        UsageError: another user's link in a shared folder leads there.
    """
    from dmformer.files import whole_file

    target = resolve(path)
    if path.exists() and not path.is_file():
        if not is_own(target) and is_shared(target.parent):
            raise StageFailed(f"{str(path)!r} is no file, and another user's in a shared folder; choose another file")
        try:
            with _open_to_write(path) as file:
                file.write(data)
        except OSError as error:
            raise StageFailed(f"{str(path)!r} could not be written: {error.strerror or error}") from error
        return
    with whole_file(target) as staging:
        staging.write_bytes(data)


def _open_to_write(path: Path) -> IO[bytes]:
    """Open a pipe or a device; for a named pipe, wait until somebody reads it, but not for good.

    Raises:
        StageFailed: nobody does.
    """
    deadline = time.monotonic() + READER_S
    while path.is_fifo():
        try:
            pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise StageFailed(f"{str(path)!r} is a pipe that nobody reads; waited {READER_S:.0f} s") from error
            time.sleep(0.05)
        else:
            os.set_blocking(pipe, True)
            return os.fdopen(pipe, "wb")
    return path.open("wb")


READER_S = 60.0  # that a pipe's other end may be late
_SILENT_S = 10.0  # after which a stage tells how far it is where there is no terminal


class Stages:
    """A line and a bar for each stage: live on a terminal, one plain line when it ends elsewhere."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Parts(MofNCompleteColumn):
            """Nothing for a stage of unknown length."""

            def render(self, task: Task) -> Text:
                return super().render(task) if (task.total or 0) > 1 else Text()

        class Remaining(TimeRemainingColumn):
            """Nothing for a stage of unknown length, or one that has ended."""

            def render(self, task: Task) -> Text:
                if (task.total or 0) <= 1 or task.finished:
                    return Text()
                return Text.assemble(super().render(task), " left")

        self.live = console.is_terminal
        self.console = console
        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            Parts(),
            TimeElapsedColumn(),
            Remaining(),
            console=console,
            disable=not self.live,
        )

    @contextmanager
    def stage(self, name: str, parts: int | None = None) -> Iterator[Advance]:
        """One stage; its bar moves while it runs, by parts where they are known, and is full when it is done."""
        begun = time.monotonic()
        task = self.progress.add_task(plain(name), total=parts)
        ended, said = 0, begun

        def advance() -> None:
            nonlocal ended, said
            ended += 1
            self.progress.advance(task)
            now = time.monotonic()
            if not self.live and parts is not None and ended < parts and now - said >= _SILENT_S:
                said = now
                left = (now - begun) / ended * (parts - ended)
                self.console.print(f"{plain(name)}: {ended} of {parts} in {now - begun:.0f} s, about {left:.0f} s left")

        yield advance
        self.progress.update(task, total=parts or 1, completed=parts or 1)
        self.progress.stop_task(task)
        if not self.live:
            self.console.print(f"{plain(name)}: {time.monotonic() - begun:.1f} s")

    def say(self, line: str) -> None:
        """Print one line above the bars."""
        self.console.print(shown(line))


@contextmanager
def stages() -> Iterator[Stages]:
    """Show progress on standard error for the length of the block; what else is printed meanwhile goes there too."""
    opened = Stages(messages())
    with printing_to_stderr(), opened.progress:
        yield opened


def artifact_findings(artifacts: Sequence[Artifact]) -> Table:
    """Make a table of what was measured of artifacts when they were made: precision of layers, accuracy lost, speed."""
    from rich.text import Text

    from dmformer.bench.sentences import digits
    from dmformer.runtimes.inspector import describe_layers

    columns = ["artifact", "size", "computes", "points lost", "p50 ms", "against fp32"]
    listing = table("Artifacts, as measured where they were made", columns, numeric=["size", "points lost", "p50 ms"])
    for artifact in artifacts:
        speed = artifact.speed
        verdict: str | Text = "-"
        if speed is not None and artifact.precision != "fp32":
            noise = "unknown" if speed.noise_floor is None else f"{speed.noise_floor:.0%}"
            words = f"takes {speed.ratio:.2f} times as long" if speed.slower else f"a tie, noise {noise}"
            verdict = Text(f"{words}: does not earn its place", style="yellow")
            if speed.faster:
                verdict = f"{1 / speed.ratio:.2f} times as fast"
        cells = [
            f"{artifact.format} {artifact.precision}",
            megabytes(artifact.bytes),
            describe_layers(artifact.layers) or "-",
            "-" if artifact.points_lost is None else f"{round(artifact.points_lost, 2) + 0.0:.2f}",
            "-" if speed is None else digits(speed.p50_ms),
            verdict,
        ]
        add_row(listing, cells)
    return listing


def tied_to(artifact: Artifact) -> str:
    """Say what a compiled artifact is tied to; nothing for one that any machine can load."""
    tied = artifact.target
    if tied is None:
        return ""
    capabilities = ", ".join(tied.compute_capabilities)
    return f"{tied.platform}, SM {capabilities}, batch {tied.min_batch} to {tied.max_batch}"


def percent(share: float | None) -> str:
    """Write a share from 0 to 1 in percent; a dash for what is not known."""
    return "-" if share is None else f"{share:.2%}"


def megabytes(size: int) -> str:
    """Write a number of bytes as MB (10^6)."""
    return f"{size / 1e6:.1f} MB"
