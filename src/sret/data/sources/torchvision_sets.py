"""Loads the small data sets that torchvision downloads: CIFAR-10 and -100, MNIST, Fashion-MNIST."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sret.data.dataset import ImageData, Samples
from sret.errors import InputError
from sret.files import cache_dir

TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST", "mnist": "MNIST"}


def load_torchvision(name: str) -> ImageData:
    """The data set of that name in TORCHVISION_SETS, with its splits "train" and "test".

    It is stored in the folder $SRET_DATA, or ~/.cache/sret/data, and downloaded if it is not there.

    Raises `InputError` if the download fails, or the files are damaged.
    """
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION_SETS[name])
    root = Path(os.environ.get("SRET_DATA") or cache_dir() / "data").expanduser()
    try:
        train, test = (kind(root, train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError, AssertionError, EOFError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name} in {root} cannot be read or downloaded ({reason}); remove damaged files; if "
            f"there is no network, put {_by_hand(kind, root)}; or set SRET_DATA to the folder that has it"
        ) from error
    class_names = [str(digit) for digit in range(10)] if name == "mnist" else train.classes  # not "0 - zero"
    given = {
        split: Samples(Pixels(np.asarray(part.data)), np.asarray(part.targets).tolist())
        for split, part in (("train", train), ("test", test))
    }
    return ImageData.of(name, given, class_names)


class Pixels(Sequence[Image.Image]):
    """An array of images, (N, H, W) grey or (N, H, W, 3) in colour, 0..255, as Pillow images, made on access."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Image.Image:  # type: ignore[override]  # no slices
        return Image.fromarray(self.pixels[i])


def _by_hand(kind: type, root: Path) -> str:
    """The files that torchvision would download, and where to put them."""
    if hasattr(kind, "tgz_md5"):
        return f"{kind.url} into {root}"  # type: ignore[attr-defined]
    files = " ".join(file for file, _ in kind.resources)  # type: ignore[attr-defined]
    return f"{files} from {kind.mirrors[0]} into {root / kind.__name__ / 'raw'}"  # type: ignore[attr-defined]
