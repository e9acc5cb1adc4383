"""The user's mistakes, as one sentence each."""

from __future__ import annotations


class UserError(Exception):
    """The user's mistake, as one sentence that names the option, the value and the remedy."""


def first_line(error: BaseException) -> str:
    """Of what ``error`` says; its type's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printed(error: UserError) -> str:
    """The line for stderr, without control characters, which could hide what stands beside them."""
    return "error: " + "".join(letter if letter.isprintable() else " " for letter in str(error))
