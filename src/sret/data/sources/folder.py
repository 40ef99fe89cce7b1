"""Loads a folder with a sub-folder of images per class, or with a folder of this kind per split."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sret.data.dataset import ImageData, Samples
from sret.data.image_files import find_image_files, is_hidden, warn_of_skipped
from sret.errors import InputError, first_few, printable

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {word: split for split, words in SPLIT_NAMES.items() for word in words}
# Words that may be added to the name of a split: training_set, seg_train, images-val.
_FILLERS = {"set", "seg", "split", "data", "images", "imgs", "img"}


def load_folder(root: Path) -> ImageData:
    """The data set in a folder. Raises `InputError` for classes without images, and splits with different classes."""
    skipped: Counter[str] = Counter()
    folders = split_folders(root) or {"all": root}
    found = {split: _read_classes(folder, skipped) for split, folder in folders.items()}
    first, (class_names, _) = next(iter(found.items()))
    for split, (names, _) in found.items():
        if names != class_names:
            odd = sorted(set(names) ^ set(class_names))
            raise InputError(f"{root}: {first} and {split} differ in their classes: {first_few(odd)}")
    warn_of_skipped(root, skipped)
    return ImageData.of(str(root), {split: samples for split, (_, samples) in found.items()}, class_names)


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of splits, each with folders of classes; {} if there are none, or only one for testing.

    Raises `InputError` for two folders of one split, and for a split whose images are not in folders of classes.
    """
    found: dict[str, Path] = {}
    loose: list[Path] = []
    for path in _sub_folders(root):
        split = split_of_folder(path.name)
        if split is None:
            continue
        inner = _sub_folders(path)
        if len(inner) == 1 and split_of_folder(inner[0].name) == split:  # seg_train/seg_train
            path, inner = inner[0], _sub_folders(inner[0])
        if not inner:
            loose.append(path)
        elif split in found:
            raise InputError(f"{root} has both {found[split].name} and {path.name}; remove one")
        else:
            found[split] = path
    for path in loose if found else ():
        if find_image_files(path):
            sorted_one = next(iter(found.values()))
            raise InputError(
                f"{path}: its images are not in sub-folders; sort them into a folder per class, as in {sorted_one}"
            )
    # A class may have the name of a split, so only folders of classes count, and one must be for training.
    found = {split: found[split] for split in SPLIT_NAMES if split in found}
    return found if found.keys() & {"train", "val"} else {}


def split_of_folder(name: str) -> str | None:
    """ "train", "val" or "test" for names such as Train, training_set, seg_train or dev; else None."""
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word]
    named = [word.removesuffix("set") if word.removesuffix("set") in SPLIT_OF else word for word in words]
    kept = [word for word in named if word not in _FILLERS]
    return SPLIT_OF.get(kept[0]) if len(kept) == 1 else None


class Files(Sequence[Path]):
    """Files in a folder. Their names are one array, not a million objects that every loading process would copy."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Path:  # type: ignore[override]  # no slices
        return self.root / os.fsdecode(self.names[i])


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def _read_classes(folder: Path, skipped: Counter[str]) -> tuple[tuple[str, ...], Samples]:
    classes = _sub_folders(folder)
    if not classes:
        raise InputError(
            f"{folder}: no sub-folders; there should be one per class, with that class's images (or .parquet files, "
            "or WebDataset .tar files)"
        )
    names: list[str] = []
    labels: list[int] = []
    for label, path in enumerate(classes):
        files = find_image_files(path, skipped)
        if not files:
            warn_of_skipped(path, skipped)
            raise InputError(f"{path}: no images; remove the folder, or put images of that class in it")
        names += [str(file.relative_to(folder)) for file in files]
        labels += [label] * len(files)
    samples = Samples(Files(folder, names), labels, ["/".join(Path(name).parts[-2:]) for name in names])
    return tuple(printable(path.name) for path in classes), samples
