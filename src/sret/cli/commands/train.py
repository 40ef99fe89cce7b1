"""`sret train`: trains a model by a recipe."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from sret.models.config import ModelConfig
from sret.ranges import PositiveInt
from sret.training.config import Launch, TrainConfig
from sret.training.distillation.config import Distillation

# Options that the parser does not list one by one.
NESTED_OPTIONS = [
    f"{name}.{field.name}"
    for name, config in (("model", ModelConfig), ("distillation", Distillation))
    for field in fields(config)
]


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--config", action="config", help="a recipe in YAML; later options override its fields")
    # A plain mapping here, which TrainConfig checks: its words for what is wrong are better than a parser's.
    parser.add_argument(
        "--model",
        type=dict[str, Any] | str,
        required=True,
        help="a published model's name, alone or as model.name beside fields to change; or all fields of a ModelConfig",
    )
    parser.add_class_arguments(TrainConfig, as_group=False, skip={"model"})
    parser.add_argument("--out", type=Path, required=True, help="the folder that receives the run")
    parser.add_argument("--resume", type=Literal["auto"] | None, help="auto: continue the run in --out if there is one")
    parser.add_argument("--max_steps", type=PositiveInt | None, help="stop after this many optimizer steps in all")
    parser.add_argument("--dry_run", action="store_true", help="check data, model, speed and disk, and leave nothing")
    parser.add_class_arguments(Launch, as_group=False)


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from sret.training.loop import train

    values = {field.name: arguments[field.name] for field in fields(TrainConfig)}
    if isinstance(values["model"], dict):  # values from the command line are still text
        values["model"] = {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in values["model"].items()}
    recipe = TrainConfig(**values)
    launch = Launch(**{field.name: arguments[field.name] for field in fields(Launch)})
    if arguments.dry_run:
        from sret.training.dry_run import rehearse

        rehearse(recipe, arguments.out, arguments.resume, launch)
    else:
        train(recipe, arguments.out, arguments.resume, arguments.max_steps, launch)
    return 0
