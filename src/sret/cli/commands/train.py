"""`sret train`: trains a model with a recipe."""

from argparse import Action
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from sret.errors import InputError, error_prefix
from sret.models.config import ModelConfig
from sret.models.timm.config import TimmConfig
from sret.ranges import PositiveInt
from sret.safe_yaml import MAX_LENGTH, read_yaml
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.distillation.config import Distillation

# Options that the parser does not list individually.
NESTED_OPTIONS = [
    f"{name}.{field.name}"
    for name, config in (("model", ModelConfig), ("model", TimmConfig), ("distillation", Distillation))
    for field in fields(config)
]


class RecipeFile(ActionConfigFile):
    """The option `--config FILE`."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = Path(values)
        if not path.is_file():  # reading a pipe would block
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}; give a recipe in YAML")
        if path.stat().st_size > MAX_LENGTH:
            raise InputError(f"{path}: too large for a recipe; it has more than {MAX_LENGTH:,} bytes")
        super().__call__(parser, cfg, values, option_string)


class ModelOption(Action):
    """The option `--model`: `--model.sharing.passes 2` changes one value of a mapping, and keeps the others."""

    def __call__(self, parser: Any, cfg: Any, value: Any, option_string: str | None = None) -> None:
        parts = (option_string or "").split(".", 2)
        if len(parts) == 3:  # jsonargparse would leave the other values of the mapping out
            _, field, name = parts
            before = cfg["model"].get(field) if isinstance(cfg["model"], dict) else None
            with error_prefix(f"model.{field}.{name}"):
                value = {**(before if isinstance(before, dict) else {}), name: read_yaml(value)}
            option_string = f"--model.{field}"
        super().__call__(parser, cfg, value, option_string)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--config", action=RecipeFile, help="a recipe in YAML; options after it override its settings")
    for action in parser._actions:  # jsonargparse adds this option with --config
        if "--print_config" in action.option_strings:
            action.help, action.metavar = "print the recipe with all settings and exit", ""
    # A plain mapping, checked by TrainConfig, whose error messages are better than the parser's.
    model = parser.add_argument(
        "--model",
        type=dict[str, Any] | str | None,
        help="a published model such as sret_t; --model.FIELD changes one of its settings: "
        f"{', '.join(field.name for field in fields(ModelConfig))}. Or a model of timm: --model.timm NAME, with "
        f"{', '.join(field.name for field in fields(TimmConfig)[1:])} (required, here or in the recipe)",
    )
    model.__class__ = type("ModelOption", (ModelOption, type(model)), {})
    parser.add_class_arguments(TrainConfig, skip={"model"})
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder of the run, for weights, metrics and report"
    )
    parser.add_argument(
        "--resume", type=Literal["auto"] | None, help="continue the run in --out; without a run there, start one"
    )
    parser.add_argument("--max_steps", type=PositiveInt | None, help="stop after this many steps in total")
    parser.add_argument(
        "--dry_run", action="store_true", help="check data, model, speed, memory and disk space, and leave no files"
    )
    parser.add_class_arguments(RuntimeConfig)


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from sret.training.loop import train

    values = {field.name: arguments[field.name] for field in fields(TrainConfig)}
    if isinstance(values["model"], dict):  # values from the command line are still text
        for name, value in values["model"].items():
            with error_prefix(f"model.{name}"):
                values["model"][name] = read_yaml(value) if isinstance(value, str) else value
    recipe = TrainConfig(**values)
    runtime = RuntimeConfig(**{field.name: arguments[field.name] for field in fields(RuntimeConfig)})
    if arguments.dry_run:
        from sret.training.dry_run import dry_run

        dry_run(recipe, arguments.out, arguments.resume, runtime)
    else:
        train(recipe, arguments.out, arguments.resume, arguments.max_steps, runtime)
    return 0
