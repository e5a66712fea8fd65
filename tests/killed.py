"""Kill processes that write a bundle, each one a moment later, and print what they leave, as JSON.

``python -m tests.killed exchange|rename DESTINATION``; ``rename`` is the way of systems that cannot exchange folders.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from dmformer.bundle import writer
from tests.test_bundle_writer import content_of, write


def killed_at(moment: int, destination: Path, content: str) -> bool:
    """Whether a process that was to write the content, and to die at its n-th audited event, did die."""
    child = os.fork()
    if not child:
        events = 0

        def hook(_: str, __: object) -> None:
            nonlocal events
            events += 1
            if events == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        write(destination, content)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main() -> None:
    how, destination = sys.argv[1], Path(sys.argv[2])
    if how == "rename":
        writer._exchange = lambda *_: False  # type: ignore[assignment]
    found: Counter[str] = Counter()
    wrong: list[str] = []
    write(destination, "old")
    moment = 1
    while killed_at(moment, destination, "new"):
        left = {path.name for path in destination.parent.iterdir()} - {destination.name}
        found["left something"] += bool(left)
        if destination.exists():
            contents = content_of(destination)
            if contents not in (("old", "old"), ("new", "new")):
                wrong.append(f"{moment}: {contents}")
            found[contents[0]] += 1
        elif how == "exchange":
            wrong.append(f"{moment}: no bundle")
        else:
            with suppress(ZeroDivisionError), writer.staged(destination):
                1 / 0  # the next export fails, so what is there is what was there  # noqa: B018
            found["put back"] += content_of(destination) == ("old", "old")
        write(destination, "old")
        if len(list(destination.parent.iterdir())) != 1:
            wrong.append(f"{moment}: {sorted(path.name for path in destination.parent.iterdir())} after the next write")
        moment += 1
    json.dump({"wrong": wrong, "kills": moment - 1, **dict.fromkeys(("put back",), 0), **found}, sys.stdout)


if __name__ == "__main__":
    main()
