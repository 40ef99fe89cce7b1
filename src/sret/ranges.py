"""Number types with a range. The command line parses by them, and `check_ranges` checks dataclasses by them."""

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
    "ClosedUnitInterval",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "Share",
    "check_number",
    "check_ranges",
]

BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**31)])


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raises `InputError` naming the first field of a dataclass whose number is outside the range of its type.

    Numbers become plain `int` and `float`.
    """
    for name, hint in get_type_hints(type(config)).items():
        for number in (hint, *get_args(hint)):
            if hasattr(number, "_restrictions") and not (
                type(None) in get_args(hint) and getattr(config, name) is None
            ):
                value = getattr(config, name)
                check_number(f"{prefix}{name}", value, number)
                # The command line hands over instances of these types, which files of tensors and numbers cannot hold.
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
