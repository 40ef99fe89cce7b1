"""`sret push`: uploads a model to the Hugging Face Hub."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from sret.cli.commands import WEIGHTS
from sret.errors import InputError, error_prefix

if TYPE_CHECKING:
    from sret.checkpoints.card import Card
    from sret.checkpoints.model_card import Result


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("checkpoint", type=str, metavar="CHECKPOINT", help=WEIGHTS)
    parser.add_argument("repo", type=str, metavar="OWNER/NAME", help="the repository; it is created if it is missing")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files with the output of sret eval --json; by default the validation accuracy of the training",
    )
    parser.add_argument("--license", type=str | None, help="of the weights, such as mit or cc-by-4.0")
    parser.add_argument("--private", type=bool, default=False, help="create a private repository")
    parser.add_argument("--out", type=Path | None, help="write the files to this folder, and upload nothing")


def run(arguments: Namespace) -> int:
    """Runs the command; returns its exit code."""
    from sret.checkpoints import hub
    from sret.checkpoints.resolve import resolve_sret

    hub.check_repo(arguments.repo)
    measured = [_read_result(path) for path in arguments.results]
    out = arguments.out
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; choose another --out")
    model, card = resolve_sret(arguments.checkpoint)
    results = measured or _validation(card)
    if out is not None:
        hub.write_folder(out, model, card, arguments.repo, results, arguments.license)
        print(f"Wrote {hub.WEIGHTS}, {hub.CONFIG} and {hub.README} to {out}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        hub.write_folder(Path(folder), model, card, arguments.repo, results, arguments.license)
        print(hub.push(Path(folder), arguments.repo, arguments.private))
    return 0


def _read_result(path: Path) -> "Result":
    """The result in a file with the output of `sret eval --json`."""
    with error_prefix(path):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return _result(values["data"], values["split"], float(values["top1"]), int(values["count"]))
        except FileNotFoundError as error:
            raise InputError("no such file; --results takes files with the output of sret eval --json") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("not the output of sret eval --json") from error


def _validation(card: "Card") -> "Sequence[Result]":
    """The validation accuracy of a training, if its card has one."""
    metrics, recipe = card.training.get("metrics", {}), card.training.get("recipe", {})
    top1 = metrics.get("ema_top1", metrics.get("val_top1"))
    if top1 is None:
        return []
    remark = f"epoch {metrics.get('epoch')}, chosen by this accuracy"
    return [_result(recipe.get("data", "unknown"), "val", top1, card.training.get("val_images"), remark)]


def _result(data: str, split: str, top1: float, count: Any, remark: str = "") -> "Result":
    from sret.checkpoints.hub import without_folders
    from sret.checkpoints.model_card import Result
    from sret.inference.statistics import wilson

    low = high = None
    if isinstance(count, int) and count > 0:
        low, high = (100 * share for share in wilson(round(top1 * count / 100), count))
    else:
        count = None
    return Result(data=without_folders(data), split=split, top1=top1, count=count, low=low, high=high, remark=remark)
