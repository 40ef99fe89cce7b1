"""Times early exit: images/s of thresholds beside their accuracy, the fastest threshold, and a figure.

An image that leaves at exit k takes the time t_k of the parts before it, whatever it shows. One image at a time takes
on average

    t = sum_k n_k t_k / sum_k n_k

with t_k measured for each exit, and n_k the number of labelled images that leave at exit k. In a batch, the time
depends on the images that go on together, so each threshold runs on a batch of sample images.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sret.bench.timing import alternate, quartiles, ratio
from sret.elastic import ExitPolicy, predict_with_exits
from sret.elastic.calibrate import Outcome, acceptable
from sret.errors import InputError
from sret.files import replacing
from sret.models.sret import SReT

ROUNDS = 7
MOST = 12  # thresholds that run in a batch


@dataclass(frozen=True)
class Speed:
    """Images/s: one image at a time, and in a batch."""

    alone: float
    batched: float


@dataclass(frozen=True)
class Timed:
    """An outcome with its measured speed."""

    outcome: Outcome
    speed: Speed


@dataclass(frozen=True, kw_only=True)
class _LeavesAt(ExitPolicy):
    """All images leave at one exit, after the scores of a policy were computed."""

    last: int

    def leaves(self, probabilities: Tensor, before: Tensor | None, exit_index: int) -> Tensor:
        return self.score(probabilities, before, exit_index) > (-1 if exit_index == self.last else 2)


def to_time(found: Sequence[Outcome], max_drop: float, most: int = MOST) -> list[Outcome]:
    """At most `most` outcomes whose images leave in different ways, the largest threshold first.

    These are threshold 1; the acceptable ones with the fewest MACs, because one of them is the fastest; and some of the
    others, which complete the curve. Of thresholds with the same exits, the largest is taken.
    """
    rows = list({row.counts: row for row in sorted(found, key=lambda row: row.threshold)}.values())[::-1]
    if len(rows) <= most:
        return rows
    best = [row for row in sorted(acceptable(rows, max_drop), key=lambda row: row.share) if row.threshold < 1]
    best = best[: most // 2]
    others = [row for row in rows if row.threshold < 1 and row not in best]
    some = others[:: math.ceil(len(others) / (most - 1 - len(best)))]
    return [row for row in rows if row.threshold == 1 or row in best or row in some]


@torch.inference_mode()
def time_exits(
    model: SReT, policy: ExitPolicy, found: Sequence[Outcome], images: Tensor, rounds: int = ROUNDS
) -> tuple[Speed, list[Timed]]:
    """Measures the speed of the whole model without exits, and of outcomes of a policy, in alternating rounds.

    Args:
        policy: its threshold is not used.
        images: normalised (B, in_chans, H, W), the batch.
    """
    singles: dict[int, Callable[[], object]] = {-1: partial(model, images[:1])}
    for k in range(len(found[0].counts)):
        singles[k] = partial(predict_with_exits, model, images[:1], _LeavesAt(**vars(policy), last=k))
    alone = _seconds(singles, rounds)
    # Thresholds with which the same images of the batch leave at the same exits take the same time.
    ways: dict[float, tuple[int, ...]] = {}
    batches: dict[tuple[int, ...], Callable[[], object]] = {(): partial(model, images)}
    for row in found:
        run = partial(predict_with_exits, model, images, replace(policy, threshold=row.threshold))
        ways[row.threshold] = tuple(run()[1].tolist())
        batches[ways[row.threshold]] = run
    batched = _seconds(batches, rounds)
    timed = []
    for row in found:
        seconds = sum(count * alone[k] for k, count in enumerate(row.counts)) / sum(row.counts)
        timed.append(Timed(row, Speed(1 / seconds, len(images) / batched[ways[row.threshold]])))
    return Speed(1 / alone[-1], len(images) / batched[()]), timed


def fastest(whole: Speed, timed: Sequence[Timed], max_drop: float) -> Timed:
    """The outcome with the most images/s one at a time, of those that lose at most `max_drop` points of accuracy.

    Those that are slower than the whole model, alone or in a batch, are left out. If none remains, that of threshold 1,
    which changes nothing.
    """
    allowed = acceptable([row.outcome for row in timed], max_drop)
    unchanged = next(row for row in timed if row.outcome.threshold == 1)
    faster = [
        row
        for row in timed
        if row is not unchanged
        and row.outcome in allowed
        and row.speed.alone > whole.alone
        and row.speed.batched >= whole.batched
    ]
    return max(faster, key=lambda row: row.speed.alone, default=unchanged)


def check_figure_path(path: Path) -> None:
    """Raises, before anything is measured, `InputError` for a wrong file name, and `ImportError` without matplotlib."""
    import matplotlib  # noqa: F401

    if path.suffix.lower() != ".png" or path.is_dir():
        raise InputError(f"{path}: the name of the figure ends in .png; give such a file name")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path}: {parent} is not a folder that can be written to; give another name")


def draw(path: Path, title: str, whole: Speed, timed: Sequence[Timed], stored: Timed, batch_size: int) -> None:
    """Writes a PNG figure: accuracy against images/s of all thresholds, one at a time and in a batch."""
    from matplotlib.figure import Figure

    top1 = next(row.outcome.top1 for row in timed if row.outcome.threshold == 1)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(title)
    rows = sorted(timed, key=lambda row: row.outcome.share)
    for panel, name, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("alone", "batched"),
        ("one image at a time", f"a batch of {batch_size}"),
        strict=True,
    ):
        speeds = [getattr(row.speed, name) for row in rows]
        panel.plot(speeds, [row.outcome.top1 for row in rows], "o-", label="thresholds")
        panel.plot(getattr(whole, name), top1, "D", color="white", mec="black", ms=9, label="whole model, no exits")
        at = getattr(stored.speed, name)
        threshold = stored.outcome.threshold
        text = "stored: 1, no image leaves early" if threshold == 1 else f"stored: above {threshold:g}"
        panel.plot(at, stored.outcome.top1, "*", color="tab:orange", mec="black", ms=16, label=text)
        panel.set(title=label, xlabel="images/s")
        panel.grid(alpha=0.3)
    panel.legend()
    figure.axes[0].set_ylabel("top-1 accuracy, %")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _seconds(calls: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Seconds of the first call, and of the others by the ratios of the rounds, which a busy machine changes less."""
    times = alternate(calls, rounds)
    first = next(iter(times.values()))
    return {key: quartiles(first)[1] * ratio(seconds, first) for key, seconds in times.items()}
