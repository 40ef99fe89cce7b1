"""`sret convert`: converts the authors' checkpoints to safetensors, and back."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "source",
        type=str,
        metavar="IN",
        help="a weights file of the authors or of sret, or a published name such as sret_t.dist_in1k",
    )
    parser.add_argument(
        "target", type=Path, metavar="OUT", help="FILE.safetensors, or FILE.pth for the authors' format"
    )
    parser.add_argument(
        "--variant", type=str | None, help="the model of IN, such as sret_t_unsliced, if the file name does not say it"
    )


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from sret.checkpoints.official.convert import convert

    print(convert(arguments.source, arguments.target, arguments.variant))
    return 0
