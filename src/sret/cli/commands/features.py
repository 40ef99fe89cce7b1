"""`sret features`: writes the features of images as a table."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import IMAGES, NUM_WORKERS, WEIGHTS
from sret.errors import InputError, printable
from sret.ranges import PositiveInt, Workers

if TYPE_CHECKING:
    from sret.inference.features import Features


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("images", type=str, nargs="*", metavar="IMAGE", help=IMAGES)
    parser.add_argument("--data", type=str | None, help="a labelled data set, as in sret train, instead of IMAGE")
    parser.add_argument("--checkpoint", type=Path, required=True, help=WEIGHTS)
    parser.add_argument(
        "--out", type=Path, required=True, help="the table to write: NAME.parquet, NAME.csv or NAME.jsonl"
    )
    parser.add_argument(
        "--knn", type=PositiveInt | None, help="print the accuracy of k-NN with this number of neighbours"
    )
    parser.add_argument("--linear_probe", action="store_true", help="print the accuracy of a logistic regression")
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="images per batch")
    parser.add_argument("--num_workers", type=Workers, default=0, help=NUM_WORKERS)


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    import torch

    from sret.data.dataset import Samples
    from sret.data.sources import load_data
    from sret.export.runtime import Exported, load_model
    from sret.inference.features import features_of, knn_accuracy, linear_probe_accuracy
    from sret.inference.predict import find_images
    from sret.inference.table import check_table_path, write_table

    check_table_path(arguments.out)
    if bool(arguments.images) == (arguments.data is not None):
        raise InputError("give either images or a data set with --data")
    is_scored = arguments.knn is not None or arguments.linear_probe
    if is_scored and arguments.data is None:
        raise InputError(
            f"k-NN and linear probe need classes; give labelled images, such as --data {arguments.images[0]}"
        )
    parts: dict[str | None, Samples]
    if arguments.data is None:
        paths, class_names = find_images(arguments.images), None
        parts = {None: Samples(paths, [0] * len(paths), [str(path) for path in paths])}
    else:
        data = load_data(arguments.data)
        parts, class_names = dict(data.splits.items()), data.class_names
    model, card = load_model(arguments.checkpoint)
    if isinstance(model, Exported):
        raise InputError(
            f"{arguments.checkpoint}: an exported file computes only logits; give the weights file it was exported from"
        )
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    kept: list[Features] = []  # for a score
    errors = 0

    def rows() -> Iterator[list[Any]]:
        nonlocal errors
        for split, samples in parts.items():
            options = (arguments.batch_size, arguments.num_workers)
            for found in features_of(model, card.preprocessing, samples, split, *options):
                if found.error:
                    errors += 1
                    print(f"sret: error: {printable(found.error)}", file=sys.stderr)
                    continue
                if is_scored:
                    kept.append(found)
                name = class_names[found.label] if class_names else None
                yield [printable(found.name), split, name, found.values.tolist()]

    started = time.monotonic()
    write_table(arguments.out, {"image": str, "split": str, "class": str, "feature": list}, rows())
    count, seconds = sum(map(len, parts.values())), time.monotonic() - started
    print(f"{arguments.out}: {model.num_features} features of {count - errors:,} images in {seconds:.1f} s")
    if arguments.knn is not None:
        print(f"k-NN, {arguments.knn} neighbours: top-1 {knn_accuracy(kept, arguments.knn):.2f} %")
    if arguments.linear_probe:
        print(f"linear probe: top-1 {linear_probe_accuracy(kept):.2f} %")
    return 1 if errors else 0
