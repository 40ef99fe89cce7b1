"""Draws the rows of `sret bench`, or of performance.py, as bars: time per image by engine and data type.

    python benchmarks/performance_figure.py OUTPUT.txt FIGURE.png [--title TITLE]

OUTPUT.txt has the output of the command; its last line is JSON. The whiskers are the quartiles of the rounds.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = Mapping[str, Any]
OURS = ("#0b5fa5", "#3f8fcf", "#86bce6")  # models named sret
OTHERS = ("#8b9198", "#b3b8bd", "#6a7077")
INK, FAINT = "#24292f", "#6e7781"


def draw(data: Mapping[str, Any], path: Path, title: str = "") -> None:
    rows, batch_size = data["rows"], data["batch_size"]
    groups = [(name, list(some)) for name, some in groupby(rows, lambda row: f"{row['engine']}, {row['dtype']}")]
    colors = colors_of(rows)
    lines = len(rows) + 0.9 * len(groups)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.34 * lines), layout="constrained")
    place, places, longest = 0.0, [], 0.0
    for name, some in groups:
        axes.text(0, place, f" {name}", va="center", ha="left", fontsize=10, weight="bold", color=INK)
        place += 0.95
        for row in some:
            low, high = row["ms_quartiles"]
            axes.barh(place, row["ms_per_image"], height=0.78, color=colors[row["model"]])
            axes.plot([low, high], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
            end = max(high, row["ms_per_image"])
            beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
            axes.annotate(f"{row['ms_per_image']:.3g} ms", (end, place), (6, 0), color=INK, **beside)
            if row["vs_first_model"] is not None and len(some) > 1:
                axes.annotate(f"{row['vs_first_model']:.2f}\u00d7", (end, place), (58, 0), color=FAINT, **beside)
            longest = max(longest, end)
            places.append((place, row["model"]))
            place += 1
        place += 0.35
    axes.set_yticks([y for y, _ in places], [name for _, name in places], fontsize=9, color=INK)
    axes.set(ylim=(place - 0.6, -0.8), xlim=(0, 1.22 * longest))
    axes.set_xlabel(f"ms per image, median and quartiles of {data['rounds']} rounds", color=FAINT, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#d0d7de")
    title = title or f"Time per image, and \u00d7 that of {rows[0]['model']}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK)
    conditions = f"{data['mode']}, batch {batch_size}; {data['device']}, {data['threads']} threads"
    axes.set_title(conditions, loc="left", fontsize=8.5, color=FAINT)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def colors_of(rows: Sequence[Row]) -> dict[str, str]:
    colors: dict[str, str] = {}
    for is_ours, palette in ((True, OURS), (False, OTHERS)):
        models = dict.fromkeys(row["model"] for row in rows if row["model"].startswith("sret") == is_ours)
        colors.update({model: palette[i % len(palette)] for i, model in enumerate(models)})
    return colors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    draw(json.loads(options.output.read_text().splitlines()[-1]), options.figure, options.title)


if __name__ == "__main__":
    main()
