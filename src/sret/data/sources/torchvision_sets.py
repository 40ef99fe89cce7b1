"""Loads the small data sets that torchvision downloads: CIFAR-10 and -100, MNIST, Fashion-MNIST."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sret.data.dataset import ImageData, Samples
from sret.errors import InputError
from sret.files import cache_dir
from sret.network import is_unreachable

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
        # torchvision passes on only the text of some errors
        if is_unreachable(error) or "urlopen error" in str(error):
            host = urlsplit(_address(kind)).hostname
            raise InputError(
                f"{name}: no connection to {host}; put {_by_hand(kind, root)}, or set SRET_DATA to the folder that "
                "has it"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name} in {root} cannot be read or downloaded ({reason}); remove damaged files; or "
            f"put {_by_hand(kind, root)}; or set SRET_DATA to the folder that has it"
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


def _address(kind: Any) -> str:
    """Where torchvision downloads from: the address of one file, or of a folder of files."""
    return str(kind.url if hasattr(kind, "tgz_md5") else kind.mirrors[0])


def _by_hand(kind: Any, root: Path) -> str:
    """The files that torchvision would download, and where to put them."""
    if hasattr(kind, "tgz_md5"):
        return f"{_address(kind)} into {root}"
    files = " ".join(file for file, _ in kind.resources)
    return f"{files} from {_address(kind)} into {root / kind.__name__ / 'raw'}"
