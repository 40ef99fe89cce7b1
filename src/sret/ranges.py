"""Number types with a range, by which the command line parses options and `check_ranges` checks dataclasses."""

import os
import re
from typing import Any, get_args, get_type_hints

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
    "check_number",
    "check_ranges",
]

BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])
# Larger ones are slips, or files that would fill the memory.
Channels = restricted_number_type("Channels", int, [(">", 0), ("<=", 65536)])
Classes = restricted_number_type("Classes", int, [(">=", 0), ("<=", 1_000_000)])
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])
# Of processes that load images: more than this on one machine is a slip.
Workers = restricted_number_type("Workers", int, [(">=", 0), ("<=", max(16, 4 * (os.cpu_count() or 1)))])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**31)])


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raises `InputError` naming the first field of a dataclass whose number is outside the range of its type.

    The same for a field of type bool that is something else.

    Numbers become plain `int` and `float`.
    """
    for name, hint in get_type_hints(type(config)).items():
        if hint is bool and not isinstance(getattr(config, name), bool):
            raise InputError(f"{prefix}{name} is {getattr(config, name)!r}; it must be true or false")
        for number in (hint, *get_args(hint)):
            if hasattr(number, "_restrictions") and not (
                type(None) in get_args(hint) and getattr(config, name) is None
            ):
                value = getattr(config, name)
                check_number(f"{prefix}{name}", value, number)
                # The command line passes instances of these types, which a file of plain values cannot hold.
                object.__setattr__(config, name, int(value) if isinstance(value, int) else float(value))


def check_number(name: str, value: object, number: Any) -> None:
    """Raises `InputError` if a value is not a number of one of the types above."""
    kinds = int if number._type is int else (int, float)
    try:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError
        number(value)
    except ValueError:
        kind = "a whole number" if number._type is int else "a number"
        bounds = re.sub(r"v([<>]=?)", r"\1 ", number._expression)  # "v>=0 and v<1"
        raise InputError(f"{name} is {value!r}; it must be {kind} {bounds}") from None
