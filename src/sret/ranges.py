"""Types of numbers within a range: the command line parses options with them, `check_fields` checks dataclasses."""

import os
import re
from numbers import Integral
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from sret.errors import InputError

__all__ = [
    "MAX_CLASSES",
    "MAX_NUMBER",
    "BelowOne",
    "Channels",
    "Classes",
    "ClosedUnitInterval",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "Share",
    "Workers",
    "check_fields",
    "check_number",
    "check_size",
    "describe_range",
    "fits",
    "is_whole",
]

BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])
# Larger numbers are typing errors, or files that would need too much memory.
MAX_NUMBER = 2**31 - 1
MAX_CLASSES = 1_000_000
Channels = restricted_number_type("Channels", int, [(">", 0), ("<=", 65536)])
Classes = restricted_number_type("Classes", int, [(">=", 0), ("<=", MAX_CLASSES)])
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])
# Processes that load images: more than this on one machine is a typing error.
Workers = restricted_number_type("Workers", int, [(">=", 0), ("<=", max(16, 4 * (os.cpu_count() or 1)))])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**31)])


def check_fields(config: Any, prefix: str = "") -> None:
    """Checks the values of a dataclass against the types of its fields, with ranges of numbers.

    Numbers become plain `int` and `float`, and text becomes a `Path` where one is expected. Raises `InputError` naming
    the first field with a wrong value.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if value is None and type(None) in get_args(hint):
            continue
        if hint is bool and not isinstance(value, bool):
            raise InputError(f"{prefix}{name} is {value!r}; it must be true or false")
        for kind in (hint, *get_args(hint)):
            if get_origin(kind) is Literal:
                for one in value if get_origin(hint) is tuple else (value,):
                    if one not in get_args(kind):
                        choices = ", ".join(choice or "''" for choice in get_args(kind))
                        raise InputError(f"{prefix}{name} is {one!r}; it must be one of {choices}")
            if hasattr(kind, "_restrictions"):
                check_number(f"{prefix}{name}", value, kind)
                # The command line passes instances of these types, which a file of plain values cannot hold.
                object.__setattr__(config, name, int(value) if isinstance(value, int) else float(value))
            if kind is Path and isinstance(value, str):
                value = Path(value)
                object.__setattr__(config, name, value)
        if not fits(value, hint):
            raise InputError(f"{prefix}{name} is {value!r}; it must be {_describe_type(hint)}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number: of Python or NumPy, but not true or false."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value, with what it contains, is of a type such as `dict[str, tuple[int, ...]] | None`."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if hint in (int, float) or hasattr(hint, "_restrictions"):
        is_number = isinstance(value, int if getattr(hint, "_type", hint) is int else (int, float))
        return is_number and not isinstance(value, bool)
    if not isinstance(value, origin or hint):
        return False
    if origin is dict:
        return all(fits(key, inner[0]) and fits(one, inner[1]) for key, one in value.items())
    if origin is list or inner[1:] == (...,):
        return all(fits(one, inner[0]) for one in value)
    return len(inner) == len(value) and all(map(fits, value, inner)) if origin is tuple else True


def _describe_type(hint: Any) -> str:
    words = {str: "text", dict: "a mapping", list: "a list", tuple: "a list", Path: "a path", type(None): "null"}
    members = {
        (int, ...): " of whole numbers",
        (float, ...): " of numbers",
        (str, ...): " of text",
        (str, Any): " of names to values",
    }
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    origins = [(get_origin(kind) or kind, members.get(get_args(kind), "")) for kind in kinds]
    return " or ".join(words.get(origin, getattr(origin, "__name__", str(origin))) + of for origin, of in origins)


def describe_range(number: Any) -> str:
    """The range of one of the types above, such as "a whole number > 0"."""
    kind = "a whole number" if number._type is int else "a number"
    bounds = re.sub(r"v([<>]=?)", r"\1 ", number._expression)  # "v>=0 and v<1"
    return f"{kind} {bounds}"


def check_number(name: str, value: object, number: Any) -> None:
    """Raises `InputError` if a value is not a number of one of the types above, or larger than `MAX_NUMBER`."""
    try:
        if not fits(value, number):
            raise ValueError
        number(value)
    except (ValueError, OverflowError):
        raise InputError(f"{name} is {value!r}; it must be {describe_range(number)}") from None
    check_size(name, value)


def check_size(name: str, value: object) -> None:
    """Raises `InputError` for a number that is infinite or that large that it can only be an error."""
    if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        raise InputError(f"{name} is {value!r}; numbers are at most {MAX_NUMBER:,}")
