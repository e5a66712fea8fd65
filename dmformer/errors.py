"""Every failure that the tool reports as one line, and the exit code each kind ends with."""

from __future__ import annotations


class DMFormerError(Exception):
    """The work failed. The message is one line: what was received, what was expected, what to do."""

    exit_code = 1


class CheckFailed(DMFormerError):
    """A check did not hold: parity, accuracy or integrity."""


class StageFailed(DMFormerError):
    """A stage of an export, or a runtime at work, broke."""


class UsageError(DMFormerError, ValueError):
    """Wrong usage, or input that cannot be used."""

    exit_code = 2


class UnavailableError(DMFormerError):
    """What was asked for cannot run on this machine."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that says something, or the name of its class."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
