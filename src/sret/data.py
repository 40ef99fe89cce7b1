"""Labelled pictures under one name: the embedded digits, or a folder with a sub-folder per class."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sret.errors import InputError, some
from sret.preprocess import Augmentation, Preprocessing

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}
TEST_SHARE = 0.2  # of all pictures
VAL_SHARE = 0.15  # of what the test split leaves


@dataclass(frozen=True)
class Samples:
    """Pictures, as files or as PIL images, and their labels (indices into the class names)."""

    images: Sequence[Path | Image.Image]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> "Samples":
        return Samples([self.images[i] for i in indices], [self.labels[i] for i in indices])


@dataclass(frozen=True)
class ImageData:
    """A data set.

    Attributes:
        given: the splits its source has, of "train", "val" and "test"; or "all" alone if it is not divided.
        mean, std: per channel, on the scale 0..1; their length is the number of channels.
        crop_pct: share of a resized picture that evaluation keeps.
    """

    name: str
    given: dict[str, Samples]
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875

    @property
    def in_chans(self) -> int:
        return len(self.mean)

    @property
    def is_divided(self) -> bool:
        """Whether the source itself says which pictures are for training."""
        return "all" not in self.given

    @cached_property
    def splits(self) -> dict[str, Samples]:
        """The splits, with what the source does not divide divided here, the same way every time.

        Raises `InputError` if a class has too few pictures for that.
        """
        splits = dict(self.given)
        if not self.is_divided:
            splits["train"], splits["test"] = self._hold_out(splits.pop("all"), TEST_SHARE)
        if "train" in splits and "val" not in splits:
            splits["train"], splits["val"] = self._hold_out(splits["train"], VAL_SHARE)
        return {name: splits[name] for name in SPLIT_FOLDERS if name in splits}

    def split(self, name: str) -> Samples:
        """One split, or every picture under the name "all". Raises `InputError` naming the splits there are."""
        if name == "all":
            parts = self.given.values()
            return Samples(
                [image for part in parts for image in part.images], [label for part in parts for label in part.labels]
            )
        if name not in self.splits:
            raise InputError(f"{self.name} has no {name} split; it has {', '.join(self.splits)}")
        return self.splits[name]

    def fingerprint(self) -> dict[str, Any]:
        """Class names, and per given split the number of pictures and a digest of their names and labels.

        Pictures that are no files have no names; they come with the package that carries them.
        """
        prints: dict[str, Any] = {"class_names": list(self.class_names)}
        for name, samples in self.given.items():
            digest = hashlib.sha256()
            for image, label in zip(samples.images, samples.labels, strict=True):
                where = "/".join(image.parts[-2:]) if isinstance(image, Path) else ""
                digest.update(f"{where}\0{label}\n".encode())
            prints[name] = f"{len(samples)} pictures, {digest.hexdigest()[:12]}"
        return prints

    def _hold_out(self, samples: Samples, share: float) -> tuple[Samples, Samples]:
        """(the rest, a stratified random share): the same for the same samples, whatever the seed of a run."""
        labels = np.asarray(samples.labels)
        generator = np.random.Generator(np.random.PCG64(0))
        rest: list[int] = []
        held: list[int] = []
        for label in np.unique(labels):
            indices = generator.permutation(np.flatnonzero(labels == label))
            count = max(1, round(share * len(indices)))
            if count == len(indices):
                raise InputError(
                    f"{self.name}: too few pictures of {self.class_names[label]} ({len(indices)}) to hold some out "
                    "for testing and for choosing the best weights; give at least 3 of each class"
                )
            held += indices[:count].tolist()
            rest += indices[count:].tolist()
        return samples.take(sorted(rest)), samples.take(sorted(held))


class EpochBatches(Sampler[list[int]]):
    """Batches of indices: the order of an epoch is a function of (seed, epoch), and any batch can be the first.

    Several processes share each batch: process `rank` takes every `num_ranks`-th index, so that the pictures of a step
    do not depend on their number. What does not fill a last batch waits for another epoch's order.

    Raises `InputError` if there are fewer pictures than a batch needs, or a batch cannot be shared evenly.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1) -> None:
        if batch_size > num_samples:
            raise InputError(f"batch_size {batch_size} is more than the {num_samples} training pictures")
        if batch_size % num_ranks:
            raise InputError(f"batch_size {batch_size} does not divide by {num_ranks} processes")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.num_ranks = rank, num_ranks
        self.epoch = self.first = 0

    def start_at(self, epoch: int, first: int = 0) -> None:
        """Iterates over this epoch next, from batch number `first` on."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.num_samples // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.Generator(np.random.PCG64((self.seed, self.epoch))).permutation(self.num_samples)
        for i in range(self.first, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size][self.rank :: self.num_ranks].tolist()


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Samples as (tensor, label). Augmentation of picture i in epoch e is a function of (seed, e, i) alone, whatever
    the number of workers and however often training was interrupted; `set_epoch` moves it on."""

    def __init__(
        self, samples: Samples, preprocessing: Preprocessing, augmentation: Augmentation = "none", seed: int = 0
    ) -> None:
        self.samples = samples
        self.preprocessing = preprocessing
        self.transform = preprocessing.transform(augmentation)
        self.is_augmented = augmentation != "none"
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.preprocessing.load(self.samples.images[index])
        if not self.is_augmented:
            return self.transform(image), self.samples.labels[index]
        with seeded((self.seed, self.epoch, index)):
            return self.transform(image), self.samples.labels[index]


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


def load_data(name: str) -> ImageData:
    """The data set of that name: "digits", or the path of a folder of pictures.

    A folder holds a sub-folder per class, or `train` and `val` (and `test`) folders that do. What a folder does not
    divide is divided here, the same way every time: a stratified 20 % for testing, and 15 % of the rest to select on.

    Raises `InputError` if there is no such data.
    """
    if name == "digits":
        return _digits()
    root = Path(name)
    if not root.is_dir():
        raise InputError(f"no data {name!r}: give 'digits', or a folder with a sub-folder of pictures per class")
    return _folder(root)


def _digits() -> ImageData:
    """1,797 handwritten digits, 8x8 grey pixels, that scikit-learn carries (UCI ML hand-written digits, test part)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0..16
    samples = Samples([Image.fromarray(image) for image in pixels], [int(label) for label in bunch.target])
    return ImageData(
        name="digits",
        given={"all": samples},
        class_names=tuple(str(digit) for digit in range(10)),
        mean=(0.5,),
        std=(0.5,),
        crop_pct=1.0,
    )


def _folder(root: Path) -> ImageData:
    folders: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        # A folder of classes, that is; a class may be called "train" as well.
        divided = [root / name for name in names if any(path.is_dir() for path in root.glob(f"{name}/*"))]
        if len(divided) > 1:
            raise InputError(f"{root} has both {divided[0].name} and {divided[1].name}; remove one")
        if divided:
            folders[split] = divided[0]
    if "train" not in folders and "val" not in folders:
        folders = {"all": root}
    found = {split: _read_classes(folder) for split, folder in folders.items()}
    first, (class_names, _) = next(iter(found.items()))
    for split, (names, _) in found.items():
        if names != class_names:
            odd = sorted(set(names) ^ set(class_names))
            raise InputError(f"{root}: {first} and {split} differ in their classes: {some(odd)}")
    return ImageData(
        name=str(root), given={split: samples for split, (_, samples) in found.items()}, class_names=class_names
    )


def _read_classes(folder: Path) -> tuple[tuple[str, ...], Samples]:
    class_names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."))
    if not class_names:
        raise InputError(f"{folder}: no sub-folders; there should be one per class, with that class's pictures")
    images: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = (path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files = sorted(path for path in found if path.is_file() and path.name[0] != ".")  # macOS leaves ._NAME.jpg
        if not files:
            raise InputError(f"{folder / name}: no pictures; remove the folder, or put pictures of that class in it")
        images += files
        labels += [label] * len(files)
    return class_names, Samples(images, labels)
