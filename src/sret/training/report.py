"""A run on one page: its curves, its accuracy class by class, what it confuses, and its worst mistakes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

RIGHT, WRONG = "#1a7f37", "#cf222e"
MOST_BARS = 20  # classes listed one by one
MOST_CELLS = 12  # classes whose confusions are written as numbers
COLUMNS = 8


@dataclass(frozen=True)
class Mistake:
    """An image, (H, W, channels) in 0..1, its class, the model's answer and its probability."""

    pixels: np.ndarray
    truth: str
    answer: str
    confidence: float


def report_page(
    path: Path,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    class_names: Sequence[str],
    confusion: np.ndarray,
    mistakes: Sequence[Mistake],
) -> None:
    """Draws the page as PNG.

    Args:
        rows: the lines of `metrics.jsonl`; best: the one whose weights were kept.
        confusion: (K, K) counts of validation images, true class by answer.
        mistakes: the images to show, the worst first.
    """
    count, right = int(confusion.sum()), int(np.trace(confusion))
    lines = -(-len(mistakes) // COLUMNS)
    heights = [3.4, 4.6, 0.5 + 1.7 * lines]
    figure = plt.figure(figsize=(12, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(
        f"{title}: {100 * right / count:.2f} % of {count:,} validation images, epoch {best['epoch']} of "
        f"{rows[-1]['epoch']}",
        fontsize=13,
    )
    top, middle, bottom = np.asarray(figure.subfigures(3, 1, height_ratios=heights))
    left, right_axes = top.subplots(1, 2)
    _losses(left, rows)
    _accuracies(right_axes, rows, best)
    bars, cells = middle.subplots(1, 2)
    _per_class(bars, class_names, confusion)
    _confusion(cells, class_names, confusion)
    _images(bottom.subplots(lines, COLUMNS, squeeze=False), mistakes)
    wrong = count - right
    bottom.suptitle(
        f"{wrong:,} wrong: the surest first" + (", then the least certain right ones" if wrong < len(mistakes) else ""),
        fontsize=10,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _losses(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    _curves(axes, rows, {"train_loss": "training, as augmented", "val_loss": "validation", "ema_loss": "averaged"})
    axes.set(ylabel="cross-entropy", yscale="log")


def _accuracies(axes: Axes, rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> None:
    _curves(axes, rows, {"train_top1": "training, as augmented", "val_top1": "validation", "ema_top1": "averaged"})
    kept = best.get("ema_top1", best["val_top1"])
    axes.plot(best["epoch"], kept, "o", color="black", label=f"kept: {kept:.2f} %")
    axes.set(ylabel="top-1, %")
    axes.legend(frameon=False, fontsize=8)


def _curves(axes: Axes, rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> None:
    marker = "." if len(rows) < 3 else ""
    for key, label in labels.items():
        if key in rows[0]:
            axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker=marker, label=label)
    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _per_class(axes: Axes, class_names: Sequence[str], confusion: np.ndarray) -> None:
    totals = confusion.sum(axis=1)
    accuracy = 100 * np.diag(confusion) / np.maximum(totals, 1)
    shown = [int(k) for k in np.argsort(accuracy, kind="stable") if totals[k]][:MOST_BARS]
    places = np.arange(len(shown))[::-1]
    axes.barh(places, accuracy[shown], color="tab:blue", alpha=0.75)
    for place, k in zip(places, shown, strict=True):
        axes.text(1, place, f"{accuracy[k]:.1f} %  of {totals[k]}", va="center", fontsize=7)
    axes.set_yticks(places, [_short(class_names[k]) for k in shown], fontsize=8)
    title = "accuracy per class" if len(shown) == len(class_names) else f"the {len(shown)} weakest classes"
    axes.set(xlim=(0, 100), xlabel="top-1, %", title=title)


def _confusion(axes: Axes, class_names: Sequence[str], confusion: np.ndarray) -> None:
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="answer", ylabel="true class", title="confusions")
    if len(class_names) > MOST_CELLS:
        return
    ticks, names = range(len(class_names)), [_short(name) for name in class_names]
    axes.set_xticks(ticks, names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    for i, j in np.argwhere(confusion):
        color = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, str(confusion[i, j]), ha="center", va="center", fontsize=7, color=color)


def _images(grid: np.ndarray, mistakes: Sequence[Mistake]) -> None:
    for axes in grid.flat:
        axes.axis("off")
    for axes, mistake in zip(grid.flat, mistakes, strict=False):
        is_right = mistake.answer == mistake.truth
        axes.imshow(mistake.pixels.squeeze(), cmap="gray", vmin=0, vmax=1)
        text = f"{_short(mistake.answer)}  {mistake.confidence:.0%}"
        text += "" if is_right else f"\n(is {_short(mistake.truth)})"
        axes.set_title(text, color=RIGHT if is_right else WRONG, fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
