"""The command line: sret train | soft-labels | eval | predict | bench | info | convert | export.

Whatever a user can cause ends in one line on standard error and exit code 2; `predict` answers for the images it can
read and exits with 1 if there were others.
"""

import json
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sret.cli.messages import brief, spelt_out
from sret.data.config import Augmentation
from sret.errors import InputError, InputWarning
from sret.models.config import ModelConfig, StageConfig
from sret.training.config import Launch, TrainConfig
from sret.training.distillation.config import Distillation

# Where a missing package is brought along, if not by `train`.
EXTRAS = {
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino"), "export"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0; 1, `predict` could not read some images; 2, wrong input; 130, Ctrl-C. After SIGTERM `train` exits with 143.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = _show_warning
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    parser = _parser()
    try:
        try:
            arguments = parser.parse_args(spelt_out(argv))
        except ArgumentError as error:
            raise InputError(brief(str(error), _options(), list(COMMANDS))) from error
        except UnicodeDecodeError as error:
            raise InputError(f"the recipe is not a text file ({error})") from error
        return COMMANDS[arguments.subcommand].run(arguments[arguments.subcommand])
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        sys.stdout = None  # nothing is left to flush at exit
        return 0
    except (InputError, OSError) as error:
        text = str(error)
        if text.startswith("Caught "):  # in a process that loads images: its traceback stands before the message
            text = text.strip().splitlines()[-1].partition(": ")[2]
        print(f"sret: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "", "train")
        print(f"sret: error: this needs {error.name}; run: pip install 'sret[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; --resume auto goes on from what was saved" if argv[:1] == ["train"] else ""
        print(f"sret: interrupted{hint}", file=sys.stderr)
        return 130


# train ---------------------------------------------------------------------------------------------------------------


def _add_train(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="a recipe in YAML; later options override its fields")
    # A plain mapping here, which TrainConfig checks: its words for what is wrong are better than a parser's.
    parser.add_argument(
        "--model",
        type=dict[str, Any] | str,
        required=True,
        help="a published model's name, alone or as model.name beside fields to change; or all fields of a ModelConfig",
    )
    parser.add_class_arguments(TrainConfig, as_group=False, skip={"model"})
    parser.add_argument("--out", type=Path, required=True, help="the folder that receives the run")
    parser.add_argument("--resume", type=Literal["auto"] | None, help="auto: continue the run in --out if there is one")
    parser.add_argument("--max_steps", type=PositiveInt | None, help="stop after this many optimizer steps in all")
    parser.add_argument("--dry_run", action="store_true", help="check data, model, speed and disk, and leave nothing")
    parser.add_class_arguments(Launch, as_group=False)


def _train(arguments: Namespace) -> int:
    from sret.training.loop import train

    values = {field.name: arguments[field.name] for field in fields(TrainConfig)}
    if isinstance(values["model"], dict):  # what came from the line is still text
        values["model"] = {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in values["model"].items()}
    values["augmentation"] = Augmentation(**values["augmentation"].as_dict())
    if values["distillation"] is not None:
        values["distillation"] = Distillation(**values["distillation"].as_dict())
    recipe = TrainConfig(**values)
    launch = Launch(**{field.name: arguments[field.name] for field in fields(Launch)})
    if arguments.dry_run:
        from sret.training.dry_run import rehearse

        rehearse(recipe, arguments.out, arguments.resume, launch)
    else:
        train(recipe, arguments.out, arguments.resume, arguments.max_steps, launch)
    return 0


# soft-labels ---------------------------------------------------------------------------------------------------------


def _add_soft_labels(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=str, required=True, help="as in sret train; its training images are labelled")
    parser.add_argument("--teacher", type=str, required=True, help="a weights file of sret, or a model of timm")
    parser.add_argument("--teacher_weights", type=Path | None, help="a file to take instead of timm's weights")
    parser.add_argument("--temperature", type=float, default=1.0, help="the teacher's logits are divided by it")
    parser.add_argument("--out", type=Path, required=True, help="the folder that receives the labels")
    parser.add_argument("--crops", type=PositiveInt, default=4, help="crops of each image")
    parser.add_argument("--top_k", type=PositiveInt, default=10, help="classes kept of each answer")
    parser.add_argument("--min_scale", type=float, default=0.08, help="smallest share of an image that a crop covers")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of the crops")
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="crops that the teacher sees at a time")
    parser.add_argument("--num_workers", type=NonNegativeInt, default=0, help="processes that load images")
    parser.add_argument("--max_corrupt", type=NonNegativeInt, default=0, help="images that may be unreadable")


def _soft_labels(arguments: Namespace) -> int:
    from accelerate import PartialState

    from sret.training.distillation.precompute import write_soft_labels

    options = arguments.as_dict()
    out, data = options.pop("out"), options.pop("data")
    distillation = Distillation(**{field.name: options.pop(field.name) for field in fields(Distillation)})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_main = PartialState().is_main_process
    bar = Progress(*columns, disable=not is_main)
    task = bar.add_task("shards of 1,000 images")
    try:
        for done, total in write_soft_labels(out, data, distillation, **options):
            bar.start()
            bar.update(task, completed=done, total=total)
    finally:
        bar.stop()
    if is_main:
        print(f"{out}: complete; train with: --soft_labels {out}")
    return 0


# eval ----------------------------------------------------------------------------------------------------------------


def _add_eval(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="weights of sret train or convert, or a file of sret export"
    )
    parser.add_argument("--data", type=str | None, help="as in sret train; by default what it was trained on")
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "test", "all"] | None,
        help="by default the images held out for testing, or all of an undivided folder it was not trained on",
    )
    parser.add_argument(
        "--batch_size", type=PositiveInt, default=64, help="images at a time; the result does not depend on it"
    )
    parser.add_argument("--num_workers", type=NonNegativeInt, default=0, help="processes that load images")
    parser.add_argument(
        "--max_corrupt", type=NonNegativeInt, default=0, help="images that may be left out as unreadable"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _eval(arguments: Namespace) -> int:
    from sret.export.runtime import load_model
    from sret.inference.evaluate import evaluate_on

    model, card = load_model(arguments.checkpoint)
    from accelerate import PartialState

    metrics, data, split = evaluate_on(
        model,
        card,
        arguments.data,
        arguments.split,
        arguments.batch_size,
        arguments.num_workers,
        arguments.max_corrupt,
    )
    if not PartialState().is_main_process:
        return 0
    if arguments.json:
        print(json.dumps({"checkpoint": str(arguments.checkpoint), "data": data, "split": split, **asdict(metrics)}))
    else:
        print(
            f"{data}, {split}: {metrics.count:,} images, top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, "
            f"loss {metrics.loss:.4f}"
        )
    return 0


# predict -------------------------------------------------------------------------------------------------------------


def _add_predict(parser: ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="weights of sret train or convert, or a file of sret export"
    )
    parser.add_argument("--top_k", type=PositiveInt, default=3, help="classes per image")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image instead")


def _predict(arguments: Namespace) -> int:
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


# info ----------------------------------------------------------------------------------------------------------------


def _add_info(parser: ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=str | None, help="a variant such as sret_t, or a checkpoint")
    parser.add_argument("--img_size", type=int | tuple[int, int] | None, help="pixels, or [height,width]")


def _info(arguments: Namespace) -> int:
    from sret.cli import tables as info

    console = Console(highlight=False)
    size = (arguments.img_size,) * 2 if isinstance(arguments.img_size, int) else arguments.img_size
    if arguments.model is None:
        info.print_variants(console, size)
    else:
        info.print_model(console, arguments.model, size)
    return 0


# bench ---------------------------------------------------------------------------------------------------------------


def _add_bench(parser: ArgumentParser) -> None:
    parser.add_argument(
        "models",
        type=str,
        nargs="+",
        metavar="MODEL",
        help="a model of timm or ours, options as in sret_t:permutation=strided; a file of weights, or exported",
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=8, help="images at a time")
    parser.add_argument("--image_size", type=int | tuple[int, int] | None, help="pixels, or [height,width]")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16, float16, or several: a,b")
    parser.add_argument(
        "--engines",
        type=str,
        default="eager",
        help="eager, fused (ours), compile, cudagraphs, onnxruntime, openvino, or several: a,b",
    )
    parser.add_argument("--train", action="store_true", help="time steps of training instead of answers")
    parser.add_argument("--threads", type=PositiveInt | None, help="of every engine; by default PyTorch's choice")
    parser.add_argument("--device", type=str | None, help="cpu or cuda; by default a GPU if there is one")
    parser.add_argument("--rounds", type=PositiveInt, default=20, help="turns of each contender")
    parser.add_argument("--memory", action="store_true", help="on a CPU: peak memory too, each in a process of its own")
    parser.add_argument("--figure", type=Path | None, help="draw it as a .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")


def _bench(arguments: Namespace) -> int:
    from sret.bench import report as bench_report
    from sret.bench.runner import Settings, bench

    size = (arguments.image_size,) * 2 if isinstance(arguments.image_size, int) else arguments.image_size
    settings = Settings(
        batch_size=arguments.batch_size,
        image_size=size,
        dtypes=tuple(arguments.dtype.split(",")),
        engines=tuple(arguments.engines.split(",")),
        is_training=arguments.train,
        threads=arguments.threads,
        device=arguments.device,
        rounds=arguments.rounds,
        memory=arguments.memory,
    )
    if arguments.figure is not None:
        bench_report.check_figure(arguments.figure)
    with Console(stderr=True).status("starting") as status:
        report = bench(arguments.models, settings, lambda text: status.update(f"{text} ..."))
    if not arguments.json:
        print(bench_report.as_text(report) + "\n")
    print(report.to_json())
    if arguments.figure is not None:
        bench_report.draw(report, arguments.figure)
    return 0


# convert -------------------------------------------------------------------------------------------------------------


def _add_convert(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=str, metavar="IN", help="a file, or a published name such as sret_t.dist_in1k")
    parser.add_argument(
        "target", type=Path, metavar="OUT", help="FILE.safetensors, or FILE.pth for the authors' format"
    )
    parser.add_argument("--variant", type=str | None, help="which model IN is, where its file name does not tell")


def _convert(arguments: Namespace) -> int:
    from sret.checkpoints.convert import convert

    print(convert(arguments.source, arguments.target, arguments.variant))
    return 0


# export --------------------------------------------------------------------------------------------------------------


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, metavar="MODEL", help="a weights file, or a name such as sret_t.dist_in1k")
    parser.add_argument("out", type=Path, metavar="OUT", help="FILE.onnx for ONNX Runtime, FILE.xml for OpenVINO")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "int8"], default="float32", help="bfloat16: only OpenVINO"
    )
    parser.add_argument(
        "--image_size", type=int | tuple[int, int] | None, help="pixels, or [height,width]; by default the model's"
    )
    parser.add_argument("--data", type=str | None, help="images to compare on, as in sret train")
    parser.add_argument("--samples", type=PositiveInt, default=300, help="to compare on, and to calibrate int8 on")
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="images at a time meanwhile")


def _export(arguments: Namespace) -> int:
    from sret.export.export import export

    options = arguments.as_dict()
    print(export(options.pop("model"), options.pop("out"), **options))
    return 0


# errors and parsing --------------------------------------------------------------------------------------------------


class _Command:
    def __init__(
        self, description: str, add_arguments: Callable[[ArgumentParser], None], run: Callable[[Namespace], int]
    ) -> None:
        self.description, self.add_arguments, self.run = description, add_arguments, run

    def parser(self) -> ArgumentParser:
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=self.description)
        self.add_arguments(parser)
        return parser


COMMANDS = {
    "train": _Command("train a model by a recipe", _add_train, _train),
    "soft-labels": _Command("let a teacher answer once for many crops", _add_soft_labels, _soft_labels),
    "eval": _Command("accuracy of a checkpoint on labelled images", _add_eval, _eval),
    "predict": _Command("say what images show", _add_predict, _predict),
    "bench": _Command("models side by side: time, memory, multiply-adds", _add_bench, _bench),
    "info": _Command("the published models, or one model in detail", _add_info, _info),
    "convert": _Command("the authors' checkpoints into safetensors, and back", _add_convert, _convert),
    "export": _Command("a model for ONNX Runtime or OpenVINO", _add_export, _export),
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="sret", exit_on_error=False, allow_abbrev=False, description=__doc__.splitlines()[0])
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, command.parser(), help=command.description)
    return parser


def _options() -> list[str]:
    """Every name that a line or a recipe can give a value to."""
    names = [field.name for kind in (TrainConfig, ModelConfig, StageConfig, Augmentation) for field in fields(kind)]
    return names + [action.dest for command in COMMANDS.values() for action in command.parser()._actions]


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, which all warn alike
    if issubclass(category, InputWarning) and is_first:  # those of the libraries underneath are not a user's business
        print(f"sret: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
