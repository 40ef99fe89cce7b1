"""`sret soft-labels`: writes a teacher's predictions for many crops of each training image."""

from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from sret.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Share, Workers
from sret.training.distillation.config import Distillation


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--data", type=str, required=True, help="as in sret train; the training images get labels")
    parser.add_argument(
        "--teacher", type=str, required=True, help="a weights file or published name of sret, or a timm model"
    )
    parser.add_argument(
        "--teacher_weights", type=Path | None, help="a file to use instead of timm's pretrained weights"
    )
    parser.add_argument("--temperature", type=PositiveFloat, default=1.0, help="divides the teacher's logits")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the labels")
    parser.add_argument("--crops", type=PositiveInt, default=4, help="crops per image")
    parser.add_argument("--top_k", type=PositiveInt, default=10, help="classes stored per prediction")
    parser.add_argument("--min_scale", type=Share, default=0.08, help="smallest share of the image's area in a crop")
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="crops per batch of the teacher")
    parser.add_argument("--num_workers", type=Workers, default=0, help="processes that load images")
    parser.add_argument(
        "--max_corrupt", type=NonNegativeInt, default=0, help="number of unreadable images that may be skipped"
    )


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from accelerate import PartialState
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sret.data.dataset import check_output_dir
    from sret.training.distillation.precompute import write_soft_labels
    from sret.training.lock import locked

    options = arguments.as_dict()
    out, data = options.pop("out"), options.pop("data")
    distillation = Distillation(**{field.name: options.pop(field.name) for field in fields(Distillation)})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_main = PartialState().is_main_process
    bar = Progress(*columns, disable=not is_main)
    task = bar.add_task("shards of 1,000 images")
    check_output_dir(out, data)
    try:
        with locked(out):
            for done, total in write_soft_labels(out, data, distillation, **options):
                bar.start()
                bar.update(task, completed=done, total=total)
    finally:
        bar.stop()
    if is_main:
        print(f"{out}: complete; train with: --soft_labels {out}")
    return 0
