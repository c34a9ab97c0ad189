"""Errors that end the command line in one line, and suggestions. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What a person asked for cannot be done; the message says what, where and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


class Stopped(Exception):
    """A run ended in order before its last step; the message says why, and how to go on.

    Args:
        message: empty on ranks other than zero.
        status: of the process.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def first_line(error: BaseException) -> str:
    """What an error says first, for a line of ours; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of an error message: the nearest choice, if one is near, and all of them."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    suggestion = f"did you mean '{near[0]}'? " if near else ""
    return f"{suggestion}Have: {', '.join(choices) or 'none'}"


def check_arguments(subject: str, given: Iterable[str], accepted: Iterable[str]) -> None:
    """Raise UserError if a name is given that is not accepted.

    Args:
        subject: what takes the arguments, as it stands at the start of the message.
        given: names.
        accepted: names.
    """
    accepted = sorted(accepted)
    for name in given:
        if name not in accepted:
            raise UserError(f"{subject} has no argument '{name}': {did_you_mean(name, accepted)}")
