"""`sret predict`: classifies images."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import CHECKPOINT, EXIT, EXIT_SHOWN, IMAGES, NUM_WORKERS, PASSES, PASSES_SHOWN, Exit, Passes
from sret.errors import printable
from sret.ranges import ClosedUnitInterval, PositiveInt, Workers

if TYPE_CHECKING:
    from sret.inference.predict import Prediction

UNSURE = "unsure"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help=IMAGES)
    parser.add_argument("--checkpoint", type=Path, required=True, help=CHECKPOINT)
    parser.add_argument(
        "--top_k", type=PositiveInt, default=3, help="number of classes to show for each image, the most probable first"
    )
    parser.add_argument(
        "--min_confidence",
        type=ClosedUnitInterval,
        default=0.0,
        help=f"print {UNSURE!r} for images whose most probable class has a lower probability",
    )
    parser.add_argument(
        "--out", type=Path | None, help="write a table instead of printing: NAME.csv, NAME.jsonl or NAME.parquet"
    )
    parser.add_argument("--passes", type=Passes, metavar=PASSES_SHOWN, help=PASSES)
    parser.add_argument("--exit", type=Exit, metavar=EXIT_SHOWN, help=EXIT)
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="images per batch")
    parser.add_argument("--num_workers", type=Workers, default=0, help=NUM_WORKERS)
    parser.add_argument("--json", action="store_true", help="print one JSON object per image instead of text")


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from sret.elastic import EarlyExit
    from sret.export.runtime import load_model
    from sret.inference.exits import with_exit
    from sret.inference.predict import find_images, predict
    from sret.inference.table import check_table_path, write_table

    if arguments.out is not None:
        check_table_path(arguments.out)
    paths = find_images(arguments.images)
    model, card = load_model(arguments.checkpoint, arguments.passes)
    model, paths_here = _on_device(with_exit(model, card, arguments.checkpoint, arguments.exit), paths)
    top_k = min(arguments.top_k, card.config.num_classes)
    found = predict(model, card, paths_here, top_k, arguments.batch_size, arguments.num_workers)
    started = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate.utils import gather_object

        found = iter(gather_object(list(found)))
        if int(os.environ["RANK"]):
            return 0
    errors: list[str] = []
    shown = _with_progress(found, len(paths), errors, is_bar=arguments.out is not None)
    if arguments.out is None:
        for prediction in shown:
            _print(prediction, arguments.min_confidence, arguments.json)
        return 1 if errors else 0
    columns: dict[str, type] = {"image": str, "prediction": str}
    for k in range(top_k):
        columns |= {f"class_{k + 1}": str, f"confidence_{k + 1}": float}
    has_exit = isinstance(model, EarlyExit)
    if has_exit:
        columns["exit"] = int
    columns["error"] = str
    rows = (_row(p, top_k, arguments.min_confidence, has_exit) for p in shown)
    write_table(arguments.out, columns, rows)
    seconds = time.monotonic() - started
    done = f"{len(paths):,} images in {seconds:.1f} s ({len(paths) / seconds:,.1f} images/s)"
    print(f"{arguments.out}: {done}{f', {len(errors)} of them could not be read' if errors else ''}")
    return 1 if errors else 0


def _on_device(model: Any, paths: Sequence[Path]) -> tuple[Any, Sequence[Path]]:
    """The model on the device of this process, and the images that this process predicts."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return model.to(device or "cpu"), paths
    from accelerate import PartialState

    state = PartialState()
    with state.split_between_processes(list(paths)) as paths_here:
        return model.to(state.device), paths_here


def _with_progress(
    predictions: "Iterator[Prediction]", count: int, errors: list[str], is_bar: bool
) -> "Iterator[Prediction]":
    """The predictions, with a progress bar. Prints and collects errors."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True) if is_bar and console.is_terminal else nullcontext()
    with bar as progress:
        task = progress.add_task("images", total=count) if progress is not None else None
        for prediction in predictions:
            if prediction.error:
                errors.append(prediction.error)
                print(f"sret: error: {printable(prediction.error)}", file=sys.stderr)
            yield prediction
            if progress is not None and task is not None:
                progress.advance(task)


def _row(prediction: "Prediction", top_k: int, min_confidence: float, has_exit: bool) -> list[Any]:
    classes = prediction.classes or ((None, None),) * top_k
    return [
        printable(prediction.path),
        _predicted_name(prediction, min_confidence) if prediction.classes else None,
        *(value for pair in classes for value in pair),
        *([prediction.exit] if has_exit else []),
        printable(prediction.error) or None,
    ]


def _predicted_name(prediction: "Prediction", min_confidence: float) -> str:
    name, probability = prediction.classes[0]
    return name if probability >= min_confidence else UNSURE


def _print(prediction: "Prediction", min_confidence: float, as_json: bool) -> None:
    if prediction.error:
        return
    image, named = printable(prediction.path), _predicted_name(prediction, min_confidence)
    if as_json:
        exit_field = {} if prediction.exit is None else {"exit": prediction.exit}
        print(json.dumps({"image": image, "prediction": named, "classes": dict(prediction.classes), **exit_field}))
    else:
        classes = "   ".join(f"{name} {100 * probability:5.1f} %" for name, probability in prediction.classes)
        exit_text = "" if prediction.exit is None else f"   (exit {prediction.exit})"
        print(f"{image}:   {f'{UNSURE}   ' if named == UNSURE else ''}{classes}{exit_text}")
