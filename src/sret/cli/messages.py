"""Normalises the spelling of options before jsonargparse parses them, and shortens its errors to one line."""

import re
from collections.abc import Sequence
from itertools import zip_longest

from sret.errors import did_you_mean


def normalize_options(argv: Sequence[str]) -> list[str]:
    """`--max-steps=3` becomes `--max_steps=3`; `--model NAME` becomes `--model.name NAME`, beside a recipe's fields."""
    normal = []
    for argument, following in zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        if name == "--model" and re.fullmatch(r"\w+", value if equals else following):
            name = "--model.name"
        normal.append(name + equals + value)
    return normal


_UNKNOWN = re.compile(
    r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: -*([^\s=]+)"
)
_NOISE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Problem with given class_path|Given value type:"
    r"|- Expected a <class '(?:str|NoneType)'>|Parser key \"[^\"]+\":$"
)


def shorten_error(message: str, options: Sequence[str]) -> str:
    """Shortens a message of jsonargparse, several lines with all values, to what was wrong and what would work.

    Args:
        options: the command's options, such as "epochs" or "model.img_size".
    """
    path = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    prefix = f"{path}: " if path else ""
    if unknown := _UNKNOWN.search(message):
        return _unknown_option(next(filter(None, unknown.groups())), path, options)
    if required := re.search(r"the following arguments are required: (.*)", message):
        names = [name.rpartition(".")[2] for name in required[1].split(", ")]
        return f"missing {', '.join(names)}{f' in {path}' if path else ''}"
    if number := re.search(r"Not of type (\w+)", message):
        from sret import ranges  # jsonargparse takes a third of a second

        return f"{prefix}must be {ranges.describe_range(getattr(ranges, number[1]))}{_given(message)}"
    given = re.search(r"Given value: (.*)", message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if not _NOISE.search(line)]
    kept = [re.sub(r'^Parser key "[^"]+": ', "", line) for line in lines if not line.startswith("Given value:")]
    text = re.sub(r"<class '(\w+)'>", r"\1", "; ".join(kept)).replace("typing.", "")
    suffix = f" (given {given[1]})" if given and "Expected" in text and "Got" not in text else ""
    return f"{prefix}{text}{suffix}"


def _unknown_option(name: str, path: str, options: Sequence[str]) -> str:
    where = f" in {path}" if path else ""
    names_elsewhere = ("grad_checkpointing", "gradient_checkpointing")
    if name in names_elsewhere and "model.memory" in options:
        return f"unknown option {name!r}; did you mean 'model.memory'? Use pass, or nested for deep models"
    by_last_part = {option.rpartition(".")[2]: option for option in reversed(options)}
    last_part = name.rpartition(".")[2]
    if last_part in by_last_part and by_last_part[last_part] != name:
        return f"unknown option {name!r}{where}; did you mean {by_last_part[last_part]!r}?"
    return f"unknown option {name!r}{where}{did_you_mean(last_part, by_last_part)}"


def _given(message: str) -> str:
    given = re.search(r"Given value: (.*)|: (\S+) does not conform|: '([^']*)'$", message, re.MULTILINE)
    return f"; given {next(filter(None, given.groups()), '')}" if given else ""
