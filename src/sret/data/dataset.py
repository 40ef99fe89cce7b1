"""Labelled images: a data set, how it is divided, and its images as tensors for evaluation and for training."""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from sret.data.augment import train_transform
from sret.data.config import Augmentation
from sret.data.preprocess import ImageSource, Preprocessing, header
from sret.data.sampler import Draw, seeded
from sret.errors import InputError, InputWarning, first_few

SPLITS = ("train", "val", "test")
TEST_SHARE = 0.2  # of all images
VAL_SHARE = 0.15  # of what the test split leaves
LOOKED_AT = 64  # images that tell what all are like
UNREADABLE = -1  # the label of an image that could not be read


class Images(Protocol):
    """Images that are fetched when asked for: a source may hold more of them than memory does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ImageSource: ...


@dataclass(frozen=True)
class Samples:
    """Images and their labels (indices into the class names).

    Attributes:
        images: what `Preprocessing.load` takes, one at a time; it may be lazy.
        names: what tells the images apart, cheap to read; empty where a source has nothing of the kind.
    """

    images: Images
    labels: Sequence[int]
    names: Sequence[str] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> "Samples":
        names = [self.names[i] for i in indices] if self.names else ()
        return Samples(Subset(cast(Any, self.images), indices), [self.labels[i] for i in indices], names)


@dataclass(frozen=True)
class ImageData:
    """A data set.

    Attributes:
        given: the splits its source has, of "train", "val" and "test"; or "all" alone if it is not divided.
        mean, std: per channel, on the scale 0..1; their length is the number of channels.
        crop_pct: share of a resized image that evaluation keeps.
    """

    name: str
    given: dict[str, Samples]
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875

    @classmethod
    def of(cls, name: str, given: dict[str, Samples], class_names: Sequence[str]) -> "ImageData":
        """A data set whose channels and crop are read off a few of its images.

        Images are grey (one channel) if all looked at are; they are not cropped if all are squares of one size, as
        in CIFAR, whose margins then matter.

        Raises `InputError` for a split without images, and for a label without a class name.
        """
        for split, samples in given.items():
            if not len(samples):
                raise InputError(f"{name}: its {split} split holds no images")
            odd = sorted({int(label) for label in np.unique(samples.labels)} - set(range(len(class_names))))
            if odd:
                raise InputError(
                    f"{name}: label(s) {first_few([str(label) for label in odd])} in {split}, but there are "
                    f"{len(class_names)} classes, numbered from 0"
                )
        images = next(iter(given.values())).images
        looked_at = [images[i] for i in np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).astype(int)]
        headers = [found for found in map(header, looked_at) if found is not None]
        is_grey = bool(headers) and all(mode in ("1", "L", "I", "I;16") for mode, _ in headers)
        sizes = {size for _, size in headers}
        is_uniform = len(sizes) == 1 and all(width == height for width, height in sizes)
        stats = {"mean": (0.5,), "std": (0.5,)} if is_grey else {}
        return cls(name, given, tuple(class_names), **stats, crop_pct=1.0 if is_uniform else 0.875)

    @property
    def in_chans(self) -> int:
        return len(self.mean)

    @property
    def is_divided(self) -> bool:
        """Whether the source itself says which images are for training."""
        return "all" not in self.given

    @cached_property
    def splits(self) -> dict[str, Samples]:
        """The splits, with what the source does not divide divided here, the same way every time.

        Raises `InputError` if a class has too few images for that.
        """
        splits = dict(self.given)
        if not self.is_divided:
            splits["train"], splits["test"] = self._hold_out(splits.pop("all"), TEST_SHARE, least=3)
        if "train" in splits and "val" not in splits:
            splits["train"], splits["val"] = self._hold_out(splits["train"], VAL_SHARE, least=2)
        return {name: splits[name] for name in SPLITS if name in splits}

    def split(self, name: str) -> Samples:
        """One split, or every image under the name "all". Raises `InputError` naming the splits there are."""
        if name == "all":
            parts = self.given.values()
            return Samples(
                ConcatDataset([cast(Any, part.images) for part in parts]),
                [label for part in parts for label in part.labels],
                [label for part in parts for label in part.names],
            )
        if name not in self.splits:
            raise InputError(f"{self.name} has no {name} split; it has {', '.join(self.splits)}")
        return self.splits[name]

    def refuse_inside(self, out: Path) -> None:
        """Raises `InputError` for a folder to write to that lies in the data, where it would count as data."""
        if Path(self.name).is_dir() and out.resolve().is_relative_to(Path(self.name).resolve()):
            raise InputError(f"{out} lies in the data, {self.name}, and would count as data; name another --out")

    def fingerprint(self) -> dict[str, Any]:
        """Class names, and per given split the number of images and a digest of their names and labels."""
        prints: dict[str, Any] = {"class_names": list(self.class_names)}
        for split, samples in self.given.items():
            digest = hashlib.sha256()
            for name, label in zip(samples.names or [""] * len(samples), samples.labels, strict=True):
                digest.update(f"{name}\0{label}\n".encode())
            prints[split] = f"{len(samples)} images, {digest.hexdigest()[:12]}"
        return prints

    def _hold_out(self, samples: Samples, share: float, least: int) -> tuple[Samples, Samples]:
        """(the rest, a stratified random share): the same for the same samples, whatever the seed of a run."""
        labels = np.asarray(samples.labels)
        generator = np.random.Generator(np.random.PCG64(0))
        rest: list[int] = []
        held: list[int] = []
        for label in np.unique(labels):
            indices = generator.permutation(np.flatnonzero(labels == label))
            if len(indices) < least:
                raise InputError(
                    f"{self.name}: too few images of {self.class_names[label]} ({len(indices)}) to hold some out "
                    f"for choosing the best weights{' and for testing' if least > 2 else ''}; give at least {least} of "
                    "each class"
                )
            count = max(1, round(share * len(indices)))
            held += indices[:count].tolist()
            rest += indices[count:].tolist()
        return samples.take(sorted(rest)), samples.take(sorted(held))


class ImageDataset(Dataset[tuple[Tensor, int, str]]):
    """Samples for evaluation, as (tensor, label, ""); (zeros, UNREADABLE, what is wrong) for one that is no image."""

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
    """Samples for training, as (tensor, label, what could not be read on the way, one a line).

    The augmentation is a function of the seed and the draw alone, whatever the number of workers and however often
    training was interrupted. In the place of an image that cannot be read stands the next one that can; after more
    than `max_corrupt` in a row, a blank, since so many errors end the run.
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
        self.transform = train_transform(augmentation, preprocessing)
        self.seed = seed
        self.max_corrupt = max_corrupt

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Any, str]:
        errors: list[str] = []
        while len(errors) <= self.max_corrupt:
            try:
                image, label = self.fetch((draw.image + len(errors)) % len(self), draw)
                return image, label, "\n".join(errors)
            except InputError as error:
                errors.append(str(error))
        return *self.blank(), "\n".join(errors)

    def fetch(self, index: int, draw: Draw) -> tuple[Tensor, Any]:
        """Image number `index`, augmented as a draw says, and its label. Raises `InputError` if it cannot be read."""
        image = self.preprocessing.load(self.samples.images[index])
        with seeded((self.seed, draw.epoch, index, draw.copy)):
            return self.transform(image), self.samples.labels[index]

    def blank(self) -> tuple[Tensor, Any]:
        """An image and a label of the right shapes."""
        return blank_image(self.preprocessing), 0


def blank_image(preprocessing: Preprocessing) -> Tensor:
    """Zeros of a prepared image's shape."""
    return torch.zeros(len(preprocessing.mean), *preprocessing.img_size)


class Unreadable:
    """Images that could not be read: each is named once, and more of them than the limit stop the run."""

    def __init__(self, limit: int, seen: Iterable[str] = ()) -> None:
        self.limit = limit
        self.seen = set(seen)

    def note(self, errors: Iterable[str], is_quiet: bool = False) -> None:
        """Takes what data sets report; an empty string is no error. Raises `InputError` past the limit."""
        for error in sorted({line for text in errors for line in text.splitlines()} - self.seen):
            self.seen.add(error)
            if len(self.seen) > self.limit:
                raise too_many(sorted(self.seen), self.limit)
            if not is_quiet:
                text = f"{error}; skipped, number {len(self.seen)} of at most {self.limit}"
                warnings.warn(text, InputWarning, stacklevel=2)


def too_many(errors: Sequence[str], limit: int) -> InputError:
    """What to raise for more unreadable images than the limit."""
    what = f"more images than max_corrupt {limit} cannot be read: " if limit else ""
    return InputError(
        f"{what}{first_few(errors)}; mend or remove what is broken, or allow for it with a larger max_corrupt"
    )
