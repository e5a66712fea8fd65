"""The Python face: what ``help()`` shows, the page that is made of it, and the command line that says the same."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import runpy
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

import dmformer
from dmformer.cli import app
from dmformer.errors import UsageError
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


def test_the_page_has_every_function_of_the_package() -> None:
    groups = runpy.run_path(str(ROOT / "docs/api.py"))["GROUPS"]
    functions = {f"dmformer:{name}" for name in dmformer.__all__ if inspect.isfunction(getattr(dmformer, name))}
    assert set(groups["`import dmformer`"]) == functions


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


def test_a_module_below_such_a_package_is_imported_from_it() -> None:
    from dmformer.export import options
    from dmformer.verify.localize.case import run_case

    assert options.ExportOptions().formats == ("onnx",)
    assert callable(run_case)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"formats": []}, "no `formats`; expected at least one, for instance onnx"),
        ({"task": "bogus"}, "`task` is 'bogus'; expected one of classification"),
        ({"max_accuracy_drop": float("nan")}, "`max_accuracy_drop` is nan"),
    ],
)
def test_options_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        ExportOptions(**given)


def test_options_that_mean_the_same_are_the_same() -> None:
    assert ExportOptions(formats="onnx", precisions=["fp32"], options=None, engine=None) == ExportOptions(  # type: ignore[arg-type]
        formats=["onnx"], options={}
    )


def test_weights_alone_may_be_given_by_position() -> None:
    assert ExportOptions("w.pt").weights == "w.pt"
    with pytest.raises(TypeError):
        ExportOptions("w.pt", "dmformer_s")  # type: ignore[misc]
