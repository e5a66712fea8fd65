"""Make docs/run.svg: a real run of the commands that the README begins with, as a terminal shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "dmformer export --format onnx --format openvino",
    "dmformer verify",
    "dmformer bench",
    "dmformer predict dmformer/assets/digits/7.png --top-k 3",
)


def main() -> None:
    """Run the commands and draw what they print on standard output."""
    console = Console(record=True, width=100, file=Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dmformer").symlink_to(ROOT / "dmformer")
        environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100", "XDG_STATE_HOME": f"{folder}/state"}
        for command in COMMANDS:
            console.print(Text(f"$ {command}", style="bold"))
            arguments = [sys.executable, "-m", *command.split()]
            done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, env=environment, check=True)
            console.print(Text.from_ansi(done.stdout))
    svg = console.export_svg(title="dmformer")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # any monospaced font will do; nothing is fetched
    (ROOT / "docs/run.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
