"""`sret predict`: classifies images."""

import json
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from sret.ranges import PositiveInt


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="weights of sret train or convert, or a file of sret export"
    )
    parser.add_argument("--top_k", type=PositiveInt, default=3, help="classes per image")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image instead")


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from sret.export.runtime import load_model
    from sret.inference.predict import predict

    model, card = load_model(arguments.checkpoint)
    exit_code = 0
    for prediction in predict(model, card, arguments.images, arguments.top_k):
        if prediction.error:
            exit_code = 1
            print(f"sret: error: {prediction.error}", file=sys.stderr)
        elif arguments.json:
            print(json.dumps({"image": str(prediction.path), "classes": dict(prediction.classes)}))
        else:
            classes = "   ".join(f"{name} {100 * probability:5.1f} %" for name, probability in prediction.classes)
            print(f"{prediction.path}:   {classes}")
    return exit_code
