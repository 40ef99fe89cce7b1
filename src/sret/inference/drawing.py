"""Draws parts of a report with matplotlib: accuracy per class, confusions, calibration, images with predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from sret.data.dataset import Samples
from sret.data.preprocess import Preprocessing
from sret.inference.statistics import Statistics, wilson

RIGHT, WRONG = "#1a7f37", "#cf222e"
MAX_BARS = 20  # classes with a bar
MAX_CELLS = 12  # up to this number of classes, confusions are also written as numbers
COLUMNS = 8


def draw_classes(axes: Axes, names: Sequence[str], found: Statistics) -> None:
    """A bar for each class with its 95 % interval, the lowest accuracy first."""
    totals, right = found.confusion.sum(axis=1), np.diag(found.confusion)
    accuracy = 100 * right / np.maximum(totals, 1)
    shown = [int(k) for k in np.argsort(accuracy, kind="stable") if totals[k]][:MAX_BARS]
    places = np.arange(len(shown))[::-1]
    intervals = 100 * np.array([wilson(int(right[k]), int(totals[k])) for k in shown])
    errors = np.abs(intervals.T - accuracy[shown])
    axes.barh(places, accuracy[shown], color="tab:blue", alpha=0.75)
    axes.errorbar(accuracy[shown], places, xerr=errors, fmt="none", ecolor="black", elinewidth=0.8, alpha=0.6)
    axes.set_yticks(places, [shorten(names[k]) for k in shown], fontsize=8)
    values = axes.secondary_yaxis("right")  # beside the bars, where no line crosses them
    values.set_yticks(places, [f"{accuracy[k]:.1f} % of {totals[k]:,}" for k in shown], fontsize=7)
    values.tick_params(length=0)
    title = "accuracy per class" if len(shown) == len(names) else f"the {len(shown)} classes with the lowest accuracy"
    axes.set(xlim=(0, 100), xlabel="top-1, % (line: 95 % interval)", title=title)


def draw_confusions(axes: Axes, names: Sequence[str], found: Statistics) -> None:
    """The confusion matrix: rows are true classes, columns predictions; colours are shares of the true class."""
    share = found.confusion / np.maximum(found.confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="true class", title="confusions")
    if len(names) > MAX_CELLS:
        return
    ticks, labels = range(len(names)), [shorten(name) for name in names]
    axes.set_xticks(ticks, labels, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(ticks, labels, fontsize=8)
    for i, j in np.argwhere(found.confusion):
        color = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, str(found.confusion[i, j]), ha="center", va="center", fontsize=7, color=color)


def draw_calibration(axes: Axes, found: Statistics) -> None:
    """Accuracy over confidence, in ten bins; the area of a point is the share of its images."""
    confidence, accuracy, counts = np.array(found.calibration()).T
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.scatter(confidence, accuracy, s=20 + 300 * counts / counts.sum(), alpha=0.75)
    error = 100 * found.calibration_error()
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.set(title=f"calibration (expected calibration error {error:.1f} %)")


def draw_images(
    grid: np.ndarray, names: Sequence[str], found: Statistics, samples: Samples, preprocessing: Preprocessing
) -> None:
    """The worst predictions, one for each axes of `grid` (rows, columns), with the images as the model gets them."""
    transform = preprocessing.transform()
    for axes in grid.flat:
        axes.axis("off")
    for axes, row in zip(grid.flat, found.worst(grid.size), strict=False):
        pixels = transform(preprocessing.load(samples.images[int(found.order[row])]))
        axes.imshow(pixels.permute(1, 2, 0).squeeze().numpy(), cmap="gray", vmin=0, vmax=1)
        is_right = found.is_right[row]
        text = f"{shorten(names[int(found.predicted[row])])}  {found.confidence[row]:.0%}"
        text += "" if is_right else f"\n(true: {shorten(names[int(found.truth[row])])})"
        axes.set_title(text, color=RIGHT if is_right else WRONG, fontsize=8)


def draw_losses(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The losses by epoch: training, validation, and validation of the EMA."""
    _curves(axes, rows, {"train_loss": "training, augmented", "val_loss": "validation", "ema_loss": "EMA"})
    axes.set(ylabel="cross-entropy", yscale="log")
    low, high = axes.get_ylim()
    # Two numbers of 1, 2, 5, 10, ... are in every range of a factor of 5.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high >= 5 * low else MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_accuracies(axes: Axes, rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> None:
    """The accuracies by epoch, and the best one."""
    _curves(axes, rows, {"train_top1": "training, augmented", "val_top1": "validation", "ema_top1": "EMA"})
    top1 = best.get("ema_top1", best["val_top1"])
    axes.plot(best["epoch"], top1, "o", color="black", label=f"best: {top1:.2f} %")
    axes.set(ylabel="top-1, %")
    axes.legend(frameon=False, fontsize=8)


def _curves(axes: Axes, rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> None:
    marker = "." if len(rows) < 3 else ""
    for key, label in labels.items():
        if key in rows[0]:
            style = "--" if key.startswith("ema") else "-"  # the validation curve shows between the dashes
            values = [row[key] for row in rows]
            axes.plot([row["epoch"] for row in rows], values, style, marker=marker, label=label)
    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def shorten(name: str) -> str:
    """At most 16 characters of a name."""
    return name if len(name) <= 16 else f"{name[:15]}…"
