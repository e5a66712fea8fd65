"""Options whose values are pairs, or one of a few words.

Whose bundles a command takes: options that stand on every command that opens bundles, and reach no further.

They set the policy for the length of the command; the place that opens bundles asks it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dmformer.bundle.manifest import DEFAULT_BUNDLE
from dmformer.bundle.reader import Bundle, open_bundle
from dmformer.errors import UsageError
from dmformer.export.options import EngineOptions, sentences

if TYPE_CHECKING:
    from collections.abc import Callable


def remember(bundle: Path) -> None:
    """Note the bundle that was just written from this working folder; a home that cannot be written is no failure."""
    try:
        note = _note()
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(bundle.absolute()), encoding="utf-8")
    except (OSError, RuntimeError, UnicodeError):  # RuntimeError: there is no home at all
        return


def find_bundle(named: Path | None) -> Bundle:
    """Open the bundle that was named, or else the last one written from this working folder.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    return open_bundle(bundle_path(named))


def bundle_path(named: Path | None) -> Path:
    """Where the bundle is that was named, or else the last one written from this working folder.

    Raises:
        UsageError: none is named, and there is no such folder.
    """
    if named is not None:
        return named
    try:
        remembered = Path(_note().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, UnicodeError):
        remembered = Path(DEFAULT_BUNDLE)
    for candidate in (remembered, Path(DEFAULT_BUNDLE)):
        if candidate.is_dir():
            return candidate
    raise UsageError(f"no bundle named, and none at ./{DEFAULT_BUNDLE}; name one, or run: dmformer export")


def _note() -> Path:
    """One small file for each working folder, in the user's state folder (XDG Base Directory Specification)."""
    import platformdirs

    key = hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()[:16]
    return platformdirs.user_state_path("dmformer") / f"last-bundle-{key}"


T = TypeVar("T", bound=str)


def parse_choice(value: str | None, words: tuple[T, ...], option: str) -> T | None:
    """One of the words, in any case.

    Raises:
        UsageError: it is none of them.
    """
    if value is None:
        return None
    for word in words:
        if word == value.lower():
            return word
    raise UsageError(f"{option} {value!r}; expected one of {', '.join(words)}")


def parse_pairs(pairs: list[str], option: str, example: str) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value is JSON where it reads as JSON, and a plain word otherwise.

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


def option(options: type, field: str, *flags: str, **how: Any) -> Any:
    """Typer's option for a field of a class of options, whose sentence is the help."""
    said, default = sentences(options)[field], getattr(options, field)
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


RequireOption = Annotated[
    bool,
    typer.Option(
        "--require-signature",
        help="Open only bundles signed by a trusted key; DMFORMER_REQUIRE_SIGNATURE=1 does the same.",
    ),
]
TrustedOption = Annotated[
    Path | None,
    typer.Option(
        "--trusted-keys",
        metavar="DIR",
        help="Public keys (*.pem) whose signature is required; otherwise DMFORMER_TRUSTED_KEYS, or the user's own.",
    ),
]


def under_policy(command: Callable[..., None]) -> Callable[..., None]:
    """The command with ``--require-signature`` and ``--trusted-keys`` after its own options."""

    @functools.wraps(command)
    def run(*, require_signature: bool, trusted_keys: Path | None, **given: Any) -> None:
        from dmformer.bundle.trust.policy import Policy, policy, policy_in_force

        default = policy()
        chosen = Policy(
            required=require_signature or trusted_keys is not None or default.required,
            trusted_keys=trusted_keys or default.trusted_keys,
        )
        with policy_in_force(chosen):
            command(**given)

    signature = inspect.signature(command, eval_str=True)
    options = (
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, default, annotation in (
            ("require_signature", False, RequireOption),
            ("trusted_keys", None, TrustedOption),
        )
    )
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *options]
    )
    return run
