"""Reads YAML within limits of size and depth, so that a recipe or an option of any content gives values or an error."""

from collections.abc import Iterator
from typing import Any

import yaml
from jsonargparse import get_loader

from sret.errors import InputError

# Far more than a recipe has. The largest ones list the slices of some thousand passes.
MAX_LENGTH = 1 << 20  # characters
MAX_VALUES = 100_000  # after aliases are replaced by what they stand for
MAX_DEPTH = 40
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_read = get_loader("yaml")  # YAML as jsonargparse reads it: 1e-3 is a number
_Errors = (yaml.YAMLError, ValueError, ArithmeticError)  # a number may have thousands of digits, or a date 40 days


def read_yaml(text: str) -> Any:
    """The plain values in a YAML text.

    Raises `InputError` for a text that is not YAML, and for one that is too long or too deep, refers to itself,
    names a key twice, or has a null character.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"it has more than {MAX_LENGTH:,} characters")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):  # without recursion, unlike the rest of the library
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            _check_depth(depth)
        if (node := yaml.compose(text, Loader=_LOADER)) is not None:
            _check(node, 0, iter(range(MAX_VALUES)))
        return _read(text)
    except InputError:
        raise
    except _Errors as error:
        raise InputError(f"not YAML: {error}") from error


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InputError(f"its values are nested deeper than {MAX_DEPTH} levels, or contain themselves")


def _check(node: yaml.Node, depth: int, budget: Iterator[int]) -> None:
    """Raises `InputError` for what `read_yaml` refuses; `budget` has one item for each value that is left."""
    _check_depth(depth)
    if next(budget, None) is None:
        raise InputError(f"it has more than {MAX_VALUES:,} values")
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value:
            raise InputError(f"line {node.start_mark.line + 1} has a null character")
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check(child, depth + 1, budget)
    else:
        names = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise InputError(f"line {key.start_mark.line + 1} sets {key.value!r} a second time")
                names.add(key.value)
            _check(key, depth + 1, budget)
            _check(value, depth + 1, budget)
