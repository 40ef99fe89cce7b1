"""Measures times in alternating rounds, MACs, and the rate of the fastest matrix product.

The candidates alternate in one process, so that a slow phase of the machine affects all of them. The order of a round
is random, and the next round has it reversed, so that no candidate profits from its place.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.benchmark import timer  # waits for the GPU

TURN = 0.02  # seconds that a turn takes at least: shorter calls are repeated
PAUSE = 0.005  # seconds between turns: after a call, threads of some engines occupy their core for a moment


def alternate(candidates: Mapping[Any, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[Any, list[float]]:
    """Seconds per call of each candidate in each round, after `warm_up` calls that do not count."""
    calls = {}
    for name, run in candidates.items():
        calls[name] = math.ceil(TURN / max(1e-5, min(turn(run, 1) for _ in range(warm_up))))
    seconds: dict[Any, list[float]] = {name: [] for name in candidates}
    generator, order = random.Random(0), list(candidates)
    for i in range(rounds):
        order = order[::-1] if i % 2 else generator.sample(order, len(order))
        for name in order:
            time.sleep(PAUSE)
            seconds[name].append(turn(candidates[name], calls[name]))
    return seconds


def turn(run: Callable[[], object], calls: int) -> float:
    """Seconds per call, of `calls` calls; a GPU has finished them."""
    started = timer()
    for _ in range(calls):
        run()
    return (timer() - started) / calls


def ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """The median of the ratios of all rounds."""
    return statistics.median(a / b for a, b in zip(times, to, strict=True))


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * [times[0]]
    return low, median, high


def roofline(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product. Sizes double until a product takes longer than a turn."""
    side, seconds, best = 128, 0.0, 0.0
    while seconds < TURN and side < 8192:
        side *= 2
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = min(turn(partial(torch.mm, a, b), 1) for _ in range(5))
        best = max(best, 2 * side**3 / seconds)
    return best
