"""`sret train`: trains a model with a recipe."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from sret.models.config import ModelConfig
from sret.ranges import PositiveInt
from sret.training.config import RuntimeConfig, TrainConfig
from sret.training.distillation.config import Distillation

# Options that the parser does not list individually.
NESTED_OPTIONS = [
    f"{name}.{field.name}"
    for name, config in (("model", ModelConfig), ("distillation", Distillation))
    for field in fields(config)
]


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--config", action="config", help="a recipe in YAML; options after it override its settings")
    for action in parser._actions:  # jsonargparse adds this option with --config
        if "--print_config" in action.option_strings:
            action.help, action.metavar = "print the recipe with all settings and exit", ""
    # A plain mapping, checked by TrainConfig, whose error messages are better than the parser's.
    parser.add_argument(
        "--model",
        type=dict[str, Any] | str | None,
        help="a published model such as sret_t; --model.FIELD changes one of its settings: "
        f"{', '.join(field.name for field in fields(ModelConfig))} (required, here or in the recipe)",
    )
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
        values["model"] = {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in values["model"].items()}
    recipe = TrainConfig(**values)
    runtime = RuntimeConfig(**{field.name: arguments[field.name] for field in fields(RuntimeConfig)})
    if arguments.dry_run:
        from sret.training.dry_run import dry_run

        dry_run(recipe, arguments.out, arguments.resume, runtime)
    else:
        train(recipe, arguments.out, arguments.resume, arguments.max_steps, runtime)
    return 0
