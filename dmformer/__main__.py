"""``python -m dmformer``, and the ``dmformer`` script."""

import gc
import os
import sys
import warnings

from dmformer.process import supervise


def main() -> None:
    """Run the command line in a process that may crash."""
    _open_standard_streams()
    supervise(_command_line)


def _open_standard_streams() -> None:
    """Let what was closed lead nowhere: the next file that is opened would take its number, and be written to."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _command_line() -> None:
    # PyTorch alone makes half a million objects that stay: to look through them for garbage takes up to a second.
    gc.set_threshold(10_000)
    from dmformer.cli import main

    if not sys.warnoptions:  # libraries' advice to programmers
        warnings.simplefilter("ignore")
    try:
        main()
    finally:
        gc.freeze()  # nor at the interpreter's end


if __name__ == "__main__":
    main()
