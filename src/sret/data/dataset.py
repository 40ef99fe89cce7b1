"""Labelled images: a data set, its classes and its splits."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import ConcatDataset, Subset

from sret.data.config import Augmentation
from sret.data.preprocess import ImageSource, Preprocessing, header
from sret.errors import InputError, InputWarning, first_few, plural

SPLITS = ("train", "val", "test")
TEST_SHARE = 0.2  # of all images
VAL_SHARE = 0.15  # of what the test split leaves
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")  # of Pillow
NUM_INSPECTED = 64  # images from which channels and crop are inferred


class Images(Protocol):
    """Images that are read on access, since a source may hold more of them than fit into memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ImageSource: ...


def check_output_dir(out: Path, data_name: str) -> None:
    """Raises `InputError` if the output folder is a file, or is inside the data, where it would count as data."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out must be a folder")
    if Path(data_name).is_dir() and out.resolve().is_relative_to(Path(data_name).resolve()):
        raise InputError(f"{out} is inside the data folder {data_name} and would be read as data; choose another --out")


@dataclass(frozen=True)
class Samples:
    """Images and their labels (indices into the class names).

    Attributes:
        images: inputs of `Preprocessing.load`; may be read on access.
        names: identify the images; empty if the source has no names.
    """

    images: Images
    labels: Sequence[int]
    names: Sequence[str] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int]) -> "Samples":
        """The samples with these indices, in this order; images are not copied."""
        names = [self.names[i] for i in indices] if self.names else ()
        return Samples(Subset(cast(Any, self.images), indices), [self.labels[i] for i in indices], names)


@dataclass(frozen=True)
class ImageData:
    """A data set.

    Attributes:
        source_splits: the splits of the source, of "train", "val" and "test"; or only "all" if it has none.
        mean, std: per channel, on the scale 0..1; their length is the number of channels.
        crop_pct: share of a resized image that evaluation keeps.
    """

    name: str
    source_splits: dict[str, Samples]
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875

    @classmethod
    def of(cls, name: str, given: dict[str, Samples], class_names: Sequence[str]) -> "ImageData":
        """A data set whose channels and crop are inferred from a few of its images.

        Images have one channel if all of these are grey. Evaluation does not crop them if all are squares of one size,
        as in CIFAR, where the border matters.

        Raises `InputError` for a split without images, and for a label without a class name.
        """
        for split, samples in given.items():
            if not len(samples):
                raise InputError(f"{name}: its {split} split has no images")
            odd = sorted({int(label) for label in np.unique(samples.labels)} - set(range(len(class_names))))
            if odd:
                few = first_few([str(label) for label in odd])
                raise InputError(
                    f"{name}: {plural('label', len(odd))} {few} in {split}, but there are {len(class_names)} classes, "
                    "numbered from 0"
                )
        images = next(iter(given.values())).images
        inspected = [images[i] for i in np.linspace(0, len(images) - 1, min(NUM_INSPECTED, len(images))).astype(int)]
        headers = [found for found in map(header, inspected) if found is not None]
        num_grey = sum(mode in GREY_MODES for mode, _ in headers)
        is_grey = 0 < num_grey == len(headers)
        if 0 < num_grey < len(headers):
            text = f"{name}: {num_grey} of {len(headers)} inspected images are grey and the others in colour; "
            warnings.warn(f"{text}all are read in colour, with 3 channels", InputWarning, stacklevel=3)
        sizes = {size for _, size in headers}
        is_uniform = len(sizes) == 1 and all(width == height for width, height in sizes)
        stats = {"mean": (0.5,), "std": (0.5,)} if is_grey else {}
        return cls(name, given, tuple(class_names), **stats, crop_pct=1.0 if is_uniform else 0.875)

    @property
    def in_chans(self) -> int:
        """Channels of the images: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    @property
    def has_splits(self) -> bool:
        """Whether the source has splits of its own."""
        return "all" not in self.source_splits

    @cached_property
    def splits(self) -> dict[str, Samples]:
        """The splits of the source, and those that it lacks, held out here in the same way every time.

        Raises `InputError` if a class has too few images for that.
        """
        splits = dict(self.source_splits)
        if not self.has_splits:
            splits["train"], splits["test"] = self._hold_out(splits.pop("all"), TEST_SHARE, least=3)
        if "train" in splits and "val" not in splits:
            splits["train"], splits["val"] = self._hold_out(splits["train"], VAL_SHARE, least=2)
        return {name: splits[name] for name in SPLITS if name in splits}

    def split(self, name: str) -> Samples:
        """One split, or every image under the name "all". Raises `InputError` naming the splits there are."""
        if name == "all":
            parts = self.source_splits.values()
            return Samples(
                ConcatDataset([cast(Any, part.images) for part in parts]),
                [label for part in parts for label in part.labels],
                [name for part in parts for name in part.names],
            )
        if name not in self.splits:
            raise InputError(f"{self.name} has no {name} split; it has {', '.join(self.splits)}")
        return self.splits[name]

    def preprocessing(self, img_size: tuple[int, int], exif_orientation: bool = True) -> Preprocessing:
        """How its images become inputs of a model for images of `img_size` pixels."""
        return Preprocessing(
            img_size=img_size,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            exif_orientation=exif_orientation,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Class names, and per given split the number of images and a digest of their names and labels."""
        prints: dict[str, Any] = {"class_names": list(self.class_names)}
        for split, samples in self.source_splits.items():
            digest = hashlib.sha256()
            for name, label in zip(samples.names or [""] * len(samples), samples.labels, strict=True):
                digest.update(f"{name}\0{label}\n".encode(errors="surrogateescape"))
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
                    f"{self.name}: too few images of {self.class_names[label]} ({len(indices)}); each class needs at "
                    f"least {least}, for training{', validation and test' if least > 2 else ' and validation'}"
                )
            count = max(1, round(share * len(indices)))
            held += indices[:count].tolist()
            rest += indices[count:].tolist()
        return samples.subset(sorted(rest)), samples.subset(sorted(held))


def warn_of_mirrors(data: ImageData, augmentation: Augmentation) -> None:
    """Warns if images of characters, whose mirror images are no longer theirs, are flipped in training."""
    if augmentation.flip and all(len(name) == 1 and name.isalnum() for name in data.class_names):
        text = f"the classes of {data.name} are characters, and training images are mirrored at random; "
        warnings.warn(text + "set flip of the augmentation to false", InputWarning, stacklevel=3)
