"""Chooses the images and random numbers of every step, as a function of (seed, step) for any number of processes.

Letters: B images per step, P parts that a step is computed in (processes x micro-batches).
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from sret.errors import InputError


class SampleIndex(NamedTuple):
    """One use of an image in training; its augmentation is a function of this and the seed."""

    image: int
    epoch: int
    use: int = 0  # number of the use in the epoch; above 0 only if classes are balanced


class EpochBatches(Sampler[list[SampleIndex]]):
    """The parts of batches that one process loads; the order of an epoch is a function of (seed, epoch).

    The B images of a step do not depend on the number of parts. Images i and B - 1 - i are in the same part, at
    mirrored positions, because mixup and CutMix pair them (timm's batch mode): so the pairs do not depend on the number
    of parts either.

    Images that do not fill a last batch are left out of the epoch.

    Args:
        rank, num_ranks: of this process.
        accumulation: parts that one process computes a step in, one after the other.
        uses: how often each image is used in an epoch, on average, see `balanced_uses`; by default once.

    Raises `InputError` if there are fewer images than a batch needs, or a batch cannot be shared evenly.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        accumulation: int = 1,
        uses: NDArray[np.float64] | None = None,
    ) -> None:
        num_parts = num_ranks * accumulation
        if batch_size > num_samples:
            unit = 2 * num_parts
            most = num_samples // unit * unit
            few = max(unit, most // 8 // unit * unit)
            hint = f"use at most {most}; {few} gives {num_samples // few} steps per epoch" if most else "add images"
            raise InputError(f"batch_size {batch_size} is more than the {num_samples} training images; {hint}")
        if num_parts > 1 and batch_size % (2 * num_parts):
            raise InputError(
                f"batch_size {batch_size} cannot be shared by {num_ranks} processes in {accumulation} parts each: "
                f"it must be a multiple of {2 * num_parts}"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.num_ranks, self.accumulation, self.uses = rank, num_ranks, accumulation, uses
        self.epoch = self.first = 0

    def start_at(self, epoch: int, first: int = 0) -> None:
        """The next iteration yields this epoch, from its step number `first` on."""
        self.epoch, self.first = epoch, first

    @property
    def steps(self) -> int:
        """Steps in a whole epoch, of `accumulation` batches each."""
        return self.num_samples // self.batch_size

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        order, uses = self._order()
        num_parts = self.num_ranks * self.accumulation
        for step in range(self.first, self.steps):
            places = range(step * self.batch_size, (step + 1) * self.batch_size)
            batch = [SampleIndex(int(order[place]), self.epoch, int(uses[place])) for place in places]
            for k in range(self.accumulation):
                yield part_of(batch, k * self.num_ranks + self.rank, num_parts)

    def _order(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The images of the epoch in their order, and how often each was used before."""
        generator = np.random.Generator(np.random.PCG64((self.seed, self.epoch)))
        order = generator.permutation(self.num_samples)
        if self.uses is None:
            return order, np.zeros_like(order)
        # Systematic sampling: an image used u times on average is used floor(u) or ceil(u) times.
        ends = np.cumsum(self.uses[order])
        places = (np.arange(self.num_samples) + generator.random()) * (ends[-1] / self.num_samples)
        found = np.searchsorted(ends, places, side="right").clip(max=self.num_samples - 1)  # rounding may pass the end
        drawn = order[found]  # uses of one image are neighbours
        firsts = np.maximum.accumulate(np.where(np.diff(drawn, prepend=-1) != 0, np.arange(len(drawn)), 0))
        mixed = generator.permutation(self.num_samples)
        return drawn[mixed], (np.arange(len(drawn)) - firsts)[mixed]


def balanced_uses(labels: Sequence[int], balance: float) -> NDArray[np.float64] | None:
    """(N,) how often each image is used in an epoch, so that classes with n images have shares of n^(1 - balance).

    None if `balance` is 0: every image is used once.
    """
    if not balance:
        return None
    _, places, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    weights = (counts**-balance)[places]
    return weights * (len(weights) / weights.sum())


def part_of(batch: Sequence[SampleIndex], part: int, num_parts: int) -> list[SampleIndex]:
    """One of `num_parts` equal parts of a batch, which contains both images of each pair (i, B - 1 - i)."""
    if num_parts == 1:
        return list(batch)
    half = len(batch) // 2
    return [*batch[:half][part::num_parts], *batch[::-1][:half][part::num_parts][::-1]]


@contextmanager
def seeded(key: tuple[int, ...]) -> Iterator[None]:
    """Within this context Python's, NumPy's and torch's CPU generators start from `key`; afterwards they are as before.

    Transforms of torchvision draw from torch, those of timm from all three.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
