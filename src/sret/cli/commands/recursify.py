"""`sret recursify`: shares the blocks of a timm model, and distils the original into the result."""

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import NUM_WORKERS
from sret.data.config import Augmentation, Geometry
from sret.files import STATE
from sret.models.timm.config import Sharing
from sret.ranges import PositiveInt, Workers
from sret.training.recovery.config import Recovery

OUTPUTS = ("model.safetensors", "report.json", "report.png", STATE)
EXAMPLES = (
    "sret recursify deit_tiny_patch16_224 --passes 2 --init mean --rank 8 --data hf:owner/imagenet --out runs/half; "
    "sret recursify vit_tiny_patch16_224 --model_args '{img_size: 32, patch_size: 4}' --weights vit.safetensors "
    "--passes 2 --data cifar10 --out runs/half"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.epilog = f"Examples: {EXAMPLES}"
    parser.add_argument(
        "model",
        type=str,
        metavar="MODEL",
        help="a timm model, with its pretrained weights; or a weights file of sret train with such a model",
    )
    parser.add_argument("--weights", type=Path | None, help="a file to use instead of timm's pretrained weights")
    parser.add_argument(
        "--model_args", type=dict[str, Any], default={}, help="arguments of the model for timm: '{img_size: 32}'"
    )
    parser.add_argument("--data", type=str, required=True, help="as in sret train; its classes must be the model's")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--resume", type=Literal["auto"] | None, help="auto continues the run in --out")
    parser.add_class_arguments(Sharing)
    parser.add_argument("--geometry", type=Geometry, default="crop", help="augmentation: crops; pad suits small images")
    parser.add_argument("--flip", type=bool, default=True, help="augmentation: flip images at random")
    parser.add_class_arguments(Recovery, skip={"augmentation"})
    parser.add_argument("--rounds", type=PositiveInt, default=20, help="of the measurement of latency")
    parser.add_argument("--num_workers", type=Workers, default=0, help=NUM_WORKERS)


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from accelerate import Accelerator

    from sret.cli.recovery import recover
    from sret.data.dataset import check_output_dir
    from sret.errors import InputError
    from sret.training.lock import locked

    options = arguments.as_dict()
    out: Path = options["out"]
    settings = Recovery(
        augmentation=Augmentation(geometry=options["geometry"], flip=options["flip"]),
        **{name: options[name] for name in Recovery.__dataclass_fields__ if name != "augmentation"},
    )
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise InputError("sret recursify runs in one process; start it without torchrun")
    sharing = Sharing(**{name: options[name] for name in Sharing.__dataclass_fields__})
    if not sharing.changed.keys() - {"parts"}:
        raise InputError("nothing would change; give --passes 2, --extra_passes 1, --slices, --scale or --projection")
    check_output_dir(out, options["data"])
    present = [name for name in OUTPUTS if (out / name).exists()]
    if present and options["resume"] is None:
        raise InputError(f"{out} has {', '.join(present)} already; add --resume auto, or choose another --out")
    if present and STATE not in present:
        raise InputError(f"{out} has {', '.join(present)}, but no {STATE} to continue from; choose another --out")
    with locked(out):
        recover(options, sharing, settings, accelerator)
    return 0
