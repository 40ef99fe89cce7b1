"""Datasets for PyTorch's DataLoader: images as tensors, for evaluation and for training; counts unreadable images."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sret.data.augment import crop_transform, train_transform
from sret.data.config import Augmentation
from sret.data.dataset import Samples
from sret.data.preprocess import Preprocessing, name_of
from sret.data.sampler import SampleIndex, seeded
from sret.errors import InputError, InputWarning, error_prefix, first_few
from sret.memory import check_memory

UNREADABLE = -1  # the label of an image that could not be read


class ImageDataset(Dataset[tuple[Tensor, int, str]]):
    """Samples for evaluation: (image, label, ""), or (zeros, UNREADABLE, error) for an image that cannot be read."""

    def __init__(self, samples: Samples, preprocessing: Preprocessing) -> None:
        self.samples = samples
        self.preprocessing = preprocessing
        self.transform = preprocessing.transform()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        try:
            image = self.preprocessing.load(self.samples.images[index])
        except InputError as error:
            return blank_image(self.preprocessing), UNREADABLE, str(error)
        return self.transform(image), self.samples.labels[index], ""


class TrainDataset(Dataset[tuple[Tensor, Any, str]]):
    """Samples for training: (image, label, errors of images that could not be read, one per line).

    If the augmentation is computed on the device, images are crops of 8-bit values, and not augmented yet.
    The augmentation is a function of the seed and the `SampleIndex` alone; it does not depend on the number of workers
    or on interruptions. An image that cannot be read is replaced by the next one that can; after more than
    `max_corrupt` in a row by a blank image, since so many errors end the run.
    """

    def __init__(
        self,
        samples: Samples,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int = 0,
        max_corrupt: int = 0,
    ) -> None:
        self.samples = samples
        self.preprocessing = preprocessing
        self.is_cropped_only = augmentation.on_device
        self.transform = (crop_transform if self.is_cropped_only else train_transform)(augmentation, preprocessing)
        self.seed = seed
        self.max_corrupt = max_corrupt

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, sample: SampleIndex) -> tuple[Tensor, Any, str]:
        errors: list[str] = []
        while len(errors) <= self.max_corrupt:
            try:
                image, label = self.fetch((sample.image + len(errors)) % len(self), sample)
                return image, label, "\n".join(errors)
            except InputError as error:
                errors.append(str(error))
        return *self.blank(), "\n".join(errors)

    def fetch(self, index: int, sample: SampleIndex) -> tuple[Tensor, Any]:
        """Image number `index`, with the augmentation of `sample`, and its label.

        Raises `InputError` naming the image if it cannot be read, or augmented.
        """
        source = self.samples.images[index]
        image = self.preprocessing.load(source)
        with seeded((self.seed, sample.epoch, index, sample.use)), error_prefix(name_of(source)):
            return self.transform(image), self.samples.labels[index]

    def blank(self) -> tuple[Tensor, Any]:
        """An image and a label of the right shapes."""
        image = blank_image(self.preprocessing)
        return image.byte() if self.is_cropped_only else image, 0


def blank_image(preprocessing: Preprocessing) -> Tensor:
    """Zeros of the shape of a preprocessed image."""
    return torch.zeros(len(preprocessing.mean), *preprocessing.img_size)


def check_batch(preprocessing: Preprocessing, batch_size: int, num_images: int) -> None:
    """Raises `InputError` if the images of a batch, of at most `num_images`, do not fit in memory."""
    count, needed = min(batch_size, num_images), blank_image(preprocessing).nbytes
    check_memory(f"a batch of {count:,} images", count * needed, "use a smaller --batch_size")


class Unreadable:
    """Counts images that could not be read: warns of each once, and raises an error past a limit."""

    def __init__(self, limit: int, seen: Iterable[str] = ()) -> None:
        self.limit = limit
        self.seen = set(seen)

    def add(self, errors: Iterable[str], is_quiet: bool = False) -> None:
        """Adds the errors that datasets return; empty strings are ignored. Raises `InputError` past the limit."""
        for error in sorted({line for text in errors for line in text.splitlines()} - self.seen):
            self.seen.add(error)
            if len(self.seen) > self.limit:
                raise too_many(sorted(self.seen), self.limit)
            if not is_quiet:
                text = f"{error}; skipped ({len(self.seen)} of at most {self.limit})"
                warnings.warn(text, InputWarning, stacklevel=2)


def too_many(errors: Sequence[str], limit: int) -> InputError:
    """The error for more unreadable images than the limit."""
    what = f"more images than max_corrupt {limit} cannot be read: " if limit else ""
    return InputError(f"{what}{first_few(errors)}; repair or remove these images, or set a larger --max_corrupt")
