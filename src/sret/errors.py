"""What a user can cause and mend: every message says what was given, what would work and what to do next."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class InputError(ValueError):
    """Wrong input: a value, a file, a name. The command line prints it as one line and exits with 2."""


class InputWarning(UserWarning):
    """A guess was made that the user should know of."""


@contextmanager
def naming(subject: object) -> Iterator[None]:
    """An `InputError` raised within says first what it is about, such as a file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}") from error.__cause__


def nearest(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `choices`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def some(phrases: Sequence[str], most: int = 5) -> str:
    """The first phrases, and how many more there are."""
    more = f" and {len(phrases) - most} more" if len(phrases) > most else ""
    return "; ".join(phrases[:most]) + more
