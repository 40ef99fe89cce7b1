"""`sret eval`: measures the accuracy of a checkpoint on labelled images."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from sret.ranges import NonNegativeInt, PositiveInt


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="weights of sret train or convert, or a file of sret export"
    )
    parser.add_argument("--data", type=str | None, help="as in sret train; by default what it was trained on")
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "test", "all"] | None,
        help="by default the images held out for testing, or all of an undivided folder it was not trained on",
    )
    parser.add_argument(
        "--batch_size", type=PositiveInt, default=64, help="images at a time; the result does not depend on it"
    )
    parser.add_argument("--num_workers", type=NonNegativeInt, default=0, help="processes that load images")
    parser.add_argument(
        "--max_corrupt", type=NonNegativeInt, default=0, help="images that may be left out as unreadable"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from sret.export.runtime import load_model
    from sret.inference.evaluate import evaluate_on

    model, card = load_model(arguments.checkpoint)
    from accelerate import PartialState

    metrics, data, split = evaluate_on(
        model,
        card,
        arguments.data,
        arguments.split,
        arguments.batch_size,
        arguments.num_workers,
        arguments.max_corrupt,
    )
    if not PartialState().is_main_process:
        return 0
    if arguments.json:
        print(json.dumps({"checkpoint": str(arguments.checkpoint), "data": data, "split": split, **asdict(metrics)}))
    else:
        print(
            f"{data}, {split}: {metrics.count:,} images, top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, "
            f"loss {metrics.loss:.4f}"
        )
    return 0
