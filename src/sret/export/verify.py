"""Compares the outputs of an exported file with those of its model, on images with or without labels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sret.checkpoints.card import Card
from sret.data.dataset import Samples
from sret.data.loading import UNREADABLE, ImageDataset, Unreadable
from sret.data.preprocess import Preprocessing
from sret.errors import InputError
from sret.export.runtime import Exported

TOLERANCE = 1e-4  # largest difference of the logits of a float32 file, relative to the largest logit
FIRST_BATCHES = (1, 3)  # batch sizes; a graph with a fixed batch size fails at one of them
RANDOM_IMAGES = 16  # for the comparison without data

Batch = tuple[Tensor, Sequence[int] | None]  # (B, C, H, W) and labels


@dataclass(frozen=True)
class Comparison:
    """Differences between the outputs of a file and those of its model.

    Attributes:
        count: number of images.
        difference: largest absolute difference between two logits.
        scale: largest absolute logit of the model.
        agreement: percentage of images with the same top-1 prediction; None without classes.
        top1: accuracy in percent of (the model, the file); None without labels.
    """

    count: int
    difference: float
    scale: float
    agreement: float | None
    top1: tuple[float, float] | None


def compare(model: nn.Module, exported: Exported, batches: Iterable[Batch]) -> Comparison:
    """Compares the logits for the same images, and accuracies if all batches have labels."""
    expected, found = [], []
    labels: list[int] | None = []
    for images, some_labels in batches:
        with torch.no_grad():
            expected.append(model(images))
        found.append(exported(images))
        labels = None if labels is None or some_labels is None else [*labels, *some_labels]
    before, after = torch.cat(expected), torch.cat(found)
    agreement, top1 = None, None
    if exported.num_classes:
        agreement = _percent(before.argmax(1) == after.argmax(1))
        if labels is not None:
            truth = torch.tensor(labels)
            top1 = _percent(before.argmax(1) == truth), _percent(after.argmax(1) == truth)
    difference, scale = (before - after).abs().max().item(), before.abs().max().item()
    return Comparison(len(before), difference, scale, agreement, top1)


def check_parity(comparison: Comparison, out: Path, dtype: str) -> None:
    """Raises `InputError` if outputs are not finite, or if float32 logits differ by more than `TOLERANCE`."""
    difference, scale = comparison.difference, comparison.scale
    if not np.isfinite(difference):
        raise InputError(f"{out} was not written: its {dtype} outputs are not finite; try float32")
    if dtype == "float32" and difference > TOLERANCE * scale:
        raise InputError(
            f"{out} was not written: its logits differ from the model's by up to {difference:.1e}, which is more than "
            f"{TOLERANCE:.0e} of the largest logit, {scale:.3g}; try another engine, or another version of this one"
        )


def random_subset(samples: Samples, count: int) -> Samples:
    """At most `count` random images, the same in each call. (The first images of a folder are all of one class.)"""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(samples))
    return samples.subset(sorted(order[:count].tolist()))


def batches_of(samples: Samples, card: Card, sizes: Iterable[int], unreadable: Unreadable) -> Iterator[Batch]:
    """The images that can be read, preprocessed as the card says, in batches of these sizes.

    Raises `InputError` for more unreadable images than the limit of `unreadable`, and if none can be read.
    """
    readable, done = _readable(samples, card.preprocessing, unreadable), 0
    for size in sizes:
        batch = list(islice(readable, size))
        if not batch:
            break
        images, labels = zip(*batch, strict=True)
        yield card.preprocessing.normalize(torch.stack(images)), labels
        done += len(batch)
    if not done:
        raise InputError("none of the images for the export can be read")


def _readable(samples: Samples, preprocessing: Preprocessing, unreadable: Unreadable) -> Iterator[tuple[Tensor, int]]:
    dataset = ImageDataset(samples, preprocessing)
    for i in range(len(dataset)):
        image, label, problem = dataset[i]
        unreadable.add([problem])
        if label != UNREADABLE:
            yield image, label


def random_batches(card: Card) -> Iterator[Batch]:
    """Random images of the card's size and channels, in several batch sizes."""
    config, generator = card.config, torch.Generator().manual_seed(0)
    images = torch.randn(RANDOM_IMAGES, config.in_chans, *config.input_size, generator=generator)
    for part in images.split([*FIRST_BATCHES, RANDOM_IMAGES - sum(FIRST_BATCHES)]):
        yield part, None


def _percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item()
