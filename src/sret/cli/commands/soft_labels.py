"""`sret soft-labels`: writes a teacher's predictions for many crops of each training image."""

from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import MAX_CORRUPT, NUM_WORKERS
from sret.ranges import NonNegativeInt, PositiveInt, Share, Workers
from sret.training.distillation.config import Distillation


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "--data", type=str, required=True, help="as in sret train; soft labels are written for the training images"
    )
    parser.add_class_arguments(Distillation)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the soft labels to")
    parser.add_argument("--crops", type=PositiveInt, default=4, help="random crops per image")
    parser.add_argument(
        "--top_k", type=PositiveInt, default=10, help="number of classes stored per crop, the most probable ones"
    )
    parser.add_argument("--min_scale", type=Share, default=0.08, help="smallest part of the image's area in a crop")
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="crops per batch")
    parser.add_argument("--num_workers", type=Workers, default=0, help=NUM_WORKERS)
    parser.add_argument("--max_corrupt", type=NonNegativeInt, default=0, help=MAX_CORRUPT)


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from accelerate import PartialState
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sret.data.dataset import check_output_dir
    from sret.training.distillation.precompute import write_soft_labels
    from sret.training.distillation.soft_labels import SHARD_SIZE
    from sret.training.lock import locked

    options = arguments.as_dict()
    out, data = options.pop("out"), options.pop("data")
    distillation = Distillation(**{field.name: options.pop(field.name) for field in fields(Distillation)})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_main = PartialState().is_main_process
    bar = Progress(*columns, disable=not is_main)
    task = bar.add_task(f"shards of {SHARD_SIZE:,} images")
    check_output_dir(out, data)
    try:
        with locked(out):
            for done, total in write_soft_labels(out, data, distillation, **options):
                bar.start()
                bar.update(task, completed=done, total=total)
    finally:
        if bar.live.is_started:  # otherwise it would print an empty line
            bar.stop()
    if is_main:
        print(f"{out}: complete; train with: --soft_labels {out}")
    return 0
