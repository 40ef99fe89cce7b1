"""`sret bench`: measures models side by side: time, memory, multiply-adds."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import ImageSize, both_sides
from sret.ranges import PositiveInt


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "models",
        type=str,
        nargs="+",
        metavar="MODEL",
        help="a model of timm or ours, options as in sret_t:permutation=strided; a file of weights, or exported",
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=8, help="images at a time")
    parser.add_argument("--img_size", type=ImageSize, help="pixels, or [height,width]")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16, float16, or several: a,b")
    parser.add_argument(
        "--engines",
        type=str,
        default="eager",
        help="eager, fused (ours), compile, cudagraphs, onnxruntime, openvino, or several: a,b",
    )
    parser.add_argument("--train", action="store_true", help="time training steps instead of inference")
    parser.add_argument("--threads", type=PositiveInt | None, help="of every engine; by default PyTorch's choice")
    parser.add_argument("--device", type=str | None, help="cpu or cuda; by default a GPU if there is one")
    parser.add_argument("--rounds", type=PositiveInt, default=20, help="turns of each contender")
    parser.add_argument("--memory", action="store_true", help="on a CPU: peak memory too, each in a process of its own")
    parser.add_argument("--figure", type=Path | None, help="draw it as a .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from rich.console import Console

    from sret.bench.report import as_text, check_figure, draw
    from sret.bench.runner import Settings, bench

    settings = Settings(
        batch_size=arguments.batch_size,
        img_size=both_sides(arguments.img_size),
        dtypes=tuple(arguments.dtype.split(",")),
        engines=tuple(arguments.engines.split(",")),
        is_training=arguments.train,
        threads=arguments.threads,
        device=arguments.device,
        rounds=arguments.rounds,
        memory=arguments.memory,
    )
    if arguments.figure is not None:
        check_figure(arguments.figure)
    with Console(stderr=True).status("starting") as status:
        report = bench(arguments.models, settings, lambda text: status.update(f"{text} ..."))
    if not arguments.json:
        print(as_text(report) + "\n")
    print(report.to_json())
    if arguments.figure is not None:
        draw(report, arguments.figure)
    return 0
