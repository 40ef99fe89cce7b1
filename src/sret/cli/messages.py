"""Normalises the spelling of options before jsonargparse parses them, and shortens its errors to one line."""

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from sret.errors import InputError, did_you_mean


def normalize_options(argv: Sequence[str]) -> list[str]:
    """`--max-steps=3` becomes `--max_steps=3`; `--model NAME` becomes `--model.name NAME`, beside a recipe's fields.

    Raises `InputError` for an empty value: as a path it would be the current folder. Often a shell variable is unset.
    """
    normal: list[str] = []
    for argument, following in zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        option = name if equals else next(iter(normal[-1:]), "")
        if not (value if equals else name) and not option.endswith("global_pool"):
            raise InputError(f"{option} has an empty value" if option.startswith("--") else "a name is empty")
        if name == "--model" and re.fullmatch(r"\w+", value if equals else following):
            name = "--model.name"
        normal.append(name + equals + value)
    return normal


_UNKNOWN = re.compile(
    r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: ([^\s=]+)"
)
# What timm's scripts call the options.
_NAMES_IN_TIMM = {
    "amp": "mixed_precision",
    "grad_checkpointing": "model.memory",
    "lr": "learning_rate",
    "opt": "optimizer",
    "smoothing": "label_smoothing",
    "wd": "weight_decay",
    "workers": "num_workers",
}
_NOISE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Problem with given class_path|Given value type:"
    r"|- Expected a <class '(?:str|NoneType)'>|Parser key \"[^\"]+\":$"
)


def shorten_error(message: str, options: Sequence[str], positionals: Mapping[str, str] | None = None) -> str:
    """Shortens a message of jsonargparse, several lines with all values, to what was wrong and what would work.

    Args:
        options: the command's options, such as "epochs" or "model.img_size".
        positionals: the command's arguments without dashes, and how its help writes them: {"out": "OUT"}.
    """
    path = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    prefix = f"{path}: " if path else ""
    if unknown := _UNKNOWN.search(message):
        in_file, in_part, on_line = unknown.groups()
        if on_line and not on_line.startswith("-"):
            hint = f"; did you mean --checkpoint {on_line}?" if "checkpoint" in options else ""
            return f"unexpected argument {on_line!r}{hint}"
        return _unknown_option(in_file or in_part or on_line, path, options)
    if required := re.search(r"the following arguments are required: (.*)", message):
        return _missing(required[1].split(", "), path, positionals or {})
    if number := re.search(r"Not of type (?!Path)(\w+)", message):
        from sret import ranges  # jsonargparse takes a third of a second

        return f"{prefix}must be {ranges.describe_range(getattr(ranges, number[1]))}{_given(message)}"
    if choices := re.search(r"Expected a (?:typing\.)?Literal\[(.*)\]\.? *(?:Got value: (.*))?", message):
        found = choices[2] or next(iter(re.findall(r"Given value: (.*)", message)), "")
        return f"{prefix}must be one of {choices[1].replace(chr(39), '')}; given {found}"
    if kind := re.search(r"Expected a <class '(?:tuple|dict)'>\. Got value: (.*)", message):
        shape = f"a list, such as [{kind[1].strip('[]()')}]" if "tuple" in kind[0] else "a mapping, such as {a: 1}"
        return f"{prefix}must be {shape}; given {kind[1]}"
    given = re.search(r"Given value: (.*)", message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if not _NOISE.search(line)]
    kept = [re.sub(r'^Parser key "[^"]+": ', "", line) for line in lines if not line.startswith("Given value:")]
    text = re.sub(r"<class '(\w+)'>", r"\1", "; ".join(kept)).replace("typing.", "")
    suffix = f" (given {given[1]})" if given and "Expected" in text and "Got" not in text else ""
    return f"{prefix}{text}{suffix}"


def _missing(names: Sequence[str], path: str, positionals: Mapping[str, str]) -> str:
    """`path` is the option that lacks fields with these names, or empty if the command lacks arguments."""
    if path:
        return f"missing {', '.join(name.rpartition('.')[2] for name in names)} in {path}"
    return f"missing {', '.join(positionals.get(name, f'--{name}') for name in names)}"


def _unknown_option(given: str, path: str, options: Sequence[str]) -> str:
    """The message for an option, `given` with its dashes, or for a field of a recipe, which has none."""
    name, where = given.lstrip("-"), f" in {path}" if path else ""
    dashes = given.removesuffix(name)
    if (ours := _NAMES_IN_TIMM.get(name, "")) in options:
        advice = " Use pass, or nested for deep models" if ours == "model.memory" else ""
        return f"unknown option {given!r}; did you mean '{dashes}{ours}'?{advice}"
    if dashes and name in options:  # an argument without dashes, such as OUT of `sret export`
        return f"unknown option {given!r}; {name.upper()} is given by its place, without an option"
    by_last_part = {option.rpartition(".")[2]: option for option in reversed(options)}
    last_part = name.rpartition(".")[2]
    if last_part in by_last_part and by_last_part[last_part] != name:
        return f"unknown option {given!r}{where}; did you mean '{dashes}{by_last_part[last_part]}'?"
    return f"unknown option {given!r}{where}{did_you_mean(last_part, by_last_part, dashes)}"


def _given(message: str) -> str:
    given = re.search(r"Given value: (.*)|: (\S+) does not conform|: '([^']*)'$", message, re.MULTILINE)
    return f"; given {next(filter(None, given.groups()), '')}" if given else ""
