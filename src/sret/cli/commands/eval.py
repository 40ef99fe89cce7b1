"""`sret eval`: measures the accuracy of a checkpoint on labelled images."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import CHECKPOINT, EXIT, EXIT_SHOWN, MAX_CORRUPT, NUM_WORKERS, PASSES, PASSES_SHOWN, Exit, Passes
from sret.ranges import NonNegativeInt, PositiveInt, Workers


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--checkpoint", type=Path, required=True, help=CHECKPOINT)
    parser.add_argument("--data", type=str | None, help="as in sret train; by default the data of the training")
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "test", "all"] | None,
        help="by default test; for a folder that has no splits and was not used for training, all",
    )
    parser.add_argument("--passes", type=Passes, metavar=PASSES_SHOWN, help=PASSES)
    parser.add_argument("--exit", type=Exit, metavar=EXIT_SHOWN, help=EXIT)
    parser.add_argument(
        "--batch_size", type=PositiveInt, default=64, help="images per batch; does not change the result"
    )
    parser.add_argument("--num_workers", type=Workers, default=0, help=NUM_WORKERS)
    parser.add_argument("--max_corrupt", type=NonNegativeInt, default=0, help=MAX_CORRUPT)
    parser.add_argument(
        "--report",
        type=Path | None,
        help="also write a report, NAME.html or NAME.png: accuracy per class, confusions, calibration, worst mistakes",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from accelerate import PartialState

    from sret.elastic import EarlyExit
    from sret.export.runtime import load_model
    from sret.inference.evaluate import evaluate_on
    from sret.inference.exits import check_one_process, with_exit
    from sret.inference.report import check_report_path, write_report
    from sret.inference.statistics import wilson

    if arguments.exit is not None:
        check_one_process()
    if arguments.report is not None:
        check_report_path(arguments.report)
    model, card = load_model(arguments.checkpoint, arguments.passes)
    net = with_exit(model, card, arguments.checkpoint, arguments.exit)
    evaluation = evaluate_on(
        net,
        card,
        arguments.data,
        arguments.split,
        arguments.batch_size,
        arguments.num_workers,
        arguments.max_corrupt,
    )
    if not PartialState().is_main_process:
        return 0
    metrics, data, split = evaluation.metrics, evaluation.data.name, evaluation.split
    exits: dict[str, Any] = {}
    if isinstance(net, EarlyExit):
        exits = {
            "criterion": net.policy.criterion,
            "threshold": net.policy.threshold,
            "exits": net.counts.tolist(),
            "share_of_macs": net.share_of_macs(),
        }
    if arguments.json:
        about = {"checkpoint": str(arguments.checkpoint), "data": data, "split": split}
        print(json.dumps({**about, **asdict(metrics), **exits}))
    else:
        low, high = (100 * share for share in wilson(round(metrics.top1 * metrics.count / 100), metrics.count))
        top5 = f"top-5 {metrics.top5:.2f} %, " if len(evaluation.data.class_names) > 5 else ""
        print(
            f"{data}, {split}: {metrics.count:,} images, top-1 {metrics.top1:.2f} % (95 % interval {low:.1f} to "
            f"{high:.1f}), {top5}loss {metrics.loss:.4f}"
        )
        if exits:
            counts, share = exits["exits"], exits["share_of_macs"]
            print(f"Early exit, {net.policy}: {share:.2f} of the MACs; images per exit {counts}")
    if arguments.report is not None:
        write_report(arguments.report, evaluation, card.preprocessing)
        print(f"Report in {arguments.report}", file=sys.stderr if arguments.json else sys.stdout)
    return 0
