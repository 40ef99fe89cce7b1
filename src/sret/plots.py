"""Pictures of a run: its learning curve, and a sheet of predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

RIGHT, WRONG = "#1a7f37", "#cf222e"


def learning_curve(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Losses and validation accuracy per epoch, from the lines of `metrics.jsonl`, as PNG."""
    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(epochs, [row["train_loss"] for row in rows], label="training")
    left.plot(epochs, [row["val_loss"] for row in rows], label="validation")
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    left.legend(frameon=False)
    best = max(rows, key=lambda row: (row["val_top1"], -row["val_loss"]))
    right.plot(epochs, [row["val_top1"] for row in rows], color="tab:orange")
    right.plot(best["epoch"], best["val_top1"], "o", color="tab:orange")
    right.set(
        xlabel="epoch", ylabel="validation top-1, %", title=f"best {best['val_top1']:.2f} %, epoch {best['epoch']}"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def prediction_sheet(
    path: Path,
    pixels: np.ndarray,
    labels: Sequence[str],
    predictions: Sequence[tuple[str, float]],
    title: str,
    columns: int = 8,
) -> None:
    """A grid of pictures as PNG, each under what the model says, red with the true name where it is wrong.

    Args:
        pixels: (B, H, W, channels) in 0..1.
        labels: true class names; predictions: (class name, probability).
    """
    rows = -(-len(labels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.8 * rows + 0.6), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, picture, label, (name, probability) in zip(grid.flat, pixels, labels, predictions, strict=False):
        is_right = name == label
        axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
        text = f"{name}  {probability:.0%}" if is_right else f"{name}  {probability:.0%}\n(is {label})"
        axes.set_title(text, color=RIGHT if is_right else WRONG, fontsize=10)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)
