"""What people see of a training run: its beginning, its progress, and two pictures at the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from sret.checkpoint import load_weights
from sret.cost import model_cost
from sret.data import ImageData, ImageDataset
from sret.model import SReT
from sret.plots import learning_curve, prediction_sheet
from sret.run import BEST, CURVE, SHEET

SHOWN = 32  # pictures on the sheet of predictions


def describe(console: Console, model: SReT, data: ImageData) -> None:
    """Two lines: the data, and the model's parameters, passes and cost."""
    cost = model_cost(model.config)
    passes = " + ".join(f"{stage.num_blocks} x {stage.num_passes}" for stage in model.config.stages)
    sizes = ", ".join(f"{len(samples):,} {name}" for name, samples in data.splits.items())
    height, width = model.config.input_size
    console.print(f"Data    {data.name}: {len(data.class_names)} classes; pictures: {sizes}", soft_wrap=True)
    console.print(
        f"Model   {cost.parameters:,} parameters; {model.config.depth} layers (blocks x passes: {passes}); "
        f"{cost.flops / 1e6:,.1f} MFLOPs ({cost.macs / 1e6:,.1f} M multiply-adds) for a {height}x{width} picture",
        soft_wrap=True,
    )


def line(row: dict[str, Any], best: dict[str, Any]) -> str:
    """One epoch's metrics in words."""
    return (
        f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  validation {row['val_top1']:6.2f} % "
        f"(best {best['val_top1']:.2f})  {row['images_per_second']:,.0f} images/s"
    )


@contextmanager
def progress(console: Console, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """Yields `show(step, text)`, which moves a live bar; on anything but a terminal there is no bar."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def show(step: int, text: str) -> None:
            bar.update(task, completed=step, description=text)

        yield show


@torch.no_grad()
def draw(out: Path, rows: list[dict[str, Any]], data: ImageData, device: torch.device) -> None:
    """The learning curve, and what the best weights make of the validation pictures: mistakes and doubts first."""
    learning_curve(out / CURVE, rows, f"{data.name}, {rows[-1]['epoch']} epochs")
    model, card = load_weights(out / BEST)
    model = model.to(device)
    samples = data.split("val")
    dataset = ImageDataset(samples, card.preprocessing)
    outputs = [model(images.to(device)).softmax(dim=1).cpu() for images, _ in DataLoader(dataset, batch_size=64)]
    confidence, predicted = torch.cat(outputs).max(dim=1)
    is_right = predicted == torch.tensor(samples.labels)
    shown = (is_right + confidence).argsort()[:SHOWN].tolist()
    images = card.preprocessing.pixels(torch.stack([dataset[i][0] for i in shown]))
    prediction_sheet(
        out / SHEET,
        images.permute(0, 2, 3, 1).numpy(),
        [card.name_of(samples.labels[i]) for i in shown],
        [(card.name_of(int(predicted[i])), float(confidence[i])) for i in shown],
        f"{data.name}: {len(samples)} validation pictures, {int((~is_right).sum())} wrong; least certain first",
    )
