"""Whose bundles a command takes: options that stand on every command that opens bundles, and reach no further.

They set the policy for the length of the command; the place that opens bundles asks it.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

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
        from dmformer.bundle.trust import Policy, policy, policy_in_force

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
