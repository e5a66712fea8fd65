"""``python -m dmformer``, and the ``dmformer`` script."""

import gc
import os
import sys
import warnings

from dmformer.process import supervise


def main() -> None:
    """Run the command line in a process that may crash."""
    _open_closed_streams()
    supervise(_command_line)


def _open_closed_streams() -> None:
    """Let streams that were closed when this process began lead nowhere; files would take their numbers otherwise."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))


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
