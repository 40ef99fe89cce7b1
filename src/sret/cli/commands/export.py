"""`sret export`: exports a model to ONNX Runtime or OpenVINO."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import (
    EXIT,
    EXIT_SHOWN,
    IMG_SIZE,
    MAX_CORRUPT,
    PASSES,
    PASSES_SHOWN,
    WEIGHTS,
    Exit,
    ImageSize,
    Passes,
)
from sret.ranges import NonNegativeInt, PositiveInt


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("model", type=str, metavar="MODEL", help=WEIGHTS)
    parser.add_argument("out", type=Path, metavar="OUT", help="NAME.onnx for ONNX Runtime, NAME.xml for OpenVINO")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "int8"],
        default="float32",
        help="bfloat16 is only for OpenVINO; int8 needs --data",
    )
    parser.add_argument("--img_size", type=ImageSize, help=IMG_SIZE)
    parser.add_argument("--passes", type=Passes, metavar=PASSES_SHOWN, help=PASSES)
    parser.add_argument("--exit", type=Exit, metavar=EXIT_SHOWN, help=EXIT)
    parser.add_argument(
        "--data",
        type=str | None,
        help="data set for comparing the outputs, and for int8, as in sret train; by default random images",
    )
    parser.add_argument(
        "--samples", type=PositiveInt, default=300, help="number of images to compare, and to calibrate int8"
    )
    parser.add_argument("--max_corrupt", type=NonNegativeInt, default=0, help=MAX_CORRUPT)


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from sret.export.export import export

    options = arguments.as_dict()
    model, out, img_size = (options.pop(name) for name in ("model", "out", "img_size"))
    print(export(model, out, img_size=img_size, **options))
    return 0
