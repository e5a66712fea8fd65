"""``python -m dmformer``, and the ``dmformer`` script."""

import sys
import warnings

from dmformer.process import supervise


def main() -> None:
    """Run the command line in a process that may crash."""
    supervise(_command_line)


def _command_line() -> None:
    from dmformer.cli import main

    if not sys.warnoptions:  # libraries' advice to programmers
        warnings.simplefilter("ignore")
    main()


if __name__ == "__main__":
    main()
