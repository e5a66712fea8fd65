"""The Python face: what ``help()`` shows, the page that is made of it, and the command line that says the same."""

from __future__ import annotations

import ast
import inspect
import pydoc
import runpy
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import pytest
import typer.main

import dmformer
from dmformer.cli import app
from dmformer.export.options import EngineOptions, ExportOptions, sentences
from tests.conftest import ROOT

PACKAGE = Path(dmformer.__file__).parent
# Names that rooms share because they implement one contract, or that no user of another room sees.
ONE_CONTRACT = {"main"}


def test_help_shows_every_option_of_an_export() -> None:
    shown = pydoc.plain(pydoc.render_doc(dmformer.export))
    for option in fields(ExportOptions):
        assert f"{option.name}: " in shown.partition("Args:")[0]
        assert f"{option.name}: {sentences(ExportOptions)[option.name]}" in shown


@pytest.mark.parametrize("name", ["export", "bench", "verify"])
def test_a_package_never_hides_its_function(name: str) -> None:
    import dmformer.bench.api
    import dmformer.export.run
    import dmformer.verify.api

    assert inspect.isfunction(getattr(dmformer, name))


def test_the_page_is_made_from_the_signatures() -> None:
    made = runpy.run_path(str(ROOT / "docs/api.py"))["page"]()
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == made, "run: python docs/api.py"


def test_the_command_line_has_every_option_with_its_default_and_sentence() -> None:
    command = typer.main.get_command(app).commands["export"]  # type: ignore[attr-defined]
    flags = {parameter.name: parameter for parameter in command.params}
    for kind in (ExportOptions, EngineOptions):
        for option in fields(kind):
            if option.name in ("stage", "engine"):  # Python's alone, and the class of the options that follow
                continue
            flag = flags[option.name]
            assert flag.help.startswith(sentences(kind)[option.name])
            given = None if isinstance(flag.default, (list, tuple)) and not flag.default else flag.default
            assert given in (option.default, None) or str(given) == option.default


def public_names() -> dict[str, list[str]]:
    found = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room == "commands":  # each is called after the function that it presents
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found[node.name].append(room)
    return found


def test_a_public_name_means_one_thing() -> None:
    shared = {name: rooms for name, rooms in public_names().items() if len(rooms) > 1 and name not in ONE_CONTRACT}
    assert shared == {}
