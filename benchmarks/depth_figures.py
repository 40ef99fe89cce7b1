"""Draws the figures of docs/depth.md from the output of depth.py and depth_cost.py.

python benchmarks/depth_figures.py docs/results/depth.jsonl docs/results
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Line = Mapping[str, Any]
COLORS = {20: "#86bce6", 108: "#3f8fcf", 1008: "#0b3d75"}
WAYS = {
    "scale one, beta 1": ("as published", "#c0392b"),
    "scale one, beta 0": ("beta = 0 at first", "#8b9198"),
    "scale sqrt, beta 1": ("1 / sqrt(passes)", "#e08e2b"),
    "scale passes, beta 1": ("1 / passes", "#0b5fa5"),
    "unshared": ("unshared, plain", "#5a8f3c"),
}
POLICIES = {
    "none": "#8b9198",
    "pass": "#86bce6",
    "nested": "#0b5fa5",
    "reversible": "#5a8f3c",
    "truncated:1": "#d9b36c",
}


def start(lines: Sequence[Line]) -> Figure:
    """Stream and gradient before each layer, at initialisation."""
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.2), layout="constrained", sharex="col", sharey="row")
    for column, layers in enumerate(COLORS):
        for line in (line for line in lines if line["kind"] == "start" and line["layers"] == layers):
            label, color = WAYS[line["way"]]
            for axes, curve in zip(grid[:, column], ("activation", "gradient"), strict=True):
                axes.plot(*zip(*line[curve], strict=True), color=color, label=label, lw=1.6)
        grid[0, column].set(title=f"{layers:,} layers", yscale="log")
        grid[1, column].set(xlabel="layer", yscale="log")
    grid[0, 0].set(ylabel="mean square of the stream")
    grid[1, 0].set(ylabel="root mean square of the gradient")
    finish(grid.flat)
    grid[0, 1].legend(frameon=False, fontsize=8)
    figure.suptitle("Before training: stream and gradient by layer, for five initialisations")
    return figure


def learning(lines: Sequence[Line]) -> Figure:
    """Validation accuracy, and the stream and the gradients after training."""
    figure, grid = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for line in (line for line in lines if line["kind"] == "train"):
        other, color = WAYS["unshared"]
        is_deep = line["way"] == "scale passes"
        label = f"{line['layers']:,} layers" + ("" if is_deep else f", {other}")
        style = {"color": COLORS[line["layers"]] if is_deep else color, "ls": "-" if is_deep else "--"}
        grid[0].plot(*zip(*((r["epoch"], r["val_top1"]) for r in line["rows"]), strict=True), label=label, **style)
        grid[1].plot(*zip(*line["activation"], strict=True), **style)
        grid[2].plot(*zip(*line["gradient"], strict=True), **style)
    grid[0].set(xlabel="epoch", ylabel="validation top-1, %", title="accuracy on the digits")
    grid[1].set(xlabel="layer", xscale="log", yscale="log", title="mean square of the stream, trained")
    grid[2].set(xlabel="layer", xscale="log", yscale="log", title="root mean square of the gradient, trained")
    finish(grid)
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def coefficients(lines: Sequence[Line]) -> Figure:
    """Minimum, median and maximum of each kind of coefficient, by epoch."""
    chosen = [line for line in lines if line["kind"] == "train" and line["way"] == "scale passes"]
    figure, grid = plt.subplots(1, 6, figsize=(13, 3.2), layout="constrained", sharex=True, sharey=True)
    for line in chosen:
        for axes, kind in zip(grid, sorted(line["coefficients"][0]), strict=True):
            epochs = range(1, len(line["coefficients"]) + 1)
            low, middle, high = zip(*(epoch[kind] for epoch in line["coefficients"]), strict=True)
            color = COLORS[line["layers"]]
            axes.plot(epochs, middle, color=color, label=f"{line['layers']:,} layers")
            axes.fill_between(epochs, low, high, color=color, alpha=0.18, lw=0)
            axes.set(title=kind, xlabel="epoch")
    grid[0].set(ylabel="coefficient, as stored")
    finish(grid)
    grid[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Coefficients during training on the digits: median, minimum and maximum")
    return figure


def steps(lines: Sequence[Line]) -> Figure:
    """Peak memory and time of a step."""
    rows = [line for line in lines if line["kind"] == "step"]
    figure, grid = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for policy, color in POLICIES.items():
        points = sorted((r["layers"], r["peak_mib"], r["seconds"]) for r in rows if r["policy"] == policy)
        if points:
            layers, peaks, seconds = zip(*points, strict=True)
            style = {
                "color": color,
                "marker": "o",
                "ls": "--" if policy == "reversible" else "-",
            }  # dashed, because it covers `pass`
            grid[0].plot(layers, peaks, label=policy, **style)
            grid[1].plot(layers, seconds, label=policy, **style)
    first = rows[0]
    what = f"{first['img_size']} pixels, batch {first['batch_size']}"
    grid[0].set(xscale="log", yscale="log", xlabel="layers", title=f"peak memory of a step, MiB ({what})")
    grid[1].set(xscale="log", yscale="log", xlabel="layers", title="seconds of a step")
    for axes in grid:
        axes.set_xticks([20, 108, 1008], ["20", "108", "1,008"])
        axes.minorticks_off()
    grid[0].set_yticks([200, 500, 1000, 2000, 5000], ["200", "500", "1,000", "2,000", "5,000"])
    grid[1].set_yticks([0.2, 0.5, 1, 2, 5, 10, 20], ["0.2", "0.5", "1", "2", "5", "10", "20"])
    finish(grid)
    grid[0].legend(frameon=False, fontsize=9)
    return figure


def finish(grid: Sequence[Axes]) -> None:
    for axes in grid:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.results.read_text().splitlines()]
    kinds = {line["kind"] for line in lines}
    for name, kind, draw in (
        ("start", "start", start),
        ("learning", "train", learning),
        ("coefficients", "train", coefficients),
        ("steps", "step", steps),
    ):
        if kind in kinds:
            figure = draw(lines)
            figure.savefig(options.folder / f"depth_{name}.png", dpi=90)
            plt.close(figure)


if __name__ == "__main__":
    main()
