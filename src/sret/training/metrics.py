"""Metrics of a training run: gathered from all processes, shown, sent to trackers, and stored as a row per epoch.

Reading a value from a GPU waits for it, and asking all processes costs a message. So losses stay on their device, and
about once a second all processes flush them together.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from sret.data.dataset import ImageData
from sret.data.loading import Unreadable
from sret.errors import InputError
from sret.files import format_bytes
from sret.inference.evaluate import Metrics
from sret.models.build import totals_of
from sret.models.config import ModelConfig
from sret.models.timm.config import TimmConfig
from sret.signals import StopRequest

FLUSH_SECONDS = 1.0  # between two flushes, about
MAX_STEPS_PER_FLUSH = 50
DIVERGENCE_ADVICE = "try a lower learning_rate, a longer warm-up or clip_grad"


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of the steps since the last flush.

    Attributes:
        losses: mean loss of each step, in nats.
        accuracies: share of correct predictions of each step, in 0..1.
        seconds: of all these steps together.
        signal: a signal to stop, the same in all processes.
    """

    losses: list[float]
    accuracies: list[float]
    seconds: float
    signal: Signals | None


@dataclass
class MetricsBuffer:
    """Collects the metrics of this process; `flush` averages them over all processes."""

    accelerator: Accelerator
    unreadable: Unreadable
    stop: StopRequest
    interval: int = 1  # steps between flushes; the same in all processes
    _losses: list[Tensor] = field(default_factory=list)
    _accuracies: list[Tensor] = field(default_factory=list)
    _errors: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)

    def restart_clock(self) -> None:
        """Restarts the clock after something that was not a step."""
        self._started = time.perf_counter()

    def add(self, loss: Tensor, accuracy: Tensor, errors: Iterable[str]) -> None:
        """Adds a step of this process: mean loss, share of correct predictions, errors of images."""
        self._losses.append(loss)
        self._accuracies.append(accuracy)
        self._errors += [error for error in errors if error]

    def agreed_signal(self) -> Signals | None:
        """The signal that any process got, the same in all; every process must call this."""
        numbers = torch.tensor(self.stop.as_numbers(), device=self.accelerator.device)
        return StopRequest.from_numbers(*self.accelerator.reduce(numbers, "sum").tolist())

    @property
    def is_due(self) -> bool:
        """Whether to flush after this step; the same in all processes."""
        is_alone = self.accelerator.num_processes == 1
        return len(self._losses) >= self.interval or (is_alone and (self.stop.is_made or bool(self._errors)))

    def flush(self) -> StepMetrics:
        """Averages over the processes; each must call this after the same step.

        Raises `InputError` past the limit of unreadable images.
        """
        steps = len(self._losses)
        mine = [time.perf_counter() - self._started, len(self._errors), *self.stop.as_numbers()]
        numbers = [*self._losses, *self._accuracies, *torch.tensor(mine, device=self.accelerator.device)]
        means = self.accelerator.reduce(torch.stack(numbers), "mean").tolist()
        *scores, seconds, errors, interrupts, terminations = means
        if errors:
            self.unreadable.add(gather_object(self._errors), is_quiet=not self.accelerator.is_main_process)
        self.interval = min(MAX_STEPS_PER_FLUSH, max(1, int(FLUSH_SECONDS * steps / seconds)))
        self._losses, self._accuracies, self._errors = [], [], []
        self.restart_clock()
        return StepMetrics(scores[:steps], scores[steps:], seconds, StopRequest.from_numbers(interrupts, terminations))


def epoch_row(
    step: int, epoch_steps: int, batch_size: int, rate: float, sums: Mapping[str, float], metrics: Mapping[str, Metrics]
) -> dict[str, Any]:
    """One line of `metrics.jsonl`: an epoch. Losses in nats, accuracies in percent, the rate after its last step.

    Args:
        sums: of loss, share of correct predictions and seconds over the steps of the epoch. A prediction is correct if
            it is the most probable class of the target, which may be mixed or a teacher's.
        metrics: on validation images, of the weights ("val") and of their moving average ("ema").
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


def accuracy_of(row: Mapping[str, Any]) -> float:
    """The validation accuracy of an epoch in percent; that of the moving average if there is one."""
    return row.get("ema_top1", row["val_top1"])


def is_best(rows: Sequence[Mapping[str, Any]], num_images: int) -> bool:
    """Whether the weights of the last of these epochs are kept as the best: the one-standard-error rule.

        a_last + sqrt(p (1 - p) / n) >= max_e a_e,    p = (right + 1) / (n + 2)

    On few images the highest of many accuracies is luck, and often that of an early epoch. So a later epoch replaces
    it unless its accuracy is lower by more than its standard error: its learning rate is smaller.
    Source: Breiman, Friedman, Olshen, Stone, "Classification and Regression Trees", 1984. Deviations: there the
    simplest model within the error is chosen, here the latest; p is smoothed, so that it is never 0 or 1.

    Args:
        num_images: n, the validation images.
    """
    last = accuracy_of(rows[-1])
    share = (last / 100 * num_images + 1) / (num_images + 2)
    return last + 100 * math.sqrt(share * (1 - share) / num_images) >= max(map(accuracy_of, rows))


def has_stalled(rows: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` epochs of these got no better: no higher accuracy, and no lower loss at the same."""
    if patience is None or not rows:
        return False

    def quality(row: Mapping[str, Any]) -> tuple[float, float]:
        return accuracy_of(row), -row.get("ema_loss", row["val_loss"])

    return rows.index(max(rows, key=quality)) < len(rows) - patience


def check_finite(losses: Sequence[float], step: int, epoch_steps: int, out: Path) -> None:
    """Raises `InputError` naming the first step whose loss is not finite; `losses` end with that of `step`."""
    for before, loss in enumerate(losses):
        if not math.isfinite(loss):
            at = step - len(losses) + before + 1
            raise InputError(
                f"the loss became {loss} at step {at} (epoch {(at - 1) // epoch_steps + 1}); {out} keeps its last "
                f"state; {DIVERGENCE_ADVICE}"
            )


def describe(console: Console, config: ModelConfig | TimmConfig, data: ImageData) -> None:
    """Prints two lines: the data, and the model's parameters, passes and cost."""
    parameters, macs = totals_of(config)
    what = config.timm if isinstance(config, TimmConfig) else _layers(config)
    sizes = ", ".join(f"{len(samples):,} {name}" for name, samples in data.splits.items())
    height, width = config.input_size
    labels, counts = np.unique(np.asarray(data.split("train").labels), return_counts=True)
    least, most = (f"{counts[i]:,} (class {data.class_names[labels[i]]})" for i in (counts.argmin(), counts.argmax()))
    per_class = f"from {least} to {most}" if counts.min() < counts.max() else f"{counts.min():,} per class"
    console.print(
        f"Data    {data.name}: {len(data.class_names)} classes; images: {sizes}; {per_class} in train",
        soft_wrap=True,
        markup=False,
    )
    console.print(
        f"Model   {parameters:,} parameters; {what}; {2 * macs / 1e6:,.1f} MFLOPs ({macs / 1e6:,.1f} M MACs) for a "
        f"{height}x{width} image",
        soft_wrap=True,
    )


def _layers(config: ModelConfig) -> str:
    passes = " + ".join(f"{stage.num_blocks} x {stage.num_passes}" for stage in config.stages)
    return f"{config.depth} layers (blocks x passes: {passes})"


class Progress:
    """Shows progress: a bar on a terminal, a line per epoch, and metrics for the trackers."""

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

    def show(self, step: int, metrics: StepMetrics, batch_size: int, rate: float) -> None:
        """Shows and logs the metrics of the latest steps."""
        loss, accuracy = (float(np.mean(values)) for values in (metrics.losses, metrics.accuracies))
        speed, memory = len(metrics.losses) * batch_size / metrics.seconds, memory_in_use(self.accelerator.device)
        epoch = (step - 1) // self.epoch_steps + 1
        text = f"epoch {epoch}  loss {loss:.3f}  accuracy {accuracy:.0%}  {speed:,.0f}/s  {format_bytes(memory)}"
        self.bar.update(self.task, completed=step, description=text)
        values = {"loss": loss, "top1": 100 * accuracy, "images_per_second": speed, "memory_mib": memory / 2**20}
        self.accelerator.log({**{f"train/{key}": value for key, value in values.items()}, "rate": rate}, step=step)

    def epoch(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prints and logs the metrics of an epoch, and the highest accuracy so far."""
        row, highest = rows[-1], max(map(accuracy_of, rows))
        average = f"  EMA {row['ema_top1']:6.2f} %" if "ema_top1" in row else ""
        self.console.print(
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  validation {row['val_top1']:6.2f} %{average}  "
            f"(highest {highest:.2f})  {row['images_per_second']:,.0f} images/s",
            soft_wrap=True,
        )
        numbers = {key: row[key] for key in row if key.startswith(("val_", "ema_"))}
        self.accelerator.log({key.replace("_", "/", 1): value for key, value in numbers.items()}, step=row["step"])


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of a GPU's tensors so far, or on a CPU the current memory of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
