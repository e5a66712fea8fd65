"""What imports what: nothing heavy before it is needed, nothing of PyTorch on a device, dependencies downwards only."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

import dmformer
from dmformer.schemas.__main__ import TYPES, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dmformer.export.cached import ExportResult

PACKAGE = Path(dmformer.__file__).parent
ENGINES = ("torch", "onnx", "onnxsim", "onnxruntime", "openvino", "safetensors", "cryptography")
COMMANDS = (
    "export", "build", "verify", "bench", "predict", "inspect", "doctor", "eval", "sign", "check", "pack", "unpack",
    "cache", "serve-layout", "train", "tune", "report",
)  # fmt: skip

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
BLOCKED = set(BLOCKED_NAMES)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, *arguments: object, blocked: tuple[str, ...] = ()) -> str:
    """Run code in a process in which some packages cannot be imported; returns its standard output."""
    script = BLOCKER.replace("BLOCKED_NAMES", repr(list(blocked))) + code
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(code: str, *arguments: object) -> set[str]:
    """The top-level packages that a process has imported when the code has run."""
    tail = '\nprint("\\n" + "@" + " ".join({name.partition(".")[0] for name in sys.modules}))\n'
    return set(python(code + tail, *arguments).rpartition("@")[2].split())


HELP = """
import json
from dmformer.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["dmformer", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, ended.code
    found = ENGINES & {name.partition(".")[0] for name in sys.modules}
    assert not found, (arguments, found)
"""


def test_importing_the_package_costs_nothing() -> None:
    found = imported("import dmformer; dir(dmformer); dmformer.__version__")
    assert "dmformer" in found
    assert not found & {*ENGINES, "numpy", "PIL", "typer", "rich", "msgspec"}


def test_the_lazy_names_are_there() -> None:
    for name in dmformer.__all__:
        assert getattr(dmformer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dmformer.nothing  # noqa: B018


def test_help_imports_no_engine() -> None:
    said = python(
        HELP.replace("ENGINES", repr(set(ENGINES))),
        json.dumps([["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)]),
    )
    assert said.count("Usage: dmformer") == 1 + len(COMMANDS)


def test_the_check_sees_an_import() -> None:
    assert "sqlite3" in imported("import sqlite3")
    with pytest.raises(AssertionError, match="json is blocked"):
        python("import json", blocked=("json",))


def device_modules() -> list[str]:
    rooms = (
        "assets",
        "runtimes",
        "bundle",
        "serve",
        "device",
        "data",
        "page",
        "bench",
        "verify",
        "signoff",
        "tuning",
        "layouts",
        "commands",
    )
    found = [
        "dmformer",
        "dmformer.cli",
        *(
            f"dmformer.{name}"
            for name in ("cache", "errors", "files", "machine", "names", "ownership", "process", "progress", "text")
        ),
    ]
    for room in rooms:
        found.append(f"dmformer.{room}")
        found += [f"dmformer.{room}.{module.name}" for module in pkgutil.walk_packages([str(PACKAGE / room)])]
    return found


def test_every_module_of_a_device_imports_without_an_engine() -> None:
    code = """
import importlib
failed = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{name}: {error}")
print(failed)
"""
    modules = device_modules()
    assert len(modules) > 25
    assert python(code, *modules, blocked=ENGINES).strip() == "[]"


@pytest.mark.slow
def test_a_device_needs_one_runtime_only(exported: ExportResult, tmp_path: Path) -> None:
    code = """
import json
import dmformer
from dmformer.bench import api
from dmformer.assets import SAMPLE_IMAGES
api.ROUNDS = 1
bundle = sys.argv[1]
with dmformer.load(bundle) as predictor:
    (prediction,) = predictor.predict([SAMPLE_IMAGES / "3.png"], top_k=1)
parity = dmformer.verify(bundle)
report = dmformer.bench(bundle, duration_s=0.03)
print(json.dumps({
    "class": prediction.classes[0].name,
    "runtimes": sorted({check.runtime for check in parity.checks}),
    "passed": parity.passed,
    "skipped": len(parity.skipped),
    "bench": [(row.runtime, row.status != "failed", row.reason) for row in report.results],
    "engines": sorted(BLOCKED & set(sys.modules)),
}))
"""
    blocked = tuple(name for name in ENGINES if name != "onnxruntime")
    answer = json.loads(python(code, exported.output, blocked=blocked))
    assert answer["class"] == "3"
    assert answer["runtimes"] == ["numpy", "onnxruntime"]
    assert answer["passed"]
    assert answer["skipped"] == 2
    assert [row[:2] for row in answer["bench"]] == [["onnxruntime", True]], answer["bench"]
    assert answer["engines"] == []


@pytest.mark.slow
def test_a_device_that_labels_pixels_needs_one_runtime_only(
    segmentation_open: ExportResult, few_scenes: Path, tmp_path: Path
) -> None:
    code = """
import json
import dmformer
from dmformer.bench import api
from dmformer.verify.evaluate import evaluate
api.ROUNDS = 1
bundle, scenes, picture = sys.argv[1:]
with dmformer.load(bundle) as predictor:
    (found,) = predictor.segment(scenes + "/images/validation/0000.png")
found.overlay().save(picture)
parity = dmformer.verify(bundle)
accuracy = evaluate(bundle, scenes)
report = dmformer.bench(bundle, duration_s=0.03)
print(json.dumps({
    "class": found.classes[0].name,
    "runtimes": sorted({check.runtime for check in parity.checks}),
    "passed": parity.passed,
    "labelled": accuracy.results[0].miou is not None,
    "agreement": [accuracy.torch, accuracy.results[0].agreement_with_torch],
    "bench": [(row.runtime, row.status != "failed", row.reason) for row in report.results],
    "engines": sorted(BLOCKED & set(sys.modules)),
}))
"""
    bundle = segmentation_open.output
    blocked = tuple(name for name in ENGINES if name != "onnxruntime")
    answer = json.loads(python(code, bundle, few_scenes, tmp_path / "picture.png", blocked=blocked))
    assert answer["class"] == "background"
    assert answer["runtimes"] == ["numpy", "onnxruntime"]
    assert answer["passed"]
    assert answer["labelled"]
    assert answer["agreement"] == [None, None]
    assert [row[:2] for row in answer["bench"]] == [["onnxruntime", True]], answer["bench"]
    assert answer["engines"] == []
    assert (tmp_path / "picture.png").is_file()


# From top to bottom; a module may import from its own line and from those below.
LAYERS = (
    "__main__",
    "cli",
    "commands",
    "schemas",
    "train",
    "export",
    "signoff",
    "tuning",
    "layouts",
    "verify",
    "bench",
    "page",
    "serve",
    "device",
    "bundle",
    "graph",
    "runtimes",
    "models",
    "data",
    "assets",
    "cache",
    "files",
    "names",
    "text",
    "ownership",
    "process",
    "machine",
    "procfs",
    "progress",
    "task",
    "_optional",
    "errors",
    "__init__",
)
# (module, room that it imports from): why it may.
EXCEPTIONS = {
    ("__init__", room): "names for type checkers; users' names are loaded when they are first used"
    for room in ("bench", "export", "models", "serve", "signoff", "tuning", "verify")
}


NAMED = re.compile(r"dmformer(\.\w+)+(:\w+)?")


def room_of(module: str) -> str:
    """``dmformer.bundle.reader`` -> ``bundle``; ``dmformer`` -> ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def module_name(path: Path) -> str:
    parts = ["dmformer", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of each import of our own, wherever in the file it stands; a string that names one counts too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if is_module(name) else str(node.module) for name in inside]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
            found = [name for name in [node.value.partition(":")[0]] if is_module(name)]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.partition(".")[0] == "dmformer")


def upward(path: Path) -> Iterator[str]:
    room = room_of(module_name(path))
    for line, name in imports(path):
        other = room_of(name)
        if LAYERS.index(other) < LAYERS.index(room) and (room, other) not in EXCEPTIONS:
            yield f"{path.relative_to(PACKAGE)}:{line}: {room} imports {name}"


def test_dependencies_point_downwards() -> None:
    assert [wrong for path in sorted(PACKAGE.rglob("*.py")) for wrong in upward(path)] == []


def test_every_exception_is_still_one() -> None:
    found = {(room_of(module_name(path)), room_of(name)) for path in PACKAGE.rglob("*.py") for _, name in imports(path)}
    assert set(EXCEPTIONS) <= found


@pytest.mark.parametrize(
    "code",
    [
        "import dmformer.bundle.reader",
        "from dmformer.bundle.reader import open_bundle",
        "from dmformer import cli",
        "def f():\n    from dmformer.bench import api",
        "if TYPE_CHECKING:\n    from dmformer.commands import bench",
        "MAKER = 'dmformer.bundle.reader:open_bundle'",
        "CHILD = 'dmformer.bundle.reader'",
    ],
)
def test_an_upward_import_is_seen(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runtimes" / "bad.py"
    path.parent.mkdir()
    path.write_text(code)
    monkeypatch.setattr(sys.modules[__name__], "module_name", lambda _: "dmformer.runtimes.bad")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "is_module", lambda name: name != "dmformer.bundle.reader.open_bundle")
    assert len(list(upward(path))) == 1


@pytest.mark.parametrize("name", TYPES)
def test_schemas_are_those_of_the_types(name: str) -> None:
    assert (PACKAGE / "schemas" / f"{name}.json").read_bytes() == encode(TYPES[name])


def test_no_schema_is_left_over() -> None:
    assert {path.stem for path in (PACKAGE / "schemas").glob("*.json")} == set(TYPES)


def test_a_changed_type_changes_its_schema() -> None:
    changed = msgspec.defstruct("PredictReport", [("added", int)], bases=(TYPES["predict"],), kw_only=True)
    assert encode(changed) != encode(TYPES["predict"])
