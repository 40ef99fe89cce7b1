"""`sret info`: lists the published models, or shows one model in detail."""

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import IMG_SIZE, ImageSize, both_sides


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "model",
        nargs="?",
        type=str | None,
        help="a model such as sret_t, a weights file, or a file written by sret export",
    )
    parser.add_argument("--img_size", type=ImageSize, help=IMG_SIZE)


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from rich.console import Console

    from sret.cli.tables import print_model, print_variants

    console = Console(highlight=False)
    size = both_sides(arguments.img_size)
    if arguments.model is None:
        print_variants(console, size)
    else:
        print_model(console, arguments.model, size)
    return 0
