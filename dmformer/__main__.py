"""``python -m dmformer``."""

from dmformer.cli import main

main()
