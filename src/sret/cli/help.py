"""Formats `sret COMMAND --help`: a short usage line, and ranges and choices in plain words."""

from argparse import Action
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

from sret.ranges import describe_range

PLACEHOLDERS = {int: "N", float: "X", Path: "PATH"}
# Options that jsonargparse adds for dataclasses, beside the options of their fields.
HIDDEN = ("_ActionConfigLoad", "_ActionHelpClassPath")


class HelpFormatter(DefaultHelpFormatter):
    """Adds to the help of an option whether it is required, the range of its numbers, and its default."""

    def _format_usage(self, usage: str | None, actions: Iterable[Action], *_: Any, **__: Any) -> str:
        """Only what must be given; the list below has all options."""
        needed = [action for action in actions if action.required or not action.option_strings]
        return super()._format_usage(usage, needed, [], "usage: ").rstrip() + " [options]\n\n"

    def add_argument(self, action: Action) -> None:
        if type(action).__name__ not in HIDDEN:
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        if action.nargs == 0 or not (action.option_strings or action.required):
            return (action.help or "").removesuffix(".")
        notes = ["required"] if action.required and action.option_strings else []
        notes += [describe_range(number) for number in _alternatives(action) if hasattr(number, "_restrictions")][:1]
        if action.default not in (None, (), "==SUPPRESS=="):
            default = str(action.default).lower() if isinstance(action.default, bool) else "%(default)s"
            notes.append(f"default: {default}")
        return (action.help or "").removesuffix(".") + (f" ({', '.join(notes)})" if notes else "")

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        kinds = _alternatives(action)
        for kind in kinds:
            if get_origin(kind) is Literal:
                return "{" + ",".join(map(str, get_args(kind))) + "}"
        placeholders = [PLACEHOLDERS.get(getattr(kind, "_type", kind), "") for kind in kinds]
        return next(filter(None, placeholders), action.dest.rpartition(".")[2].upper())


def _alternatives(action: Action) -> list[Any]:
    """The types that an option takes."""
    hint = getattr(action, "_typehint", None) or action.type
    return [hint] if get_origin(hint) is Literal else [hint, *get_args(hint)]
