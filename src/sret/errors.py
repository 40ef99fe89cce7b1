"""Errors and warnings for users, and helpers that build their messages."""

import difflib
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Wrong input: a value, a file, a name. The command line prints it as one line and exits with 2."""


class InputWarning(UserWarning):
    """A problem that does not stop the command, and that the user may want to correct."""


@contextmanager
def error_prefix(subject: object) -> Iterator[None]:
    """Within this context an `InputError` gets a prefix, such as the name of a file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}") from error.__cause__


def printable(text: str | os.PathLike[str]) -> str:
    r"""Text or a path for a terminal or a table: control characters and bytes other than UTF-8 become \n, \xe9, ..."""
    decoded = os.fsencode(text).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


def did_you_mean(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """`"; did you mean 'x'?"` for the closest of `choices`, or an empty string when none is close.

    Args:
        prefix: written before the choice, such as the dashes of an option.
    """
    if len(name) > 100:  # comparing takes quadratic time
        return ""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def plural(noun: str, count: int) -> str:
    """The noun, with an s unless it counts one."""
    return noun if count == 1 else f"{noun}s"


def numbers_to(count: int) -> str:
    """The numbers from 1, as in "1, 2" or "1, 2, ... 6"."""
    return ", ".join(map(str, range(1, count + 1))) if count < 4 else f"1, 2, ... {count}"


def first_few(phrases: Sequence[str], limit: int = 5) -> str:
    """The first phrases, and how many more there are."""
    more = f" and {len(phrases) - limit} more" if len(phrases) > limit else ""
    return "; ".join(phrases[:limit]) + more


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences between two nested dicts of plain values, one phrase per field."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key, _MISSING), now.get(key, _MISSING)
        if isinstance(a, dict) and isinstance(b, dict):
            found += describe_changes(a, b, f"{prefix}{key}.")
        elif before.get(key) != now.get(key):
            found.append(f"{prefix}{key} was {_shorten(a)}, now {_shorten(b)}")
    return found


_MISSING = object()


def _shorten(value: Any) -> str:
    text = "missing" if value is _MISSING else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def describe_lost_worker(error: BaseException) -> str | None:
    """Advice for the error of a process that loads images and was stopped by the system; None for other errors."""
    signs = ("</torch_", "killed by signal", "exited unexpectedly")  # of torch's DataLoader
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error) and any(s in str(error) for s in signs):
        return (
            "a process that loads images was stopped, perhaps because memory or shared memory (/dev/shm) was full; use "
            "fewer --num_workers (0 needs no shared memory), or more memory, such as docker run --shm-size 8g"
        )
    return None


# Messages of torch's allocators on Linux and Windows, of C++, oneDNN, MPS and CUDA's libraries.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "could not create a primitive",
    "out of memory",
    "Failed to allocate",
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def first_line(error: Exception) -> str:
    """The first line of an error, with the next one if it ends with a colon; or what to do if memory ran out."""
    if is_out_of_memory(error):
        return "the batch does not fit in memory; try a smaller --batch_size"
    line, *more = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = f"{line} {more[0].strip()}" if more and line.rstrip().endswith(":") else line
    return textwrap.shorten(printable(line), 500)
