"""Writes an evaluation as one PNG page: classes, confusions, calibration, images; and the curves of a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from sret.data.dataset import Samples
from sret.data.preprocess import Preprocessing
from sret.files import replacing
from sret.inference.drawing import (
    COLUMNS,
    draw_accuracies,
    draw_calibration,
    draw_classes,
    draw_confusions,
    draw_images,
    draw_losses,
)
from sret.inference.statistics import Statistics, wilson

SHOWN = 24  # images on the page


def write_png(
    path: Path,
    title: str,
    names: Sequence[str],
    found: Statistics,
    samples: Samples,
    preprocessing: Preprocessing,
    rows: Sequence[Mapping[str, Any]] = (),
    best: Mapping[str, Any] | None = None,
) -> None:
    """Draws the page.

    Args:
        names: names of the classes.
        found: statistics of the predictions.
        samples: the evaluated images; those of the worst predictions are shown.
        rows: the lines of `metrics.jsonl` of a training run, whose curves are drawn too.
        best: the line of the best epoch.
    """
    count, right = len(found.truth), int(found.is_right.sum())
    lines = -(-min(SHOWN, count) // COLUMNS)
    heights = [*([3.4] if rows else []), 4.8, 0.5 + 1.7 * lines]
    figure = plt.figure(figsize=(15, sum(heights) + 0.6), layout="constrained")
    low, high = (100 * share for share in wilson(right, count))
    figure.suptitle(
        f"{title}: top-1 {100 * right / count:.2f} % on {count:,} images (95 % interval {low:.1f} to {high:.1f} %)",
        fontsize=13,
    )
    *curves, middle, bottom = np.asarray(figure.subfigures(len(heights), 1, height_ratios=heights))
    for part in curves:
        losses, accuracies = part.subplots(1, 2)
        draw_losses(losses, rows)
        draw_accuracies(accuracies, rows, best or rows[-1])
    bars, cells, points = middle.subplots(1, 3)
    draw_classes(bars, names, found)
    draw_confusions(cells, names, found)
    draw_calibration(points, found)
    draw_images(bottom.subplots(lines, COLUMNS, squeeze=False), names, found, samples, preprocessing)
    then = ", then the least confident correct predictions" if count - right < SHOWN else ""
    bottom.suptitle(f"{count - right:,} wrong predictions, the most confident first{then}", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
