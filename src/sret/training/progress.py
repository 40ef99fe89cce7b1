"""What people see of a training run: its beginning, its progress, and one page at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sret.data.dataset import UNREADABLE, ImageData, ImageDataset
from sret.data.preprocess import Preprocessing
from sret.inference.evaluate import Metrics, Predictions
from sret.models.cost import model_cost
from sret.models.sret import SReT
from sret.training.metrics import Look
from sret.training.report import Mistake, report_page
from sret.training.run_dir import REPORT

SHOWN = 24  # images on the page
MIB = 1 << 20


def describe(console: Console, model: SReT, data: ImageData) -> None:
    """Two lines: the data, and the model's parameters, passes and cost."""
    cost = model_cost(model.config)
    passes = " + ".join(f"{stage.num_blocks} x {stage.num_passes}" for stage in model.config.stages)
    sizes = ", ".join(f"{len(samples):,} {name}" for name, samples in data.splits.items())
    height, width = model.config.input_size
    console.print(f"Data    {data.name}: {len(data.class_names)} classes; images: {sizes}", soft_wrap=True)
    console.print(
        f"Model   {cost.parameters:,} parameters; {model.config.depth} layers (blocks x passes: {passes}); "
        f"{cost.flops / 1e6:,.1f} MFLOPs ({cost.macs / 1e6:,.1f} M multiply-adds) for a {height}x{width} image",
        soft_wrap=True,
    )


def row(
    step: int, epoch_steps: int, batch_size: int, rate: float, sums: Mapping[str, float], metrics: Mapping[str, Metrics]
) -> dict[str, Any]:
    """One line of `metrics.jsonl`: an epoch. Losses in nats, accuracies in percent, the rate after its last step.

    Args:
        sums: of loss, share of right answers and seconds over the epoch's steps. An answer is right if it is the
            likeliest class of the target: of a mixed one, the larger share; of a teacher's, the teacher's answer.
        metrics: of the weights ("val") and of their moving average ("ema"), on validation images.
    """
    values = {
        "epoch": step // epoch_steps,
        "step": step,
        "learning_rate": rate,
        "train_loss": sums["loss"] / epoch_steps,
        "train_top1": 100 * sums["accuracy"] / epoch_steps,
    }
    for name, measured in metrics.items():
        values |= {f"{name}_loss": measured.loss, f"{name}_top1": measured.top1, f"{name}_top5": measured.top5}
    return {**values, "images_per_second": epoch_steps * batch_size / sums["seconds"]}


def merit(row: Mapping[str, Any]) -> tuple[float, float]:
    """What the best epoch is chosen by: accuracy, then loss, of the moving average where there is one."""
    which = "ema" if "ema_top1" in row else "val"
    return row[f"{which}_top1"], -row[f"{which}_loss"]


class Progress:
    """Within this context a live bar on a terminal, lines for the epochs everywhere, numbers for the trackers."""

    def __init__(
        self, console: Console, accelerator: Accelerator, epoch_steps: int, total_steps: int, step: int
    ) -> None:
        self.console, self.accelerator, self.epoch_steps = console, accelerator, epoch_steps
        columns = (MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=total_steps, completed=step)

    def __enter__(self) -> "Progress":
        self.bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.__exit__(*exception)

    def show(self, step: int, look: Look, batch_size: int, rate: float) -> None:
        """The steps since the last look."""
        loss, accuracy = (float(np.mean(values)) for values in (look.losses, look.accuracies))
        speed, memory = len(look.losses) * batch_size / look.seconds, memory_in_use(self.accelerator.device)
        epoch = (step - 1) // self.epoch_steps + 1
        text = f"epoch {epoch}  loss {loss:.3f}  accuracy {accuracy:.0%}  {speed:,.0f}/s  {memory / MIB:,.0f} MiB"
        self.bar.update(self.task, completed=step, description=text)
        values = {"loss": loss, "top1": 100 * accuracy, "images_per_second": speed, "memory_mib": memory / MIB}
        self.accelerator.log({**{f"train/{key}": value for key, value in values.items()}, "rate": rate}, step=step)

    def epoch(self, row: Mapping[str, Any], best: Mapping[str, Any]) -> None:
        """An epoch's metrics, and the best so far."""
        average = f"  averaged {row['ema_top1']:6.2f} %" if "ema_top1" in row else ""
        self.console.print(
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  validation {row['val_top1']:6.2f} %{average}  "
            f"(best {merit(best)[0]:.2f})  {row['images_per_second']:,.0f} images/s",
            soft_wrap=True,
        )
        numbers = {key: row[key] for key in row if key.startswith(("val_", "ema_"))}
        self.accelerator.log({key.replace("_", "/", 1): value for key, value in numbers.items()}, step=row["step"])


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that a GPU's tensors took so far, or what the process holds now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def draw(
    out: Path, rows: list[dict[str, Any]], data: ImageData, preprocessing: Preprocessing, predictions: Predictions
) -> None:
    """Draws the report: curves, accuracy per class, confusions, and the worst mistakes of the best weights, as images.

    Args:
        predictions: of the best epoch, on the validation images in their order.
    """
    dataset = ImageDataset(data.split("val"), preprocessing)
    readable = (predictions.labels != UNREADABLE).nonzero()[:, 0]
    truth, predicted = predictions.labels[readable], predictions.classes[readable]
    confidence = predictions.confidences[readable]
    # The surest mistakes first; where there are few, the least certain right predictions follow.
    worst = torch.where(predicted == truth, 1 + confidence, 1 - confidence).argsort()[:SHOWN].tolist()
    names = data.class_names
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    confusion.index_put_((truth, predicted), torch.ones_like(truth), accumulate=True)
    mistakes = [
        Mistake(
            pixels=dataset[int(readable[i])][0].permute(1, 2, 0).numpy(),
            truth=names[int(truth[i])],
            answer=names[int(predicted[i])],
            confidence=float(confidence[i]),
        )
        for i in worst
    ]
    report_page(out / REPORT, data.name, rows, max(rows, key=merit), names, confusion.numpy(), mistakes)
