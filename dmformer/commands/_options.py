"""Options and arguments that commands share, and the bundle that a command is about.

The policy options act by a callback, so that no command's body reads them: they put their policy in force for as long
as the command runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmformer.bundle.archive import SUFFIX
from dmformer.bundle.manifest import DEFAULT_BUNDLE
from dmformer.bundle.trust import Policy, policy, policy_in_force
from dmformer.commands._present import say
from dmformer.errors import DMFormerError, UsageError
from dmformer.export.options import EngineOptions, sentences
from dmformer.files import read_bounded, whole_file
from dmformer.ownership import is_own, is_shared, resolve

if TYPE_CHECKING:
    from dmformer.bundle.reader import Bundle


def _require_signature(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.with_resource(policy_in_force(replace(policy(), required=True)))
    return wanted


def _trust_keys(context: typer.Context, folder: Path | None) -> Path | None:
    if folder is not None:
        context.with_resource(policy_in_force(Policy(required=True, trusted_keys=folder)))
    return folder


def check_report_target(target: str | Path | None) -> str | Path | None:
    """Refuse a report file that cannot be written, before the work is done; the callback of options that name one.

    Raises:
        UsageError: its folder does not exist, it is a folder or a packed bundle, it would lie in a bundle, or another
            user's link leads there.
    """
    if target is not None and target != "-":
        from dmformer.bundle.writer import check_outside

        check_outside(Path(target))
        path = resolve(Path(target))
        if path.is_dir() or not path.absolute().parent.is_dir() or path.suffix == SUFFIX:
            raise UsageError(f"report {str(target)!r}: expected a file in a folder that exists, and no bundle")
    return target


DEBUG = "--debug"
_MOST_NOTE_BYTES = 1 << 16

BundleArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[BUNDLE]", help="Folder of the bundle, or a packed file; otherwise the one the last export wrote."
    ),
]
RuntimeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help="torch, onnxruntime (ort), openvino (ov), tensorrt (trt), ncnn or litert. Repeatable.",
    ),
]
PrecisionOption = Annotated[
    list[str] | None, typer.Option("--precision", metavar="P", help="fp32, fp16 or int8; otherwise all. Repeatable.")
]
ModuleOption = Annotated[
    str | None,
    typer.Option(
        "--module",
        metavar="FILE.py:NAME",
        help="Compare with this network of one's own, as dmformer export takes it. This runs the file's code.",
    ),
]
WeightsKeyOption = Annotated[
    str | None,
    typer.Option("--weights-key", metavar="KEY", help="Which of several sets of weights in --weights; . is the top."),
]
ModuleArgumentsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--module-option",
        metavar="KEY=VALUE",
        help="Arguments of what makes that network; otherwise those of the export. Repeatable.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads for one inference; otherwise all cores.")
]
SERVED = "A running server"  # panel of the options that ask one
ServedModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Of its models this one; otherwise those that are named as serve-layout names them.",
        rich_help_panel=SERVED,
    ),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=check_report_target,
        help="Write the report as JSON; - is standard output.",
    ),
]


def option(options: type, name: str, *flags: str, **how: Any) -> Any:
    """Typer's option for a field of a class of options, whose sentence is the help."""
    said, default = sentences(options)[name], getattr(options, name)
    if isinstance(default, tuple):
        said += " Repeatable" + (f"; otherwise {', '.join(default)}." if default else ".")
    return typer.Option(*flags, help=said, **how)


_engine = functools.partial(option, EngineOptions)
FlavourOption = Annotated[str, _engine("flavour", "--flavour", metavar="NAME")]
TargetOption = Annotated[list[str] | None, _engine("targets", "--target", metavar="SM")]
MinBatchOption = Annotated[int, _engine("min_batch", "--min-batch", min=1)]
OptBatchOption = Annotated[int, _engine("opt_batch", "--opt-batch", min=1)]
MaxBatchOption = Annotated[int, _engine("max_batch", "--max-batch", min=1)]
WorkspaceOption = Annotated[int | None, _engine("workspace_mb", "--workspace", metavar="MIB", min=1)]

# On every command that opens bundles. The environment is read by the policy itself, for callers in Python too: Typer's
# ``envvar`` would refuse a value that the policy takes for "yes".
RequireSignatureOption = Annotated[
    bool,
    typer.Option(
        "--require-signature",
        callback=_require_signature,
        help="Open only bundles signed by a trusted key; DMFORMER_REQUIRE_SIGNATURE=1 does the same.",
    ),
]
TrustedKeysOption = Annotated[
    Path | None,
    typer.Option(
        "--trusted-keys",
        metavar="DIR",
        callback=_trust_keys,
        help="Public keys (*.pem) whose signature is required; otherwise DMFORMER_TRUSTED_KEYS, or the user's own.",
    ),
]
# On every command, so that it may stand anywhere on the line; only the help of the whole shows it.
DebugOption = Annotated[bool, typer.Option(DEBUG, hidden=True)]


def json_to_output(arguments: list[str]) -> list[str]:
    """Give a ``--json`` without a file ``-``: commands that show what there is print it then.

    That is where an option follows it, or nothing, or what no report can replace: a folder or a packed bundle.
    """
    completed: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        completed.append(argument)
        if argument == "--json":
            option = following is None or (following.startswith("-") and following != "-")
            if option or Path(str(following)).is_dir() or str(following).endswith(SUFFIX):
                completed.append("-")
    return completed


def parse_pairs(pairs: list[str], option: str, example: str) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` pairs; a value is JSON where it reads as JSON, and otherwise a string.

    Raises:
        UsageError: a text is no pair.
    """
    values = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key or not text:
            raise UsageError(f"{option} {pair!r}; expected KEY=VALUE, for instance {example}")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def parse_numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Parse numbers that are parted by commas; ``None`` where there is no text.

    Raises:
        UsageError: a part is no number.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r}; expected numbers parted by commas, for instance 0.5,0.5,0.5") from error


def remember_bundle(folder: Path) -> None:
    """Note the bundle that was just written from this working folder; a home that cannot be written is no failure."""
    try:
        note = _note()
        note.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(resolve(note.parent) / note.name) as staging:
            staging.write_bytes(os.fsencode(folder.absolute()))
    except (OSError, RuntimeError, DMFormerError):  # RuntimeError: there is no home at all
        return


def bundle_path(named: Path | None) -> Path:
    """Return the path that the user named, or else that of the last bundle written from this working folder.

    Raises:
        UsageError: none is named, and there is no such folder, or it belongs to another user.
    """
    if named is not None:
        return named
    try:
        remembered = Path(os.fsdecode(read_bounded(_note(), _MOST_NOTE_BYTES))) if is_own(_note()) else None
    except (OSError, RuntimeError):
        remembered = None
    if remembered is not None and remembered.is_dir():
        return _own_folder(remembered, "the last bundle written from here")
    default = Path(DEFAULT_BUNDLE)
    if default.is_dir():
        return _own_folder(default, "the bundle that is taken where none is named") if is_shared(Path()) else default
    raise UsageError(f"no bundle named, and none at ./{DEFAULT_BUNDLE}; name one, or run: dmformer export")


def _own_folder(folder: Path, what: str) -> Path:
    """Return a folder that nobody named, after checking that it is still the user's: others may have put theirs there.

    Raises:
        UsageError: it belongs to another user.
    """
    if is_own(folder) and is_own(folder.resolve()):
        return folder
    raise UsageError(f"{what}, {str(folder)!r}, belongs to another user; expected one of yours: name the bundle")


def find_bundle(named: Path | None) -> Bundle:
    """Open the bundle at :func:`bundle_path`; say which it is where the user named none.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    from dmformer.bundle.reader import open_bundle

    bundle = open_bundle(bundle_path(named))
    if named is None:
        say(f"bundle {bundle.source}")
    return bundle


def _note() -> Path:
    """Return the file that remembers this working folder's bundle, in the user's state folder (XDG)."""
    import platformdirs

    key = hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()[:16]
    return platformdirs.user_state_path("dmformer") / f"last-bundle-{key}"
