"""Types of numbers within a range: the command line parses options with them, `check_fields` checks dataclasses."""

import os
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

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
    "describe_range",
]

BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])
# Larger numbers are typing errors, or files that would need too much memory.
MAX_CLASSES = 1_000_000
Channels = restricted_number_type("Channels", int, [(">", 0), ("<=", 65536)])
Classes = restricted_number_type("Classes", int, [(">=", 0), ("<=", MAX_CLASSES)])
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])
# Processes that load images: more than this on one machine is a typing error.
Workers = restricted_number_type("Workers", int, [(">=", 0), ("<=", max(16, 4 * (os.cpu_count() or 1)))])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**31)])


def check_fields(config: Any, prefix: str = "") -> None:
    """Checks the fields of a dataclass that are numbers within a range, a `Literal` or a bool.

    Numbers become plain `int` and `float`. Raises `InputError` naming the first field with a wrong value.
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


def describe_range(number: Any) -> str:
    """The range of one of the types above, such as "a whole number > 0"."""
    kind = "a whole number" if number._type is int else "a number"
    bounds = re.sub(r"v([<>]=?)", r"\1 ", number._expression)  # "v>=0 and v<1"
    return f"{kind} {bounds}"


def check_number(name: str, value: object, number: Any) -> None:
    """Raises `InputError` if a value is not a number of one of the types above."""
    kinds = int if number._type is int else (int, float)
    try:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError
        number(value)
    except ValueError:
        raise InputError(f"{name} is {value!r}; it must be {describe_range(number)}") from None
