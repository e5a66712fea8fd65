"""``python -m dmformer``, and the ``dmformer`` script."""

import gc
import sys
import warnings

from dmformer.process import supervise


def main() -> None:
    """Run the command line in a process that may crash."""
    supervise(_command_line)


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
