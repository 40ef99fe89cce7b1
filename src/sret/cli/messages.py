"""Between a user's words and jsonargparse: spellings that are let pass, and its errors in one line."""

import re
from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest

from sret.errors import did_you_mean
from sret.models.config import ModelConfig


def spelt_out(argv: Sequence[str]) -> list[str]:
    """`--max-steps=3` means `--max_steps=3`; `--model NAME` means `--model.name NAME`, beside what a recipe changes."""
    spelt = []
    for argument, following in zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        if name == "--model" and re.fullmatch(r"\w+", value if equals else following):
            name = "--model.name"
        spelt.append(name + equals + value)
    return spelt


_UNKNOWN = re.compile(
    r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: -*([^\s=]+)"
)
_NOISE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Problem with given class_path|Given value type:"
    r"|- Expected a <class 'str'>|Parser key \"[^\"]+\":$"
)


def brief(message: str, options: Sequence[str], commands: Sequence[str]) -> str:
    """jsonargparse's message, several lines and a dump of all values, as what was wrong and what would work.

    Args:
        options, commands: the names there are.
    """
    path = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if unknown := _UNKNOWN.search(message):
        name = next(filter(None, unknown.groups()))
        if name in ("grad_checkpointing", "gradient_checkpointing"):  # its name elsewhere
            return f"unknown option {name!r}; did you mean 'model.memory'? It takes pass, or nested for deep models"
        if name in (field.name for field in fields(ModelConfig)):
            return f"unknown option {name!r}; did you mean 'model.{name}'?"
        where = f" in {path}" if path else ""
        return f"unknown option {name!r}{where}{did_you_mean(name.rpartition('.')[2], options)}"
    if choice := re.search(r"invalid choice: '([^']*)'", message):
        return f"unknown command {choice[1]!r}{did_you_mean(choice[1], commands)}; there are {', '.join(commands)}"
    if 'expected "subcommand"' in message:
        return f"name a command: {', '.join(commands)}; `sret COMMAND --help` says more"
    if required := re.search(r"the following arguments are required: (.*)", message):
        names = [name.rpartition(".")[2] for name in required[1].split(", ")]
        return f"missing {', '.join(names)}{f' in {path}' if path else ''}"
    given = re.search(r"Given value: (.*)", message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if not _NOISE.search(line)]
    kept = [re.sub(r'^Parser key "[^"]+": ', "", line) for line in lines if not line.startswith("Given value:")]
    text = re.sub(r"<class '(\w+)'>", r"\1", "; ".join(kept)).replace("typing.", "")
    suffix = f" (given {given[1]})" if given and "Expected" in text and "Got" not in text else ""
    return f"{path}: {text}{suffix}" if path else f"{text}{suffix}"
