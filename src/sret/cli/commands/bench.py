"""`sret bench`: compares the speed of models side by side."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import ImageSize, both_sides
from sret.ranges import PositiveInt


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    models = "a model of timm or sret, also with options (sret_t:permutation=strided); or a file of weights or export; "
    models += "of sret also with its first passes only (sret_t:passes=1, best.safetensors:passes=[2,2,1])"
    engines = "eager, fused (sret only), compile, cudagraphs, onnxruntime, openvino, or several: a,b"
    parser.add_argument("models", type=str, nargs="+", metavar="MODEL", help=models)
    parser.add_argument("--batch_size", type=PositiveInt, default=8, help="images per batch")
    parser.add_argument("--img_size", type=ImageSize, help="pixels, or [height,width]; by default each model's own")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16, float16, or several: a,b")
    parser.add_argument("--engines", type=str, default="eager", help=engines)
    parser.add_argument("--train", action="store_true", help="time training steps instead of inference")
    parser.add_argument("--device", type=Literal["cpu", "cuda"] | None, help="by default a GPU if there is one")
    parser.add_argument("--rounds", type=PositiveInt, default=20, help="how often each model is timed")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from rich.console import Console

    from sret.bench.runner import Settings, bench

    settings = Settings(
        batch_size=arguments.batch_size,
        img_size=both_sides(arguments.img_size),
        dtypes=tuple(arguments.dtype.split(",")),
        engines=tuple(arguments.engines.split(",")),
        is_training=arguments.train,
        device=arguments.device,
        rounds=arguments.rounds,
    )
    with Console(stderr=True).status("starting") as status:
        report = bench(arguments.models, settings, lambda text: status.update(f"{text} ..."))
    if not arguments.json:
        print(report.to_text() + "\n")
    print(report.to_json())
    return 0
