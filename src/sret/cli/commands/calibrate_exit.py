"""`sret calibrate-exit`: chooses the fastest threshold of early exit on validation images, and stores it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import NUM_WORKERS
from sret.errors import InputError, numbers_to
from sret.ranges import NonNegativeFloat, PositiveInt, Workers

if TYPE_CHECKING:
    from sret.bench.exits import Speed, Timed


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a weights file with exits; it is changed")
    parser.add_argument("--data", type=str | None, help="as in sret train; by default the data of the training")
    parser.add_argument(
        "--max_drop", type=NonNegativeFloat, default=0.3, help="points of top-1 accuracy that may be lost"
    )
    parser.add_argument(
        "--criterion",
        type=Literal["confidence", "agreement", "learned"],
        default="confidence",
        help="leave when the prediction is confident, when it agrees with that of the exit before, or by a score "
        "that is fitted on the validation images",
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="images per batch")
    parser.add_argument("--num_workers", type=Workers, default=0, help=NUM_WORKERS)
    parser.add_argument("--figure", type=Path | None, help="also draw accuracy against images/s, NAME.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    import torch

    from sret.bench.exits import check_figure_path, draw, fastest, time_exits, to_time
    from sret.checkpoints.files import stored_checksum
    from sret.export.exits import with_exits
    from sret.export.runtime import load_model
    from sret.inference.exits import calibrate, store_policy

    path, figure, max_drop = arguments.checkpoint, arguments.figure, arguments.max_drop
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the threshold is stored in a weights file of sret, NAME.safetensors; give one")
    if figure is not None:
        check_figure_path(figure)
    checksum = stored_checksum(path)
    loaded, card = load_model(path)
    model = with_exits(loaded, path)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    options = (arguments.data, arguments.criterion, arguments.batch_size, arguments.num_workers)
    measured = calibrate(model, card, *options)
    images = measured.sample
    whole, timed = time_exits(model, measured.policy, to_time(measured.found, max_drop), images)
    stored = fastest(whole, timed, max_drop)
    policy = replace(measured.policy, threshold=stored.outcome.threshold)
    if arguments.json:
        rows = [{**vars(row.outcome), "images_per_second": vars(row.speed)} for row in timed]
        about = {"checkpoint": str(path), "data": measured.data, "batch": len(images), **asdict(policy)}
        print(json.dumps({**about, "whole_images_per_second": vars(whole), "rows": rows}))
    else:
        print_table(measured.data, whole, timed, stored, len(images))
    if figure is not None:
        draw(figure, f"{path.stem}, {measured.data}: {policy.criterion}", whole, timed, stored, len(images))
    store_policy(path, policy, checksum)
    if arguments.json:
        return 0
    if policy.threshold == 1:
        print(f"No threshold that loses at most {max_drop} points is faster than the whole model")
        print(f"Stored in {path}: {policy}")
    else:
        print(f"Stored in {path}: {policy}; use it with --exit auto")
    if figure is not None:
        print(f"Figure in {figure}")
    return 0


def print_table(data: str, whole: "Speed", timed: "list[Timed]", stored: "Timed", batch_size: int) -> None:
    """Prints a row for each threshold."""
    exits = len(stored.outcome.counts)
    print(f"{data}; images/s one at a time, and in a batch of {batch_size}")
    where = f"images that leave at exit {numbers_to(exits)}"
    print(f"threshold   top-1 %   MACs   images/s: 1      {batch_size:3}   {where}")
    for row in timed:
        outcome, counts = row.outcome, " ".join(map(str, row.outcome.counts))
        print(
            f"{outcome.threshold:9.3f}   {outcome.top1:7.2f}   {outcome.share:4.2f}   {row.speed.alone:11,.1f}  "
            f"{row.speed.batched:7,.1f}   {counts}{'  <- stored' if row is stored else ''}"
        )
    top1 = next(row.outcome.top1 for row in timed if row.outcome.threshold == 1)
    print(f"    whole   {top1:7.2f}          {whole.alone:11,.1f}  {whole.batched:7,.1f}   the model without exits")
